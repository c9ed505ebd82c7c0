"""Parameters and operations a crystal of every config: prints the table that docs/deviations.md holds.

python -m benchmarks.model_cost

Counted from the jaxpr (unimat_jax/flops.py): nothing is trained or compiled, and no data set is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from unimat_jax.assembly import create_network, init_arguments
from unimat_jax.cli import Parser, run_program
from unimat_jax.errors import UserError
from unimat_jax.flops import model_cost
from unimat_jax.main import config_directory, load_config
from unimat_jax.periodic_table import Table
from unimat_jax.representation import UniMatSpec

SIZES = {"unimat": ("small", "medium", "large")}
"""Configs that come in several sizes."""
DATA_GRIDS = {"starter": (3, 8, 18), "perov_5": (3, 6, 17), "carbon_24": (24, 1, 1), "mp_20": (20, 9, 18)}
"""(L, H, W) of a data set's own table, as the training program announces it: most atoms of one element, and the rows
and columns that have an element of it. "starter" is the quickstart's selection of it."""
DATA_ATOMS = {"perov_5": 5, "starter": 5}
"""Atoms of a data set's largest crystal, where a network of slots asks for it and it is more than L."""
HEADER = """| config | L x H x W | parameters | forward, GFLOP | training, GFLOP |
|---|---|---|---|---|"""


def config_names() -> list[str]:
    """All configs of the package, those with sizes once for each."""
    stems = sorted(path.stem for path in config_directory().glob("*.py") if path.stem != "__init__")
    return [name for stem in stems for name in ([f"{stem}:{size}" for size in SIZES.get(stem, ())] or [stem])]


def spec_of(config: Any) -> UniMatSpec:
    """The tensor of a config, without its data. Raises UserError for a data set that DATA_GRIDS lacks."""
    if config.data.dataset not in DATA_GRIDS:
        raise UserError(f"config.data.dataset = {config.data.dataset!r}: add its L, H and W to DATA_GRIDS")
    levels, rows, columns = DATA_GRIDS[config.data.dataset]
    table = {"full": Table(), "data": Table(tuple(range(rows)), tuple(range(columns)))}.get(config.data.table)
    return UniMatSpec(
        max_atoms_per_element=config.data.max_atoms_per_element or levels,
        max_atoms=DATA_ATOMS.get(config.data.dataset, levels),
        table=table or Table.of_elements(config.data.table.split(",")),
        coordinates=config.data.coordinates,
        lattice_form=config.data.lattice_form,
    )


def network_of(name: str) -> tuple[tuple[int, int, int], Any, tuple[Any, ...]]:
    """(L, H, W), the network and its arguments of a config by name; nothing is computed twice to save memory."""
    config, _, _ = load_config([f"--config={name}", "--workdir=unused"])
    spec = spec_of(config)
    network = create_network({field: value for field, value in config.model.items() if field != "remat"})
    return spec.grid, network, init_arguments(spec, len(config.data.properties), config.model.name)


def row(name: str) -> str:
    """The table's row of a config."""
    grid, network, arguments = network_of(name)
    cost = model_cost(network, arguments)
    flops = [f"{value / 1e9:.4g}" for value in (cost.forward_flops_per_crystal, cost.train_flops_per_crystal)]
    return f"| `{name}` | {' x '.join(map(str, grid))} | {cost.num_params:,} | {' | '.join(flops)} |"


def main(argv: Sequence[str] | None = None) -> int:
    Parser(prog="python -m benchmarks.model_cost", description=__doc__).parse(sys.argv[1:] if argv is None else argv)
    print(HEADER)
    for name in config_names():
        print(row(name), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
