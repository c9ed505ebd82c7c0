"""MP2020 corrections (Wang et al. 2021, doi:10.1038/s41598-021-94550-5), and which energies may meet each other."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError

if TYPE_CHECKING:
    from unimat_jax.stability.engines import EnergyModel

CORRECTIONS = ("auto", "mp2020", "none")
ANY = "any"
"""The scheme of a reference in which no correction could show: elements alone."""


def mp2020_correction(crystal: Crystal) -> float | None:
    """eV for the whole cell, to be added to a PBE(+U) energy; None where MP2020 has no answer.

    pymatgen's, for an entry with the Hubbard U and potentials that the Materials Project would take. Oxides, peroxides,
    superoxides and sulfides are told apart by the structure.
    """
    from pymatgen.entries.computed_entries import ComputedStructureEntry
    from pymatgen.io.vasp.sets import MPRelaxSet

    structure = crystal.to_pymatgen()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on magnetic moments, k-points and oxidation states, which change nothing here
        settings: Any = {"user_incar_settings": {"KSPACING": 0.5}, "user_kpoints_settings": None}
        inputs = MPRelaxSet(structure, **settings)
        values = inputs.incar.get("LDAUU") or []
        hubbards = dict(zip(inputs.poscar.site_symbols, values, strict=False)) if any(values) else {}
        parameters: dict[str, Any] = {
            "run_type": "GGA+U" if hubbards else "GGA",
            "is_hubbard": bool(hubbards),
            "hubbards": hubbards,
            "potcar_symbols": [f"PBE {symbol}" for symbol in inputs.potcar_symbols],
        }
        entry = ComputedStructureEntry(structure, 0.0, parameters=parameters)
        found = _scheme().process_entry(entry, inplace=False)
    return None if found is None else float(found.correction)


@functools.cache
def _scheme() -> Any:
    from pymatgen.entries.compatibility import MaterialsProject2020Compatibility

    return MaterialsProject2020Compatibility(check_potcar=False)


def resolve(model: EnergyModel, correction: str) -> tuple[bool, str]:
    """(whether the MP2020 correction is added to the model's energies, the scheme that they are then in).

    `auto` adds it to `pbe` and to nothing else. Raises UserError where it would be added to what has it already.
    """
    if correction == "mp2020" and model.scale != "pbe":
        why = "has it already: it would count twice" if model.scale == "mp2020" else f"is on the scale {model.scale!r}"
        raise UserError(f"--correction=mp2020: {model.name} {why}; leave --correction out")
    if correction == "none" and model.scale == "mp2020":
        raise UserError(f"--correction=none: {model.name} predicts corrected energies; leave --correction out")
    if model.scale == "pbe":
        return (False, "none") if correction == "none" else (True, "MP2020")
    return False, "MP2020" if model.scale == "mp2020" else f"own: {model.name}"


def check_schemes(ours: str, theirs: str, mixed_schemes: bool) -> None:
    """Raises UserError where energies of two schemes would meet unasked."""
    if theirs not in (ours, ANY) and not mixed_schemes:
        raise UserError(
            f"the model's energies are in the scheme {ours!r}, the reference's in {theirs!r}: give a reference of the "
            "same scheme, change --correction, or ask for the mixture with --mixed_schemes"
        )
