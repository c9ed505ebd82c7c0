"""Energy models: machine-learned potentials and any other ASE calculator, each with the energy scale that it declares.

`energy_model` describes one without importing it; `load` makes its calculator, once in a process. Those of ENGINES are
in `potentials`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimat_jax.errors import UserError
from unimat_jax.periodic_table import SYMBOLS
from unimat_jax.stability.dft import DftSettings

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

SCALES = {
    "pbe": "PBE, with Hubbard U as the Materials Project has it, before any correction",
    "mp2020": "MP2020-corrected energies: the correction is part of what the model predicts",
    "own": "a scale of its own, comparable with nothing but itself",
}
"""What a model's energies are. Only `pbe` takes a correction."""


@dataclasses.dataclass(frozen=True)
class EnergyModel:
    """A calculator by import path ("package.module:Callable") and keyword arguments (JSON), and what it declares.

    scale: one of SCALES. weights: SHA-256 by file name. package: the distribution that has it, with its version.
    """

    name: str
    path: str
    kwargs: str
    scale: str
    functional: str
    weights: dict[str, str]
    package: str

    @property
    def identity(self) -> str:
        """Everything that decides the numbers."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def __hash__(self) -> int:
        return hash(self.identity)


@dataclasses.dataclass(frozen=True)
class _Built:
    """distribution: on PyPI; weights: of the default model, in the package's folder."""

    distribution: str
    scale: str
    weights: str
    functional: str = "PBE(+U), Materials Project settings"


# CHGNet has no embedding beyond plutonium, and of MPtrj's elements, which both models learned, five lighter ones are
# missing. SevenNet's own list says the same.
_MPTRJ = frozenset(range(1, 95)) - {84, 85, 86, 87, 88}
ENGINES = {
    "sevennet": _Built("sevenn", "pbe", "pretrained_potentials/SevenNet_0__11Jul2024/checkpoint_sevennet_0.pth"),
    "chgnet": _Built("chgnet", "mp2020", "pretrained/0.3.0/*.tar"),
}
"""By the name of the extra that installs each."""
GPAW = "gpaw"
"""The energy model that computes instead of predicting: DftSettings are its arguments."""


def energy_model(
    name: str, *, kwargs: Mapping[str, Any] | None = None, scale: str | None = None, functional: str = ""
) -> EnergyModel:
    """The model of that name (one of ENGINES), or the calculator that an import path makes.

    kwargs: of the callable; those that name files count among the weights. scale: must be given for an import path, and
    is known for the others. Raises UserError where the package is not installed or something is missing.
    """
    kwargs = dict(kwargs or {})
    for key, value in kwargs.items():
        if key in ("model", "model_path", "model_name") and "/" in str(value) and not Path(str(value)).is_file():
            raise UserError(f"--energy_model_kwargs: {key} = {value!r} is no file: give the path of the weights")
    weights = {
        Path(value).name: _sha256(Path(value))
        for value in kwargs.values()
        if isinstance(value, str) and value and Path(value).is_file()
    }
    if name in ENGINES:
        return _built_in(name, kwargs, scale, functional)
    if name == GPAW:
        return _gpaw(kwargs, scale, functional)
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        names = ", ".join([*ENGINES, GPAW])
        raise UserError(f"--energy_model={name}: choose from {names}, or give a calculator as package.module:Callable")
    if scale is None:
        scales = "; ".join(f"{key}: {text}" for key, text in SCALES.items())
        raise UserError(f"--energy_model={name} needs --energy_scale, which says what its energies are ({scales})")
    _require(module.partition(".")[0], name, "install the package that has it, or mend the path")
    package = _package(module.partition(".")[0])
    return EnergyModel(
        name, name, json.dumps(kwargs, sort_keys=True), scale, functional or "not declared", weights, package
    )


def _built_in(name: str, kwargs: dict[str, Any], scale: str | None, functional: str) -> EnergyModel:
    engine = ENGINES[name]
    if scale not in (None, engine.scale):
        raise UserError(f"--energy_scale={scale}: {name} declares {engine.scale} ({SCALES[engine.scale]})")
    folder = _require(engine.distribution, name, f"pip install 'unimat-jax[{name}]'")
    if "model" in kwargs:  # it may have been fitted to other energies
        raise UserError(
            f"--energy_model_kwargs: {name} has the model that it declares the scale of; for another one give the "
            "calculator's import path as --energy_model, and its --energy_scale"
        )
    weights = {path.name: _sha256(path) for path in sorted(folder.glob(engine.weights))}
    if not weights:
        raise UserError(f"--energy_model={name}: no {engine.weights} in {folder}: install the package again")
    path = f"{__package__}.potentials:{name}"
    package = _package(engine.distribution)
    values = json.dumps(kwargs, sort_keys=True)
    return EnergyModel(name, path, values, engine.scale, functional or engine.functional, weights, package)


def _gpaw(kwargs: dict[str, Any], scale: str | None, functional: str) -> EnergyModel:
    if scale not in (None, "own"):
        raise UserError(f"--energy_scale={scale}: {GPAW} declares own ({SCALES['own']})")
    settings = DftSettings.of(kwargs)
    fix = "bash docs/install_gpaw.sh in a clone of unimat-jax, or pip install 'unimat-jax[dft]' where libxc is"
    for package in ("gpaw", "gpaw_data"):
        _require(package, GPAW, fix)
    functional = functional or ("PBE(+U), Materials Project settings" if settings.hubbard_u else "PBE")
    values = json.dumps(dataclasses.asdict(settings), sort_keys=True)
    packages = f"{_package('gpaw')}, {_package('gpaw_data')}"
    return EnergyModel(GPAW, "unimat_jax.stability.gpaw_engine:Gpaw", values, "own", functional, {}, packages)


def _require(package: str, name: str, fix: str) -> Path:
    """The folder of an importable package."""
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise UserError(f"--energy_model={name}: {package} is not installed here: {fix}")
    return Path(next(iter(found.submodule_search_locations or []), found.origin or "."))


def _package(module: str) -> str:
    for distribution in importlib.metadata.packages_distributions().get(module, []):
        return f"{distribution} {importlib.metadata.version(distribution)}"
    return module


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=1)
def load(model: EnergyModel) -> Calculator:
    """The calculator, the same one each time that this process asks. Raises UserError, with what the engine said."""
    module, _, attribute = model.path.partition(":")
    try:
        made: Any = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the results
            calculator = made(**json.loads(model.kwargs))
    except Exception as error:
        raise UserError(
            f"--energy_model={model.name} cannot be made ({type(error).__name__}: {error}): "
            "try the same call in Python; its arguments come from --energy_model_kwargs"
        ) from error
    if not hasattr(calculator, "get_property"):
        raise UserError(f"--energy_model={model.name} makes a {type(calculator).__name__}, no ASE calculator")
    return calculator


def unsupported(model: EnergyModel, atomic_numbers: Collection[int]) -> list[str]:
    """Symbols of the elements that a model of ENGINES does not know, or GPAW has no data set of; of others nothing is
    known until they fail."""
    known = _MPTRJ if model.name in ENGINES else frozenset(range(1, 119))
    if model.name == GPAW:
        engine: Any = load(model)
        known = engine.elements
    return [SYMBOLS[number] for number in sorted(set(atomic_numbers) - known)]
