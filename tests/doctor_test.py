"""`unimat doctor`: no problem where there is none, and each problem is found, named and comes with what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny_run import environment

from unimat_jax.doctor import Finding, command, devices, machine, probe

SCRIPT = Path(sys.executable).parent / "unimat"


def doctor(*arguments, before: str = "", **changes: str) -> tuple[int, list[Finding]]:
    """(exit code, findings) of the installed script. before: of PYTHONPATH."""
    env = environment(optimised=True) | changes
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [before, env.get("PYTHONPATH")]))
    run = [str(SCRIPT), "doctor", "--json", *map(str, arguments)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, env=env, check=False)
    assert done.returncode in (0, 1) and done.stderr == "", done.stderr
    told = json.loads(done.stdout)
    findings = [Finding(**row) for row in told["findings"]]
    counted = {status: sum(f.status == status for f in findings) for status in ("ok", "warning", "problem")}
    assert told["counts"] == counted and (done.returncode == 1) == (counted["problem"] > 0)
    return done.returncode, findings


def problems(findings) -> list[Finding]:
    return [f for f in findings if f.status == "problem"]


def only(findings, check: str) -> Finding:
    (found,) = [f for f in findings if f.check == check]
    return found


def test_no_problem_where_there_is_none(tiny_data, tmp_path):
    code, findings = doctor(f"--data_dir={tiny_data}", f"--workdir={tmp_path / 'not' / 'yet'}")
    assert (code, problems(findings)) == (0, [])
    assert only(findings, "jax").found.startswith(f"jax {jax.__version__}, jaxlib {jax.lib.__version__}")
    assert f"jax {jax.__version__}" in only(findings, "packages").found
    assert "1 x cpu" in only(findings, "devices").found
    assert "right on cpu" in only(findings, "jit").found
    assert f"{os.cpu_count()} cores" in only(findings, "cores").found
    assert "data sets starter; writes and renames work" in only(findings, "data_dir").found
    assert "not/yet can be made" in only(findings, "workdir").found
    assert only(findings, "cache").found.startswith(os.environ["JAX_COMPILATION_CACHE_DIR"])
    assert only(findings, "extra test").found == "installed"
    assert list(tmp_path.iterdir()) == [] and not list(tiny_data.glob(".*"))


def test_as_text(monkeypatch, capsys):
    told = [Finding("ok", "a", "fine"), Finding("problem", "b", "bad", "do this")]
    monkeypatch.setattr(command, "examine", lambda *_: told)
    assert command.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "ok a fine", "problem b bad", "-> do this", "1 ok, 0 warning, 1 problem",
    ]  # fmt: skip
    monkeypatch.setattr(command, "examine", lambda *_: told[:1])
    assert command.main([]) == 0


# jax.


def stub(folder: Path, source: str) -> str:
    (folder / "jax").mkdir()
    (folder / "jax" / "__init__.py").write_text(source)
    return str(folder)


def test_a_jax_that_cannot_be_imported(tmp_path):
    code, findings = doctor(before=stub(tmp_path, "raise ImportError('libfoo.so.3: cannot open')"))
    (found,) = problems(findings)
    assert code == 1 and found.check == "jax"
    assert "import failed: ImportError: libfoo.so.3: cannot open" in found.found and "pip install" in found.fix
    assert only(findings, "cores").status == "ok"  # all else is still looked at


def test_a_jax_that_hangs_or_dies(tmp_path, monkeypatch):
    (tmp_path / "hangs").mkdir()
    monkeypatch.setenv("PYTHONPATH", stub(tmp_path / "hangs", "import time; time.sleep(600)"), prepend=os.pathsep)
    (found,) = devices.jax(devices.Probe(1.5), 1.5)
    assert found.status == "problem" and found.found == "import did not end in 1.5 s" and "--time_limit" in found.fix
    (tmp_path / "dies").mkdir()
    dies = "import os, sys; print('bad luck', file=sys.stderr, flush=True); os.abort()"
    monkeypatch.setenv("PYTHONPATH", stub(tmp_path / "dies", dies), prepend=os.pathsep)
    (found,) = devices.jax(devices.Probe(60), 60)
    assert found.status == "problem" and found.found == "import ended the process with exit code -6: bad luck"


def test_a_driver_that_dies(tmp_path, monkeypatch):
    """By a plugin of jax, which is started with the devices."""
    plugin = tmp_path / "jax_plugins" / "bad"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text("import os\n\n\ndef initialize():\n    os.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    fine, broken = devices.jax(devices.Probe(60), 60)
    assert fine.status == "ok" and "imported in" in fine.found
    assert broken.status == "problem" and broken.found.startswith("devices ended the process with exit code -6")


def test_no_compilation_cache(monkeypatch):
    nowhere = found_by_probe(**{"compilation cache": {"directory": None}})
    assert only(devices.cache(nowhere), "cache").status == "warning"
    assert not list(devices.cache(found_by_probe(**{"compilation cache": {"directory": "/a"}})))
    assert not list(devices.cache(found_by_probe()))


def test_wrong_numbers_are_a_problem(monkeypatch):
    """As jax 0.10.2 gives them."""
    right = probe.jit()
    assert right == {"wrong": [], "checked": ["cpu"]}
    jit = jax.jit

    def broken(function):
        compiled = jit(function)
        return lambda *arrays: compiled(*arrays).at[-1].multiply(0.9921875)

    monkeypatch.setattr(jax, "jit", broken)
    wrong = probe.jit()
    assert wrong["wrong"][0] == (
        "cpu: 1 of 32,769 squared lengths are wrong under jit, as 1,065,353,216 for 1,073,741,824"
    )
    assert len(wrong["wrong"]) == 2 and "matrix product" in wrong["wrong"][1]
    (*_, last) = devices.jax(found_by_probe(jit=wrong), 60)
    assert last.status == "problem" and "wrong results: cpu: " in last.found and "pip install" in last.fix


def found_by_probe(noise=(), **stages) -> devices.Probe:
    """A probe that ended well with this."""
    result = devices.Probe.__new__(devices.Probe)
    result.found = {name: {"stage": name, "seconds": 0.1, **found} for name, found in stages.items()}
    result.noise, result.stopped, result.exit_code = list(noise), None, 0
    return result


CPU = {"devices": [{"platform": "cpu", "kind": "cpu", "bytes": None}]}


def test_a_gpu_that_jax_does_not_use(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_tpu", lambda: "")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 5 MiB, 81559 MiB, 570.1'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    found = only(devices.accelerators(found_by_probe(devices=CPU)), "gpu")
    assert found.status == "warning" and found.fix == "JAX_PLATFORMS=cpu leaves it out: unset it"
    assert found.found == "NVIDIA H100 80GB HBM3 (5 MiB of 81559 MiB used), driver 570.1, which jax does not use"
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(devices.packages, "extra_installed", lambda extra: False)
    assert (
        only(devices.accelerators(found_by_probe(devices=CPU)), "gpu").fix == "in the clone: pip install -e '.[cuda]'"
    )
    monkeypatch.setattr(devices.packages, "extra_installed", lambda extra: True)
    noise = ["Unable to initialize backend 'cuda': driver too old"]
    assert noise[0] in only(devices.accelerators(found_by_probe(noise, devices=CPU)), "gpu").fix
    gpu = {"devices": [{"platform": "gpu", "kind": "NVIDIA H100 80GB HBM3", "bytes": 64 * 2**30}]}
    assert only(devices.accelerators(found_by_probe(devices=gpu)), "gpu").status == "ok"
    assert "1 x NVIDIA H100 80GB HBM3 (gpu, 64.0 GiB for jax)" in only(devices.jax(gpu_probe(gpu), 60), "devices").found


def gpu_probe(found) -> devices.Probe:
    return found_by_probe(devices=found)


# Packages.


def distribution(folder: Path, name: str, version: str, *lines: str) -> str:
    """Metadata of a package that is not there."""
    made = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    made.mkdir(parents=True)
    (made / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines]))
    return str(folder)


@pytest.mark.parametrize(
    ("name", "version", "said", "fix"),
    [
        ("jax", "0.10.2", "wrong numbers from jit on CPU, jax-ml/jax#39103", "pip install 'jax"),
        ("jax", "0.11.1", "this version breaks flax", "pip install 'jax"),
        ("flax", "0.1.0", "flax 0.1.0, but >=0.12.8 is asked for", "pip install 'flax>=0.12.8'"),
    ],
)
def test_a_version_out_of_range(tmp_path, monkeypatch, name, version, said, fix):
    monkeypatch.syspath_prepend(distribution(tmp_path, name, version))
    (found,) = command.packages.required()
    assert found.status == "problem" and said in found.found and found.fix.startswith(fix)


def test_a_version_out_of_range_by_the_script(tmp_path):
    code, findings = doctor(before=distribution(tmp_path, "jax", "0.10.2"))
    assert code == 1 and [f.check for f in problems(findings)] == ["packages"]


def test_what_is_not_installed_and_extras_that_are_new(tmp_path, monkeypatch):
    lines = ["Requires-Python: >=99", "Requires-Dist: no-such-package>=2", "Requires-Dist: numpy"]
    lines += ["Provides-Extra: new", "Requires-Dist: no-such-engine>=1; extra == 'new'"]
    lines += ["Provides-Extra: old", "Requires-Dist: numpy>=999; extra == 'old'"]
    lines += ["Provides-Extra: both", "Requires-Dist: unimat-jax[new]; extra == 'both'"]
    lines += ["Provides-Extra: partly", "Requires-Dist: numpy>=999; extra == 'partly'"]
    lines += ["Requires-Dist: no-such-engine>=1; extra == 'partly'"]
    lines += ["Provides-Extra: there", "Requires-Dist: numpy; extra == 'there'"]
    monkeypatch.syspath_prepend(distribution(tmp_path, "unimat-jax", "0.0.1", *lines))
    found = list(command.packages.required())
    assert found == [
        Finding("problem", "packages", "no-such-package is not installed", "pip install 'no-such-package>=2'")
    ]
    new, old, both, partly, there = command.packages.extras()
    assert partly.status == "ok" and partly.found == "not installed (no no-such-engine)"
    assert (new.status, new.found) == ("ok", "not installed (no no-such-engine)") and "'.[new]'" in new.fix
    assert old.status == "warning" and ">=999 is asked for" in old.found
    assert both.found == "not installed (no no-such-engine)" and there.found == "installed"
    python, package = command.packages.python()
    assert python.status == "problem" and "Python >=99" in python.fix
    assert package.status == "warning" and "installed is 0.0.1" in package.found


# The machine.


def folder(path, **options) -> Finding:
    (found,) = machine.folder("data_dir", str(path), **options)
    return found


def test_folders(tmp_path, monkeypatch):
    assert folder(tmp_path).status == "ok" and list(tmp_path.iterdir()) == []
    assert folder(tmp_path / "a" / "b").status == "ok"
    assert "no data set in it" in folder(tmp_path, for_data=True).found
    missing = folder(tmp_path / "a", for_data=True)
    assert missing.status == "problem" and "does not exist" in missing.found and "unimat prepare" in missing.fix
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        assert folder(path).status == "problem" and "is a file" in folder(path).found
    assert folder("gs://bucket/run").status == "problem"
    monkeypatch.setattr(machine, "MIN_DISK", 2**70)
    assert folder(tmp_path).status == "warning" and "little space" in folder(tmp_path).found


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that even root cannot write to")
def test_a_folder_that_cannot_be_written():
    code, findings = doctor("--data_dir=/proc")
    (found,) = problems(findings)
    assert code == 1 and found.check == "data_dir" and "not writable" in found.found and found.fix


def test_data_that_can_only_be_read_are_enough_to_train(tiny_data, tmp_path, monkeypatch):
    def refuse(place):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(machine, "_write_and_rename", refuse)
    found = folder(tiny_data, for_data=True)
    assert found.status == "warning" and "Read-only file system" in found.found and "enough to train" in found.fix
    assert folder(tmp_path, for_data=True).status == "problem"


def test_an_object_store_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_file_system", lambda place: ("fuse.gcsfuse", "bucket"))
    assert folder(tmp_path).status == "warning"


def test_memory_and_cores_of_a_control_group(monkeypatch):
    files = {"memory.max": ["max", str(2**30)], "cpu.max": ["max 100000", "150000 100000"]}
    monkeypatch.setattr(machine, "_cgroup", lambda name, *_: files[name])
    (found,) = machine.memory()
    assert found.status == "warning" and "limited to 1.0 GiB" in found.found
    (found,) = machine.cores()
    assert "a share of 1.5" in found.found


def test_few_open_files():
    code = "from unimat_jax.doctor import machine; print(next(machine.open_files()))"
    run = ["bash", "-c", f"ulimit -n 200; '{sys.executable}' -c '{code}'"]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert "status='warning'" in said and "200 at once" in said and "ulimit -n 4096" in said


@pytest.mark.parametrize(
    ("variables", "status", "said"),
    [
        ({}, "ok", "one: nothing"),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "n[1-8]"}, "ok", "SLURM: process 3 of 8"),
        ({"SLURM_NTASKS": "8"}, "warning", "process ? of 8"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "ok", "Open MPI: process 1 of 2"),
        (
            {"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "n", "OMPI_COMM_WORLD_SIZE": "2"},
            "warning",
            "Open MPI",
        ),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}, "ok", "TPU: host 2 of 4"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "3"}, "ok", "TPU: host ? of 2 in each of 3 slices"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1234"}, "ok", "JAX_COORDINATOR_ADDRESS=a:1234"),
    ],
)
def test_processes_of_a_cluster(monkeypatch, variables, status, said):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (found,) = machine.processes()
    assert found.status == status and said in found.found


def test_a_check_that_fails_itself_is_a_finding(monkeypatch):
    def broken():
        yield Finding("ok", "cores", "some")
        raise KeyError("flags")

    monkeypatch.setattr(machine, "cores", broken)
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)  # as where it is not installed
    monkeypatch.setattr(devices, "Probe", lambda time_limit: found_by_probe(devices=CPU))
    findings = command.examine(None, None, 1)
    assert [f.status for f in findings if f.check == "cores"] == ["ok", "warning"]
    assert any(f.check == "memory" for f in findings)
    assert only(findings, "packages") == Finding(
        "problem", "packages", "packaging.requirements is not installed", "in the clone: pip install -e ."
    )
