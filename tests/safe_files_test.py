"""What a file can do to its reader: nothing. Each limit is met, and memory does not grow with the file."""

import gzip
import json
import os
import re
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import ase.db
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from crystal_cases import perovskite, quartz

from unimat_jax import structure_json, structure_streams, structure_tables, structure_texts
from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.structure_files import Failure, read_structures, scan

CIF = perovskite().to_cif()
POSCAR = perovskite().to_poscar()
EXTXYZ = perovskite().to_extxyz()
STRUCTURE = json.dumps(perovskite().to_pymatgen().as_dict())
CSV_ROW = '"' + CIF.replace('"', '""') + '"\n'


def reasons(path: Path) -> list[str]:
    """Of each structure, "kept" or the reason."""
    found = list(read_structures(path))
    for failure in found:
        if isinstance(failure, Failure):
            assert failure.message and "\n" not in failure.message and failure.uid
    return [f.reason if isinstance(f, Failure) else "kept" for f in found]


@pytest.fixture
def small_limits(monkeypatch):
    """A hundredth of a mebibyte where the real limit is 64: the crystals here take 2 kB."""
    for module in (structure_streams, structure_json, structure_tables, structure_texts):
        monkeypatch.setattr(module, "MAX_TEXT_BYTES", 10_000)


LONG = "x" * 20_000
LINES = "x\n" * 10_000
TOO_LARGE = [
    ("a.cif", CIF + "# " + LONG, ["too_large"]),
    ("a.cif", CIF + "# x\n" * 5_000, ["too_large"]),
    ("a.cif", CIF + "data_b\n" + "# x\n" * 5_000, ["kept", "too_large"]),
    ("a.poscar", POSCAR + LONG, ["too_large"]),
    ("a.extxyz", EXTXYZ + EXTXYZ.replace("pbc=", f"x={LONG} pbc=") + EXTXYZ, ["kept", "too_large"]),
    ("a.extxyz", EXTXYZ + "2000\n\n" + "H 0 0 0\n" * 2000 + EXTXYZ, ["kept", "too_large", "kept"]),
    ("a.json", f'[{STRUCTURE}, {{"x": "{LONG}"}}, {STRUCTURE}]', ["kept", "too_large"]),
    ("a.json", f'{{"entries": [{STRUCTURE}, {{"x": "{LONG}"}}]}}', ["kept", "too_large"]),
    ("a.json", f'{{"structure": [{", ".join([STRUCTURE] * 20)}]}}', ["too_large"]),
    ("a.json", f'{{"a": {json.dumps("x" * 6000)}, "b": {json.dumps("x" * 6000)}}}', ["too_large"]),
    ("a.jsonl", STRUCTURE + "\n" + STRUCTURE.replace("{", "{" + " " * 20_000, 1) + "\n", ["kept", "too_large"]),
    ("a.csv", f"material_id,cif\na,{CSV_ROW}b,{LONG}\n", ["kept", "too_large"]),
    ("a.csv", f'material_id,cif\na,{CSV_ROW}b,"{LINES}"\n', ["kept", "too_large"]),
]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(("name", "text", "expected"), TOO_LARGE)
def test_too_large_texts(name, text, expected, suffix, small_limits, tmp_path):
    if suffix and not name.endswith((".cif", ".extxyz", ".csv", ".json", ".jsonl")):
        return
    data = text.encode()
    (tmp_path / (name + suffix)).write_bytes(gzip.compress(data) if suffix else data)
    assert reasons(tmp_path) == expected


