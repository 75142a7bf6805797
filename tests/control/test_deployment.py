"""Who holds the fleet's lease, and whether they can come back."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import psutil
import pytest

from pipeline.control.deployment import CLOCK_SECONDS, _dead

HOST = socket.gethostname()


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def holder(pid: int, *, moved: float = 0) -> str:
    return f"{HOST}:{pid}:{psutil.Process(pid).create_time() + moved:.0f}"


def test_a_living_holder_is_not_dead(sleeper):
    assert not _dead(holder(sleeper.pid))
    assert not _dead(holder(sleeper.pid, moved=CLOCK_SECONDS / 2))


def test_a_killed_holder_is_dead_before_and_after_it_was_reaped(sleeper):
    name = holder(sleeper.pid)
    sleeper.kill()
    psutil.Process(sleeper.pid).status()  # nobody has waited for it
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert psutil.Process(sleeper.pid).status() == psutil.STATUS_ZOMBIE
    assert _dead(name)
    sleeper.wait()
    assert _dead(name)


def test_another_process_under_its_number_is_not_it(sleeper):
    assert _dead(holder(sleeper.pid, moved=-3600))


def test_of_another_host_or_without_a_number_only_the_lease_tells():
    assert not _dead("elsewhere:1:1")
    assert not _dead(f"{HOST}:x:y")
