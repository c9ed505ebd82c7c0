"""The built wheel, installed outside the clone, is the whole program."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"unimat_jax": "unimat_jax", "configs": "unimat_jax/configs", "data_prep": "data_prep"}
"""Folder of the clone -> folder of the wheel."""


def call(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy without the leftovers of earlier builds, and without network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", target, source]
    done = call(*pip, cwd=source)
    assert done.returncode == 0, done.stderr
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel, and with this one's packages behind it, but not this clone.

    A .pth file that names a folder does not run the .pth files in it, and so no editable install.
    """
    folder = tmp_path_factory.mktemp("outside") / "venv"
    assert call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent).returncode == 0
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages_behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index"]
    # Without the first flag pip finds this environment's unimat-jax and leaves it.
    done = call(*pip, "--ignore-installed", wheel, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_source_file_is_in_the_wheel(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    files = [p for name in FOLDERS for p in (ROOT / name).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert len(files) > 10
    for path in files:
        folder, _, rest = path.relative_to(ROOT).as_posix().partition("/")
        assert f"{FOLDERS[folder]}/{rest}" in inside, "add its folder or its kind to [tool.setuptools]"
    tops = {name.partition("/")[0] for name in inside if ".dist-info" not in name}
    assert tops == {"unimat_jax", "data_prep"}
    assert any(name.endswith("licenses/LICENSE") for name in inside)


def test_it_is_the_wheel_that_runs(environment):
    code = "import unimat_jax, data_prep; print(unimat_jax.__file__, data_prep.__file__)"
    done = call(environment / "bin" / "python", "-c", code, cwd=environment.parent)
    assert done.returncode == 0, done.stderr
    assert all(name.startswith(str(environment)) for name in done.stdout.split())


def test_released_models_outside_the_clone(environment):
    code = "from unimat_jax import released; print(*released.models())"
    done = call(environment / "bin" / "python", "-c", code, cwd=environment.parent)
    assert done.stdout.split() == sorted(p.parent.name for p in (ROOT / "unimat_jax" / "released").glob("*/model.json"))


@pytest.mark.parametrize("arguments", [["--help"], ["prepare", "--help"], ["train", "--help"], ["generate", "--help"]])
def test_help_outside_the_clone(environment, arguments):
    done = call(environment / "bin" / "unimat", *arguments, cwd=environment.parent)
    said = done.stdout + done.stderr
    assert "Traceback" not in said and "--" in said


def test_a_config_by_name_outside_the_clone(environment, tmp_path):
    """The name is found: what is refused is a field of it. The user's own folder `configs` is not in the way."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").touch()
    unimat, workdir = environment / "bin" / "unimat", f"--workdir={tmp_path / 'run'}"
    found = call(unimat, "train", "--config=perov_5", workdir, "--config.train.no_such_field=1", cwd=tmp_path)
    assert found.returncode != 0
    assert "no_such_field" in found.stderr and "Traceback" not in found.stderr
    sized = call(unimat, "train", "--config=unimat:small", workdir, "--config.train.no_such_field=1", cwd=tmp_path)
    assert "no_such_field" in sized.stderr and "Traceback" not in sized.stderr
    unknown = call(unimat, "train", "--config=no_such_config", workdir, cwd=tmp_path)
    assert unknown.returncode == 2
    assert "no_such_config" in unknown.stderr and "perov_5" in unknown.stderr  # names what there is
    assert len(unknown.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
