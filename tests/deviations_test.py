"""docs/deviations.md says what the configs and the program say, and the paper's sizes are configs of their own."""

import ast
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import shared_data

from data_prep.prepare import prepare
from unimat_jax import data, main
from unimat_jax.cli import run_program
from unimat_jax.default_config import MODELS, get_config
from unimat_jax.periodic_table import Table

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "deviations.md").read_text(encoding="utf-8")
FIELD = re.compile(r"`((?:data|model|diffusion|optimizer|train|sample)\.[a-z_0-9]+)(?:=[^`]*)?`")


def load(name):
    return main.load_config([f"--config={name}", "--workdir=w"])[0]


def table(title: str) -> list[list[str]]:
    """Rows, cell by cell, of the table below a comment."""
    lines = TEXT.split(f"<!-- {title} -->\n")[1].splitlines()
    rows = [line for line in lines[: lines.index("")] if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_the_papers_values_are_those_of_the_config():
    config = load("unimat")
    rows = table("the paper's values")
    assert len(rows) > 20 and len({field for *_, field in rows}) == len(rows)
    for what, value, _, field in rows:
        section, name = field.strip("`").split(".")
        assert config[section][name] == ast.literal_eval(value.strip("`")), what


def test_the_config_sets_the_papers_values_and_how_to_run_them():
    tree = ast.parse((main.config_directory() / "unimat.py").read_text())
    targets = [t for node in ast.walk(tree) if isinstance(node, ast.Assign) for t in node.targets]
    flat = [t for target in targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
    fields = {ast.unparse(t).removeprefix("config.") for t in flat if ast.unparse(t).startswith("config.")}
    known = {field.strip("`") for *_, field in table("the paper's values")}
    ours = {"data.dataset", "data.max_atoms_per_element", "optimizer.schedule"}
    ours |= {
        "model.dtype",
        "model.remat",
        "model.scan_blocks",
        "model.attention_kernel",
        "train.microbatches",
    }  # change no result, or rounding
    assert len(fields & known) > 15 and fields - known <= ours


def test_every_field_that_is_named_exists():
    configs, fields = [get_config(name) for name in MODELS], FIELD.findall(TEXT)
    assert len(set(fields)) > 40
    for section, name in (field.split(".") for field in fields):
        assert any(name in config[section] for config in configs), f"{section}.{name}"


def test_every_choice_names_its_switch_or_says_that_it_has_none():
    part = TEXT.split("## Where the paper leaves a choice")[1].split("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line.strip("|")) for line in part.splitlines() if line.startswith("|")]
    switches = [row[-1].strip() for row in rows if row[0].strip() not in ("what", "---")]
    assert {len(row) for row in rows} == {4} and len(switches) > 50
    assert all(s == "no switch" or "`" in s for s in switches)


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import model_cost

    return model_cost


def test_the_quickstarts_grid(program, tmp_path):
    config = load("quickstart")
    prepare("starter", data_dir=tmp_path, **config.data.prepare.to_dict(), num_workers=0, quiet=True)
    statistics = data.read_statistics(data.dataset_directory("starter", tmp_path))
    assert data.make_spec(statistics, table="data").grid == program.DATA_GRIDS["starter"]


@pytest.mark.parametrize("split", ["perov_5/train", "carbon_24/train", "mp_20/train_partial"])
def test_the_grids_of_data_sets(program, split):
    with np.load(shared_data.data_dir() / f"{split}.npz") as file:
        number, elements = file["n_atoms"].astype(int), file["numbers"].astype(int)
    crystal = np.repeat(np.arange(len(number)), number)
    most = np.unique(np.stack([crystal, elements]), axis=1, return_counts=True)[1].max()
    levels, *places = program.DATA_GRIDS[split.partition("/")[0]]
    assert most == levels
    kept = Table.of_elements(np.unique(elements).tolist()).shape
    assert kept == tuple(places) or split.startswith("mp_20")  # its config keeps all 9 x 18


COSTS = {row[0].strip("`"): row for row in table("parameters and operations")}
PARAMETERS_ALONE = {"mp_20", "unimat:small", "unimat:medium"}
"""The network of unimat:large with other settings: tracing each one's gradient would take seconds."""


def test_each_config_has_its_row_of_costs(program):
    assert list(COSTS) == program.config_names(), "python -m benchmarks.model_cost makes the table"


@pytest.mark.parametrize("name", COSTS)
def test_costs_are_as_recorded(program, name):
    if name in PARAMETERS_ALONE:
        grid, network, arguments = program.network_of(name)
        shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), *arguments)["params"])
        number = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
        assert COSTS[name][1:3] == [" x ".join(map(str, grid)), f"{number:,}"]
    else:
        recorded = f"| {' | '.join(COSTS[name])} |"
        assert program.row(name) == recorded, "python -m benchmarks.model_cost makes the table"


def test_the_papers_sizes():
    assert [load(f"unimat:{s}").model.base_channels for s in ("small", "medium", "large")] == [64, 128, 256]
    large, plain, small = load("unimat:large").to_dict(), load("unimat").to_dict(), load("unimat:small").to_dict()
    assert large == plain
    small["model"]["base_channels"] = 256
    assert small == plain  # nothing else differs
    by_path = load(f"{main.config_directory() / 'unimat.py'}:small")
    assert by_path.model.base_channels == 64
    changed, _, _ = main.load_config(
        ["--config", "unimat:small", "--workdir=w", "--config.train.num_steps=7", "--config.model.base_channels=8"]
    )
    assert (changed.train.num_steps, changed.model.base_channels) == (7, 8)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("unimat:tiny", "--config=unimat:tiny: choose from small, medium, large"),
        ("unimat:", "choose from small, medium, large"),
        ("perov_5:small", "perov_5.py:small"),
        ("nothing:small", "no config of that name"),
    ],
)
def test_a_size_that_does_not_exist_is_one_line(name, said, capsys):
    assert run_program(main.main, [f"--config={name}", "--workdir=w"]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and len(error.splitlines()) == 1
