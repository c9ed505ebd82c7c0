"""Compositions as a training set has them: which elements, and how many atoms of each. p(counts), the factor that a
model of exact compositions lacks.

A composition is drawn in three parts: its number of atoms; its elements, one after the other until there is no next;
then their counts, which add up. The elements come in no order: the network sees the table of those chosen so far and
learns of all orders alike (Uria et al. 2014, "A deep and tractable density estimator"). That is what makes elements
that were asked for a matter of choosing them first, and what draws of whole sets are weighed by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unimat_jax.conditioning import training_properties
from unimat_jax.diffusion import antithetic_times
from unimat_jax.errors import UserError
from unimat_jax.representation import UniMatSpec
from unimat_jax.requests import Request, element_table

PROPOSALS = 64
"""Sets of elements that are drawn for a sample with conditions, of which one is kept by its weight."""
IMPOSSIBLE = -1e9


@dataclasses.dataclass(frozen=True)
class CompositionModel:
    """What a network of `models.create_composition` learns, and how it is sampled."""

    network: Any
    spec: UniMatSpec
    num_properties: int = 0
    property_drop_rate: float = 0.2

    def init_arguments(self) -> tuple[jax.Array | None, ...]:
        """Arguments of the network (batch of 1) to initialise it or to trace its shapes."""
        table = jnp.zeros((1, *self.spec.table.shape), jnp.float32)
        return table, table, jnp.zeros(1, jnp.int32), table, self._properties(None, 1)

    # Logarithms of probabilities, of what can be alone. Tables are flat here: P = H W places. properties [B, 2 K] are
    # those of `conditioning.seen_properties`, None: not given.

    def size_logits(self, params: Any, properties: jax.Array | None = None, **options: Any) -> jax.Array:
        """Of the number of atoms, 1 to A: [B, A]; [1, A] where no properties are given."""
        number = 1 if properties is None else len(properties)
        zeros = jnp.zeros((number, int(np.prod(self.spec.table.shape))))
        logits = self._network(params, zeros, zeros, jnp.zeros(number, jnp.int32), zeros, properties, **options)[0]
        possible = jnp.arange(1, self.spec.max_atoms + 1) <= self.spec.max_atoms_per_element * self._is_element.sum()
        return jax.nn.log_softmax(jnp.where(possible, logits, IMPOSSIBLE))

    def element_logits(
        self,
        params: Any,
        chosen: jax.Array,
        num_atoms: jax.Array,
        properties: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        """Of the next element, the last entry of there being none: [B, P + 1]. chosen: bool [B, P]."""
        zeros = jnp.zeros(chosen.shape)
        _, element, stop, _ = self._network(params, chosen, zeros, num_atoms, zeros, properties, **options)
        number = chosen.sum(1)
        more = self._is_element & ~chosen & (number < num_atoms)[:, None]
        enough = (number > 0) & (number * self.spec.max_atoms_per_element >= num_atoms)
        possible = jnp.concatenate([more, enough[:, None]], 1)
        logits = jnp.concatenate([element.reshape(chosen.shape), stop[:, None]], 1)
        return jax.nn.log_softmax(jnp.where(possible, logits, IMPOSSIBLE))

    def count_logits(
        self,
        params: Any,
        chosen: jax.Array,
        counts: jax.Array,
        num_atoms: jax.Array,
        query: jax.Array,
        properties: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        """Of the atoms, 1 to L, of the element at `query` [B], its count and perhaps others' (0) unknown: [B, L]."""
        asked = jax.nn.one_hot(query, chosen.shape[1])
        logits = self._network(params, chosen, counts, num_atoms, asked, properties, **options)[3]
        limit = self.spec.max_atoms_per_element
        others = (chosen & (counts == 0)).sum(1) - 1
        rest = (num_atoms - counts.sum(1))[:, None] - jnp.arange(1, limit + 1)
        possible = (rest >= others[:, None]) & (rest <= limit * others[:, None])
        return jax.nn.log_softmax(jnp.where(possible, logits, IMPOSSIBLE))

    def losses(self, params: Any, batch: Mapping[str, jax.Array], key: jax.Array, train: bool) -> jax.Array:
        """Negative log-likelihoods [B] (nats) of the examples' compositions on average over keys, or a little above:
        exact where the network gives all orders of the elements the same probability. One place in a random order, and
        one of the counts, stand for all of them."""
        order_key, element_key, count_key, *dropout_keys = jax.random.split(key, 6)

        def options(i: int) -> dict[str, Any]:
            return {"train": train, "rngs": {"dropout": dropout_keys[i]} if train else {}}

        properties = None
        if self.num_properties:
            properties_key = jax.random.fold_in(key, 1)
            properties = training_properties(properties_key, batch["properties"], self.property_drop_rate)
        counts = self._counts(batch["slot"])
        present, number = counts > 0, (counts > 0).sum(1)
        num_atoms = counts.sum(1)
        sizes = self.size_logits(params, properties, **options(0))
        size = -jnp.take_along_axis(jnp.broadcast_to(sizes, (len(counts), sizes.shape[1])), (num_atoms - 1)[:, None], 1)

        def one_of(key: jax.Array, n: jax.Array) -> jax.Array:
            return jnp.minimum((antithetic_times(key, len(n)) * n).astype(jnp.int32), n - 1)

        shuffled = jnp.where(present, jax.random.uniform(order_key, present.shape), 2.0)
        rank = shuffled.argsort(1).argsort(1)
        taken = one_of(element_key, number + 1)
        chosen = present & (rank < taken[:, None])
        logits = self.element_logits(params, chosen, num_atoms, properties, **options(1))
        rest = (present & ~chosen).astype(jnp.float32)
        target = jnp.concatenate([rest / jnp.maximum(rest.sum(1), 1)[:, None], (taken == number)[:, None]], 1)
        elements = -(number + 1) * (target * logits).sum(1) - jax.lax.lgamma(number + 1.0)

        turns = jnp.maximum(number - 1, 1)  # the last count is what the others leave
        turn, before = one_of(count_key, turns)[:, None], jnp.cumsum(present, 1) - present
        query = (present & (before == turn)).argmax(1)
        known = jnp.where(before < turn, counts, 0)
        logits = self.count_logits(params, present, known, num_atoms, query, properties, **options(2))
        answer = jnp.take_along_axis(counts, query[:, None], 1) - 1
        return size[:, 0] + elements - turns * jnp.take_along_axis(logits, answer, 1)[:, 0]

    def conditions(
        self, requests: Sequence[Request], values: np.ndarray | None = None, given: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Arrays of a batch of requests: elements `required` and `allowed`, bool [B, P], possible `sizes`, bool [B, A],
        and `properties` [B, 2 K] of standardised values and flags [K]. Raises UserError for numbers of atoms that
        cannot be."""
        required, allowed, sizes = [], [], []
        everything = self._is_element
        for request in requests:
            asked = element_table(request, self.spec).ravel() > 0
            required.append(asked if request.kind in ("chemical_system", "contains") else np.zeros_like(asked))
            allowed.append(asked if request.kind in ("chemical_system", "elements") else everything)
            sizes.append(self._sizes(request, int(required[-1].sum()), int(allowed[-1].sum())))
        arrays = {"required": np.stack(required), "allowed": np.stack(allowed), "sizes": np.stack(sizes)}
        if self.num_properties:
            seen = np.zeros(2 * self.num_properties) if values is None or given is None else [*(values * given), *given]
            arrays["properties"] = np.tile(np.asarray(seen, np.float32), (len(requests), 1))
        return arrays

    def _sizes(self, request: Request, fewest: int, elements: int) -> np.ndarray:
        largest, limit = self.spec.max_atoms, self.spec.max_atoms_per_element
        low, high = max(fewest, 1), min(largest, elements * limit)
        asked = request.num_atoms or range(low, high + 1)
        number = np.arange(1, largest + 1)
        possible = (number >= max(low, asked.start)) & (number < min(high + 1, asked.stop))
        if not possible.any():
            raise UserError(
                f"{request.asked}: no such number of atoms can be: {fewest or 1} elements at least, {elements} at "
                f"most, and the model holds at most {limit} atoms of an element and {largest} in all"
            )
        return possible

    def sample(
        self,
        params: Any,
        key: jax.Array,
        arrays: Mapping[str, jax.Array],
        *,
        proposals: int = PROPOSALS,
        min_p: float = 0.0,
    ) -> jax.Array:
        """Atoms at each place [B, H, W] int32. arrays: of `conditions`, and `indices` [B].

        Under conditions `proposals` sets of elements are drawn for each sample, those asked for first, the others from
        what is allowed; one is kept, with a probability proportional to how much likelier it is in the model's own
        distribution under the condition. All randomness of a sample comes from (key, its index).

        min_p: elements and counts less likely than this share of the likeliest are not chosen ("min-p", Nguyen et al.
        2024, arXiv 2407.01082): a network gives some probability to everything. 0: the model's own distribution.
        """
        required, allowed, sizes = arrays["required"], arrays["allowed"], arrays["sizes"]
        properties = self._properties(arrays.get("properties"), len(required))
        keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i), 3))(arrays["indices"])
        batch = len(required)

        def repeated(array: jax.Array) -> jax.Array:
            return jnp.repeat(array, proposals, 0)

        fold_in = jax.vmap(jax.random.fold_in, (0, None))
        own_keys = jax.vmap(lambda k: jax.vmap(lambda i: jax.random.fold_in(k, i))(jnp.arange(proposals)))(keys[:, 0])
        many = None if properties is None else repeated(properties)
        own_keys = own_keys.reshape(batch * proposals)
        sets = self._draw_elements(
            params, own_keys, repeated(required), repeated(allowed), repeated(sizes), many, min_p
        )
        chosen, num_atoms, weight = (a.reshape(batch, proposals, *a.shape[1:]) for a in sets)
        kept = jax.vmap(jax.random.categorical)(keys[:, 1], weight)
        # Without conditions all weights are the same, and the first is as good, and the same, as of one.
        free = ~required.any(1) & (allowed == self._is_element).all(1)
        kept = jnp.where(free, 0, kept)
        chosen = jnp.take_along_axis(chosen, kept[:, None, None], 1)[:, 0]
        num_atoms = jnp.take_along_axis(num_atoms, kept[:, None], 1)[:, 0]

        def unknown(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
            return (chosen & (carry[1] == 0)).any()

        def draw_count(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            step, counts = carry
            open_ = chosen & (counts == 0)
            query = open_.argmax(1)
            logits = _likely(self.count_logits(params, chosen, counts, num_atoms, query, properties), min_p)
            count = jax.vmap(jax.random.categorical)(fold_in(keys[:, 2], step), logits) + 1
            here = open_ & (jnp.arange(open_.shape[1]) == query[:, None])
            return step + 1, jnp.where(here, count[:, None], counts)

        start = jnp.zeros((), jnp.int32), jnp.zeros(chosen.shape, jnp.int32)
        return jax.lax.while_loop(unknown, draw_count, start)[1].reshape(batch, *self.spec.table.shape)

    def _draw_elements(
        self,
        params: Any,
        keys: jax.Array,
        required: jax.Array,
        allowed: jax.Array,
        sizes: jax.Array,
        properties: jax.Array | None,
        min_p: float,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(chosen bool [B, P], number of atoms [B], log-weight [B]): the required elements, and then what the model
        draws of the allowed ones."""
        keys = jax.vmap(jax.random.split)(keys)
        size_key, element_key = keys[:, 0], keys[:, 1]
        logits = jnp.where(sizes, self.size_logits(params, properties), IMPOSSIBLE)
        num_atoms = jax.vmap(jax.random.categorical)(size_key, logits) + 1
        may = jnp.concatenate([allowed, jnp.ones((len(allowed), 1), bool)], 1)

        def unfinished(carry: tuple[jax.Array, ...]) -> jax.Array:
            return ~carry[3].all()

        def draw(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            step, chosen, weight, done = carry
            logits = self.element_logits(params, chosen, num_atoms, properties)
            asked = required & ~chosen
            forced = asked.any(1)
            open_ = _likely(jnp.where(may, logits, IMPOSSIBLE), min_p)
            drawn = jax.vmap(jax.random.categorical)(jax.vmap(jax.random.fold_in, (0, None))(element_key, step), open_)
            choice = jnp.where(forced, asked.argmax(1), drawn)
            probability = jnp.take_along_axis(logits, choice[:, None], 1)[:, 0]
            # What the draw divides the model's own probability by, and that of a choice that was none.
            factor = jnp.where(forced, probability, jax.nn.logsumexp(open_, 1))
            chosen = chosen | ((jnp.arange(chosen.shape[1]) == choice[:, None]) & ~done[:, None])
            weight = jnp.where(done, weight, weight + factor)
            return step + 1, chosen, weight, done | (choice == chosen.shape[1])

        number = len(required)
        start = jnp.zeros((), jnp.int32), jnp.zeros_like(required), jnp.zeros(number), jnp.zeros(number, bool)
        _, chosen, weight, _ = jax.lax.while_loop(unfinished, draw, start)
        # Sets in which the required elements come first are one of C(k, m) of all orders.
        k, m = chosen.sum(1) + 1.0, required.sum(1) + 1.0
        gamma = jax.lax.lgamma
        return chosen, num_atoms, weight + gamma(k) - gamma(m) - gamma(k - m + 1)

    @property
    def _is_element(self) -> np.ndarray:
        return self.spec.table.atomic_numbers.ravel() > 0

    def _counts(self, slot: jax.Array) -> jax.Array:
        """Atoms at each place [B, P] int of flat slots [B, A]."""
        places = int(np.prod(self.spec.table.shape))
        rows = jnp.arange(len(slot))[:, None]
        return jnp.zeros((len(slot), places), jnp.int32).at[rows, slot % places].add(slot < self.spec.num_slots)

    def _properties(self, properties: jax.Array | None, number: int) -> jax.Array | None:
        """Properties [B, 2 K], none of them given where None; None where the model has none."""
        if not self.num_properties:
            return None
        return jnp.zeros((number, 2 * self.num_properties)) if properties is None else properties

    def _network(
        self,
        params: Any,
        chosen: jax.Array,
        counts: jax.Array,
        num_atoms: jax.Array,
        query: jax.Array,
        properties: jax.Array | None,
        **options: Any,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        shape = (len(chosen), *self.spec.table.shape)
        tables = (a.astype(jnp.float32).reshape(shape) for a in (chosen, counts, query))
        present, known, asked = tables
        properties = self._properties(properties, len(chosen))
        return self.network.apply({"params": params}, present, known, num_atoms, asked, properties, **options)


def _likely(logits: jax.Array, min_p: float) -> jax.Array:
    """logits [B, N], of what is less likely than `min_p` times the likeliest IMPOSSIBLE."""
    if not min_p:
        return logits
    return jnp.where(logits < logits.max(1, keepdims=True) + np.log(min_p), IMPOSSIBLE, logits)
