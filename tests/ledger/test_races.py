"""Real processes that write at the same time, on both databases."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta

import pytest

from pipeline.ledger import SCHEMA, Cycle, CycleBusy, Ledger, StaleGeneration
from tests.support.ledgers import T0, begin, execute, shard

WRITERS = 3
ROUNDS = 15
together = None  # this worker's barrier


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Processes that share nothing but a barrier."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(WRITERS, timeout=60)
    with ProcessPoolExecutor(WRITERS, context, _join, (barrier,)) as pool:
        yield pool


def _join(barrier):
    global together
    together = barrier


def race(pool, work, *arguments):
    """What each process returned; all of them run ``work`` and meet at its barriers."""
    return [f.result(60) for f in [pool.submit(work, i, *arguments) for i in range(WRITERS)]]


def opens(me, url):
    together.wait()
    ledger = Ledger.open(url)
    ledger.audit.append("opened", {"me": me}, now=T0)
    ledger.close()


def test_a_new_ledger_is_created_once(pool, url):
    race(pool, opens, url)
    ledger = Ledger.open(url, create=False)
    assert sorted(payload["me"] for _, _, _, payload in ledger.audit.rows()) == list(range(WRITERS))
    assert ledger.audit.first_broken() is None
    ledger.close()


def test_an_old_ledger_is_upgraded_once(pool, old):
    race(pool, opens, old)
    ledger = Ledger.open(old)
    assert Counter(kind for _, _, kind, _ in ledger.audit.rows())["schema"] == SCHEMA - 1
    assert ledger.audit.first_broken() is None
    ledger.close()


def appends(me, url):
    ledger = Ledger.open(url)
    together.wait()
    for i in range(ROUNDS):
        ledger.streams.register({f"{me}-{i}": {}, f"all-{i}": {}}, now=T0)
        ledger.audit.append("test", {"me": me, "i": i}, now=T0)
        ledger.releases.serve({"s0": (None, 1)}, rollout="r", wave=1, kind="rollback", reason="", now=T0)
        ledger.streams.sites()
    ledger.close()


def test_the_audit_chain_does_not_fork_and_counters_do_not_repeat(pool, ledger, url):
    race(pool, appends, url)
    assert Counter(kind for _, _, kind, _ in ledger.audit.rows()) == dict.fromkeys(
        ("test", "rollback"), WRITERS * ROUNDS
    )
    assert [seq for seq, *_ in ledger.audit.rows()] == list(range(1, 2 * WRITERS * ROUNDS + 1))
    assert ledger.audit.first_broken() is None
    assert [s.counter for s in ledger.releases.history("s0")] == list(range(1, WRITERS * ROUNDS + 1))
    assert len(ledger.streams.sites()) == 5 + ROUNDS * (WRITERS + 1)


def takes(me, url):
    ledger, won = Ledger.open(url), []
    for i in range(ROUNDS):
        together.wait()
        try:
            cycle = begin(ledger, holder=str(me), fingerprint=str(i))
        except CycleBusy:
            cycle = None
        together.wait()
        if cycle:
            ledger.cycles.finish(cycle, summary={}, now=T0)
            won.append((i, cycle.id))
    ledger.close()
    return won


def test_a_cycle_is_begun_by_one(pool, ledger, url):
    won = sorted(w for part in race(pool, takes, url) for w in part)
    assert [i for i, _ in won] == list(range(ROUNDS))
    assert len({name for _, name in won}) == ROUNDS
    assert ledger.audit.first_broken() is None


def resumes(me, url):
    ledger, generations = Ledger.open(url), []
    for i in range(ROUNDS):
        together.wait()
        generations.append(begin(ledger, holder=f"{me}-{i}", dead=lambda _: True).generation)
    ledger.close()
    return generations


def test_no_two_drivers_hold_one_generation(pool, ledger, url):
    begin(ledger)
    got = [g for part in race(pool, resumes, url) for g in part]
    assert sorted(got) == list(range(2, 2 + WRITERS * ROUNDS))


def commits(me, url, generation):
    """Every writer brings the same windows in its own order; returns the sites that it committed."""
    ledger, mine = Ledger.open(url), []
    for i in range(ROUNDS):
        together.wait()
        names = [f"s{(me + k) % 5}" for k in range(5)]
        rows = [shard(s, 0, 10, blob=f"{me}", slot=k) for k, s in enumerate(names)]
        left = ledger.verdicts.commit(Cycle(f"cycle-{i:05d}", generation, False), rows, now=T0)
        mine += [(i, s) for s in names if s not in left]
        together.wait()
        if me == 0:
            execute(url, "update sites set learned_offset = 0")
    ledger.close()
    return mine


def test_a_window_is_committed_by_one(pool, ledger, url):
    for i in range(ROUNDS):
        values = f"'cycle-{i:05d}', 'cycle', 1, 'running', 'f', '', 'a', '', '', null, ''"
        execute(url, f"insert into cycles values ({values})")
    mine = [w for part in race(pool, commits, url, 1) for w in part]
    assert sorted(mine) == sorted((i, f"s{k}") for i in range(ROUNDS) for k in range(5))
    assert len(ledger.verdicts.find()) == 5 * ROUNDS


def overtakes(me, url, cycle, sites):
    """The first takes the cycle over while the others commit; returns what each of them saw."""
    ledger = Ledger.open(url)
    together.wait()
    if me == 0:
        while len(ledger.verdicts.outcomes(cycle.id)) < sites // 4:
            pass
        begin(ledger, holder="b", dead=lambda _: True)
        seen = set(ledger.verdicts.outcomes(cycle.id))
        ledger.close()
        return seen
    done = set()
    for i in range(me - 1, sites, WRITERS - 1):
        try:
            ledger.verdicts.commit(cycle, [shard(f"n{i}")], now=T0)
        except StaleGeneration:
            break
        done.add(f"n{i}")
    ledger.close()
    return done


def test_nothing_is_written_after_a_takeover(pool, ledger, url):
    sites = 400
    ledger.streams.register({f"n{i}": {} for i in range(sites)}, now=T0)
    seen, *done = race(pool, overtakes, url, begin(ledger, now=T0 - timedelta(days=1)), sites)
    assert set(ledger.verdicts.outcomes("cycle-00001")) == seen == set().union(*done)
    assert sites // 4 <= len(seen) < sites
