"""Compiled programs kept between runs: the second run of a command starts at once."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import jax

from unimat_jax.errors import UserError


def enable(setting: str) -> Path | None:
    """Switches JAX's persistent cache on, for programs that took over a second to compile; where it is, or None.

    setting: a directory, "auto" for ~/.cache/unimat_jax/compiled, or "" to leave it off. A cache that the user gave to
    JAX itself (JAX_COMPILATION_CACHE_DIR) stays. Raises UserError for a directory that cannot be made.
    """
    if given := jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return Path(given)
    if not setting:
        return None
    directory = Path.home() / ".cache" / "unimat_jax" / "compiled" if setting == "auto" else Path(setting)
    if jax.default_backend() == "cpu":  # machine code: another kind of processor on a shared disk could not run it
        directory = directory / f"cpu-{_processor()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if setting == "auto":  # no home to write to: as good as off
            return None
        raise UserError(
            f"config.train.compilation_cache = {setting!r}: {error.strerror}; give another directory, or ''"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    return directory


def _processor() -> str:
    """A short name of this machine's instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        known = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        known = platform.processor() or platform.machine()
    return hashlib.sha256(known.encode()).hexdigest()[:12]
