"""Floating-point operations of a JAX function, counted in its jaxpr: nothing is compiled and nothing is run.

Counted are matrix products and convolutions, 2 operations for each multiply-add of their definition. Kernel taps that
fall on padding, or between the elements of a dilated input, are not counted: XLA's own cost analysis has the same rule,
and each gradient of a convolution then costs what its forward pass does. Not counted is what is element-wise:
activations, norms, softmax, random numbers, the optimizer; nor sums of element-wise products (inner products).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

OPAQUE = ("dot_product_attention", "pallas_call", "ragged_dot", "ffi_call")
"""Beginnings of the names of primitives that may compute matrix products out of a jaxpr's sight."""
RECOMPUTED = "rematted_computation"
"""A scope that `jax.checkpoint` puts between the names of modules."""


@dataclasses.dataclass(frozen=True)
class ModelCost:
    """Number of parameters, and operations for one crystal: of the forward pass, and of it and the gradient."""

    num_params: int
    forward_flops_per_crystal: float
    train_flops_per_crystal: float


def step_cost(train_step: Callable[..., Any], state: Any, batch: Any, key: Any) -> ModelCost:
    """The cost of a jitted `train_step(state, batch, key)`. What rematerialisation computes again counts as training.

    Traces the step, which its first call needs anyway: jit keeps the trace for arguments of the same shapes and
    shardings (arrays, or `jax.ShapeDtypeStruct`s that have them), so that counting takes next to no time of its own.
    """
    forward, total = _forward_and_total(train_step, state, batch, key)
    number = jax.tree.leaves(batch)[0].shape[0]
    return ModelCost(_num_params(state.params), forward / number, total / number)


def model_cost(network: Any, arguments: tuple[Any, ...]) -> ModelCost:
    """The cost of a network (`models.create`) on arguments x [B, L, H, W, 3], lattice [B, D], logsnr [B], cond, or on
    their shapes. Training is the gradient of a sum of squares of all it returns with respect to the parameters, dropout
    on."""
    key = jax.eval_shape(jax.random.key, 0)
    params = jax.eval_shape(lambda key, arguments: network.init(key, *arguments)["params"], key, arguments)

    def loss(params, arguments, key):
        predictions = network.apply({"params": params}, *arguments, train=True, rngs={"dropout": key})
        return sum(jnp.sum(jnp.square(prediction)) for prediction in predictions)

    forward, total = _forward_and_total(jax.value_and_grad(loss), params, arguments, key)
    number = arguments[0].shape[0]
    return ModelCost(_num_params(params), forward / number, total / number)


