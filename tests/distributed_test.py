"""Jobs of real processes: trained together, killed, told to stop, and launched by what SLURM and Open MPI set."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from train_test import rows

from benchmarks.kills import arrays
from benchmarks.scale_out import free_port
from unimat_jax import Generator, distributed
from unimat_jax.checkpoint import available_steps
from unimat_jax.distributed import PEER_LOST
from unimat_jax.errors import UserError

NAMES = ("train/loss", "train/grad_norm", "eval/loss")


class Job:
    """Processes of one job with two devices each; everything they print goes to a file a process."""

    def __init__(self, folder: Path, *arguments: object, processes=(0, 1), module: str = "unimat_jax.main"):
        self.files = {p: folder / f"process_{p}_{time.monotonic_ns()}.log" for p in processes}
        port = free_port()
        self.children = {
            p: subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments), f"--coordinator_address=localhost:{port}",
                 "--num_processes=2", f"--process_id={p}", "--rendezvous_timeout=60"],
                stdout=self.files[p].open("wb"), stderr=subprocess.STDOUT, env=tiny_run.environment(2),
            )
            for p in processes
        }  # fmt: skip

    def wait(self, timeout: float = 240.0) -> list[int]:
        end = time.monotonic() + timeout
        try:
            return [child.wait(max(end - time.monotonic(), 0.1)) for child in self.children.values()]
        finally:
            for child in self.children.values():
                child.kill()

    def text(self, process: int) -> str:
        return self.files[process].read_text(errors="replace")

    def told(self) -> str:
        return "\n".join(f"--- {p}\n{self.text(p)}" for p in self.files)

    def wait_for(self, process: int, text: str, timeout: float = 240.0) -> None:
        end = time.monotonic() + timeout
        while text not in self.text(process):
            assert time.monotonic() < end and self.children[process].poll() is None, self.told()
            time.sleep(0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="module")
def slow_config(tiny_data, folder) -> Path:
    """The light run with a checkpoint after each step and steps that take a while: time to be killed in one."""
    slow = (
        "import time\nfrom unimat_jax.data import BatchMaker\n\nmake = BatchMaker.__call__\n\n"
        "def slowly(self, number):\n    time.sleep(0.3)\n    return make(self, number)\n\n"
        "BatchMaker.__call__ = slowly\n"
    )
    return tiny_run.config_file(folder / "slow.py", tiny_data, slow, made_by="light_config")


def common(config: Path, workdir: Path) -> list[str]:
    return [f"--config={config}", f"--workdir={workdir}", "--config.train.fsdp=2", "--config.train.log_batches=True"]


def test_two_processes_train_as_one(trained, tiny_data, folder):
    """And stop together when one of them is told to, and go on."""
    config = tiny_run.config_file(folder / "tiny.py", tiny_data)
    workdir = folder / "run"
    job = Job(folder, *common(config, workdir), "--config.train.num_steps=4")
    assert job.wait() == [0, 0], job.told()
    assert "process 0 on " in job.text(0) and "process 1 on " in job.text(0) and "step 1/4" not in job.text(1)
    job = Job(folder, *common(config, workdir))
    assert job.wait() == [0, 0], job.told()
    assert "steps: 4 of 12 done" in job.text(0)
    ours, alone = rows(workdir), rows(trained)
    for step in range(13):
        for name in NAMES:
            if name in alone[step] and (step != 4 or not name.startswith("eval")):
                assert ours[step][name] == pytest.approx(alone[step][name], rel=2e-4), (step, name)
    ours, alone = arrays(workdir, 12), arrays(trained, 12)
    for name in alone:
        np.testing.assert_allclose(ours[name], alone[name], rtol=2e-3, atol=2e-4)
    # What two processes wrote, this one samples from.
    assert [sample.status for sample in Generator(workdir).generate(2, formula="NaCl", num_steps=2)] == ["ok", "ok"]
    # Each process read its half of each global batch, and no other.
    logs = [[json.loads(line) for line in (workdir / f"batches_{p}.jsonl").read_text().splitlines()] for p in (0, 1)]
    assert [row["step"] for row in logs[0]] == list(range(1, 13)) == [row["batch"] + 1 for row in logs[1]]
    used = [a["index"] + b["index"] for a, b in zip(*logs, strict=True)]
    assert all(len(a["index"]) == 4 for a in logs[0])
    assert sorted(np.concatenate(used)[:36]) == list(range(36))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_job_with_a_word_and_the_next_start_goes_on(slow_config, folder, victim):
    workdir = folder / f"killed_{victim}"
    flags = [*common(slow_config, workdir), "--config.train.checkpoint_every=2", "--config.train.sample_every=0"]
    job = Job(folder, *flags)
    job.wait_for(0, "step 4/12")
    begin = time.monotonic()
    job.children[victim].kill()
    codes = job.wait(60.0)
    assert codes[1 - victim] == PEER_LOST and time.monotonic() - begin < 60.0, job.told()
    last = job.text(1 - victim).strip().splitlines()[-1]
    assert last.startswith(f"error: process {victim} (host {socket.gethostname()}, pid ") and "the same command" in last
    if victim == 0:  # and now one of two is told to stop: both save the same step and end well
        job = Job(folder, *flags)
        job.wait_for(0, "steps: ")
        assert "steps: 0 of" not in job.text(0)
        job.wait_for(0, "examples/s")
        job.children[1].send_signal(signal.SIGTERM)
        assert job.wait() == [0, 0], job.told()
        assert f"another process was told to stop: saved step {available_steps(workdir)[-1]};" in job.text(0)


def test_a_process_that_fails_is_named_by_the_other(trained, folder, tiny_data):
    """Process 1 alone cannot see the data set."""
    program = folder / "half.py"
    lines = "import os, json\nprocess = json.loads(os.environ.get('UNIMAT_CHILD', '{}')).get('process_id')\n"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport tiny_run\n{lines}\n"
        f"def get_config():\n    return tiny_run.light_config('/nowhere' if process == 1 else {str(tiny_data)!r})\n"
    )
    job = Job(folder, f"--config={program}", f"--workdir={folder / 'half'}")
    assert job.wait(90.0) == [PEER_LOST, 2], job.told()
    assert "no data set 'starter' in data_dir '/nowhere'" in job.text(1)
    assert "process 1 (host" in job.text(0) and "ended with exit code 2; process 0 stops too" in job.text(0)


def test_a_missing_process_is_named(folder, slow_config):
    port = free_port()
    flags = [f"--coordinator_address=localhost:{port}", "--num_processes=3", "--rendezvous_timeout=3", "--process_id=0"]
    command = [sys.executable, "-m", "unimat_jax.main", *common(slow_config, folder / "never"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == PEER_LOST and not (folder / "never").exists()
    assert "2 of 3 processes did not come within 3 s: 1, 2" in done.stderr


def test_two_processes_sample_as_one(trained, folder):
    flags = [f"--checkpoint={trained}", "--formula=NaCl,LiF", "--num_samples=6"]
    job = Job(folder, *flags, f"--output_dir={folder / 'two'}", module="unimat_jax.generate")
    assert job.wait() == [0, 0], job.told()
    alone = tiny_run.unimat("generate", *flags, f"--output_dir={folder / 'one'}", devices=4)
    assert alone.returncode == 0, alone.stderr
    two, one = (json.loads(f"[{','.join((folder / n / 'manifest.jsonl').read_text().splitlines())}]")
                for n in ("two", "one"))  # fmt: skip
    assert [row["uid"] for row in two] == [row["uid"] for row in one] and len(one) == 6
    for a, b in zip(two, one, strict=True):
        assert a["status"] == b["status"] and a["volume_per_atom"] == pytest.approx(b["volume_per_atom"], rel=1e-3)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (
            {"SLURM_JOB_ID": "5000", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_NTASKS": "8", "SLURM_PROCID": "5",
             "SLURM_LOCALID": "1"},
            ("gpu07", 8, 5, [1]),
        ),
        (
            {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2",
             "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            ("10.96.0.1", 2, 1, [0]),
        ),
        (
            {"SLURM_JOB_ID": "5000", "SLURM_STEP_NODELIST": "gpu07", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
             "SLURM_LOCALID": "0"},
            None,
        ),
        ({"SLURM_JOB_ID": "5000", "SLURM_NTASKS": "8"}, None),  # inside salloc, but not started by srun
        ({}, None),
    ],
)  # fmt: skip
def test_launchers_are_found_by_what_they_set(monkeypatch, variables, expected):
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "TPU", "KUBERNETES")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    job = distributed._find_job({})
    if expected is None:
        assert job is None
    else:
        assert job is not None and job.coordinator_address.rpartition(":")[2].isdigit()
        host = job.coordinator_address.rpartition(":")[0]
        assert (host, job.num_processes, job.process_id, job.local_device_ids) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "go together"),
        (["--coordinator_address=a:1", "--num_processes=2", "--process_id=2"], "--process_id=2: give 0 to 1"),
        (
            ["--coordinator_address=a", "--num_processes=2", "--process_id=1"],
            "--coordinator_address=a: write HOST:PORT",
        ),
        (["--num_processes", "two"], "--num_processes=two: give a number"),
    ],
)
def test_flags_that_cannot_be(flags, message):
    with pytest.raises(UserError, match=message):
        distributed.launch("unimat_jax.main", flags, lambda argv: 0)


def test_the_program_does_not_see_the_jobs_flags():
    flags = ["--a=1", "--coordinator-address", "h:1", "--num_processes=1", "--process_id=0", "b"]
    seen = []
    assert distributed.launch("unimat_jax.main", flags, lambda argv: seen.extend(argv) or 0) == 0
    assert seen == ["--a=1", "b"]
