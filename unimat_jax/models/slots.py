"""A transformer over the occupied slots of a UniMat tensor: one token an atom, no null sites, exact counts given.

Everything that it sees of coordinates are differences between atoms, periodic: shifting all atoms, or taking another
image of one, changes nothing. Atoms of one element differ by where they are alone, so that permuting them permutes what
comes out.

All atoms attend to all, or each to the nearest ones and to one entry that stands for the others: the same parameters,
and costs that grow with the atoms instead of their pairs.

The geometry of a noisy crystal tells little. So the network can predict the clean one half way, a draft, and look at
the geometry of that as well: what AlphaFold's recycling (Jumper et al. 2021) does in several passes, in one.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimat_jax.models.layers import Dense, dropout, each_site, in_memory, zeros_init

DTYPES = ("float32", "bfloat16")
WAVES = 3
"""Waves of each fractional difference: 1 to WAVES in the cell."""
RADII = tuple(0.6 + 0.4 * i for i in range(16))
"""Centres of the radial basis of distances, Angstrom; 0.5 wide."""
TIME_WAVES = 16
_IMAGES = tuple((i, j, k) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1))


def shortest_distances(difference: jax.Array, metric: jax.Array) -> jax.Array:
    """Distances [B, A, N] (Angstrom) of fractional differences [B, A, N, 3] in [-1/2, 1/2] to the nearest of 27 images,
    enough for reduced cells. metric [B, 3, 3]: of the cell, Angstrom^2; where it belongs to no cell, squares below zero
    count as zero. From an atom to itself: zero."""
    images = jnp.array(_IMAGES, jnp.float32)
    projected = jnp.einsum("bxy,bijy->bijx", metric, difference)
    own = (projected * difference).sum(-1)
    cross = jnp.einsum("bijx,sx->bijs", projected, images)
    shift = jnp.einsum("sx,bxy,sy->bs", images, metric, images)
    return jnp.sqrt(jnp.maximum((own[..., None] + 2 * cross + shift[:, None, None]).min(-1), 0.0))


def nearest(frac: jax.Array, metric: jax.Array, mask: jax.Array, number: int) -> jax.Array:
    """Indices [B, A, number] of the atoms nearest to each, itself among them and padded ones (mask [B, A] zero) last,
    by the wrapped difference of fractional coordinates [B, A, 3]: in a skewed cell some other image may be nearer.
    Of atoms equally far the first ones."""
    # Axis by axis, so that nothing but the squares has A x A entries.
    wrapped = [d - jnp.round(d) for d in jnp.moveaxis(frac, -1, 0)[..., None] - jnp.moveaxis(frac, -1, 0)[..., None, :]]
    square = sum(metric[:, x, y, None, None] * wrapped[x] * wrapped[y] for x in range(3) for y in range(3))
    return jax.lax.top_k(jnp.where(mask[:, None] > 0, -square, -jnp.inf), number)[1]


def rows(x: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows [B, A, N, ...] of x [B, M, ...] at indices [B, A, N]."""
    return jax.vmap(lambda x, i: x[i])(x, indices)


def pair_features(frac: jax.Array, others: jax.Array, metric: jax.Array | None, directions: bool) -> jax.Array:
    """[B, A, N, F] of fractional coordinates [B, A, 3] and of those that each is compared with, [B, A or 1, N, 3]:
    waves of the differences and, with a metric, a radial basis of the distances in the cell; with directions, that
    basis (every second of it) times how far the other is along each axis against the distance, which is as sharp in a
    large cell as in a small one. Along an axis of length a that is a sin(2 pi d) / 2 pi, the difference where it is
    small, and periodic."""
    difference = frac[:, :, None] - others
    sin, cos = jnp.sin(2 * jnp.pi * difference), jnp.cos(2 * jnp.pi * difference)
    waves = [sin, cos]
    for _ in range(WAVES - 1):  # of angles added: far cheaper than a sine
        waves += [waves[-2] * cos + waves[-1] * sin, waves[-1] * cos - waves[-2] * sin]
    if metric is None:
        return jnp.concatenate(waves, -1)
    distance = in_memory(shortest_distances(difference - jnp.round(difference), metric)[..., None])
    basis = in_memory(jnp.exp(-0.5 * jnp.square((distance - jnp.array(RADII)) / 0.5)))
    waves = [in_memory(wave) for wave in waves]  # apart: what is computed while joining is not vectorised
    if not directions:
        return jnp.concatenate([*waves, basis], -1)
    lengths = jnp.sqrt(jnp.diagonal(metric, axis1=1, axis2=2))[:, None, None]
    along = lengths * waves[0] / (2 * jnp.pi) / (distance + 0.5)
    pointed = in_memory(along[..., None, :] * basis[..., ::2, None])
    return jnp.concatenate([*waves, basis, pointed.reshape(*pointed.shape[:-2], -1)], -1)


@jax.custom_vjp
def mean_pairs(weights: jax.Array, pair: jax.Array) -> jax.Array:
    """Means [B, A, H, P] of pairs [B, A, N, P] by weights [B, A, H, N]."""
    return jnp.einsum("bihj,bijp->bihp", weights, pair)


