"""A checkpoint -> crystals: unimat generate --checkpoint=runs/perov_5 --formula=SrTiO3 --num_samples=9 --output_dir=out

Writes generated_crystals.extxyz, generated_crystals_cif.zip, manifest.jsonl (one row a sample, failures too) and
config.json. Generates nothing twice: --resume goes on where a run stopped, or adds samples to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import re
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimat_jax import distributed, released
from unimat_jax.cli import Parser, run_program
from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation.structure_statistics import describe
from unimat_jax.evaluation.validity import Validity, check, format_summary, summary
from unimat_jax.structure_files import GENERATED as EXTXYZ
from unimat_jax.structure_files import MANIFEST

if TYPE_CHECKING:
    from unimat_jax.generator import Generator, Sample, SamplerSettings
    from unimat_jax.requests import Request

ASKED = ("formula", "chemical_system", "elements", "contains", "num_atoms")
CIF_ZIP, CONFIG = "generated_crystals_cif.zip", "config.json"
PACKAGES = ("unimat-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "pymatgen", "ase", "smact", "spglib")


def parser() -> Parser:
    p = Parser(
        prog="unimat generate",
        description=__doc__,
        epilog=f"several processes:\n{distributed.FLAGS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--checkpoint", required=True, help=released.checkpoint_help())
    p.add_argument("--output_dir", required=True, type=Path)
    p.add_argument("--num_samples", type=int, help="total number (default 16, or what --compositions_from gives)")
    p.add_argument("--seed", type=int, default=0, help="sample i depends on the seed and i alone")
    p.add_argument("--formula", "--formulas", help="SrTiO3,BaTiO3: sample i has formula i modulo their number, exactly")
    p.add_argument("--num_formula_units", default="1", help="2 or 1-4: formula units in a cell, drawn for each sample")
    p.add_argument("--chemical_system", help="Sr-Ti-O: no other element; a missing one is a status")
    p.add_argument("--elements", help="Sr,Ti,O: any subset of these")
    p.add_argument("--contains", help="Sr,O: these and perhaps others; takes a checkpoint with a model of compositions")
    p.add_argument("--num_atoms", help="5 or 2-8: atoms in a cell; takes a checkpoint with a model of compositions")
    p.add_argument("--compositions_from", help="crystal files: the composition of each structure in them")
    p.add_argument("--samples_per_composition", type=int, default=1, help="with --compositions_from")
    p.add_argument("--condition", action="append", default=[], metavar="NAME=VALUE", help="property of the checkpoint")
    p.add_argument("--guidance_weight", type=float, help="the paper's w on properties; others' scale is 1 + w")
    p.add_argument("--num_steps", type=int, help="of the sampler; default: the checkpoint's")
    p.add_argument(
        "--method", help="ancestral or ddim; slots models also mean (less noise) or heun; else the checkpoint's"
    )
    p.add_argument(
        "--time_power", type=float, help="above 1: the sampler's steps lie closer near the data; below 1: near noise"
    )
    p.add_argument(
        "--mean_below", type=float, help="slots, method mean: share of the cell below which little noise is added"
    )
    p.add_argument("--noise_below", type=float, help="slots, method mean: how little, as a share of the full noise")
    p.add_argument("--corrector_steps", type=int, help="slots: Langevin steps after each step, an evaluation each")
    p.add_argument("--corrector_below", type=float, help="slots: share of the cell below which these are taken")
    p.add_argument(
        "--closest_ratio", type=float, help="slots: share of their radii's sum that atoms are kept apart; 0: not"
    )
    p.add_argument(
        "--composition_min_p",
        type=float,
        help="models with compositions: none less likely than this share of the likeliest choice, for each element",
    )
    p.add_argument("--log_variance_interpolation", type=float, help="the paper's 0.1, for ancestral sampling")
    p.add_argument("--batch_size", type=int, help="samples at a time; changes speed and memory only")
    p.add_argument("--step", type=int, help="of the checkpoint; default: the latest")
    p.add_argument("--raw_params", action="store_true", help="raw parameters in place of their moving average")
    existing = p.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="go on with the run in --output_dir: interrupted, or of fewer samples"
    )
    existing.add_argument("--overwrite", action="store_true", help="delete the run in --output_dir first")
    return p


def conditions(texts: Sequence[str]) -> dict[str, float]:
    """{"band_gap": 1.5} from ["band_gap=1.5"]. Raises UserError."""
    result = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            result[name] = float(value)
        except ValueError:
            result[name] = math.nan
        if not math.isfinite(result[name]):
            raise UserError(f"--condition={text}: write NAME=NUMBER, as in band_gap=1.5")
    return result


def row_of(sample: Sample, seed: int, condition: Mapping[str, float]) -> tuple[dict[str, Any], Validity]:
    """The manifest's row of a sample, and its validity."""
    request = sample.request
    row: dict[str, Any] = {
        "uid": sample.uid, "index": sample.index, "seed": seed, "condition": {**request.to_json(), **condition},
        "status": sample.status, "message": sample.message,
    }  # fmt: skip
    if request.reference_uid:
        row["reference_uid"] = request.reference_uid
    if sample.crystal is None:
        return row, Validity.failed(sample.uid, sample.status)
    validity = check(sample.crystal)
    verdicts = {"struct_valid": validity.struct_valid, "comp_valid": validity.comp_valid, "validity": validity.status}
    return {**row, **describe(sample.crystal), **verdicts}, validity


