"""Pictures of crystals: unit cell, atoms coloured by element, those on the cell's border repeated."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ase.data import covalent_radii
from ase.data.colors import jmol_colors

from unimat_jax.crystal import Crystal
from unimat_jax.periodic_table import SYMBOLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

BORDER = 0.12
"""Atoms this near to a face (fractional) are drawn on the opposite face too."""


def view() -> np.ndarray:
    """Rotation [3, 3] of a look along b, a little from one side and from above; columns: right, up, towards the eye."""
    yaw, pitch = np.radians([-22.0, 14.0])
    turn = np.array([[np.cos(yaw), 0, -np.sin(yaw)], [0, 1, 0], [np.sin(yaw), 0, np.cos(yaw)]])
    tilt = np.array([[1, 0, 0], [0, np.cos(pitch), np.sin(pitch)], [0, -np.sin(pitch), np.cos(pitch)]])
    # Cartesian x to the right, z up, y away from the eye.
    return np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ turn @ tilt


def nearest_distances(crystal: Crystal) -> np.ndarray:
    """Distance [N] of every atom to the nearest other atom or its image (Angstrom)."""
    distances = crystal.to_pymatgen().distance_matrix
    return (distances + np.diag(np.full(crystal.num_atoms, np.inf))).min(1)


def corner_element(crystal: Crystal) -> int:
    """The element of the atom with most room: in a perovskite the A site, drawn at the corners by convention."""
    return int(crystal.atomic_numbers[np.argmax(nearest_distances(crystal))])


def moved_to_corner(crystal: Crystal, element: int) -> np.ndarray:
    """Fractional coordinates [N, 3], about [0, 1), with an atom of `element` (that with most room) at the origin."""
    room = np.where(crystal.atomic_numbers == element, nearest_distances(crystal), -1.0)
    return np.mod(crystal.frac_coords - crystal.frac_coords[np.argmax(room)] + BORDER, 1.0) - BORDER


def draw(axes: Axes, crystal: Crystal, element: int, bond_factor: float = 1.25) -> None:
    """Draws one crystal with an atom of `element` (atomic number) at its corners; bonds between unlike atoms."""
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Circle

    frac = moved_to_corner(crystal, element)
    numbers, places = [], []
    for number, place in zip(crystal.atomic_numbers, frac, strict=True):
        for offset in itertools.product((0, 1), repeat=3):
            image = place + offset
            if (image < 1 + BORDER).all():
                numbers.append(int(number))
                places.append(image)
    numbers, points = np.array(numbers), np.array(places) @ crystal.lattice @ view()
    corners = np.array(list(itertools.product((0, 1), repeat=3)))
    frame = corners @ crystal.lattice @ view()
    edges = [
        frame[[i, j]] for i, j in itertools.combinations(range(8), 2) if np.abs(corners[i] - corners[j]).sum() == 1
    ]
    depth = frame[:, 2].max() - frame[:, 2].min()
    for edge in edges:
        behind = edge[:, 2].mean() < frame[:, 2].mean() - 0.1 * depth
        axes.add_collection(
            LineCollection(
                [edge[:, :2]],
                colors="0.6",
                linewidths=0.8,
                zorder=edge[:, 2].mean() - 0.2,
                linestyles=":" if behind else "-",
            )
        )
    radii = covalent_radii[numbers]
    for i, j in itertools.combinations(range(len(points)), 2):
        distance = np.linalg.norm(points[i] - points[j])
        pair = {numbers[i], numbers[j]}
        if len(pair) == 2 and element not in pair and distance < bond_factor * (radii[i] + radii[j]):
            axes.add_collection(
                LineCollection(
                    [points[[i, j], :2]], colors="0.35", linewidths=1.6, zorder=points[[i, j], 2].mean() - 0.1
                )
            )
    for number, point in zip(numbers, points, strict=True):
        axes.add_patch(
            Circle(
                tuple(point[:2]),
                0.38 * float(covalent_radii[number]),
                facecolor=_color(int(number)),
                edgecolor="black",
                linewidth=0.6,
                zorder=point[2],
            )
        )
    everything = np.concatenate([frame, points])
    axes.set_xlim(everything[:, 0].min() - 0.9, everything[:, 0].max() + 0.9)
    axes.set_ylim(everything[:, 1].min() - 0.9, everything[:, 1].max() + 0.9)
    axes.set_aspect("equal")
    axes.axis("off")


def to_one_scale(column: Sequence[Axes]) -> None:
    """Widens the limits so that an Angstrom is as long in every picture of a column."""
    half_width = max(float(np.ptp(axes.get_xlim())) for axes in column) / 2
    half_height = max(float(np.ptp(axes.get_ylim())) for axes in column) / 2
    for axes in column:
        x, y = np.mean(axes.get_xlim()), np.mean(axes.get_ylim())
        axes.set_xlim(float(x - half_width), float(x + half_width))
        axes.set_ylim(float(y - half_height), float(y + half_height))


def draw_grid(
    rows: Mapping[str, Sequence[Crystal | str]], captions: Mapping[str, Sequence[str]], path: Path, heading: str
) -> None:
    """Writes a PNG with a row of crystals for each name; a string stands for a failure and is written out.

    In each column the last row's crystal says which element goes to the corners. `captions` stand below the crystals.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    number = len(next(iter(rows.values())))
    size = (2.0 * number, 2.7 * len(rows) + 0.4)
    figure, axes = plt.subplots(len(rows), number, figsize=size, squeeze=False, dpi=130)
    for i, (name, crystals) in enumerate(rows.items()):
        figure.text(0.012, 1 - (i + 0.5) / len(rows) * 0.95, name, rotation=90, va="center", ha="center", weight="bold")
        for j, crystal in enumerate(crystals):
            ax = axes[i, j]
            last = next(column[j] for column in reversed(list(rows.values())) if isinstance(column[j], Crystal))
            if isinstance(crystal, Crystal) and isinstance(last, Crystal):
                draw(ax, crystal, corner_element(last))
                style = {"fontsize": 7, "frameon": False, "handletextpad": 0.0, "columnspacing": 0.3}
                ax.legend(handles=_handles(crystal), loc="lower center", bbox_to_anchor=(0.5, 0.97), ncols=5, **style)
            else:
                ax.axis("off")
                ax.text(0.5, 0.5, str(crystal), ha="center", va="center", transform=ax.transAxes, fontsize=8)
            ax.set_title(captions[name][j], fontsize=8, y=0.0, va="top")
    for j in range(number):
        to_one_scale([axes[i, j] for i, row in enumerate(rows.values()) if isinstance(row[j], Crystal)])
    figure.suptitle(heading, fontsize=9)
    figure.tight_layout(rect=(0.02, 0.0, 1, 0.99), h_pad=2.5)
    figure.savefig(path)
    plt.close(figure)


def _handles(crystal: Crystal) -> list[Line2D]:
    from matplotlib.lines import Line2D

    dot = {"marker": "o", "linestyle": "", "markersize": 5, "markeredgecolor": "black", "markeredgewidth": 0.5}
    return [
        Line2D([], [], color=_color(z), label=SYMBOLS[z], **dot) for z in sorted(set(crystal.atomic_numbers.tolist()))
    ]


def _color(number: int) -> tuple[float, float, float]:
    red, green, blue = jmol_colors[number].tolist()
    return red, green, blue
