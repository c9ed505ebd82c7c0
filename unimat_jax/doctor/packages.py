"""Python, this package, the packages that it needs, and its extras, by the metadata installed: none is imported."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import unimat_jax
from unimat_jax.doctor import Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement

US = "unimat-jax"
SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")
BROKEN_JAX = {
    "0.10.2": "returns wrong numbers from jit on CPU, jax-ml/jax#39103",
    "0.11.1": "breaks flax",
}


def python() -> Iterator[Finding]:
    """The interpreter against Requires-Python, and where the package is."""
    from packaging.specifiers import SpecifierSet

    version, bits = platform.python_version(), 64 if sys.maxsize > 2**32 else 32
    found = f"{version} ({bits} bit) on {platform.system()} {platform.machine()}, {sys.executable}"
    if bits != 64:
        yield Finding("problem", "python", found, "use a 64-bit Python: jax has no other")
    try:
        about = importlib.metadata.metadata(US)
    except importlib.metadata.PackageNotFoundError:
        yield Finding("ok", "python", found)
        yield Finding(
            "problem", US, "is not installed here: its versions are unknown", "in the clone: pip install -e ."
        )
        return
    (asked,) = about.get_all("Requires-Python") or [""]
    fits = SpecifierSet(asked).contains(version, prereleases=True)
    fix = "" if fits else f"make a virtual environment with a Python {asked}"
    yield Finding("ok" if fits else "problem", "python", f"{found}; {asked or 'any'} is asked for", fix)
    here = Path(unimat_jax.__file__).parent
    if about["Version"] == unimat_jax.__version__:
        yield Finding("ok", US, f"{about['Version']} in {here}")
    else:
        found = f"{here} is version {unimat_jax.__version__}, installed is {about['Version']}"
        yield Finding("warning", US, found, "in the clone: pip install -e .")


def required() -> Iterator[Finding]:
    """Every package that is needed, and jaxlib against what jax asks."""
    asked = _requirements(US)
    wrong = list(_wrong(asked))
    if not any(r.name == "jax" for r, _ in wrong):
        wrong += _wrong(r for r in _requirements("jax") if r.name == "jaxlib")
    for requirement, version in wrong:
        name = requirement.name
        found = f"{name} is not installed" if version is None else f"{name} {version}, but {_asked(requirement)}"
        if name == "jax" and version in BROKEN_JAX:
            found += f": this version {BROKEN_JAX[version]}"
        yield Finding("problem", "packages", found, f"pip install '{name}{requirement.specifier}'")
    if not wrong:
        shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN)
        yield Finding("ok", "packages", f"all {len(asked)} in range: {shown}, ...")


def extras() -> Iterator[Finding]:
    """Each extra of the package: there or not, and how to get it."""
    for extra in importlib.metadata.metadata(US).get_all("Provides-Extra") or []:
        fix = f"to have it, in the clone: pip install -e '.[{extra}]'"
        wrong = list(_wrong(_requirements(US, extra)))
        outdated = [f"{r.name} {version}, but {_asked(r)}" for r, version in wrong if version is not None]
        missing = [r.name for r, version in wrong if version is None]
        if missing:  # what else it needs may be there for another reason, in any version
            yield Finding("ok", f"extra {extra}", f"not installed (no {', '.join(dict.fromkeys(missing))})", fix)
        elif outdated:
            yield Finding("warning", f"extra {extra}", "; ".join(outdated), fix)
        else:
            yield Finding("ok", f"extra {extra}", "installed")


def extra_installed(extra: str) -> bool:
    return not list(_wrong(_requirements(US, extra)))


def _asked(requirement: Requirement) -> str:
    return f"{requirement.specifier} is asked for" if requirement.specifier else "any is asked for"


def _requirements(distribution: str, extra: str = "") -> list[Requirement]:
    """What a distribution asks for on this machine: by itself, or only for one of its extras."""
    from packaging.requirements import Requirement

    result = []
    for requirement in map(Requirement, importlib.metadata.requires(distribution) or []):
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        with_extra = marker is not None and bool(extra) and marker.evaluate({"extra": extra})
        if (with_extra and not always) if extra else always:
            result.append(requirement)
    return result


def _wrong(
    requirements: Iterator[Requirement] | list[Requirement], seen: set[tuple[str, str]] | None = None
) -> Iterator[tuple[Requirement, str | None]]:
    """Those that are not met, extras of extras included, with the installed version or None."""
    seen = set() if seen is None else seen
    for requirement in requirements:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield requirement, None
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield requirement, version
        for extra in sorted(requirement.extras):
            if (requirement.name, extra) not in seen:
                seen.add((requirement.name, extra))
                yield from _wrong(_requirements(requirement.name, extra), seen)
