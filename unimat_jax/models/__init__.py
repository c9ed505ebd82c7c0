"""Networks. The only folder that imports flax; others ask `create`."""

from __future__ import annotations

from typing import Any

from unimat_jax.errors import UserError


def create(name: str, **settings: Any) -> Any:
    """A network by name ("unet3d", "slots") with `init` and `apply`. Raises UserError for unknown names or settings."""
    from unimat_jax.models.slots import SlotTransformer
    from unimat_jax.models.unet3d import UNet3D

    networks = {"unet3d": UNet3D, "slots": SlotTransformer}
    if name not in networks:
        raise UserError(f"config.model.name = {name!r}: choose from {sorted(networks)}")
    try:
        return networks[name](**settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.model: {error}") from error


def create_composition(max_atoms_per_element: int, max_atoms: int, **settings: Any) -> Any:
    """The network of compositions of such sizes. Raises UserError for unknown settings."""
    from unimat_jax.models.composition import CompositionNetwork

    try:
        return CompositionNetwork(max_atoms_per_element, max_atoms, **settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.composition: {error}") from error
