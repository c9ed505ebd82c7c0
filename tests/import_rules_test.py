"""The house rules about imports (DESIGN.md, "The house"), read from the source with `ast`."""

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ORDER = [
    "unimat_jax.errors",
    "unimat_jax.allocator",
    "unimat_jax.cli",  # names its programs as strings: it may stand above them, and they use its run_program
    "unimat_jax.periodic_table",
    "unimat_jax.crystal",
    "unimat_jax.representation",
    "unimat_jax.augmentation",
    "unimat_jax.structure_parsing",
    "unimat_jax.structure_streams",
    "unimat_jax.structure_tables",
    "unimat_jax.structure_json",
    "unimat_jax.structure_texts",
    "unimat_jax.structure_files",
    "unimat_jax.evaluation",
    "unimat_jax.evaluate",
    "unimat_jax.stability",
    "unimat_jax.starter",
    "unimat_jax.released",
    "data_prep",
    "unimat_jax.rendezvous",
    "unimat_jax.distributed",
    "unimat_jax.densify",
    "unimat_jax.requests",
    "unimat_jax.conditioning",
    "unimat_jax.data",
    "unimat_jax.diffusion",
    "unimat_jax.torus",
    "unimat_jax.models",
    "unimat_jax.sampler",
    "unimat_jax.tensor_diffusion",
    "unimat_jax.exclusion",
    "unimat_jax.slot_sampler",
    "unimat_jax.slot_diffusion",
    "unimat_jax.composition_model",
    "unimat_jax.sharding",
    "unimat_jax.train_state",
    "unimat_jax.train_step",
    "unimat_jax.compilation_cache",
    "unimat_jax.doctor",
    "unimat_jax.flops",
    "unimat_jax.assembly",
    "unimat_jax.weights",
    "unimat_jax.checkpoint",
    "unimat_jax.aot",
    "unimat_jax.metric_writer",
    "unimat_jax.default_config",
    "unimat_jax.run_directory",
    "unimat_jax.rollback",
    "unimat_jax.sample_check",
    "unimat_jax.train",
    "unimat_jax.generator",
    "unimat_jax.generate",
    "unimat_jax.search_compositions",
    "unimat_jax.search",
    "unimat_jax.model_card",
    "unimat_jax.export",
    "unimat_jax.main",
    "unimat_jax.quickstart",
]
"""A module, or a package as a whole, imports only what stands above it here, and its own package."""

NO_JAX_UP_TO = "data_prep"
"""Everything down to this one works where jax is not even installed."""
BELONGS_TO_EVALUATION = {
    "unimat_jax.errors",
    "unimat_jax.allocator",
    "unimat_jax.cli",
    "unimat_jax.periodic_table",
    "unimat_jax.crystal",
}
BELONGS_TO_EVALUATION |= {"unimat_jax.structure_files", "unimat_jax.evaluation", "unimat_jax"}
"""Evaluation scores anybody's structures: it knows crystals and files, and nothing of UniMat tensors."""

