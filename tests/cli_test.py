"""The console script: its verbs, and how every program ends on an error."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from unimat_jax import __version__, cli
from unimat_jax.cli import VERBS, main, run_program
from unimat_jax.crystal import CrystalError
from unimat_jax.errors import UserError


def unimat(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The installed script itself, as a user runs it."""
    script = Path(sys.executable).parent / "unimat"
    command = [script, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_tells_every_verb(arguments, capsys):
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert all(verb in told for verb in VERBS)


def test_the_installed_script():
    assert unimat("--version").stdout == f"unimat-jax {__version__}\n"
    done = unimat("dance", "--fast")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "'dance'" in done.stderr and all(verb in done.stderr for verb in VERBS)


def test_an_error_that_the_user_can_fix_is_one_line(capsys):
    def program(argv):
        raise UserError(f"--steps = {argv[0]}:\n  must be\n  above 0")

    assert run_program(program, ["-3"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "error: --steps = -3: must be above 0\n"


def test_a_bad_crystal_is_such_an_error(capsys):
    def program(argv):
        raise CrystalError("no_atoms", "a.cif has no atoms")

    assert run_program(program, []) == 2
    assert capsys.readouterr().err == "error: a.cif has no atoms\n"


def test_a_bug_is_not_hidden():
    def program(argv):
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        run_program(program, [])


def test_exit_codes(capsys):
    def stopped(argv):
        raise KeyboardInterrupt

    assert run_program(lambda argv: None, []) == 0
    assert run_program(lambda argv: 3, []) == 3
    assert run_program(stopped, []) == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize("lines", [1, 100_000])
def test_output_that_nobody_reads_ends_without_a_word(lines):
    program = "from unimat_jax.cli import run_program as r\nimport sys\nsys.stdin.read()\n"
    program += f"sys.exit(r(lambda argv: [print(i) for i in range({lines})] and None, []))"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin and child.stdout and child.stderr
        child.stdout.close()
        child.stdin.close()
        assert child.stderr.read() == b""
    assert child.returncode == 141


def test_another_broken_pipe_is_no_such_end():
    program = (
        "from unimat_jax.cli import run_program\n\ndef program(argv):\n    raise BrokenPipeError('of a worker')\n\n"
        "run_program(program, [])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "BrokenPipeError: of a worker" in done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_a_program_with_help(verb):
    assert callable(importlib.import_module(VERBS[verb][0]).main)
    done = unimat(verb, "--help")
    assert "--" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


REQUIRED = {
    "quickstart": [],
    "prepare": ["--dataset=starter"],
    "train": ["--config=perov_5", "--workdir=not_made"],
    "generate": ["--checkpoint=not_there", "--output_dir=not_made"],
    "export": ["--checkpoint=not_there", "--output_dir=not_made"],
    "doctor": [],
    "check": ["not_there.cif"],
    "evaluate": ["--structures=not_there.cif", "--output_dir=not_made"],
    "search": ["--formula=NaCl", "--output_dir=not_made"],
    "stability": ["--structures=not_there.cif", "--energy_model=sevennet", "--output_dir=not_made"],
    "vasp": ["inputs", "--structures=not_there.cif", "--output_dir=not_made"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_an_unknown_flag_in_one_line(verb, tmp_path):
    done = unimat(verb, *REQUIRED[verb], "--no_such_flag=1", folder=tmp_path)
    assert done.returncode == 2
    assert "no_such_flag" in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", VERBS)
def test_training_keeps_memory(verb, monkeypatch):
    class Restarted(Exception):
        pass

    def restart():
        raise Restarted

    monkeypatch.setattr(cli, "restart_with_kept_memory", restart)
    monkeypatch.setattr(sys, "argv", ["unimat", verb, "--help"])
    with pytest.raises(Restarted if verb == "train" else SystemExit):
        sys.exit(main())
