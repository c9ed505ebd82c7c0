"""A build that is stopped anywhere goes on, and ends with the bytes of one in peace, for any number of workers."""

import gzip
import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from benchmarks import million
from benchmarks.build_kills import command, contents, finish, kill, write_source
from data_prep import atomic
from data_prep.choosing import halves_of_hash
from data_prep.parse_stage import expected_number
from data_prep.prepare import main, prepare
from data_prep.shards import SPLITS
from data_prep.statistics import Statistics
from unimat_jax.data import RecordSource
from unimat_jax.errors import UserError

OPTIONS = {"part_size": 40, "num_shards": 3, "quiet": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """300 real crystals: 6 ids stand there twice, 3 lattices are none."""
    return write_source(tmp_path_factory.mktemp("source") / "crystals", 300)


@pytest.fixture(scope="module")
def peace(source, tmp_path_factory) -> Path:
    return prepare("crystals", source, tmp_path_factory.mktemp("peace"), num_workers=0, **OPTIONS)


def test_every_structure_is_kept_once_or_named(source, peace):
    report = json.loads((peace / "data_report.json").read_text())
    dropped = [json.loads(line) for line in (peace / "dropped.jsonl").read_text().splitlines()]
    assert (report["read"], report["kept"]) == (300, 291)
    assert Counter(d["reason"] for d in dropped) == report["dropped"] == {"duplicate_id": 6, "not_finite": 3}
    assert [d["origin"] for d in dropped] == sorted((d["origin"] for d in dropped), key=lambda o: int(o.split(":")[1]))
    assert {len(items) for items in report["dropped_structures"].values()} == {5, 3}
    twice = [d for d in dropped if d["reason"] == "duplicate_id"]
    assert [d["origin"] for d in twice] == [f"0.npz:{25 + 50 * i}" for i in range(6)]
    assert [d["message"].split()[4] for d in twice] == [f"0.npz:{i}" for i in range(6)]
    sources = [RecordSource(peace, split) for split in SPLITS]
    ids = [record["material_id"] for split in sources for record in split.read(range(len(split)))]
    assert len(ids) == len(set(ids)) == 291 and not {d["id"] for d in dropped if d["reason"] == "not_finite"} & set(ids)


def test_order_and_shards_are_those_that_tfds_would_write(peace, tmp_path):
    class Peer(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "peer"

        def _info(self):
            features = tfds.features.FeaturesDict({"id": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in SPLITS}

        def _generate_examples(self, split):
            source = RecordSource(peace, split)
            for record in reversed(source.read(range(len(source)))):
                yield record["material_id"], {"id": record["material_id"]}

    builder = Peer(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare(
        download_dir=str(tmp_path / "none"), download_config=tfds.download.DownloadConfig(num_shards=3)
    )
    ours = tfds.builder_from_directory(str(peace))
    for split in SPLITS:
        theirs = [r["id"].decode() for r in builder.as_data_source(split)]
        assert theirs == [r["material_id"].decode() for r in ours.as_data_source(split)]
        assert builder.info.splits[split].shard_lengths == ours.info.splits[split].shard_lengths


def test_workers_and_the_size_of_parts_change_no_record(source, peace, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.shards.RECORDS_AT_ONCE", 10)
    two = prepare("crystals", source, tmp_path / "two", num_workers=2, **OPTIONS)
    assert contents(two) == contents(peace)
    whole = prepare("crystals", source, tmp_path / "whole", num_workers=0, **{**OPTIONS, "part_size": 1000})
    found, expected = contents(whole), contents(peace)
    statistics = [json.loads(c.pop("statistics.json")) for c in (found, expected)]
    metadata = [json.loads(c.pop("metadata.json"))["properties"] for c in (found, expected)]
    assert found == expected  # the statistics may differ in the last digit
    for one, other in (statistics, metadata):
        np.testing.assert_allclose(numbers(one), numbers(other), rtol=1e-12, atol=1e-14)


def numbers(tree) -> list[float]:
    if isinstance(tree, dict | list):
        return [n for value in (tree.values() if isinstance(tree, dict) else tree) for n in numbers(value)]
    return [tree] if isinstance(tree, int | float) else []


def test_stopped_at_every_file_that_it_writes(source, peace, tmp_path, monkeypatch):
    real = Path.replace
    left = [0]

    def replace(self, target):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    stops = 0
    while True:
        left[0] = 5
        try:
            directory = prepare("crystals", source, tmp_path, num_workers=0, **OPTIONS)
            break
        except KeyboardInterrupt:
            stops += 1
            assert not (tmp_path / "crystals/1.0.0").exists()
    assert stops > 8 and contents(directory) == contents(peace)
    assert [p.name for p in directory.parent.iterdir()] == ["1.0.0"]


def test_killed(source, peace, tmp_path):
    one = command(source, tmp_path, 40)
    for sent, after in ((signal.SIGKILL, 1.2), (signal.SIGTERM, 1.6)):
        kill(one, sent, after)
    assert contents(finish(one)) == contents(peace)


def test_sigterm_says_how_to_go_on(source, tmp_path):
    slow = command(source, tmp_path, 1)
    running = subprocess.Popen(slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until_there(tmp_path / "crystals/1.0.0.parsing/chosen/000003.ids.npy", running)
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 143 and said.strip().endswith("stopped: the same command goes on from here")
    assert "Traceback" not in said


def until_there(path: Path, running: subprocess.Popen) -> None:
    while not path.exists():
        assert running.poll() is None


@pytest.mark.parametrize("limit", [20_000, 60_000])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(limit, source, peace, tmp_path):
    """A limit on the size of files stands for the disk: writing fails in the middle of a part, then of a shard."""
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from unimat_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""
    flags = [*command(source, tmp_path, 40)[3:], "--num_workers=0"]
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "1.0.0.parsing cannot be written (" in done.stderr and "make room" in done.stderr
    assert main(flags[1:]) == 0
    assert contents(tmp_path / "crystals/1.0.0") == contents(peace)


def test_other_options_use_what_is_parsed_but_not_what_is_chosen(source, peace, tmp_path, monkeypatch, capsys):
    from data_prep import parse_pool

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.build.write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare("crystals", source, tmp_path, num_workers=0, **OPTIONS)
    monkeypatch.setattr(parse_pool, "prepare_one", stop)  # nothing is parsed again
    smaller = prepare("crystals", source, tmp_path, num_workers=0, max_atoms=6, **OPTIONS)
    report = json.loads((smaller / "data_report.json").read_text())
    assert report["kept"] < 291 and report["dropped"]["too_many_atoms"] > 0 and report["read"] == 300


def test_damaged_files_cost_themselves_only(source, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(source / "0.npz", folder / "a.npz")
    with np.load(source / "0.npz") as file:
        np.savez_compressed(folder / "b.npz", **{name: file[name] for name in file.files})
    content = bytearray((folder / "b.npz").read_bytes())
    content[100:200] = bytes(100)
    (folder / "b.npz").write_bytes(content)
    (folder / "c.parquet").write_bytes(b"PAR1 and no more")
    table = gzip.compress(b"material_id,cif\n" + b"1,x\n" * 1000)
    (folder / "d.csv.gz").write_bytes(table[:20] + bytes(10) + table[30:])
    (folder / "e.db").write_bytes(b"no database" * 100)
    shutil.copy(source / "0.npz", folder / "f.npz")
    directory = prepare("crystals", folder, tmp_path, num_workers=0, **OPTIONS)
    lines = [json.loads(line) for line in (directory / "dropped.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines if line["reason"] == "unreadable_file"] == ["b", "c", "d", "e"]
    report = json.loads((directory / "data_report.json").read_text())
    assert (report["read"], report["kept"]) == (604, 291) and report["dropped"]["duplicate_id"] == 6 + 297


def test_the_number_of_structures_that_files_tell(source, tmp_path):
    (tmp_path / "a.cif").write_text("")
    assert expected_number({"": source}) == 300 and expected_number({"train": source, "test": tmp_path}) == 301
    (tmp_path / "b.csv").write_text("")
    assert expected_number({"": tmp_path}) is None


def test_a_damaged_part_is_an_error(source, tmp_path):
    from data_prep.spool import Spool

    spool = Spool(tmp_path, part_size=2)
    outcomes = list(prepared(source, 5))
    assert list(spool.append(outcomes, 0)) == outcomes and (spool.size, spool.num_parts) == (5, 3)
    assert [len(list(spool.read(part))) for part in range(3)] == [2, 2, 1]
    spool.part(1).write_bytes(spool.part(1).read_bytes()[:-1])
    with pytest.raises(UserError, match="holds 1 structures, not 2: delete"):
        list(spool.read(1))


def prepared(source: Path, number: int):
    from data_prep.parse_pool import CellOptions, prepare_one
    from unimat_jax.structure_files import scan

    for _, raw in zip(range(number), scan(source), strict=False):
        yield prepare_one(("", raw), CellOptions()).to_bytes()


def test_statistics_of_parts_are_those_of_the_whole(source):
    import io

    from data_prep.outcome import read_outcome

    outcomes = [read_outcome(io.BytesIO(b)) for b in prepared(source, 100)]
    records = [(o.record, o.properties) for o in outcomes if o and o.record]
    whole, merged = Statistics(), Statistics()
    for part in (records[:1], records[1:40], [], records[40:]):
        one = Statistics()
        for record, properties in part:
            one.add(record, properties)
            whole.add(record, properties)
        merged.merge(Statistics.of_state(json.loads(json.dumps(one.state()))))
    about = {"e_above_hull": {}}
    found, expected = merged.to_json(about), whole.to_json(about)
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=1e-12, atol=1e-14)
    assert found["elements"] == expected["elements"] and found["properties"]["e_above_hull"]["count"] == len(records)


def test_a_file_is_whole_or_not_there(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic.written_whole(tmp_path / "a") as beside:
        beside.write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    atomic.write_json(tmp_path / "a", {"b": 1})
    assert json.loads((tmp_path / "a").read_text()) == {"b": 1} and len(list(tmp_path.iterdir())) == 1


def test_hashes_are_those_of_tfds():
    from tensorflow_datasets.core.hashing import Hasher

    for key in ("mp-1", "a\\b", "é"):
        high, low = halves_of_hash(key, salt="train")
        assert (high << 64) + low == Hasher("train").hash_key(key)


def test_the_millions_crystals_are_perturbed_real_ones(tmp_path):
    import unimat_jax.starter
    from unimat_jax.structure_files import read_structures

    starter = Path(str(unimat_jax.starter.__file__)).parent / "starter.npz"
    million.perturb(starter, tmp_path / "source", 200)
    found = list(read_structures(tmp_path / "source"))
    assert len({crystal.uid for crystal in found}) == 200
    formulas = {crystal.formula for crystal in read_structures(starter)}
    assert {crystal.formula for crystal in found} <= formulas
    with pytest.raises(UserError, match=r"--source=.*none.npz does not exist"):
        million.perturb(tmp_path / "none.npz", tmp_path / "b", 10)
