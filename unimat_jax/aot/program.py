"""The train step and the sampler of a config compiled for a TPU slice: what a chip then holds, computes and moves."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from unimat_jax import data
from unimat_jax.aot.topology import GIB, Topology, make_devices
from unimat_jax.errors import UserError
from unimat_jax.representation import LATTICE_FORMS, UniMatSpec

PROGRAMS = ("train_step", "sampler")


def tensor_of(config: Any) -> tuple[UniMatSpec, list[dict[str, Any]], str]:
    """(spec, condition schema, where they come from): of the prepared data set, else of the config alone.

    Without data the lattice is standardised by 0 and 1, and a crystal has as many atoms as one element may: shapes are
    all that compilation looks at. Raises UserError where the config does not say enough for that.
    """
    fields = config.data
    options = {name: fields[name] for name in ("table", "coordinates", "lattice_form")}
    try:
        directory = data.dataset_directory(fields.dataset, fields.data_dir)
    except UserError:
        directory = None
    if directory:
        statistics = data.read_statistics(directory)
        spec = data.make_spec(statistics, max_atoms_per_element=fields.max_atoms_per_element or None, **options)
        return spec, data.condition_schema(statistics, fields.properties), f"of the data set in {Path(directory)}"
    where = f"no data set {fields.dataset!r} in config.data.data_dir = {str(fields.data_dir)!r}"
    if not fields.max_atoms_per_element:
        raise UserError(
            f"{where}, and config.data.max_atoms_per_element = 0: set it (20 for MP-20), or prepare the data"
        )
    if fields.table == "data":
        raise UserError(f"{where}, and config.data.table = 'data': write 'full' or the elements, or prepare the data")
    statistics = {
        "elements": [],
        "max_atoms_per_element": fields.max_atoms_per_element,
        "max_atoms": fields.prepare.get("max_atoms", fields.max_atoms_per_element),
        "coordinate_radius": 1.0,
        "lattice": {form: {"mean": [0.0] * size, "std": [1.0] * size} for form, size in LATTICE_FORMS.items()},
    }
    spec = data.make_spec(statistics, max_atoms_per_element=fields.max_atoms_per_element, **options)
    return spec, [{"name": name} for name in fields.properties], f"of the config alone: {where}"


def compile_for(
    config: Any,
    topology: Topology,
    *,
    programs: Sequence[str] = PROGRAMS,
    count: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The report, as JSON holds it, of the programs of a config compiled for a slice; see `report.as_text`.

    count: the model's FLOPs too. say: is told what goes on, as compiling takes minutes. Raises UserError for what
    cannot be: no libtpu, no such slice, batches that do not divide.
    """
    from unimat_jax import sharding
    from unimat_jax.assembly import assemble

    unknown = set(programs) - set(PROGRAMS)
    if unknown or not programs:
        raise UserError(f"--programs = {','.join(programs)}: choose from {', '.join(PROGRAMS)}")
    mesh = sharding.make_mesh(config.train.fsdp, make_devices(topology))
    spec, schema, source = tensor_of(config)
    chip = topology.chip
    run = assemble(config, spec, schema, mesh)
    report = {
        "topology": topology.name,
        "num_chips": topology.num_chips,
        "mesh": dict(mesh.shape),
        "chip": {
            "name": chip.name, "hbm": chip.hbm, "usable_hbm": chip.usable_hbm, "flops": chip.flops,
            "hbm_bandwidth": chip.hbm_bandwidth, "ici": chip.ici, "source": chip.source,
        },
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")},
        "tensor": {"grid": spec.grid, "source": source, "num_properties": len(schema)},
        "model": {**config.model.to_dict(), "num_params": run.num_params},
        "programs": {},
    }  # fmt: skip
    for name in programs:
        jitted, arguments, size = _program(name, config, spec, schema, mesh, run)
        report["programs"][name] = size | _compile(name, jitted, arguments, size, topology, say)
        if count:
            say(f"{name}: counting the model's FLOPs ...")
            flops = _model_flops(name, config, spec, schema, mesh, arguments)
            _add_utilisation(report["programs"][name], flops, topology)
    return report


def _program(name: str, config: Any, spec: UniMatSpec, schema: Any, mesh: Any, run: Any) -> Any:
    """(jitted function, abstract arguments, sizes for the report)."""
    import jax

    from unimat_jax import sharding
    from unimat_jax.assembly import abstract_batch, sampler_program

    key = jax.eval_shape(jax.random.key, 0)
    if name == "train_step":
        batch_size = config.train.batch_size
        sizes = {"batch_size": batch_size, "microbatches": config.train.microbatches}
        return run.train_step, (run.shapes, abstract_batch(spec, len(schema), batch_size), key), sizes
    batch_size = config.sample.batch_size
    sharding.check_batch_size(batch_size, mesh, "sample.batch_size")
    sampler = sampler_program(run.objective, mesh, **config.sample)
    arguments = (run.shapes.ema_params, key, run.objective.abstract_conditions(len(schema), batch_size))
    return sampler, arguments, {"batch_size": batch_size, "num_steps": config.sample.num_steps}


