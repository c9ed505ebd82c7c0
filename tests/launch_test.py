"""The recipes of docs/launch, run as far as they can be without the machines that they are for."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

from benchmarks.scale_out import free_port
from unimat_jax.checkpoint import available_steps

RECIPES = Path(__file__).parents[1] / "docs" / "launch"
NUM_STEPS = 2
FEW = [f"--config.train.num_steps={NUM_STEPS}", "--config.train.sample_every=0"]

SRUN = """#!/usr/bin/env bash
# What srun does for a job of two tasks on one machine.
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" >"$TASK_1_LOG" 2>&1 & other=$!
code=0; SLURM_PROCID=0 SLURM_LOCALID=0 "$@" || code=$?
wait "$other" || exit $?
exit "$code"
"""


@pytest.fixture
def environment(tiny_data, tmp_path) -> dict[str, str]:
    config = tiny_run.config_file(tmp_path / "light.py", tiny_data, made_by="light_config")
    places = {"CONFIG": str(config), "WORKDIR": str(tmp_path / "run"), "TASK_1_LOG": str(tmp_path / "task_1.log")}
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return tiny_run.environment(2) | places | {"PATH": path}


def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)


def test_one_machine(environment, tmp_path):
    done = run(["bash", str(RECIPES / "one_gpu.sh"), *FEW], environment)
    assert done.returncode == 0, done.stderr
    assert "process 0: 2 x cpu" in done.stderr and available_steps(tmp_path / "run") == [NUM_STEPS]


def test_slurm(environment, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(SRUN)
    (tmp_path / "bin" / "srun").chmod(0o755)
    job = str(free_port())  # jax makes the port of it
    env = environment | {"SLURM_JOB_ID": job}
    done = run(["bash", str(RECIPES / "slurm.sbatch"), *FEW], env)
    assert done.returncode == 0, done.stderr + (tmp_path / "task_1.log").read_text()
    assert "process 1 on " in done.stderr and available_steps(tmp_path / "run") == [NUM_STEPS]


def test_jobset(environment, tmp_path):
    text = (RECIPES / "jobset.yaml").read_text()
    found = re.search(r"args:\n\s+- >-\n((?:\s{20,}.*\n)+?)\s+resources:", text)
    assert found and text.count("completions: 2") == text.count("parallelism: 2") == 1
    port = free_port()
    command = " ".join(found[1].split()).replace(":8476", f":{port}")
    assert "--num_processes=2" in command and "--process_id=$JOB_COMPLETION_INDEX" in command
    command += " " + shlex.join(FEW)
    env = environment | {"COORDINATOR": "localhost"}
    pods = [
        subprocess.Popen(["bash", "-c", command], env=env | {"JOB_COMPLETION_INDEX": str(index)},
                         stderr=(tmp_path / f"pod_{index}.log").open("w"))
        for index in (0, 1)
    ]  # fmt: skip
    assert [pod.wait(timeout=300) for pod in pods] == [0, 0], (tmp_path / "pod_0.log").read_text()
    assert available_steps(tmp_path / "run") == [NUM_STEPS]


@pytest.mark.parametrize("name", ["one_gpu.sh", "slurm.sbatch", "tpu_pod.sh"])
def test_scripts_are_well_formed(name):
    done = subprocess.run(["bash", "-n", str(RECIPES / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
