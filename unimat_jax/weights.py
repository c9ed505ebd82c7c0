"""Parameters in safetensors files: plain arrays by name, no code, and the same bytes for the same parameters.

An exported model (`export.py`) is a folder with two of them, config.json, and model.json with the entry "export".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from unimat_jax.errors import UserError

FILES = {"ema": "model.safetensors", "raw": "raw_params.safetensors"}


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path, as "down_0.conv.kernel", in the order of the tree's leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def write(path: Path, params: Any, about: Mapping[str, Any]) -> None:
    """Writes all parameters, and `about` as JSON in the header's entry "unimat". Raises UserError."""
    arrays = {name: np.asarray(jax.device_get(leaf), order="C") for name, leaf in _named(params).items()}
    # One entry, since safetensors writes several in another order each time.
    try:
        save_file(arrays, path, metadata={"unimat": json.dumps(about, sort_keys=True)})
    except SafetensorError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that nobody else may read


def read(path: Path, like: Any) -> Any:
    """The parameters, in the tree, shapes and shardings of `like` (jax.ShapeDtypeStruct). Raises UserError, with the
    tensor's name, for a file that is damaged or holds another network's parameters; nothing is loaded before."""
    wanted = _named(like)
    if not path.is_file():
        raise UserError(f"{path} is missing: the exported model is not whole; export or download it again")
    try:
        with safe_open(path, framework="numpy") as file:
            _check(path, file, wanted)
            arrays = [_placed(file.get_tensor(name), leaf.sharding) for name, leaf in wanted.items()]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut off ({error}): export or download it again") from error
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def _placed(array: np.ndarray, sharding: Any) -> jax.Array:
    """On this process's devices, of which the sharding may have others too."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _check(path: Path, file: Any, wanted: Mapping[str, Any]) -> None:
    found = set(file.keys())
    for problem, names in (("lacks", wanted.keys() - found), ("has the unknown", found - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{path} {problem} tensor {min(names)}{more}: it does not belong to the network in model.json"
            )
    for name, leaf in wanted.items():
        entry = file.get_slice(name)
        there = entry.get_dtype(), tuple(entry.get_shape())
        asked = f"{leaf.dtype.kind.upper()}{8 * leaf.dtype.itemsize}", leaf.shape
        if there != asked:
            raise UserError(
                f"{path}: tensor {name} is {there[0]} {there[1]}, the network in model.json has {asked[0]} {asked[1]}"
            )