def _compile(
    name: str, jitted: Any, arguments: tuple, size: dict[str, int], topology: Topology, say: Callable[[str], None]
) -> dict[str, Any]:
    from jax.errors import JaxRuntimeError

    from unimat_jax.aot.cost import module_cost
    from unimat_jax.aot.hlo import parse_module

    chip = topology.chip
    begin = time.monotonic()
    say(f"{name}: tracing ...")
    lowered = jitted.lower(*arguments)
    traced, traced_cpu = time.monotonic(), time.process_time()
    say(f"{name}: compiling for {topology.num_chips} x {topology.chip.name} ...")
    compiled, memory = None, None
    try:
        with no_compilation_cache():
            compiled = lowered.compile()
    except JaxRuntimeError as error:
        memory = refused(str(error), chip.usable_hbm)
        if memory is None:
            raise
    seconds = {
        "trace_seconds": traced - begin,
        "compile_seconds": time.monotonic() - traced,
        "compile_cpu_seconds": time.process_time() - traced_cpu,
    }
    if compiled is None:
        return {"memory": memory, **seconds}
    cost = module_cost(parse_module(compiled.as_text()), peak_flops=chip.flops, hbm_bandwidth=chip.hbm_bandwidth)
    theirs = compiled.cost_analysis() or {}
    optimal = theirs.get("optimal_seconds")
    if optimal is not None:
        optimal += cost.custom_call_sites  # XLA notes -1 second for each
    result = {
        "memory": fitting(compiled.memory_analysis(), chip.usable_hbm),
        **seconds,
        "flops": cost.flops,
        "hbm_bytes": cost.hbm_bytes,
        "optimal_seconds": cost.seconds,
        "collectives": {kind: vars(total) for kind, total in sorted(cost.collectives.items())},
        "collective_seconds": sum(total.sent for total in cost.collectives.values()) / chip.ici,
        "loops": cost.loops,
        "unknown_loops": cost.unknown_loops,
        "custom_calls": dict(cost.custom_calls),
        "compiler": {
            "flops": theirs.get("flops"),
            "bytes_accessed": theirs.get("bytes accessed"),
            "optimal_seconds": optimal,
        },
    }
    for suffix, total in (("", cost.seconds), ("_nothing_hidden", cost.seconds + result["collective_seconds"])):
        result["crystals_per_second_per_chip" + suffix] = size["batch_size"] / total / topology.num_chips
    return result


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
    """A program out of the cache has no compile time to report, and one for other machines cannot be read from it."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    def switch(on: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", on)
        compilation_cache.reset_cache()  # else what was decided for an earlier program stays

    before = jax.config.values["jax_enable_compilation_cache"]
    switch(False)
    try:
        yield
    finally:
        switch(before)


def fitting(stats: Any, capacity: int) -> dict[str, Any]:
    """Bytes of HBM a chip needs, of the compiler's statistics, against what a program may use. The program's code lies
    there too, and is not part of the compiler's peak. refused: the compiler gave up; partial: its message had no total.
    """
    needed = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    needed += stats.temp_size_in_bytes
    peak = (stats.peak_memory_in_bytes or needed) + stats.generated_code_size_in_bytes
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "peak": peak,
        "capacity": capacity,
        "fits": peak <= capacity,
        "refused": False,
        "partial": False,
    }


def refused(message: str, capacity: int) -> dict[str, Any] | None:
    """The same of the compiler's message that a program is too large, as far as it says; None of another message."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None

    def size(pattern: str) -> int | None:
        match = re.search(pattern, message)
        units = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
        return int(float(match[1]) * units[match[2]]) if match else None

    number = r"([\d.]+)([KMGT]?)"
    total = size(rf"Used {number}B? of {number}B? hbm")
    needed = total or size(r"Allocation \(size=(\d+)()\) would exceed memory")
    if needed is None:
        return None
    return {
        "arguments": size(rf"arguments +{number}B?\b"),
        "outputs": size(rf"Output size {number}B?;"),
        "aliased": size(rf"shares {number}B? with arguments"),
        "temporaries": size(rf"HLO temp +{number}B?\b"),
        "code": None,
        "peak": needed,
        "capacity": capacity,
        "fits": False,
        "refused": True,
        "partial": total is None,  # `peak` is one array alone
    }


def _model_flops(name: str, config: Any, spec: UniMatSpec, schema: Any, mesh: Any, arguments: tuple) -> float:
    """FLOPs that the mathematics asks for, all chips together: nothing recomputed, whatever config.model.remat says."""
    from unimat_jax.assembly import assemble
    from unimat_jax.flops import count_flops

    plain = copy.deepcopy(config)
    plain.train.microbatches = 1
    if "remat" in plain.model:
        plain.model.remat = False
    run = assemble(plain, spec, schema, mesh)
    jitted, _, _ = _program(name, plain, spec, schema, mesh, run)
    return count_flops(jitted, *arguments)


def _add_utilisation(program: dict[str, Any], flops: float, topology: Topology) -> None:
    """Adds the model's FLOPs and, where the program was compiled, their share of the peak."""
    program["model_flops"] = flops
    if "optimal_seconds" not in program:
        return
    program["flops_ratio"] = program["flops"] * topology.num_chips / flops
    peak = topology.num_chips * topology.chip.flops
    for suffix, seconds in (
        ("", program["optimal_seconds"]),
        ("_nothing_hidden", program["optimal_seconds"] + program["collective_seconds"]),
    ):
        program["mfu" + suffix] = flops / (peak * seconds)