USES_JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "chex"}
FORBIDDEN = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN |= {"tensorflow", "torch", "clu", "keras"}
ALLOWED = {("unimat_jax.evaluation.torch_files", "torch")}
"""An extra: samples that others saved with torch, tensors only."""
IMPLICIT_DEPENDENCIES = {"array-record", "importlib-resources"}
"""Needed by tensorflow-datasets, which does not ask for them on every platform and Python."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> list[Path]:
    return [path for folder in ("unimat_jax", "data_prep", "configs") for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, bool]]:
    """(dotted name, at module level) of every import; `from a import b` gives `a.b`, which may be a module or not."""

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", top) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in ("importlib.import_module", "import_module", "__import__") and node.args[0].value:
                yield str(node.args[0].value), top
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        inside |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, top and not inside)

    return walk(tree, True)


def imports_of(path: Path) -> list[tuple[str, bool]]:
    name = name_of(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return list(imports(ast.parse(path.read_text(encoding="utf-8")), package))


def place(module: str) -> str | None:
    """The entry of ORDER that a dotted name belongs to."""
    return next((entry for entry in ORDER if module == entry or module.startswith(entry + ".")), None)


def broken_rules(name: str, imported: list[tuple[str, bool]]) -> list[str]:
    """What module `name` imports against the rules, one line each."""
    here = place(name)
    problems = []
    for module, _ in imported:
        top = module.partition(".")[0]
        there = place(module)
        if here and there and here != there and ORDER.index(there) > ORDER.index(here):
            problems.append(f"{name} imports {module}, which stands below it")
        ours = top in ("unimat_jax", "data_prep")
        if ours and here == "unimat_jax.evaluation" and (there or top) not in BELONGS_TO_EVALUATION:
            problems.append(f"{name} imports {module}: evaluation knows only crystals and files")
        if top in USES_JAX and (here is None or ORDER.index(here) <= ORDER.index(NO_JAX_UP_TO)):
            problems.append(f"{name} imports {module}: no jax above densify")
        if top == "flax" and here != "unimat_jax.models":
            problems.append(f"{name} imports {module}: flax only under models/")
        if top in FORBIDDEN and (name, top) not in ALLOWED:
            problems.append(f"{name} imports {module}: never")
    return problems


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_rules(path):
    problems = broken_rules(name_of(path), imports_of(path))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("unimat_jax.crystal", "from unimat_jax.representation import encode"),
        ("unimat_jax.crystal", "def f():\n    from unimat_jax import train"),
        ("unimat_jax.models.unet3d", "from .. import generate"),
        ("unimat_jax.evaluation.validity", "from unimat_jax import representation"),
        ("data_prep.prepare", "import jax.numpy as jnp"),
        ("unimat_jax", "import jax"),
        ("unimat_jax.train_state", "from flax import struct"),
        ("unimat_jax.checkpoint", "import pickle"),
        ("unimat_jax.generate", "import importlib\nimportlib.import_module('torch.nn')"),
    ],
)
def test_the_rules_catch(name, source):
    package = name.rpartition(".")[0] or name
    assert broken_rules(name, list(imports(ast.parse(source), package)))


def test_every_module_has_its_place():
    without = {name_of(p) for p in sources() if place(name_of(p)) is None} - {"unimat_jax"}
    assert {name for name in without if not name.startswith("configs")} == set(), "add it to ORDER"


def test_configs_import_only_ml_collections_and_the_package():
    for path in (ROOT / "configs").glob("*.py"):
        tops = {module.partition(".")[0] for module, _ in imports_of(path)}
        assert tops <= {"ml_collections", "unimat_jax", "__future__", *sys.stdlib_module_names}, path.name


providers = functools.cache(importlib.metadata.packages_distributions)  # reads every RECORD: seconds


def distribution_of(module: str) -> set[str]:
    """Normalised names of the distributions that may provide a top-level module."""
    found = providers().get(module, [])
    return {re.sub(r"[-_.]+", "-", name).lower() for name in [module, *found]}


def declared() -> tuple[set[str], set[str]]:
    """Normalised names that this package requires, and those that only an extra does."""
    core, extra = set(), set()
    for requirement in importlib.metadata.requires("unimat-jax") or []:
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert match
        target = extra if re.search(r"\bextra\b", requirement) else core
        target.add(re.sub(r"[-_.]+", "-", match[0]).lower())
    return core, extra


def test_every_import_is_a_declared_dependency():
    core, extra = declared()
    ours = {"unimat_jax", "data_prep", "configs", *sys.stdlib_module_names}
    for path in sources():
        for module, at_module_level in imports_of(path):
            top = module.partition(".")[0]
            if top in ours:
                continue
            allowed = core if at_module_level else core | extra
            where = "dependencies" if at_module_level else "dependencies or an extra"
            assert distribution_of(top) & allowed, f"{path}: {top} is not in pyproject.toml's {where}"


def test_every_dependency_is_imported():
    tops = {module.partition(".")[0] for path in sources() for module, _ in imports_of(path)}
    used = set().union(*(distribution_of(top) for top in tops)) | IMPLICIT_DEPENDENCIES
    assert declared()[0] - used == set(), "in pyproject.toml's dependencies, and imported by nothing"


def test_importing_the_package_is_quick_and_loads_no_jax():
    code = "import time; t = time.perf_counter(); import unimat_jax; t = time.perf_counter() - t; import sys; "
    code += "print(t, *({'jax', 'flax', 'numpy', 'pymatgen', 'ase'} & set(sys.modules)))"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(3)
    ]
    assert runs[0][1:] == []
    assert min(float(run[0]) for run in runs) < 0.5


def test_what_needs_no_jax_loads_none():
    """Imports through third parties count too."""
    last = ORDER.index(NO_JAX_UP_TO)
    modules = [name for name in map(name_of, sources()) if (entry := place(name)) and ORDER.index(entry) <= last]
    code = (
        "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]; print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
