"""unimat quickstart: from the crystals in the package to new crystals, in minutes on a laptop.

Prepares a slice of the embedded data set, trains a small network on it, generates crystals of a few compositions,
checks them and says where they are. A second run goes on where the first stopped, or says that it is done.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from unimat_jax.cli import Parser, run_program

CONFIG = "quickstart"
FORMULAS = "NaCl,MgO,LiF,KBr,CaO,SrS,GaAs,ZnS"


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="unimat quickstart", description=__doc__)
    p.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"), help="everything goes here")
    p.add_argument("--num_samples", type=int, default=64)
    p.add_argument("--formula", default=FORMULAS, help="compositions to generate")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--num_steps", type=int, help="of training; default: the config's")
    p.add_argument("--sampling_steps", type=int, help="default: the config's")
    arguments = p.parse(sys.argv[1:] if argv is None else argv)

    from data_prep.prepare import prepare
    from unimat_jax.main import config_path, load_config

    root: Path = arguments.output_dir
    workdir, crystals = root / "model", root / "crystals"
    overrides = [f"--config.data.data_dir={root / 'data'}"]
    if arguments.num_steps is not None:
        overrides.append(f"--config.train.num_steps={arguments.num_steps}")
    config, _, _ = load_config([f"--config={config_path(CONFIG)}", f"--workdir={workdir}", *overrides])

    print("1/3 data: crystals of the Materials Project that come with the package", flush=True)
    prepare(dataset=config.data.dataset, data_dir=root / "data", **config.data.prepare.to_dict())

    print(f"2/3 training: {config.train.num_steps} steps", flush=True)
    from unimat_jax.train import train

    train(config, workdir)

    print(f"3/3 generating {arguments.num_samples} crystals", flush=True)
    from unimat_jax.generate import CIF_ZIP, MANIFEST, run
    from unimat_jax.generate import CONFIG as GENERATE_CONFIG
    from unimat_jax.generator import Generator

    generator = Generator(workdir)
    requests = generator.requests(arguments.num_samples, formula=arguments.formula, seed=arguments.seed)
    before = crystals / GENERATE_CONFIG
    same_model = before.exists() and json.loads(before.read_text())["checkpoint_step"] == generator.step
    if same_model and (crystals / CIF_ZIP).exists():
        print(f"done before: {crystals} holds {len((crystals / MANIFEST).read_text().splitlines())} samples")
        return 0
    settings = generator.settings(num_steps=arguments.sampling_steps)
    changes = {"resume": same_model, "overwrite": not same_model}
    run(generator, requests, settings, {}, seed=arguments.seed, output_dir=crystals, **changes)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