def whole_frames(extxyz: str) -> list[tuple[str, str]]:
    """(uid, text) of each frame, up to one that was cut off."""
    lines, frames, start = extxyz.splitlines(keepends=True), [], 0
    while start < len(lines) and lines[start].strip().isdigit():
        end = start + int(lines[start]) + 2
        if end > len(lines) or not lines[end - 1].endswith("\n"):
            break
        uid = re.search(r'\buid="?([^\s"]+)', lines[start + 1])
        frames.append((uid[1] if uid else "", "".join(lines[start:end])))
        start = end
    return frames


class Output:
    """The output directory. Each batch is on disk when the next one starts: frames first, then the manifest's rows."""

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        requests: Sequence[Request],
        *,
        resume: bool,
        overwrite: bool,
    ):
        self.directory = directory
        self.rows: list[dict[str, Any]] = []
        if directory.exists() and not directory.is_dir():
            raise UserError(f"--output_dir={directory} is a file: name a directory")
        if directory.is_dir() and any(directory.iterdir()):
            if resume:
                self._continue(config, requests)
                return
            if not overwrite:
                raise UserError(f"--output_dir={directory} is not empty: add --resume or --overwrite, or name another")
            if "requests_hash" not in self._config_there():
                raise UserError(f"--output_dir={directory} holds something else than generated crystals: name another")
            for name in (EXTXYZ, CIF_ZIP, MANIFEST, CONFIG):  # what somebody else put there stays
                (directory / name).unlink(missing_ok=True)
        directory.mkdir(parents=True, exist_ok=True)
        self._write({**config, **_asked(requests)})

    def _write(self, config: Mapping[str, Any]) -> None:
        """Whole or not at all: without it the samples that are there would be nobody's."""
        from unimat_jax.checkpoint import write_json

        write_json(self.directory / CONFIG, config)

    def _config_there(self) -> dict[str, Any]:
        try:
            return json.loads((self.directory / CONFIG).read_text())
        except (OSError, ValueError):
            return {}

    def _continue(self, config: Mapping[str, Any], requests: Sequence[Request]) -> None:
        """Keeps the samples before the first one of which the row or the frame is not whole. There may be more requests
        than before, after those."""
        from unimat_jax.generator import SamplerSettings

        before = self._config_there()
        if "requests_hash" not in before:
            raise UserError(
                f"--resume: {self.directory} holds no interrupted run of this program: name another directory"
            )
        if len(requests) < before["num_samples"]:
            raise UserError(
                f"--resume: {self.directory} holds a run of {before['num_samples']} samples and {len(requests)} are "
                "asked for: ask for as many or more, or name another directory"
            )
        # A version that had no such field did as its default says.
        before["sampler"] = SamplerSettings.defaults() | before["sampler"]
        # Not the checkpoint's folder, which may have moved: its parameters' hash tells whether it is the same.
        again = {**config, **_asked(requests[: before["num_samples"]])}
        changed = _changed(before, {k: v for k, v in again.items() if k not in ("checkpoint", "packages", "created")})
        if changed:
            raise UserError(f"--resume: {self.directory} was made otherwise: {'; '.join(changed)}: use the same")
        self._write({**before, **_asked(requests)})
        manifest, extxyz = self.directory / MANIFEST, self.directory / EXTXYZ
        lines = manifest.read_text().splitlines(keepends=True) if manifest.exists() else []
        frames = iter(whole_frames(extxyz.read_text()) if extxyz.exists() else [])
        kept = []
        for row in (json.loads(line) for line in lines if line.endswith("\n")):
            if "formula" in row:
                uid, text = next(frames, ("", ""))
                if uid != row["uid"]:
                    break
                kept.append(text)
            self.rows.append(row)
        manifest.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        extxyz.write_text("".join(kept))

    def add(self, crystals: Sequence[Crystal], rows: Sequence[dict[str, Any]]) -> None:
        with (self.directory / EXTXYZ).open("a") as file:
            file.write("".join(crystal.to_extxyz() for crystal in crystals))
        with (self.directory / MANIFEST).open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.rows += rows

    def finish(self) -> list[Crystal]:
        """Writes the CIF archive from the frames and returns the crystals."""
        import ase.io

        extxyz = self.directory / EXTXYZ
        frames: Any = ase.io.read(extxyz, index=":") if extxyz.exists() and extxyz.stat().st_size else []
        crystals = [Crystal.from_ase(frame, frame.info["uid"]) for frame in frames]
        partial = self.directory / (CIF_ZIP + ".partial")
        with zipfile.ZipFile(partial, "w") as archive:
            for crystal in crystals:
                member = zipfile.ZipInfo(f"{crystal.uid}.cif")  # with no date: the same crystals are the same bytes
                member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                archive.writestr(member, crystal.to_cif())
        partial.replace(self.directory / CIF_ZIP)
        return crystals


