"""Processes that meet and watch each other, over real sockets on loopback."""

import json
import socket
import threading
import time

import pytest

from unimat_jax import rendezvous
from unimat_jax.errors import UserError
from unimat_jax.rendezvous import Peers, ProcessesMissing, meet


@pytest.fixture
def port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def meet_all(port: int, processes: list[int], number: int, timeout: float = 20.0, **differing) -> dict:
    """What each process got: its Peers or the error. differing: by "p1", what process 1 says of itself."""
    found: dict[int, object] = {}

    def one(index: int, process: int) -> None:
        same = {"version of jax": "1"} | differing.get(f"p{process}", {})
        try:
            found[index] = meet(f"localhost:{port}", number, process, same, timeout)
        except UserError as error:
            found[index] = error

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout + 20.0)
    assert len(found) == len(processes)
    return found


def close(found: dict) -> None:
    for peers in found.values():
        peers.close()


def test_all_meet_and_know_each_other(port):
    found = meet_all(port, [2, 0, 1], 3)
    for peers in found.values():
        assert [hello["process"] for hello in peers.hellos] == [0, 1, 2]
        assert peers.name(1).startswith(f"process 1 (host {socket.gethostname()}, pid ")
    close(found)


def test_who_is_missing_is_named_everywhere(port):
    begin = time.monotonic()
    found = meet_all(port, [0, 2], 4, timeout=1.0)
    assert time.monotonic() - begin < 10.0
    for error in found.values():
        assert isinstance(error, ProcessesMissing)
        host = socket.gethostname()
        assert f"2 of 4 processes did not come within 1 s: 1, 3 (there: 0 from {host}, 2 from {host})" in str(error)


def test_no_process_0(port):
    with pytest.raises(ProcessesMissing, match=rf"process 0 does not answer at localhost:{port} within 0.5 s"):
        meet(f"localhost:{port}", 2, 1, {}, 0.5)


@pytest.mark.parametrize(
    ("processes", "said", "message"),
    [
        ([0, 1], {"p1": {"version of jax": "2"}}, "has version of jax '2', process 0 has '1'"),
        ([0, 1], {"p0": {"arguments": "a"}, "p1": {"arguments": "b"}}, "has arguments 'b', process 0 has 'a'"),
        ([0, 5], {}, "--process_id=5, but --num_processes=3"),
        ([0, 1, 1], {}, "process 1 came twice"),
    ],
)
def test_what_does_not_go_together_is_named(port, processes, said, message):
    found = meet_all(port, processes, 3 if len(processes) == 3 or 5 in processes else 2, **said)
    assert all(isinstance(error, ProcessesMissing) for error in found.values())
    assert any(message in str(error) for error in found.values()), found


def test_a_stranger_does_no_harm(port):
    def knock() -> None:
        for content in (b"GET / HTTP/1.1\r\n\r\n", json.dumps({"hello": 1}).encode() + b"\n"):
            for _ in range(100):
                try:
                    with socket.create_connection(("localhost", port), timeout=1.0) as connection:
                        connection.sendall(content)
                        break
                except OSError:
                    time.sleep(0.02)

    thread = threading.Thread(target=knock)
    thread.start()
    time.sleep(0.1)
    found = meet_all(port, [0, 1], 2)
    thread.join()
    assert all(isinstance(peers, Peers) for peers in found.values())
    close(found)


def test_a_process_that_is_gone_is_told_to_all(port):
    found = meet_all(port, [0, 1, 2], 3)
    for channel in found[1]._channels.values():  # as a killed process leaves it: without a word
        channel.close()
    for index in (0, 2):
        event = found[index].wait_for_event(10.0)
        assert (event.process, event.kind) == (1, "lost") and "connection closed" in event.message
    close(found)


def test_process_0_gone(port):
    found = meet_all(port, [0, 1], 2)
    for channel in found[0]._channels.values():
        channel.close()
    event = found[1].wait_for_event(10.0)
    assert (event.process, event.kind) == (0, "lost")
    close(found)


def test_a_silent_process_is_lost(port, monkeypatch):
    monkeypatch.setattr(rendezvous, "SILENCE", 0.5)
    monkeypatch.setattr(rendezvous, "ALIVE_EVERY", 60.0)
    found = meet_all(port, [0, 1], 2)
    event = found[0].wait_for_event(10.0)
    assert (event.process, event.kind) == (1, "lost") and "no sign of life for 0.5 s" in event.message
    close(found)


def test_signs_of_life_keep_it(port, monkeypatch):
    monkeypatch.setattr(rendezvous, "SILENCE", 1.0)
    monkeypatch.setattr(rendezvous, "ALIVE_EVERY", 0.2)
    found = meet_all(port, [0, 1], 2)
    assert found[0].wait_for_event(2.5) is None and found[1].wait_for_event(0.1) is None
    close(found)


def test_how_a_process_ended_is_told_and_a_goodbye_is_no_loss(port):
    found = meet_all(port, [0, 1, 2], 3)
    found[1].tell("failed", "ended with exit code 2")
    for index in (0, 2):
        event = found[index].wait_for_event(10.0)
        assert (event.process, event.kind, event.message) == (1, "failed", "ended with exit code 2")
    found[2].tell("bye")
    found[2].close()
    event = found[0].wait_for_event(10.0)
    assert (event.process, event.kind) == (2, "bye")
    assert found[0].wait_for_event(0.5) is None
    close(found)


def test_a_port_that_is_taken(port):
    with socket.create_server(("", port)), pytest.raises(UserError, match=f"cannot listen on port {port}"):
        meet(f"localhost:{port}", 2, 0, {}, 1.0)