def count_flops(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    """Operations of fn(*args, **kwargs), all arrays or `jax.ShapeDtypeStruct`s: bind anything else with `partial`.

    A scan counts its body times its length, `cond` its dearest branch, a sharded function all its devices, and
    `jax.checkpoint` its forward pass again where a gradient recomputes it; what no result depends on is left out. Of
    the forms of a `platform_dependent`, one of which may be a product where another is a sum, the cheapest counts.
    Raises ValueError for matrix products inside a `while` loop, whose number of rounds nobody knows, or inside a kernel
    that shows no jaxpr.
    """
    return float(sum(flops for _, flops in _products(fn, *args, **kwargs)))


def count_flops_by_scope(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, float]:
    """`count_flops` by the name of the flax module, one level under the root, that each operation stands in, as
    "down0_0_block", forward and gradient together; "" for what is in none. Adds up to `count_flops`."""
    counts: Counter[str] = Counter()
    for stack, flops in _products(fn, *args, **kwargs):
        # Of "UNet3D", "UNet3D._input" (a method), "sites_in": the last. Checkpoints may tell the root's name twice.
        modules = [n for n, is_scope in stack if is_scope and "." not in n and n != RECOMPUTED]
        counts[next((n for n in modules if n != modules[0]), "")] += flops
    return {name: float(flops) for name, flops in counts.items()}


Stack = tuple[tuple[str, bool], ...]
"""Where an operation stands, outermost first: names of scopes (True) and of transforms of what follows, as jvp."""


def _forward_and_total(fn: Callable[..., Any], *args: Any) -> tuple[float, float]:
    """Operations outside of backward passes, and all, of a function that takes gradients."""
    products = list(_products(fn, *args))
    forward = sum(flops for stack, flops in products if ("transpose", False) not in stack)
    return float(forward), float(sum(flops for _, flops in products))


def _num_params(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _products(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[tuple[Stack, int]]:
    jitted = fn if hasattr(fn, "trace") else jax.jit(fn)
    return _walk(jitted.trace(*args, **kwargs).jaxpr.jaxpr, (), 1)


def _walk(jaxpr: core.Jaxpr, outer: Stack, times: int) -> Iterator[tuple[Stack, int]]:
    """(stack, operations) of each product in a jaxpr that runs `times` times within `outer`."""
    for eqn in _needed(jaxpr):
        name, params = eqn.primitive.name, eqn.params
        entries = eqn.source_info.name_stack.stack
        stack = outer + tuple((entry.name, type(entry).__name__ == "Scope") for entry in entries)
        if name == "dot_general":
            yield stack, times * _dot_flops(eqn)
        elif name == "conv_general_dilated":
            yield stack, times * _convolution_flops(eqn)
        elif name.startswith(OPAQUE):
            raise ValueError(f"count_flops cannot look into {name}: count with an implementation in plain XLA")
        elif name == "cond":
            branches = [list(_walk(branch.jaxpr, stack, times)) for branch in params["branches"]]
            choose = min if params.get("branches_platforms") else max
            yield from choose(branches, key=lambda branch: sum(flops for _, flops in branch))
        elif name == "while":
            if any(True for inner in _jaxprs(params) for _ in _walk(inner, stack, times)):
                raise ValueError("count_flops: a while loop of unknown length has matrix products: use jax.lax.scan")
        else:
            for inner in _jaxprs(params):
                yield from _walk(inner, stack, times * _rounds(name, params))


def _needed(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    """Equations that a result depends on. A gradient may hold others, which compilers drop: that of the data."""
    wanted, kept = set(filter(_is_variable, jaxpr.outvars)), []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not wanted.isdisjoint(eqn.outvars):
            wanted.update(filter(_is_variable, eqn.invars))
            kept.append(eqn)
    return kept[::-1]


def _is_variable(atom: Any) -> bool:
    return not isinstance(atom, core.Literal)


def _rounds(primitive: str, params: dict[str, Any]) -> int:
    if primitive == "shard_map":  # its jaxpr is one device's
        return math.prod(params["mesh"].shape[axis] for axis in params["manual_axes"])
    return params["length"] if primitive == "scan" else 1


def _jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _dot_flops(eqn: Any) -> int:
    (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
    lhs, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if len(out) == len(batch):  # an inner product, as in a norm: a sum that was written as a product
        return 0
    return 2 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)


def _convolution_flops(eqn: Any) -> int:
    params = eqn.params
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    lhs, rhs, out = (variable.aval.shape for variable in (*eqn.invars, *eqn.outvars))
    # The kernel holds the channels of one group alone: neither groups of channels nor of the batch need more than this.
    number = out[out_spec[0]] * out[out_spec[1]] * rhs[rhs_spec[1]]
    settings = (params[name] for name in ("window_strides", "padding", "lhs_dilation", "rhs_dilation"))
    for size, taps, places, setting in zip(
        lhs_spec[2:], rhs_spec[2:], out_spec[2:], zip(*settings, strict=True), strict=True
    ):
        stride, (before, _), holes, dilation = setting
        number *= meetings(lhs[size], rhs[taps], out[places], stride, before, holes, dilation)
    return 2 * number


@functools.cache
def meetings(size: int, taps: int, places: int, stride: int, before: int, holes: int, dilation: int) -> int:
    """Along one axis, the pairs of a result and a kernel tap that meet an element of the input; `before`: padding. The
    TPU compiler writes a batch of products as a convolution along the batch, so that all may be thousands."""
    at = np.arange(places)[:, None] * stride + np.arange(taps) * dilation - before
    return int(np.count_nonzero((at >= 0) & (at <= (size - 1) * holes) & (at % holes == 0)))
