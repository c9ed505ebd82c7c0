"""The processes of a job meet before JAX starts, and watch each other after: plain sockets, no JAX.

JAX waits minutes for a process that never comes and names nobody, and aborts all others with a C++ trace when one dies.
Here every process tells process 0 who it is, over one TCP connection that stays open; a connection that closes, or is
silent, is a process lost, and process 0 tells it to all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from unimat_jax.errors import UserError

ALIVE_EVERY = 5.0
"""Seconds between signs of life."""
SILENCE = 20.0
"""Seconds without one after which a process counts as lost: its machine or its network is gone."""


class ProcessesMissing(UserError):
    """Not all processes of the job came, or they cannot work together."""


@dataclasses.dataclass(frozen=True)
class Event:
    """What happened to process `process`. kind: "bye" (done), "failed" (ended with an error), "lost" (no word)."""

    process: int
    kind: str
    message: str


class Channel:
    """JSON lines over a socket. `receive` returns None where the other side closed it."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._buffer, self._lock = connection, b"", threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        with self._lock, contextlib.suppress(OSError):  # what is gone is noticed by the reader
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """Raises TimeoutError after `timeout` seconds without a whole line."""
        end = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            try:
                self._socket.settimeout(max(end - time.monotonic(), 0.001))
                data = self._socket.recv(65536)
            except TimeoutError:
                raise
            except OSError:
                return None
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Peers:
    """The other processes after all have met. `hellos`: what each process told of itself, by number."""

    def __init__(self, process: int, hellos: list[dict[str, Any]], channels: Mapping[int, Channel]):
        """channels: to all others in process 0, to process 0 alone in the others."""
        self.process, self.hellos, self._channels = process, hellos, dict(channels)
        self.events: queue.Queue[Event] = queue.Queue()
        self.ended: set[int] = set()
        self._closed = threading.Event()
        for number, channel in self._channels.items():
            threading.Thread(target=self._read, args=(number, channel), daemon=True).start()
        threading.Thread(target=self._stay_alive, daemon=True).start()

    def name(self, process: int) -> str:
        hello = self.hellos[process]
        return f"process {process} (host {hello['host']}, pid {hello['pid']})"

    def tell(self, kind: str, message: str = "") -> None:
        """Tells all others what became of this process."""
        self._pass_on(Event(self.process, kind, message))

    def wait_for_event(self, timeout: float) -> Event | None:
        with contextlib.suppress(queue.Empty):
            return self.events.get(timeout=timeout)
        return None

    def close(self) -> None:
        self._closed.set()
        for channel in self._channels.values():
            channel.close()

    def _read(self, number: int, channel: Channel) -> None:
        while True:
            try:
                message = channel.receive(SILENCE)
            except TimeoutError:
                event = Event(number, "lost", f"gave no sign of life for {SILENCE:g} s")
            else:
                if message == {}:
                    continue
                if message is not None:
                    event = Event(message["process"], message["kind"], message["message"])
                elif number in self.ended or self._closed.is_set():
                    return
                else:
                    event = Event(number, "lost", "is gone: its connection closed")
            self.ended.add(event.process)
            self._pass_on(event)
            self.events.put(event)
            if event.kind == "lost" and event.process == number:
                return

    def _pass_on(self, event: Event) -> None:
        for number, channel in self._channels.items():
            if number != event.process and (self.process == 0 or event.process == self.process):
                channel.send(dataclasses.asdict(event))

    def _stay_alive(self) -> None:
        while not self._closed.wait(ALIVE_EVERY):
            for channel in self._channels.values():
                channel.send({})


def meet(address: str, num_processes: int, process: int, same: Mapping[str, Any], timeout: float) -> Peers:
    """Waits until all processes of the job are there. address: "host:port" of process 0; same: what must be equal in
    all of them (versions, arguments). Raises ProcessesMissing that names who did not come, or what differs."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator_address={address}: write HOST:PORT of process 0")
    hello = {"process": process, "host": socket.gethostname(), "pid": os.getpid(), "same": dict(same)}
    if process == 0:
        return _host(int(port), num_processes, hello, timeout)
    return _join(host.strip("[]"), int(port), hello, timeout)


def _host(port: int, num_processes: int, hello: dict[str, Any], timeout: float) -> Peers:
    end = time.monotonic() + timeout
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port} ({error.strerror}): choose another --coordinator_address"
        ) from error
    found: dict[int, tuple[dict[str, Any], Channel]] = {}
    channels: list[Channel] = []
    problem = ""
    with server:
        while len(found) < num_processes - 1 and not problem:
            server.settimeout(max(end - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
                channel = Channel(connection)
                theirs = channel.receive(5.0)
            except TimeoutError:
                if time.monotonic() >= end:
                    break
                continue
            if theirs is None or "same" not in theirs:  # a stranger: a port scanner, a health check
                channel.close()
                continue
            channels.append(channel)
            number = theirs["process"]
            problem = _differences(hello, theirs, num_processes)
            if number in found:
                other = found[number][0]
                problem = f"process {number} came twice: from {other['host']} (pid {other['pid']}) and from "
                problem += f"{theirs['host']} (pid {theirs['pid']}): give each its own --process_id"
            found.setdefault(number, (theirs, channel))
    missing = [number for number in range(1, num_processes) if number not in found]
    if missing and not problem:
        here = ", ".join(f"{n} from {h['host']}" for n, (h, _) in sorted({0: (hello, None), **found}.items()))
        problem = (
            f"{len(missing)} of {num_processes} processes did not come within {timeout:g} s: "
            f"{', '.join(map(str, missing))} (there: {here}): look at their own output, start all within that time, or "
            "give a longer --rendezvous_timeout"
        )
    if problem:
        for channel in channels:
            channel.send({"problem": problem})
            channel.close()
        raise ProcessesMissing(problem)
    hellos = [hello, *(found[number][0] for number in range(1, num_processes))]
    for _, channel in found.values():
        channel.send({"hellos": hellos})
    return Peers(0, hellos, {number: channel for number, (_, channel) in found.items()})


def _join(host: str, port: int, hello: dict[str, Any], timeout: float) -> Peers:
    end = time.monotonic() + timeout
    last: Exception | None = None
    answer = None
    channel: Channel | None = None
    while answer is None and time.monotonic() < end:
        try:
            channel = Channel(socket.create_connection((host, port), timeout=5.0))
            channel.send(hello)
            answer = channel.receive(max(end - time.monotonic(), 0.0) + 10.0)
        except OSError as error:  # TimeoutError too
            last = error
        if answer is None:  # not there yet, or it is the end of an earlier job
            time.sleep(0.2)
    if answer is None or channel is None:
        raise ProcessesMissing(
            f"process 0 does not answer at {host}:{port} within {timeout:g} s ({last or 'it closed the connection'}): "
            "is it started, is the address right on every machine, is the port open?"
        )
    if "problem" in answer:
        raise ProcessesMissing(answer["problem"])
    return Peers(hello["process"], answer["hellos"], {0: channel})


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], num_processes: int) -> str:
    if not 0 < theirs["process"] < num_processes:
        return f"a process came with --process_id={theirs['process']}, but --num_processes={num_processes}"
    for name, value in ours["same"].items():
        if theirs["same"].get(name) != value:
            return (
                f"process {theirs['process']} on {theirs['host']} has {name} {theirs['same'].get(name)!r}, "
                f"process 0 has {value!r}: start all with the same"
            )
    return ""
