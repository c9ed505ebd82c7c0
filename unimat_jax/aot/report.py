"""A report of `program.compile_for` as text for people."""

from __future__ import annotations

from typing import Any

from unimat_jax.aot.topology import GIB

HARMLESS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")
"""Custom calls of the TPU compiler without FLOPs."""
WIDTH = 13


def as_text(report: dict[str, Any]) -> str:
    chip, model = report["chip"], report["model"]
    mesh = " x ".join(f"{name} {size}" for name, size in report["mesh"].items())
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        _line("topology", f"{report['topology']}, {report['num_chips']} chips, mesh {mesh} ({versions})"),
        _line(
            "chip",
            f"{chip['flops'] / 1e12:.0f} TFLOP/s (bf16), {chip['hbm'] / GIB:.0f} GiB HBM of which a program may use "
            f"{chip['usable_hbm'] / GIB:.2f}, {chip['hbm_bandwidth'] / 1e9:.0f} GB/s, {chip['ici'] / 1e9:.0f} GB/s to "
            "other chips",
        ),
        _line("tensor", f"L x H x W = {' x '.join(map(str, report['tensor']['grid']))}, {report['tensor']['source']}"),
        _line("model", f"{model['name']}, {model['num_params']:,} parameters" + _settings(model)),
    ]
    for name, program in report["programs"].items():
        lines += ["", *_program_lines(name, program, report)]
    return "\n".join(lines)


def _settings(model: dict[str, Any]) -> str:
    return "".join(f", {name} {model[name]}" for name in ("dtype", "remat") if name in model)


def _program_lines(name: str, program: dict[str, Any], report: dict[str, Any]) -> list[str]:
    chips = report["num_chips"]
    size = f"batch {program['batch_size']} ({program['batch_size'] // chips} a chip)"
    if "num_steps" in program:
        size += f", {program['num_steps']} steps"
    elif program["microbatches"] > 1:
        size += f" in {program['microbatches']} microbatches"
    lines = [
        _line(
            name.replace("_", " "),
            f"{size}; traced in {program['trace_seconds']:.0f} s, compiled in {program['compile_seconds']:.0f} s "
            f"({program['compile_cpu_seconds']:.0f} s of CPU)",
        ),
        _line("  memory", memory_text(program["memory"])),
    ]
    if "optimal_seconds" not in program:
        lines.append(_line("  model", f"{program['model_flops'] / chips:.3g} FLOP a chip"))
        return lines
    theirs = program["compiler"]["optimal_seconds"]
    note = f"; the compiler's own figure: {theirs:.4g} s" if theirs is not None and not program["loops"] else ""
    if program["loops"]:
        note = "; the compiler's own figure counts loops once"
    lines += [
        _line(
            "  arithmetic",
            f"{program['flops']:.4g} FLOP a chip in matrix products; the model's mathematics: "
            f"{program['model_flops'] / chips:.4g} (ratio {program['flops_ratio']:.3f})",
        ),
        _line("  traffic", f"{program['hbm_bytes']:.4g} bytes of HBM read and written a chip"),
        _line(
            "  optimal",
            f"{program['optimal_seconds']:.4g} s: each kernel at peak FLOP/s or HBM bandwidth, whichever is slower"
            + note,
        ),
        _line("  collectives", _collectives_text(program)),
        _line(
            "  utilisation",
            f"{100 * program['mfu']:.1f} % of peak FLOP/s at the optimum, "
            f"{program['crystals_per_second_per_chip']:.4g} crystals/s a chip; "
            f"{100 * program['mfu_nothing_hidden']:.1f} % and "
            f"{program['crystals_per_second_per_chip_nothing_hidden']:.4g} where no collective overlaps with work",
        ),
    ]
    warnings = []
    if program["unknown_loops"]:
        warnings.append(f"{program['unknown_loops']} loops of unknown length are counted as one round")
    opaque = [f"{count} x {target}" for target, count in program["custom_calls"].items() if target not in HARMLESS]
    if opaque:
        warnings.append(f"FLOPs of custom calls are not counted: {', '.join(opaque)}")
    return lines + [_line("  careful", warning) for warning in warnings]


def memory_text(memory: dict[str, Any]) -> str:
    """ "arguments 7.24, ... GiB; peak 27.70 of 30.75 GiB: fits, 3.05 GiB free"."""
    parts = [
        f"{name} {memory[name] / GIB:.2f}"
        for name in ("arguments", "outputs", "aliased", "temporaries", "code")
        if memory[name] is not None
    ]
    free = memory["capacity"] - memory["peak"]
    verdict = f"fits, {free / GIB:.2f} GiB free" if memory["fits"] else f"does not fit, {-free / GIB:.2f} GiB over"
    peak = "the compiler refuses it: it needs" if memory["refused"] else "peak"
    peak += " at least" if memory["partial"] else ""
    return f"{', '.join(parts)} GiB; {peak} {memory['peak'] / GIB:.2f} of {memory['capacity'] / GIB:.2f} GiB: {verdict}"


def _collectives_text(program: dict[str, Any]) -> str:
    if not program["collectives"]:
        return "none"
    kinds = [f"{kind} {total['count']} x, {total['bytes']:.3g} bytes" for kind, total in program["collectives"].items()]
    return f"{'; '.join(kinds)} a chip: {program['collective_seconds']:.3g} s on the links between chips"


def _line(name: str, text: str) -> str:
    return f"{name:<{WIDTH}} {text}"
