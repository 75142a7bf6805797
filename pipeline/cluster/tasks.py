"""Runs one function over many calls as Ray tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

import ray
from ray.exceptions import RayError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RETRIES = 2  # a task whose worker is lost is started again this often
POLL = 0.5  # seconds between two reports of progress
R = TypeVar("R")


class Failed(NamedTuple):
    """A call that gave no result, and the last line of its error."""

    why: str


def run_tasks(
    task: Callable[..., R], calls: Sequence[tuple[object, ...]], *, on_progress: Callable[[int], None]
) -> list[R | Failed]:
    """Runs ``task(*call)`` for every call, one CPU each, and returns what each call returned or why it
    failed, in order.

    One failure stops no other call. ``on_progress`` gets the number of ended calls at least every POLL
    seconds. A task may be started again after it has stored something. Needs a connected Ray.
    """
    remote = ray.remote(num_cpus=1, max_retries=RETRIES)(task)
    refs = [remote.remote(*call) for call in calls]
    results: dict[ray.ObjectRef, R | Failed] = {}
    waiting = list(refs)
    while waiting:
        ended, waiting = ray.wait(waiting, timeout=POLL)
        for ref in ended:
            try:
                results[ref] = ray.get(ref)
            except RayError as e:
                results[ref] = Failed(str(e).strip().splitlines()[-1])
        on_progress(len(calls) - len(waiting))
    return [results[ref] for ref in refs]
