"""Our half of benchmarks/peer_unet3d.py: this package's U-Net, train step and sampler, in a process of its own.

Started by that benchmark, not by hand: it answers requests on its standard input, and is idle between them.
"""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peer_torch import grouped, serve, timed
from unimat_jax import default_config, models, sampler
from unimat_jax.assembly import compiler_options
from unimat_jax.conditioning import free_sites, make_condition
from unimat_jax.densify import densify
from unimat_jax.evaluation.pool import available_cores
from unimat_jax.flops import count_flops, count_flops_by_scope
from unimat_jax.periodic_table import Table
from unimat_jax.representation import NULL_VALUE, UniMatSpec
from unimat_jax.tensor_diffusion import TensorDiffusion
from unimat_jax.train_state import create_state, make_optimizer, make_schedule
from unimat_jax.train_step import train_step

SETTINGS = {
    "base_channels": 64, "channel_multipliers": (1, 2, 4), "num_res_blocks": 3, "attention_resolutions": (3, 9),
    "head_dim": 64, "dropout_rate": 0.0, "convolution": "axial",
}  # fmt: skip
"""The peer's, in our words. "axial" has a convolution over L beside each one over the plane, as the peer has."""


def group_of(name: str) -> str:
    """The group (`peer_torch.GROUPS`) of a module of our network."""
    match = re.match(r"(down|up)_?(\d)|(middle)", name)
    return "other" if match is None else match[3] or f"{match[1]} {match[2]}"


def random_batch(spec: UniMatSpec, batch_size: int, seed: int) -> dict[str, np.ndarray]:
    """A batch as the loader gives it, every atom at a random slot: time does not depend on what crystals they are."""
    rng = np.random.default_rng(seed)
    slots = np.stack([rng.choice(spec.num_slots, spec.max_atoms, replace=False) for _ in range(batch_size)])
    coords = rng.uniform(-1.0, 1.0, (batch_size, spec.max_atoms, 3))
    return {
        "slot": slots.astype(np.int32),
        "coords": coords.astype(np.float32),
        "lattice": rng.normal(size=(batch_size, spec.lattice_size)).astype(np.float32),
        "num_atoms": np.full(batch_size, spec.max_atoms, np.int32),
        "properties": np.zeros((batch_size, 0), np.float32),
        "index": np.arange(batch_size, dtype=np.int32),
    }


def no_condition(spec: UniMatSpec, batch_size: int) -> dict[str, jax.Array]:
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    shape, none = (batch_size, *spec.grid), zeros((batch_size, 0))
    grid = zeros((batch_size, *spec.table.shape))
    return make_condition(zeros(shape), zeros(batch_size), grid, zeros(batch_size), none, none)


def matmul_peak(dtype: str, sizes: Sequence[int] = (1024, 2048, 4096), repeats: int = 5) -> float:
    """The best FLOP/s of a product of square matrices with a float32 result."""
    product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    best = 0.0
    for size in sizes:
        a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
        product(a, b).block_until_ready()
        seconds = min(timed(lambda a=a, b=b: product(a, b).block_until_ready()) for _ in range(repeats))
        best = max(best, 2 * size**3 / seconds)
    return best


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
    }


