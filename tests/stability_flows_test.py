"""The flow for jobflow gives the table of `unimat stability`, and a job that fails costs its own crystals alone."""

import json

import pytest
from stability_calculators import EMT_PATH
from stability_relaxation_test import metal
from stability_test import read, run, write

from unimat_jax.errors import UserError
from unimat_jax.stability import flows
from unimat_jax.stability.engines import energy_model
from unimat_jax.stability.judgement import References
from unimat_jax.stability.relaxation import Protocol

jobflow = pytest.importorskip("jobflow", reason="not installed: pip install 'unimat-jax[workflow]'")
maggma = pytest.importorskip("maggma.stores", reason="comes with jobflow")
CLOCKS = {"seconds", "cpu_seconds"}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alloys = [metal(["Cu", "Au", "Au", "Cu"], a=3.8, uid="l10"), metal(["Cu"], a=3.5, uid="copper"),
              metal(["Au"], a=4.0, uid="gold"), metal(["Fe"], a=3.6, uid="iron"),
              metal(["Ag"], uid="silver")]  # fmt: skip
    text = "".join(crystal.to_extxyz() for crystal in alloys)
    (tmp_path / "raw.extxyz").write_text(text + text.splitlines(keepends=True)[0] + "uid=broken\nX 0 0 0\n")
    write(tmp_path / "hull.extxyz", [metal(["Cu"], uid="Cu"), metal(["Au"], a=4.1, uid="Au"), metal(["Pd"], uid="Pd")])
    return tmp_path


def flow_of(**changes):
    settings = {"references": References(hull_structures=["hull.extxyz"]), "chunk_size": 2, "num_workers": 0}
    settings |= {"protocol": Protocol(fmax=0.02), "output_dir": "flow"}
    return flows.stability_flow(["raw.extxyz"], energy_model(EMT_PATH, scale="own"), **settings | changes)


def run_locally(flow, folder):
    # Through JSON, as an engine on a cluster would send it.
    flow = jobflow.Flow.from_dict(json.loads(json.dumps(flow.as_dict(), default=str)))
    store = jobflow.JobStore(maggma.MemoryStore())
    jobflow.run_locally(flow, store=store, create_folders=True, root_dir=folder, log=False)
    return store.get_output(flow.job_uuids[-1])


def test_a_flow_gives_the_table_of_the_command(files):
    flow = flow_of()
    assert [job.name for job in flow.jobs] == ["relax 1", "relax 3", "relax 5", "relax hull 1", "stability"]
    result = run_locally(flow, files / "jobs")
    flags = ["--structures=raw.extxyz", "--hull_structures=hull.extxyz", "--fmax=0.02", "--num_workers=0"]
    assert run(*flags, f"--energy_model={EMT_PATH}", "--energy_scale=own", "--output_dir=command") == 0
    (ours, about), (theirs, expected) = read(files / "flow"), read(files / "command")
    assert list(ours) == list(theirs) and len(ours) == 6
    for uid, row in theirs.items():
        assert {k: v for k, v in ours[uid].items() if k not in CLOCKS} == {
            k: v for k, v in row.items() if k not in CLOCKS}, uid  # fmt: skip
    same = (
        "protocol",
        "weights",
        "hull",
        "reference_hash",
        "reference_left_out",
        "metrics",
        "status",
        "structures_hash",
    )
    assert {name: about[name] for name in same} == {name: expected[name] for name in same}
    assert result["status"] == about["status"] and result["output_dir"] == str(files / "flow")
    assert run(*flags, f"--energy_model={EMT_PATH}", "--energy_scale=own", "--against=flow", "--output_dir=both") == 0


def test_a_job_that_fails_costs_its_own_crystals(files):
    flow = flow_of()
    kwargs = flow.jobs[1].function_kwargs  # of gold and iron
    kwargs["model"] = {**kwargs["model"], "path": "no.such.module:Thing"}
    run_locally(flow, files / "jobs")
    rows, about = read(files / "flow")
    assert {uid: row["status"] for uid, row in rows.items()} == {
        "l10": "converged", "copper": "converged", "gold": "failed(job_failed)", "iron": "failed(job_failed)",
        "silver": "converged", "broken": "failed(unparsable)",
    }  # fmt: skip
    assert rows["l10"]["decomposition_energy"] < 0 and sum(about["status"].values()) == 6


def test_what_is_wrong_is_said_before_anything_is_relaxed(files):
    with pytest.raises(UserError, match=r"nowhere\.json does not exist"):
        flow_of(references=References(hull=["nowhere.json"]))
    with pytest.raises(UserError, match="chunk_size = 0"):
        flow_of(chunk_size=0)
