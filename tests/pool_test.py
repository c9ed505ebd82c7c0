"""Items that raise, hang or kill their process, among others that must not notice."""

import ctypes
import itertools
import os
import signal
import subprocess
import sys
import time
from collections import deque

import pytest

from unimat_jax.crystal import CrystalError
from unimat_jax.errors import UserError
from unimat_jax.evaluation import pool
from unimat_jax.evaluation.pool import Failure, Pool, map_isolated


def behave(item):
    """What the worker processes do with an item; imported there by name."""
    match item:
        case "raise":
            raise ValueError("no good")
        case "raise with reason":
            raise CrystalError("no_atoms", "empty")
        case "sleep":
            time.sleep(60)
        case "swallow":  # a function that handles every exception of its own
            try:
                time.sleep(60)
            except Exception:
                return "swallowed"
        case "hang in C":
            deque(itertools.repeat(0), maxlen=0)  # never ends, and never looks at signals
        case "crash":
            ctypes.string_at(0)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            sys.exit(3)
        case "unpicklable":
            return lambda: None
        case int():
            time.sleep(0.002)
            return item**2
        case _:
            return os.getpid()


@pytest.fixture(scope="module")
def workers():
    with Pool(2, timeout_s=0.5) as found:
        yield found


def test_results_in_the_order_of_the_items(workers):
    assert list(workers.map(behave, range(200))) == [i**2 for i in range(200)]
    pids = set(workers.map(behave, ["pid"] * 50))
    assert pids <= {worker.process.pid for worker in workers._workers}, "the same processes as before"
    assert os.getpid() not in pids
    assert list(workers.map(behave, [])) == []


def test_an_item_fails_alone(workers, monkeypatch):
    monkeypatch.setattr(pool, "GRACE_S", 0.2)
    bad = {
        3: ("raise", "error"), 8: ("sleep", "timeout"), 9: ("crash", "worker_died"), 10: ("killed", "worker_died"),
        20: ("hang in C", "timeout"), 21: ("raise with reason", "no_atoms"), 22: ("unpicklable", "error"),
        30: ("exit", "worker_died"), 39: ("swallow", "timeout"),
    }  # fmt: skip
    items = [bad[i][0] if i in bad else i for i in range(40)]
    results = list(workers.map(behave, items))
    for i, result in enumerate(results):
        if i in bad:
            assert isinstance(result, Failure) and result.reason == bad[i][1], (i, result)
        else:
            assert result == i**2
    assert results[3].message == "ValueError: no good"
    assert "killed" in results[20].message and "killed" not in results[39].message
    assert list(workers.map(behave, range(20))) == [i**2 for i in range(20)]


def test_results_come_as_they_are_ready_and_may_be_left(workers):
    results = workers.map(behave, [1, 2, *["sleep"] * 50])
    start = time.monotonic()
    assert next(results) == 1
    results.close()
    assert list(workers.map(behave, [5])) == [25]
    assert time.monotonic() - start < 20


def test_this_process(capsys):
    items = [1, "raise", "sleep", "raise with reason", "swallow", 2]
    before = signal.getsignal(signal.SIGALRM)
    results = list(map_isolated(behave, items, num_workers=0, timeout_s=0.1, progress="squaring"))
    assert [getattr(r, "reason", r) for r in results] == [1, "error", "timeout", "no_atoms", "timeout", 4]
    assert list(map_isolated(behave, ["pid"], num_workers=0, timeout_s=1)) == [os.getpid()]
    assert signal.getsignal(signal.SIGALRM) is before
    shown = capsys.readouterr().err
    assert "squaring" in shown and "6/6" in shown and "failed=4" in shown


def test_negative_number_of_workers():
    with pytest.raises(UserError, match="num_workers = -1"):
        Pool(-1, timeout_s=1)


def test_a_script_without_main_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from unimat_jax.evaluation.pool import map_isolated\n"
        "from unimat_jax.errors import UserError\n"
        "try:\n    print(list(map_isolated(abs, [-1], num_workers=1, timeout_s=5)))\n"
        "except UserError as error:\n    print('told:', error)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert "told:" in done.stdout and "__main__" in done.stdout, done.stderr