def test_too_large_cell_of_parquet(small_limits, tmp_path):
    columns = {"material_id": ["a", "b"], "cif": [CIF, LONG]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert reasons(tmp_path) == ["kept", "too_large"]


def test_too_large_arrays(monkeypatch, tmp_path):
    np.savez_compressed(tmp_path / "a.npz", n_atoms=np.zeros(100_000, np.int64))
    monkeypatch.setattr(structure_tables, "MAX_ARRAYS_BYTES", 2**19)
    with pytest.raises(UserError, match=r"larger than 0\.5 MiB"):
        scan(tmp_path / "a.npz")


def test_a_bomb_is_refused_in_little_memory(tmp_path):
    with gzip.open(tmp_path / "bomb.cif.gz", "wb", compresslevel=1) as file:
        for _ in range(500):
            file.write(b" " * 2**20)
    assert (tmp_path / "bomb.cif.gz").stat().st_size < 4e6
    code = (
        "import resource, sys; from unimat_jax.structure_files import read_structures\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"print([f.reason for f in read_structures({str(tmp_path)!r})])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["['too_large']", "True"]


COUNTS = [
    ("a.extxyz", "999999999999\n" + EXTXYZ.partition("\n")[2], "too_large"),
    ("a.extxyz", "9" * 500 + "\n" + EXTXYZ.partition("\n")[2], "unparsable"),
    ("a.extxyz", EXTXYZ.replace("5\n", "\u00b2\n", 1), "unparsable"),
    ("a.extxyz", EXTXYZ.replace("pos:R:3", "pos:R:999999999"), "unparsable"),
    ("a.extxyz", EXTXYZ.replace("pbc=", "a={" * 10_000 + " pbc="), "too_large"),
    ("a.poscar", POSCAR.replace("1 1 3", "1 1 999999999"), "too_large"),
    ("a.poscar", POSCAR.replace("1 1 3", "1 1 " + "9" * 5000), "too_large"),
    ("a.cif", CIF.replace("'x, y, z'", "'" + "1 " * 30_000 + "x, y, z'"), "unparsable"),
    ("a.cif", CIF + "  O  O9 " + "'" * 30_000, "unparsable"),
    ("a.cif", CIF.replace("'x, y, z'", "'x, y, z'\n" + "  2 '-x, y, z'\n" * 21_000), "too_large"),
    ("a.cif", re.sub(r"(_cell_length_a\s+)\S+", r"\g<1>99999", CIF), "cell_too_large"),
    ("a.cif", re.sub(r"(_cell_length_a\s+)\S+", r"\g<1>1e308", CIF), "cell_too_large"),
    ("a.poscar", POSCAR.replace("0.500000000000", "1e12", 1), "coordinates_too_large"),
    ("a.json", "[" * 200_000, "unreadable_file"),
    ("a.json", '{"sites": ' + "[" * 5_000 + "]" * 5_000 + ', "lattice": {}}', "unreadable_file"),
    ("a.json", f'{{"a": {"9" * 10_000}}}', "unreadable_file"),
    ("a.json", STRUCTURE + STRUCTURE, "unreadable_file"),
    ("a.json", STRUCTURE.replace("3.905", "9" * 400, 1), "unparsable"),
    ("a.csv", "id,cif\n1,a,b,c\n", "unparsable"),
    ("a.csv", "id,cif\n1\n", "unparsable"),
    ("a.csv", "id,cif\n", "empty_file"),
    ("a.poscar", " \n", "empty_file"),
    ("a.db", "no database at all " * 100, "unreadable_file"),
    ("a.parquet", "PAR1" + "x" * 500 + "PAR1", "unreadable_file"),
    ("a.npz", "PK\x03\x04" + "x" * 500, "unreadable_file"),
    ("a.json.bz2", "BZh9" + "x" * 500, "unreadable_file"),
    ("inside.zip", "PK\x03\x04", "not_a_structure_file"),
    ("weights.pkl", "\x80\x04", "not_a_structure_file"),
]


@pytest.mark.parametrize(("name", "text", "reason"), COUNTS)
def test_what_would_hang_or_crash_has_a_reason(name, text, reason, tmp_path):
    (tmp_path / name).write_text(text)
    (tmp_path / "z.cif").write_text(CIF)
    found = reasons(tmp_path)
    assert reason in found and found[-1] == "kept"


def test_a_thousand_blank_lines_take_no_time(tmp_path):
    """pymatgen alone needs minutes for this file."""
    (tmp_path / "a.cif").write_text(CIF.replace("loop_", "\n" * 200_000 + "loop_"))
    assert reasons(tmp_path) == ["kept"]


def _zip(path: Path, *names: str) -> bytearray:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, CIF)
    return bytearray(path.read_bytes())


def _patched(data: bytearray, signature: bytes, offset: int, new: bytes) -> bytes:
    at = data.index(signature) + offset
    data[at : at + len(new)] = new
    return bytes(data)


@pytest.mark.parametrize(
    ("offset", "new", "reason"),
    [
        (8, b"\x01\x00", "encrypted"),
        (10, b"\x63\x00", "unreadable_file"),  # a compression that does not exist
        (24, b"\x0a\x00\x00\x00", "unreadable_file"),  # 10 bytes are declared
        (24, b"\xff\xff\xff\x7f", "kept"),  # 2 GiB are declared, there are fewer
        (42, b"\xff\x00\x00\x00", "unreadable_file"),  # it begins elsewhere
        (38, b"\x00\x00\xff\xa1", "unsafe_path"),  # a symbolic link
    ],
)
def test_what_a_zips_directory_can_lie_about(offset, new, reason, tmp_path):
    data = _patched(_zip(tmp_path / "a.zip", "a.cif", "b.cif"), b"PK\x01\x02", offset, new)
    (tmp_path / "a.zip").write_bytes(data)
    assert reasons(tmp_path / "a.zip") == [reason, "kept"]


def test_names_in_a_zip(tmp_path):
    names = [
        "../up.cif",
        "/absolute.cif",
        "c:\\windows.cif",
        "a\\..\\b.cif",
        "\\\\host\\share.cif",
        "nested.zip",
        "ok.cif",
    ]
    _zip(tmp_path / "a.zip", *names)
    assert sorted(reasons(tmp_path / "a.zip")) == ["kept", "not_a_structure_file", *["unsafe_path"] * 5]
    (tmp_path / "empty.zip").write_bytes(b"PK\x05\x06" + b"\0" * 18)
    with pytest.raises(UserError, match="holds no files"):
        scan(tmp_path / "empty.zip")


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    (tmp_path / "good.cif").write_text(CIF)
    (tmp_path / "deep").mkdir()
    os.mkfifo(tmp_path / "pipe.cif")
    (tmp_path / "broken.cif").symlink_to(tmp_path / "nothing")
    (tmp_path / "circle.cif").symlink_to(tmp_path / "circle.cif")
    (tmp_path / "deep/up").symlink_to(tmp_path)
    (tmp_path / "memory.cif").symlink_to("/proc/self/mem")  # a regular file that no one can read from its start
    found = {f.uid: f.reason for f in read_structures(tmp_path) if isinstance(f, Failure)}
    left_out = dict.fromkeys(("pipe.cif", "broken.cif", "circle.cif", "deep/up"), "not_a_file")
    assert found == left_out | {"memory": "unreadable_file"}
    with pytest.raises(UserError, match="no regular file"):
        scan(tmp_path / "pipe.cif")
    with pytest.raises(UserError, match=r"memory\.cif cannot be read"):
        scan(tmp_path / "memory.cif")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(tmp_path):
    for name in ("closed.cif", "good.cif"):
        (tmp_path / name).write_text(CIF)
    (tmp_path / "closed.cif").chmod(0)
    (tmp_path / "folder").mkdir(mode=0)
    assert sorted(reasons(tmp_path)) == ["kept", "not_a_file", "unreadable_file"]


def test_names_can_be_written_everywhere(tmp_path):
    structure = json.loads(STRUCTURE)
    (tmp_path / "ids.json").write_text(
        json.dumps({"a\ud800b": structure, "two\nlines": structure, "n" * 9999: structure})
    )
    (Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.cif"))).write_text(CIF)
    uids = [raw.uid for raw in scan(tmp_path)]
    assert len(uids) == 4 and uids[1:3] == ["a?b", "two lines"] and len(uids[3]) == 500
    for uid in uids:
        assert uid.encode() and uid.isprintable()


def test_numbers_beyond_float32_are_text(tmp_path):
    values = {"a": 1e39, "b": float("inf"), "c": 10**400, "d": float("nan"), "e": 1.5, "f": "1_0", "g": "-Infinity"}
    (tmp_path / "a.json").write_text(json.dumps([{"structure": json.loads(STRUCTURE), **values}]))
    raw = next(scan(tmp_path / "a.json"))
    assert raw.properties == {"e": 1.5}
    assert raw.texts == {"a": "1e+39", "b": "inf", "c": "a huge number", "f": "1_0", "g": "-Infinity"}


def test_a_file_that_breaks_keeps_what_came_before(tmp_path):
    texts = {
        "a.extxyz": EXTXYZ * 3,
        "b.cif": CIF + CIF.replace("data_SrTiO3", "data_b"),
        "c.csv": f"cif\n{CSV_ROW * 3}",
    }
    for name, text in {**texts, "d.json": f"[{', '.join([STRUCTURE] * 300)}]"}.items():
        noise = np.random.default_rng(0).bytes(4000).hex()  # so that the cut is behind whole structures
        data = gzip.compress((text + "\n# " + noise).encode())
        (tmp_path / f"{name}.gz").write_bytes(data[:-3000])
    expected = ["kept"] * 3 + ["unreadable_file"] + ["kept"] + ["unreadable_file"]
    expected += ["kept"] * 3 + ["unreadable_file"]
    found = reasons(tmp_path)
    assert found[: len(expected)] == expected
    assert 250 < found[len(expected) :].count("kept") < 300 and found[-1] == "unreadable_file"  # all but a window


@pytest.mark.parametrize("window", [1, 2, 3, 7, 100])
def test_json_is_the_same_whatever_the_window(window, monkeypatch, tmp_path):
    a, b = ({**c.to_pymatgen().as_dict(), "@note": 'a "quoted" \\ \u00e9 \U0001f600'} for c in (perovskite(), quartz()))
    contents = [
        *([a, b], {"x": a, "y": b}, {"entries": [{"structure": a, "data": {"mat_id": "agm1", "gap": -1.25e-3}}]}),
        *({"columns": ["structure", "e"], "index": [5, 6], "data": [[a, 1], [b, float("nan")]]}, a, {"structure": a}),
        *({"data": [[a], [b]], "columns": ["structure"]}, {"x": {"structure": [a, b], "e": [1, 2]}}, [], {}, [1, 2]),
    ]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.json").write_text(json.dumps(content, indent=number % 3, ensure_ascii=number % 2 == 0))
    expected = list(scan(tmp_path))
    assert sum(raw.format == "pymatgen" for raw in expected) == 13 and len(expected) == 16
    monkeypatch.setattr(structure_json, "WINDOW", window)
    assert repr(list(scan(tmp_path))) == repr(expected)


def test_many_entries_without_a_structure_are_counted_each(monkeypatch, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"x": 1}] * 30 + [json.loads(STRUCTURE)]))
    (tmp_path / "b.json").write_text(json.dumps({str(i): {"x": 1} for i in range(30)} | {"c": json.loads(STRUCTURE)}))
    assert reasons(tmp_path) == (["no_structure"] * 30 + ["kept"]) * 2
    for name in ("a.json", "b.json"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text[: text.index("@module")])
    assert reasons(tmp_path) == ["unreadable_file"] * 2  # no structure in it: one failure, of the file
    monkeypatch.setattr(structure_json, "MAX_UNDECIDED", 10)
    assert reasons(tmp_path) == (["no_structure"] * 30 + ["unreadable_file"]) * 2


