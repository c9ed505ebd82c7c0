"""Which elements, and how many atoms of each: a residual network that completes a partial table of counts.

It sees the periodic table as it stands half filled, and nothing of an order in which it was filled.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimat_jax.models.layers import Dense, zeros_init


class CompositionNetwork(nn.Module):
    """Logits of the number of atoms, 1 to A [B, A], of the next element [B, H, W], of there being no next [B], and of
    the queried element's count, 1 to L [B, L].

    Of `present` [B, H, W] (1 where an element is chosen), `counts` [B, H, W] (its atoms, 0 where not known yet),
    `num_atoms` [B] int (0 where not known yet), `query` [B, H, W] (1 at the element whose count is asked) and, with
    any, `properties` [B, 2 P] (see `conditioning.seen_properties`). L and A are max_atoms_per_element and max_atoms.
    Raises ValueError for a size that cannot be.
    """

    max_atoms_per_element: int
    max_atoms: int
    width: int
    depth: int
    dropout_rate: float

    def __post_init__(self):
        for name in ("width", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: give a whole number above 0")
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate = {self.dropout_rate}: give a share below 1")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        present: jax.Array,
        counts: jax.Array,
        num_atoms: jax.Array,
        query: jax.Array,
        properties: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        b, h, w = present.shape
        left = num_atoms - counts.sum((1, 2)).astype(jnp.int32)
        share = counts / jnp.maximum(num_atoms, 1)[:, None, None]
        tables = jnp.stack([present, (counts > 0).astype(jnp.float32), share, query], 1)
        # Places, and with them rows and columns: what is learned of an element tells of its neighbours.
        seen = [tables.reshape(b, -1), tables.sum(3).reshape(b, -1), tables.sum(2).reshape(b, -1)]
        numbers = [jax.nn.one_hot(n, self.max_atoms + 1) for n in (num_atoms, left)]
        inputs = jnp.concatenate([*seen, *numbers, *([] if properties is None else [properties])], -1)
        x = Dense(self.width, kernel_init=nn.initializers.normal(0.5), name="table")(inputs)
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        for i in range(self.depth):
            y = nn.silu(Dense(2 * self.width, name=f"in_{i}")(nn.LayerNorm(name=f"norm_{i}")(x)))
            x = x + Dense(self.width, name=f"out_{i}")(dropout(y))
        x = dropout(nn.LayerNorm(name="norm_out")(x))

        def read(name: str, number: int) -> jax.Array:
            return Dense(number, kernel_init=zeros_init, name=name)(x)

        element = read("place", h * w).reshape(b, h, w) + read("row", h)[:, :, None] + read("column", w)[:, None]
        return read("size", self.max_atoms), element, read("stop", 1)[:, 0], read("count", self.max_atoms_per_element)