def run(
    generator: Generator,
    requests: Sequence[Request],
    settings: SamplerSettings,
    condition: Mapping[str, float],
    *,
    seed: int,
    output_dir: Path,
    resume: bool = False,
    overwrite: bool = False,
) -> Counter[str]:
    """Generates the requests into `output_dir`, prints a summary and returns how many samples have each status.

    Of a job of several processes, all sample their part and the first one writes.
    """
    import jax
    from tqdm import tqdm

    from unimat_jax.sharding import number_of_first

    first = jax.process_index() == 0

    config = {
        "checkpoint": str(generator.directory), "checkpoint_step": generator.step,
        "parameters": "ema" if generator.ema else "raw", "parameters_hash": generator.params_hash,
        "seed": seed, "condition": dict(condition),
        "sampler": {k: v for k, v in dataclasses.asdict(settings).items() if k != "batch_size"},
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    if not first:
        for _ in generator.sample(requests, settings, condition, seed=seed, start=number_of_first(0)):
            pass
        return Counter()
    for symbol, number in generator.never_seen(requests).items():
        print(
            f"warning: no training crystal has {symbol}, which {number} of {len(requests)} samples ask for: "
            "the model has a place for it and knows nothing of it",
            file=sys.stderr,
        )
    output = Output(output_dir, json.loads(json.dumps(config)), requests, resume=resume, overwrite=overwrite)
    done = number_of_first(len(output.rows))
    with tqdm(total=len(requests), initial=done, desc="generating", unit="crystal", file=sys.stderr) as bar:
        for batch in generator.sample(requests, settings, condition, seed=seed, start=done, arrived=bar.update):
            rows = [row_of(sample, seed, condition)[0] for sample in batch]
            output.add([sample.crystal for sample in batch if sample.crystal], rows)
            bar.set_postfix(failed=sum("formula" not in row for row in output.rows))
    crystals = {crystal.uid: crystal for crystal in output.finish()}
    verdicts = [
        check(crystals[row["uid"]]) if row["uid"] in crystals else Validity.failed(row["uid"], row["status"])
        for row in output.rows
    ]
    statuses = Counter(row["status"] for row in output.rows)
    print(f"generated {len(requests)}: " + ", ".join(f"{number} {status}" for status, number in statuses.most_common()))
    print(format_summary(summary(verdicts)))
    for name, what in ((EXTXYZ, "all crystals, one frame each"), (CIF_ZIP, "one CIF each, for VESTA and others"),
                       (MANIFEST, "one row a sample"), (CONFIG, "how they were made")):  # fmt: skip
        print(f"  {output_dir / name}   {what}")
    return statuses


def _asked(requests: Sequence[Request]) -> dict[str, Any]:
    """What `config.json` tells of the requests."""
    texts = (
        f"{r.kind} {r.label} {sorted(r.counts.items())} {r.elements} {r.reference_uid}{r.size_label}" for r in requests
    )
    return {
        "num_samples": len(requests),
        "requests": dict(Counter(" ".join(f"{r.kind} {r.label} {r.size_label}".split()) for r in requests)),
        "requests_hash": hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16],
    }


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of `now`, and of the mappings in it, is not as it was."""
    changed = []
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            changed += [f"{name}.{line}" for line in _changed(old, {**dict.fromkeys(old), **value})]
        elif old != value:
            changed.append(f"{name} was {old}, now {value}")
    return changed


def main(argv: Sequence[str] | None = None) -> int:
    return distributed.launch("unimat_jax.generate", sys.argv[1:] if argv is None else argv, _program)


def _program(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)
    condition = conditions(arguments.condition)
    if arguments.samples_per_composition < 1:
        raise UserError(f"--samples_per_composition={arguments.samples_per_composition}: give a number above 0")

    from unimat_jax.generator import Generator, SamplerSettings
    from unimat_jax.requests import file_requests

    generator = Generator(arguments.checkpoint, step=arguments.step, ema=not arguments.raw_params)
    names = [field.name for field in dataclasses.fields(SamplerSettings)]
    settings = generator.settings(**{name: getattr(arguments, name) for name in names})
    asked = {name: getattr(arguments, name) for name in ASKED}
    if arguments.compositions_from:
        given = [name for name, value in asked.items() if value]
        if given:
            raise UserError(f"--compositions_from and --{given[0]} together: give one of them")
        path, per_composition = arguments.compositions_from, arguments.samples_per_composition
        requests = file_requests(path, per_composition, arguments.num_samples, generator.spec)
    else:
        if arguments.samples_per_composition != 1:
            raise UserError("--samples_per_composition goes with --compositions_from; --num_samples is the total else")
        number = 16 if arguments.num_samples is None else arguments.num_samples
        units = arguments.num_formula_units
        requests = generator.requests(number, num_formula_units=units, seed=arguments.seed, **asked)
    generator.properties(condition)  # unknown names end here, before anything is written
    run(
        generator, requests, settings, condition, seed=arguments.seed, output_dir=arguments.output_dir,
        resume=arguments.resume, overwrite=arguments.overwrite,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