def _mean_pairs_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights, pair = saved
    # Turned in memory first: XLA's product on CPU with the turn inside is four times slower.
    turned = in_memory(weights.swapaxes(2, 3))
    return jnp.einsum("bihp,bijp->bihj", g, pair), jnp.einsum("bijh,bihp->bijp", turned, g)


mean_pairs.defvjp(lambda weights, pair: (mean_pairs(weights, pair), (weights, pair)), _mean_pairs_backward)


def time_features(time: jax.Array) -> jax.Array:
    """Sines and cosines [B, 2 TIME_WAVES] of times [B] in [0, 1], half a wave to 32."""
    angles = time[:, None] * jnp.pi * jnp.exp(jnp.linspace(0.0, jnp.log(64.0), TIME_WAVES))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def _norm(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """Layer normalisation of [B, A, C] in float32, then (1 + scale) y + shift, both [B, 1 or A, C]."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    return (y * (1 + scale) + shift).astype(x.dtype)


class SlotBlock(nn.Module):
    """Attention, then a layer for each token. `condition` [B, E] scales and shifts what both read and add.

    A function of `pairs` [B, A, N, F] and the condition is added to the attention's logits and, averaged with its
    weights, to its values, and so is `offset` [B, A or 1, 1, N] to the logits. near: None where each attends to all
    (N = A), or the indices [B, A, N] of those attended to, of which A is the mean of all by weights `share` [B, A].
    """

    heads: int
    pair_width: int
    mlp_factor: int
    dropout_rate: float

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        pairs: jax.Array,
        offset: jax.Array,
        condition: jax.Array,
        near: jax.Array | None,
        share: jax.Array,
        train: bool,
    ) -> jax.Array:
        b, a, width = tokens.shape
        heads, dtype = self.heads, tokens.dtype
        film = Dense(6 * width, kernel_init=zeros_init, name="film")(condition)
        film = [jnp.asarray(each_site(x, a)) for x in jnp.split(film, 6, -1)]
        scale_in, shift_in, gate_in, scale_mlp, shift_mlp, gate_mlp = film
        h = in_memory(_norm(tokens, scale_in, shift_in))
        q, key, v = (x.reshape(b, a, heads, -1) for x in jnp.split(Dense(3 * width, name="qkv")(h), 3, -1))
        each = "bjhd"
        if near is not None:
            each = "bijhd"
            both = jnp.concatenate([key, v], -1)
            mean = jnp.einsum("bj,bjhd->bhd", share, both, preferred_element_type=jnp.float32).astype(dtype)
            key, v = jnp.split(rows(jnp.concatenate([both, mean[:, None]], 1), near), 2, -1)
        by_noise = Dense(self.pair_width, use_bias=False, name="pair_condition")(condition)[:, None, None]
        pair = in_memory(nn.silu(Dense(self.pair_width, name="pair_in")(pairs) + by_noise.astype(dtype)))
        logits = jnp.einsum(f"bihd,{each}->bihj", q, key, preferred_element_type=jnp.float32) / jnp.sqrt(width / heads)
        logits = logits + Dense(heads, name="pair_bias")(pair).swapaxes(2, 3) + offset
        weights = nn.softmax(logits.astype(jnp.float32)).astype(dtype)
        values = jnp.einsum(f"bihj,{each}->bihd", weights, v).reshape(b, a, width)
        geometry = mean_pairs(weights, pair).reshape(b, a, heads * self.pair_width)
        added = Dense(width, name="out")(in_memory(jnp.concatenate([values, geometry], -1)))
        tokens = tokens + (self._dropped(added, train) * (1 + gate_in)).astype(dtype)
        h = in_memory(_norm(tokens, scale_mlp, shift_mlp))
        h = in_memory(nn.silu(Dense(self.mlp_factor * width, name="mlp_in")(h)))
        added = Dense(width, name="mlp_out")(h)
        return tokens + (self._dropped(added, train) * (1 + gate_mlp)).astype(dtype)

    def _dropped(self, x: jax.Array, train: bool) -> jax.Array:
        return dropout(x, self.dropout_rate, self.make_rng("dropout")) if train and self.dropout_rate else x


class SlotTransformer(nn.Module):
    """(coordinates' noise [B, A, 3], lattice [B, D] as predicted) of noisy fractional coordinates [B, A, 3], lattice
    [B, D], times [B], the noisy cell's metric [B, 3, 3] (Angstrom^2), atoms [B, A, H, W] (one-hot places of the table,
    all zero where padded) and, with any, properties [B, 2 P] (see `conditioning.seen_properties`).

    distances: the pair geometry has a radial basis of distances in the noisy cell, beside waves of fractional
    differences; directions: and where in it the other atom lies, in Angstrom, for large cells. neighbours: K > 0: each
    atom attends to the K nearest in the noisy cell, itself among them, and to one entry for all others, which stands
    for as many as they are: the mean of all keys and values, with the mean geometry of what is far (waves and basis
    zero). As without where there are no more than K atoms. dtype: of activations and products; parameters, norms,
    softmax and outputs stay float32. remat: compute each block again for its gradient.

    draft_after: D > 0: after D blocks the tokens become a prediction, the draft, by heads of its own. `redraw` turns it
    into the (fractional coordinates, metric) that it stands for, and the blocks after see their geometry beside the
    noisy one's. No gradient goes through that: the draft learns by a loss of its own. It comes out after the
    prediction: (noise, lattice, draft's noise, draft's lattice). Without a `redraw`, to trace shapes, the noisy crystal
    stands in for it.
    Raises ValueError for a choice that does not exist.
    """

    width: int = 128
    depth: int = 6
    heads: int = 8
    pair_width: int = 64
    mlp_factor: int = 2
    dropout_rate: float = 0.0
    distances: bool = True
    directions: bool = False
    neighbours: int = 0
    draft_after: int = 0
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype = {self.dtype!r}: choose from {', '.join(DTYPES)}")
        for name in ("width", "depth", "heads", "pair_width", "mlp_factor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: give a whole number above 0")
        if self.directions and not self.distances:
            raise ValueError("directions = True goes with distances = True")
        if self.neighbours < 0:
            raise ValueError(f"neighbours = {self.neighbours}: give a whole number above 0, or 0 for all atoms")
        if not 0 <= self.draft_after < self.depth:
            raise ValueError(
                f"draft_after = {self.draft_after}: give a number of blocks below depth = {self.depth}, or 0 for none"
            )
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} does not divide by heads = {self.heads}: choose a multiple")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        frac: jax.Array,
        lattice: jax.Array,
        time: jax.Array,
        metric: jax.Array,
        atoms: jax.Array,
        properties: jax.Array | None = None,
        train: bool = False,
        redraw: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None,
    ) -> tuple[jax.Array, ...]:
        b, a, h, w = atoms.shape
        mask = atoms.sum((2, 3))
        condition = Dense(self.width, name="time")(time_features(time)) + Dense(self.width, name="lattice")(lattice)
        if properties is not None:
            condition = condition + Dense(self.width, name="properties")(properties)
        condition = nn.silu(Dense(self.width, name="condition")(nn.silu(condition)))
        dtype = jnp.dtype(self.dtype)

        place = jnp.concatenate([atoms.reshape(b, a, h * w), atoms.sum(3), atoms.sum(2)], -1)
        tokens = Dense(self.width, kernel_init=nn.initializers.normal(0.5), name="elements")(place).astype(dtype)
        blocked = jnp.where(mask > 0, 0.0, -1e9)
        share = mask / jnp.maximum(mask.sum(1, keepdims=True), 1)
        if 0 < self.neighbours < a:
            near = nearest(frac, metric, mask, self.neighbours)
            offset = rows(blocked, near)
            unseen = mask.sum(1) - self.neighbours
            crowd = jnp.where(unseen > 0, jnp.log(jnp.maximum(unseen, 1)), -1e9)[:, None, None]
            near = jnp.pad(near, ((0, 0), (0, 0), (0, 1)), constant_values=a)
            offset = jnp.concatenate([offset, jnp.broadcast_to(crowd, (b, a, 1))], -1)
        else:
            near, offset = None, blocked[:, None]

        def geometry(frac: jax.Array, metric: jax.Array) -> jax.Array:
            others = frac[:, None] if near is None else rows(frac, near[:, :, :-1])
            pairs = pair_features(frac, others, metric if self.distances else None, self.directions)
            pairs = in_memory(pairs.astype(dtype))  # all blocks read it
            return pairs if near is None else jnp.pad(pairs, ((0, 0), (0, 0), (0, 1), (0, 0)))

        def prediction(tokens: jax.Array, suffix: str) -> tuple[jax.Array, jax.Array]:
            film = Dense(2 * self.width, kernel_init=zeros_init, name="film_out" + suffix)(condition)[:, None]
            tokens = _norm(tokens.astype(jnp.float32), *jnp.split(film, 2, -1))
            noise = Dense(3, kernel_init=zeros_init, name="coords_out" + suffix)(tokens) * mask[..., None]
            pooled = (tokens * mask[..., None]).sum(1) / jnp.maximum(mask.sum(1), 1)[:, None]
            hidden = jnp.concatenate([pooled, condition, lattice], -1)
            hidden = nn.silu(Dense(2 * self.width, name="lattice_hidden" + suffix)(hidden))
            return noise, Dense(lattice.shape[-1], kernel_init=zeros_init, name="lattice_out" + suffix)(hidden)

        pairs, draft = geometry(frac, metric), ()
        block = nn.remat(SlotBlock, static_argnums=(7,)) if self.remat else SlotBlock
        narrow = condition.astype(dtype)
        for i in range(self.depth):
            if i and i == self.draft_after:
                draft = prediction(tokens, "_draft")
                drawn = redraw(*draft) if redraw else (frac, metric)
                pairs = in_memory(jnp.concatenate([pairs, geometry(*jax.lax.stop_gradient(drawn))], -1))
            tokens = block(self.heads, self.pair_width, self.mlp_factor, self.dropout_rate, name=f"block_{i}")(
                tokens, pairs, offset[:, :, None], narrow, near, share, train
            )
        return (*prediction(tokens, ""), *draft)