@pytest.mark.parametrize("line", ["no JSON", "[]", "7", '{"uid": "a"}'])
def test_a_broken_manifest_does_not_end_the_run(line, tmp_path):
    (tmp_path / "generated_crystals.extxyz").write_text(EXTXYZ)
    failure = '{"uid": "g1", "status": "no_atoms", "message": "no slot"}\n'
    (tmp_path / "manifest.jsonl").write_text(failure + line + "\n")
    assert reasons(tmp_path) == ["kept", "no_atoms", "unreadable_file"]
    (tmp_path / "generated_crystals.extxyz").write_text("")
    (tmp_path / "manifest.jsonl").write_text(failure)
    assert reasons(tmp_path) == ["no_atoms"]


def _peak(path: Path) -> tuple[int, int]:
    tracemalloc.start()
    number = sum(1 for _ in scan(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return number, peak


def test_memory_does_not_grow_with_the_file(tmp_path):
    written = {}
    for number in (500, 2000):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "a.json").write_text('{"entries": [' + ", ".join([STRUCTURE] * number) + "]}")
        (folder / "a.jsonl").write_text((STRUCTURE + "\n") * number)
        (folder / "a.csv").write_text("cif\n" + CSV_ROW * number)
        (folder / "a.cif").write_text(CIF * number)
        (folder / "a.extxyz").write_text(EXTXYZ * number)
        pyarrow.parquet.write_table(pyarrow.table({"cif": [CIF] * number}), folder / "a.parquet", row_group_size=100)
        with ase.db.connect(folder / "a.db") as database:
            for _ in range(number):
                database.write(perovskite().to_ase())
        written[number] = {file.name: _peak(file) for file in sorted(folder.iterdir())}
    for name, (count, peak) in written[2000].items():
        assert count == 2000, name
        assert peak < 1.2 * written[500][name][1] + 100_000, (name, written)


def test_an_ase_database_is_read_in_pages(monkeypatch, tmp_path):
    with ase.db.connect(tmp_path / "a.db") as database:
        for i in range(7):
            database.write(perovskite().to_ase(), uid=f"x{i}", gap=float(i))
        del database[3]
    monkeypatch.setattr(structure_tables, "ROWS_AT_ONCE", 2)
    found = [c for c in read_structures(tmp_path / "a.db") if isinstance(c, Crystal)]
    assert [c.uid for c in found] == ["x0", "x1", "x3", "x4", "x5", "x6"]
    assert [c.properties["gap"] for c in found] == [0, 1, 3, 4, 5, 6]
