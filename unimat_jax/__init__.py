"""UniMat in JAX/Flax: from any collection of crystals to new, checked crystals (arXiv 2311.09235).

`import unimat_jax` loads no jax: names below are imported when they are first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unimat_jax.crystal import Crystal, CrystalError
    from unimat_jax.generator import Generator

__version__ = "0.1.0"

# XLA prints pages of errors when it loads a CPU program from the compilation cache: it takes two tuning hints
# for instructions that the processor lacks (jax issue 38445). It reads this once, when jax is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

_LAZY = {
    "Crystal": "unimat_jax.crystal",
    "CrystalError": "unimat_jax.crystal",
    "Generator": "unimat_jax.generator",
}

__all__ = ["Crystal", "CrystalError", "Generator", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'unimat_jax' has no attribute {name!r}")
