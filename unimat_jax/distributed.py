"""From one process to a pod: who belongs to the job, JAX's own start, and a clear end when one of them is gone.

A program that may run in several processes goes through `launch`. Alone, it just runs. In a job, each process is two: a
supervisor without JAX, which meets and watches the others (rendezvous.py), and its child, which does the work. JAX ends
a process whose peer died by a C++ abort that names nobody: the supervisor outlives it and says who is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

from unimat_jax.cli import run_program
from unimat_jax.errors import UserError
from unimat_jax.rendezvous import Event, Peers, ProcessesMissing, meet

PEER_LOST = 75
"""Exit code of a process that stopped since another is gone (EX_TEMPFAIL): start all again with the same command."""
HEARTBEAT_TIMEOUT = 30
"""Seconds after which JAX itself gives up a silent process; the supervisors notice before."""
RENDEZVOUS_TIMEOUT = 120.0

FLAGS = """  --coordinator_address=HOST:PORT --num_processes=N --process_id=I   of a job of several processes (PORT + 1
      is used too); found without flags under SLURM (srun), Open MPI (mpirun) and on TPU pods
  --rendezvous_timeout=SECONDS   how long the processes wait for each other (default 120)
  exit codes: 0 done, or saved after SIGTERM or Ctrl-C; 2 an error to mend; 75 another process is gone: start again"""
_CHILD = "UNIMAT_CHILD"
_CAN_BE_A_CONSEQUENCE = (1, -signal.SIGABRT, -signal.SIGSEGV)
"""How a child ends when a collective with a lost process fails: not its own fault until nobody is found lost."""
_GRACE = 15.0


@dataclasses.dataclass(frozen=True)
class Job:
    """Several processes that work as one. local_device_ids: those of this process where it may not use all."""

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None
    hosts: list[str] = dataclasses.field(default_factory=list)


def launch(module: str, argv: Sequence[str], program: Callable[[Sequence[str]], int]) -> int:
    """Runs program(argv) here, or as one process of a job; its exit code. argv may hold FLAGS, the program does not
    see them. module: what `python -m` starts as the child."""
    given, rest = _take_flags(argv)
    if _CHILD in os.environ:
        return _be_child(program, rest)
    job = _find_job(given)
    if job is None:
        return program(rest)
    timeout = float(given.get("rendezvous_timeout", RENDEZVOUS_TIMEOUT))
    host, _, port = job.coordinator_address.rpartition(":")
    if not port.isdigit():
        raise UserError(f"--coordinator_address={job.coordinator_address}: write HOST:PORT of process 0")
    same = {f"version of {name}": importlib.metadata.version(name) for name in ("unimat-jax", "jax", "jaxlib")}
    same |= {"number of processes": job.num_processes, "arguments": " ".join(rest)}
    try:
        peers = meet(f"{host}:{int(port) + 1}", job.num_processes, job.process_id, same, timeout)
    except ProcessesMissing as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return PEER_LOST
    job = dataclasses.replace(job, hosts=[hello["host"] for hello in peers.hellos])
    with contextlib.closing(peers):
        return _supervise(peers, job, [sys.executable, "-m", module, *rest])


def _take_flags(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    names = ("coordinator_address", "num_processes", "process_id", "rendezvous_timeout")
    given, rest, words = {}, [], iter(argv)
    for word in words:
        name, equals, _ = word.lstrip("-").replace("-", "_").partition("=")
        if not word.startswith("-") or name not in names:
            rest.append(word)
            continue
        given[name] = word.partition("=")[2] if equals else next(words, "")
        if name != "coordinator_address":
            try:
                float(given[name])
            except ValueError as error:
                raise UserError(f"--{name}={given[name]}: give a number") from error
    return given, rest


def _find_job(given: dict[str, str]) -> Job | None:
    """By flags, or by what SLURM, Open MPI or a TPU pod tell; None for one process."""
    explicit = [given.get(name) for name in ("coordinator_address", "num_processes", "process_id")]
    if any(explicit) and not all(explicit):
        raise UserError("--coordinator_address, --num_processes and --process_id go together: give all three, or none")
    if all(explicit):
        number, process = int(given["num_processes"]), int(given["process_id"])
        if not 0 <= process < number:
            raise UserError(f"--process_id={process}: give 0 to {number - 1}, as --num_processes={number}")
        return Job(given["coordinator_address"], number, process) if number > 1 else None
    # JAX knows these environments; jax.distributed.initialize would ask the same, but only once it is too late to say
    # who is missing.
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 60)
    address, number, process, devices = found
    if address is None or number is None or process is None or number < 2:
        return None
    return Job(address, number, process, None if devices is None else list(devices))


def _be_child(program: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Runs the program as a process of JAX's job; ends with its supervisor."""

    def follow_supervisor() -> None:
        os.read(0, 1)  # returns when the supervisor is gone
        os._exit(PEER_LOST)

    threading.Thread(target=follow_supervisor, daemon=True).start()
    _join_jax(Job(**json.loads(os.environ[_CHILD])))
    try:
        code = run_program(program, argv)
    except BaseException as error:
        if _is_about_a_peer(str(error)):
            time.sleep(_GRACE)  # the supervisor knows more and ends this process with a better word
        traceback.print_exc()
        code = 1
    if code:  # at once: JAX would first wait for the others, who may be waiting for this process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return 0