class Ours:
    """What the benchmark asks of us. `train` and `sample` compile in their first call."""

    def setup(
        self, batch_size: int, max_atoms_per_element: int, seed: int, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """`settings` change SETTINGS; fields that neither names stay at the network's own defaults."""
        self.settings = {**SETTINGS, **settings}
        self.network = models.create("unet3d", **self.settings)
        self.spec = UniMatSpec(max_atoms_per_element, max_atoms=20, table=Table())
        self.batch = jax.tree.map(jnp.asarray, random_batch(self.spec, batch_size, seed))
        self.key = jax.random.key(seed)
        config = default_config.get_config()
        o = config.optimizer
        schedule = make_schedule(
            num_steps=1000, learning_rate=o.learning_rate, schedule="constant", warmup_steps=1, final_factor=1.0
        )
        optimizer = make_optimizer(schedule, b1=o.b1, b2=o.b2, weight_decay=o.weight_decay, grad_clip=o.grad_clip)
        objective = TensorDiffusion(apply=self.network.apply, spec=self.spec, **config.diffusion)
        step = functools.partial(train_step, objective=objective, optimizer=optimizer, ema_decay=o.ema_decay)
        self.train_step = jax.jit(step, donate_argnums=0, compiler_options=compiler_options(jax.default_backend()))
        self.cond = no_condition(self.spec, batch_size)
        x_0 = densify(self.batch, self.spec)
        self.arguments = (x_0, self.batch["lattice"], jnp.zeros(batch_size), self.cond)

        def init():
            return create_state(lambda: self.network.init(self.key, *self.arguments)["params"], optimizer)

        self.init, self.shapes = jax.jit(init), jax.eval_shape(init)
        self.state: Any = None
        self.samplers: dict[int, Callable[..., Any]] = {}

        params = self.shapes.params
        leaves = [(str(path[0].key), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
        modules = params.items()
        return {
            "settings": {**self.settings, "input": list(x_0.shape), "dtype": self._float_types()},
            "num_params": sum(leaf.size for _, leaf in leaves),
            "params": grouped([(name, leaf.size) for name, leaf in leaves], group_of),
            "res_blocks": grouped([(name, name.endswith("_block")) for name, _ in modules], group_of),
            "attentions": grouped(  # each holds one over the table's places and one over L
                [(name, len(parts)) for name, parts in modules if name.endswith("_attention")], group_of
            ),
            "threads": available_cores(),
            "versions": versions(),
            "x_0": np.asarray(x_0).tolist(),
            "null": NULL_VALUE,
        }

    def _forward(self, params: Any) -> Any:
        return self.network.apply({"params": params}, *self.arguments)

    def _float_types(self) -> str:
        """All floating-point types that occur in a forward pass."""
        return ", ".join(
            sorted(set(re.findall(r"\b(b?f\d+)\[", str(jax.make_jaxpr(self._forward)(self.shapes.params)))))
        )

    def flops(self) -> dict[str, Any]:
        """Operations of one forward pass by `peer_torch.GROUPS`, and of one train step."""
        return {
            "forward": grouped(count_flops_by_scope(self._forward, self.shapes.params).items(), group_of),
            "train_step": count_flops(self.train_step, self.shapes, self.batch, self.key),
        }

    def matmul(self, size: int, repeats: int) -> float:
        """The best FLOP/s of `repeats` float32 products of [size, size] matrices."""
        return matmul_peak("float32", (size,), repeats)

    def train(self) -> float:
        """Seconds of one step, of which the loss is read."""
        self.state = self.state or jax.block_until_ready(self.init())

        def step():
            self.state, metrics = self.train_step(self.state, self.batch, self.key)
            jax.block_until_ready(self.state)
            float(metrics["train/loss"])

        return timed(step)

    def sample(self, num_steps: int) -> float:
        """Seconds of sampling without a condition."""
        self.state = self.state or jax.block_until_ready(self.init())
        if num_steps not in self.samplers:
            size = len(self.batch["lattice"])

            def run(params, key):
                return sampler.sample(
                    functools.partial(self.network.apply, {"params": params}),
                    key,
                    (size, *self.spec.grid, 3),
                    lattice_size=self.spec.lattice_size,
                    indices=jnp.arange(size),
                    cond=self.cond,
                    free=free_sites(self.cond, self.spec),
                    num_steps=num_steps,
                    prediction_type="eps",
                )

            self.samplers[num_steps] = jax.jit(run, compiler_options=compiler_options(jax.default_backend()))
        return timed(lambda: jax.block_until_ready(self.samplers[num_steps](self.state.ema_params, self.key)))


if __name__ == "__main__":
    ours = Ours()
    serve({name: getattr(ours, name) for name in ("setup", "flops", "matmul", "train", "sample")})
