"""SevenNet-0 and CHGNet as ASE calculators that also evaluate many crystals in one call of the network.

Their numbers are those of the packages' own calculators, to rounding. They take less time: no gradients of the weights,
and CHGNet's forces and stress in one pass back through the network instead of two that could be differentiated again.
Only `engines.load` imports this module.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

Evaluate = Callable[[Sequence[Atoms]], list[dict[str, Any]]]


class BatchCalculator(Calculator):
    """evaluate: many Atoms -> the results of each, as ASE names them: eV, eV/Angstrom, eV/Angstrom^3 by Voigt."""

    def __init__(self, evaluate: Evaluate, implemented_properties: Sequence[str]):
        self.implemented_properties = list(implemented_properties)
        super().__init__()
        self.calculate_batch = evaluate

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        super().calculate(atoms, list(properties), list(system_changes))
        assert atoms is not None
        (self.results,) = self.calculate_batch([atoms])


def sevennet(device: str = "cpu", **kwargs: Any) -> Calculator:
    """SevenNet-0 (Park et al. 2024, doi:10.1021/acs.jctc.4c00190), of 11 July 2024: the weights inside its wheel."""
    from sevenn.atom_graph_data import AtomGraphData  # pyright: ignore[reportMissingImports]
    from sevenn.calculator import SevenNetCalculator  # pyright: ignore[reportMissingImports]
    from sevenn.train.dataload import unlabeled_atoms_to_graph  # pyright: ignore[reportMissingImports]
    from torch_geometric.data import Batch  # pyright: ignore[reportMissingImports]

    loaded: Any = SevenNetCalculator("7net-0", device=device, **kwargs)
    model = loaded.model.requires_grad_(False)
    model.set_is_batch_data(True)

    def evaluate(many: Sequence[Atoms]) -> list[dict[str, Any]]:
        graphs = [AtomGraphData.from_numpy_dict(unlabeled_atoms_to_graph(atoms, loaded.cutoff)) for atoms in many]
        found = model(Batch.from_data_list(graphs).to(loaded.device))
        energies, forces, stresses = (
            found[name].detach().cpu().numpy()
            for name in ("inferred_total_energy", "inferred_force", "inferred_stress")
        )
        ends = np.cumsum([len(atoms) for atoms in many])[:-1]
        return [
            {"energy": float(energy), "free_energy": float(energy), "forces": force,
             "stress": -stress[[0, 1, 2, 4, 5, 3]]}
            for energy, force, stress in zip(energies.reshape(-1), np.split(forces, ends), stresses, strict=True)
        ]  # fmt: skip

    return BatchCalculator(evaluate, ("energy", "free_energy", "forces", "stress"))


def chgnet(device: str = "cpu", **kwargs: Any) -> Calculator:
    """CHGNet 0.3.0 (Deng et al. 2023, doi:10.1038/s42256-023-00716-3): the weights inside its wheel."""
    from chgnet.model.dynamics import CHGNetCalculator  # pyright: ignore[reportMissingImports]
    from pymatgen.io.ase import AseAtomsAdaptor

    structure_of: Any = AseAtomsAdaptor.get_structure
    loaded: Any = CHGNetCalculator(use_device=device, **kwargs)
    model = loaded.model.requires_grad_(False).eval()
    warnings.filterwarnings(
        "ignore", message="Converting a tensor with requires_grad"
    )  # of volumes that it does not use

    def evaluate(many: Sequence[Atoms]) -> list[dict[str, Any]]:
        graphs = [model.graph_converter(structure_of(atoms)) for atoms in many]
        found = model([graph.to(device) for graph in graphs], task="em")
        atoms_of = np.array([len(atoms) for atoms in many]) if model.is_intensive else np.ones(len(many))
        energies = found["e"].detach().cpu().numpy().astype(float) * atoms_of
        # Energies an atom of unlike crystals add up to nothing; their gradients by each crystal's own coordinates do.
        found["e"].sum().backward()
        return [
            {"energy": float(energy), "free_energy": float(energy), "magmoms": moments.detach().cpu().numpy()}
            | _forces_and_stress(atoms, graph, factor)
            for atoms, graph, energy, factor, moments in zip(many, graphs, energies, atoms_of, found["m"], strict=True)
        ]

    return BatchCalculator(evaluate, ("energy", "free_energy", "forces", "stress", "magmoms"))


def _forces_and_stress(atoms: Atoms, graph: Any, factor: float) -> dict[str, Any]:
    """From the gradients of energy / factor by fractional coordinates [N, 3] and lattice rows [3, 3]: a strain S takes
    the lattice A to A(1 + S), and the fractional coordinates stay."""
    cell = atoms.cell.array
    by_coordinates, by_lattice = (
        factor * tensor.grad.numpy().astype(float) for tensor in (graph.atom_frac_coord, graph.lattice)
    )
    virial = cell.T @ by_lattice
    return {
        "forces": -np.linalg.solve(cell, by_coordinates.T).T,
        "stress": full_3x3_to_voigt_6_stress((virial + virial.T) / 2 / atoms.get_volume()),
    }