def _join_jax(job: Job) -> None:
    import jax

    jax.distributed.initialize(
        job.coordinator_address,
        job.num_processes,
        job.process_id,
        # Given even where all are meant: else JAX asks its cluster detection again.
        local_device_ids=job.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=120,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        shutdown_timeout_seconds=60,
    )


def hosts() -> list[str]:
    """Host name of each process of the job this process belongs to; empty outside one."""
    return json.loads(os.environ[_CHILD])["hosts"] if _CHILD in os.environ else []


def _is_about_a_peer(message: str) -> bool:
    return any(word in message for word in ("Gloo", "gloo", "NCCL", "coordination", "UNAVAILABLE", "DEADLINE", "peer"))


@contextlib.contextmanager
def _signals_to(child: subprocess.Popen[bytes]) -> Iterator[None]:
    def forward(number: int, frame: object) -> None:
        if child.poll() is None:
            child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _supervise(peers: Peers, job: Job, command: Sequence[str]) -> int:
    """Runs the child to its end; its exit code, or PEER_LOST where another process is to blame."""
    env = os.environ | {_CHILD: json.dumps(dataclasses.asdict(job))}
    # A session of its own: signals of the terminal come through us, once. Its input is a pipe that closes with us.
    child = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, start_new_session=True)
    with _signals_to(child):
        try:
            blamed, code = _watch(peers, child)
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
    if blamed is not None:
        peers.tell("failed", f"stopped, since {peers.name(blamed.process)} {blamed.message}")
        print(
            f"error: {peers.name(blamed.process)} {blamed.message}; process {peers.process} stops too (exit code "
            f"{PEER_LOST}): the same command on all processes goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        return PEER_LOST
    if code:
        peers.tell("failed" if code > 0 else "lost", _how(code))
    else:
        peers.tell("bye")
        _let_others_finish(peers)
    return code if code >= 0 else 128 - code


def _watch(peers: Peers, child: subprocess.Popen[bytes]) -> tuple[Event | None, int]:
    """(the event of another process that ended this one, or None; the child's exit code)."""
    blamed: Event | None = None
    deadline = float("inf")
    while True:
        event = peers.wait_for_event(0.1)
        if event is not None and event.kind != "bye" and blamed is None:
            blamed = event
            # One that failed may have failed by what fails here too, as a wrong argument: that error is the better.
            deadline = time.monotonic() + (_GRACE if event.kind == "failed" else 0.0)
        code = child.poll()
        if code is not None:
            if code not in _CAN_BE_A_CONSEQUENCE:
                return None, code
            end = time.monotonic() + _GRACE
            while blamed is None and time.monotonic() < end:
                event = peers.wait_for_event(end - time.monotonic())
                blamed = event if event is not None and event.kind != "bye" else None
            return blamed, code
        if time.monotonic() > deadline:
            return blamed, PEER_LOST


def _how(code: int) -> str:
    return f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


def _let_others_finish(peers: Peers) -> None:
    """Process 0 passes on what the others tell: it leaves last."""
    end = time.monotonic() + 60.0
    while peers.process == 0 and len(peers.ended) < len(peers.hellos) - 1 and time.monotonic() < end:
        peers.wait_for_event(0.5)
