"""The part of the doctor that imports jax, as a program: one line of JSON after each stage, so that what hangs or dies
is known by the last line. `devices.py` runs it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

STAGES = ("import", "devices", "compilation cache", "jit")


def imported() -> dict[str, Any]:
    import importlib.metadata

    import jax

    import unimat_jax.models  # noqa: F401 - flax too: a jax that it cannot use is of no use

    return {"jax": jax.__version__, "jaxlib": importlib.metadata.version("jaxlib")}


def devices() -> dict[str, Any]:
    import jax

    found = [
        {"platform": d.platform, "kind": d.device_kind, "bytes": (d.memory_stats() or {}).get("bytes_limit")}
        for d in jax.local_devices()
    ]
    return {"devices": found}


def compilation_cache() -> dict[str, Any]:
    from unimat_jax import compilation_cache

    directory = compilation_cache.enable("auto")
    return {"directory": None if directory is None else str(directory)}


def jit() -> dict[str, Any]:
    """What is wrong with the numbers of the default devices and of the CPU; [] where nothing is."""
    import jax

    places = {jax.default_backend(): jax.local_devices()[0]}
    with contextlib.suppress(RuntimeError):  # where JAX_PLATFORMS leaves it out
        places["cpu"] = jax.local_devices(backend="cpu")[0]
    wrong = []
    for platform, device in places.items():
        with jax.default_device(device):
            wrong += [f"{platform}: {what}" for what in (*_product_and_sum(platform), *_matmul())]
    return {"wrong": wrong, "checked": sorted(places)}


def _product_and_sum(platform: str) -> list[str]:
    """The program that jax 0.10.2 gets wrong on CPU (jax-ml/jax#39103), as in tests/toolchain_test.py."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    def squared_lengths(rows):
        identity = jnp.eye(3, dtype=rows.dtype)
        return jax.vmap(lambda row: jnp.sum((identity @ row) ** 2))(rows)

    rows = np.zeros((32_769, 3), np.float32)
    rows[:, 0] = np.arange(len(rows))
    expected = rows[:, 0] ** 2
    # Elsewhere products are rounded on purpose, unless told otherwise; on CPU never.
    with jax.default_matmul_precision("default" if platform == "cpu" else "highest"):
        found = np.asarray(jax.jit(squared_lengths)(rows))
    wrong = ~np.isclose(found, expected, rtol=1e-6)
    if not wrong.any():
        return []
    first = int(np.flatnonzero(wrong)[0])
    return [
        f"{int(wrong.sum()):,} of {len(rows):,} squared lengths are wrong under jit, as {found[first]:,.0f} for "
        f"{expected[first]:,.0f}"
    ]


def _matmul() -> list[str]:
    """Whole numbers small enough to be exact in every precision."""
    import jax
    import numpy as np

    a, b = (np.random.default_rng(seed).integers(-4, 5, (256, 256)).astype(np.float32) for seed in (0, 1))
    found = np.asarray(jax.jit(lambda a, b: a @ b)(a, b))
    number = int((found != a @ b).sum())
    return [f"{number:,} of {found.size:,} numbers of a matrix product are wrong"] if number else []


def main() -> None:
    functions: tuple[Callable[[], dict[str, Any]], ...] = (imported, devices, compilation_cache, jit)
    for stage, function in zip(STAGES, functions, strict=True):
        begin = time.monotonic()
        try:
            result = function()
        except BaseException as error:
            print(json.dumps({"stage": stage, "error": f"{type(error).__name__}: {error}"}), flush=True)
            return
        print(json.dumps({"stage": stage, **result, "seconds": round(time.monotonic() - begin, 2)}), flush=True)


if __name__ == "__main__":
    main()
