"""Which presentations teach and which judge, who is in a memory, and what labels do to candidates."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.control import teaching
from pipeline.control.adapt import adapt_sites
from pipeline.control.deployment import now
from pipeline.control.loaders import load_model
from pipeline.control.teaching import JUDGE, PER_SESSION, TEACH, LabelledBlock, memory, role_of
from pipeline.data.features import FeatureBlock
from pipeline.ledger import LabelFileRow, LabelRow
from pipeline.models import tail
from pipeline.site import taught
from tests.support.crowds import HOSTILE, LENGTH, SITES, Crowd, assert_same, copy_crowd, new_crowd
from tests.support.doors import F, draw, source
from tests.support.ledgers import fix_split

DAY = datetime(2026, 5, 1, tzinfo=UTC)
MODEL = SimpleNamespace(tail=source(), manifest=SimpleNamespace(threshold=0.5))


def lesson(
    bona_fide: int,
    instruments: dict[str, int],
    *,
    sessions: int = 1000,
    days: int = 1,
    flipped: tuple[int, ...] = (),
) -> LabelledBlock:
    """Labelled presentations, bona fide first, then each instrument's; ``flipped`` have the wrong label."""
    n = bona_fide + sum(instruments.values())
    real, fake = draw(max(n, 1), seed=3)
    z = torch.cat([real[:bona_fide], fake[: n - bona_fide]])
    names = ["bona_fide"] * bona_fide + [i for i, k in instruments.items() for _ in range(k)]
    for i in flipped:
        names[i] = "bona_fide" if names[i] != "bona_fide" else next(iter(instruments))
    rows = tuple(
        LabelRow(
            "s",
            f"x{i}",
            "f",
            int(name == "bona_fide"),
            name,
            "correction",
            "me",
            DAY + timedelta(days=i % days),
            i,
            TEACH,
        )
        for i, name in enumerate(names)
    )
    block = FeatureBlock(
        np.arange(n),
        np.array([r.sample_id for r in rows], object),
        np.zeros(n, "datetime64[us]"),
        np.arange(n) % sessions,
        np.full(n, 7, np.uint8),
        z.numpy().astype(np.float16),
    )
    return LabelledBlock(block, rows)


def kept(state: dict[str, torch.Tensor]) -> tuple[int, int]:
    label = state["taught.label"]
    return int((label == 1).sum()), int((label == 0).sum())


@given(
    sessions=st.lists(st.integers(0, 2**62), min_size=200, max_size=200, unique=True),
    key=st.binary(min_size=16, max_size=16),
)
def test_half_of_the_sessions_teach_and_the_key_decides_which(sessions, key):
    roles = [role_of(key, "site", s) for s in sessions]
    assert roles == [role_of(key, "site", s) for s in sessions]
    assert 50 < roles.count(TEACH) < 150
    assert roles != [role_of(b"another key" + key, "site", s) for s in sessions]
    assert roles != [role_of(key, "other", s) for s in sessions]


def test_a_memory_is_balanced_over_classes_and_instruments():
    full = memory(MODEL, lesson(100, {"print": 60, "mask": 60, "replay": 3}), taught.init(48, source()))
    assert kept(full) == (24, 24)
    one = memory(MODEL, lesson(100, {}), taught.init(48, source()))
    assert kept(one) == (48, 0)
    few = memory(MODEL, lesson(5, {"print": 60}), taught.init(48, source()))
    assert kept(few) == (5, 43)
    assert kept(memory(MODEL, lesson(0, {}), taught.init(48, source()))) == (0, 0)


def test_a_session_has_a_cap_and_the_newest_stay():
    capped = memory(MODEL, lesson(40, {}, sessions=4), taught.init(48, source()))
    assert kept(capped) == (4 * PER_SESSION, 0)
    newest = memory(MODEL, lesson(40, {}, days=40), taught.init(10, source()))
    torch.testing.assert_close(newest["taught.z"], torch.from_numpy(lesson(40, {}).block.z[:29:-1].copy()))
    old = memory(MODEL, lesson(2, {}, days=2), taught.init(8, source()))["taught.weight"]
    assert old[0] == 1 and old[1] == pytest.approx(0.5 ** (1 / teaching.HALF_LIFE_DAYS))


def test_a_label_apart_from_all_of_its_instrument_weighs_nothing():
    clean = memory(MODEL, lesson(16, {"print": 16}), taught.init(48, source()))
    assert int((clean["taught.weight"] > 0).sum()) == 32
    some = memory(MODEL, lesson(16, {"print": 16}, flipped=(3, 20)), taught.init(48, source()))
    assert int((some["taught.weight"] > 0).sum()) == 30
    # an instrument that is accepted every time is no mistake of its labels
    fooled = lesson(16, {"print": 16}, flipped=tuple(range(16)))
    assert int((memory(MODEL, fooled, taught.init(48, source()))["taught.weight"] > 0).sum()) == 32


@given(order=st.permutations(range(12)))
def test_a_memory_does_not_depend_on_the_order_of_its_labels(order):
    whole = lesson(6, {"print": 6}, days=12)
    at = np.array(order)
    other = LabelledBlock(whole.block.rows(at), tuple(whole.rows[i] for i in order))
    a, b = (memory(MODEL, x, taught.init(8, source())) for x in (whole, other))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert (
        a["taught.digest"]
        != memory(MODEL, lesson(7, {"print": 5}, days=12), taught.init(8, source()))["taught.digest"]
    )


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Crowd:
    """Sites of which two days have arrived; the labels of the first two cover their whole first day."""
    crowd = new_crowd(tmp_path_factory.mktemp("crowd"), hostile=False)
    crowd.arrive(0)
    fix_split(crowd.ledger)  # else a run in thirty would have no session that teaches
    say(crowd, SITES[0], range(9))
    say(crowd, SITES[1], range(12))
    return crowd


def say(crowd: Crowd, site: str, offsets: range, name: str = "labels-1.parquet") -> None:
    """Somebody labels the captures of ``site``, every other one an attack."""
    block = stored(crowd, site)
    rows = [
        LabelRow(
            site,
            str(block.sample_id[o]),
            name,
            o % 2,
            ("print", "bona_fide")[o % 2],
            "correction",
            "me",
            now(),
        )
        for o in offsets
    ]
    crowd.ledger.labels.commit(
        [LabelFileRow(site, name, name, len(rows), len(rows))], rows, [], cycle="test", now=now()
    )


def stored(crowd: Crowd, site: str) -> FeatureBlock:
    row, champion = crowd.ledger.streams.site(site), crowd.ledger.sources.champion()
    return teaching.read_features(
        crowd.d.config.place("features"), champion.trunk, site, start=0, end=row.ingested_offset, features=F
    )


def adapted(crowd: Crowd, sites=SITES) -> str:
    cycle = crowd.begin()
    assert adapt_sites(crowd.job(cycle), sites) == {}
    crowd.ledger.cycles.finish(cycle, summary={}, now=now())
    return cycle.id


def test_labels_move_their_site_and_no_other(template, tmp_path):
    told, untold = (copy_crowd(template, tmp_path / n) for n in ("told", "untold"))
    for site in SITES[:2]:
        samples = list(untold.ledger.labels.of([site])[site])
        untold.ledger.labels.retract(site, samples, by="me", reason="a test", now=now())
    adapted(told)
    adapted(untold)
    a, b = told.states(), untold.states()
    moved = {
        site for site, at in a if any(not torch.equal(a[site, at][n], b[site, at][n]) for n in tail.MOVABLE)
    }
    assert moved == set(SITES[:2])
    labelled = {v.site: v.evidence.labelled for v in told.ledger.verdicts.find()}
    assert {s for s, e in labelled.items() if e} == set(SITES[:2])
    for site in SITES[:2]:
        roles = {s: r.role for s, r in told.ledger.labels.of([site])[site].items()}
        assert set(roles.values()) <= {TEACH, JUDGE}
        e = labelled[site]
        assert e.taught_bona_fide + e.taught_attack == list(roles.values()).count(TEACH)
        assert e.bona_fide.n + e.attack.n == list(roles.values()).count(JUDGE)


def test_a_shard_that_is_called_again_teaches_nothing_twice(template, tmp_path):
    once, twice = (copy_crowd(template, tmp_path / n) for n in ("once", "twice"))
    adapted(once)
    cycle = twice.begin()
    job = twice.job(cycle)
    for part in (SITES[:5], SITES, SITES):
        assert adapt_sites(job, part) == {}
    assert_same(once.states(), twice.states())


def test_roles_are_decided_once_and_a_retraction_makes_the_site_learn_anew(template, tmp_path):
    crowd = copy_crowd(template, tmp_path / "crowd")
    adapted(crowd)
    site = SITES[1]
    before = {s: r.role for s, r in crowd.ledger.labels.of([site])[site].items()}
    wrong = [s for s, role in before.items() if role == TEACH][:6]
    crowd.ledger.labels.retract(site, wrong, by="me", reason="wrong person", now=now())
    crowd.arrive(1)
    adapted(crowd)
    after = {s: r.role for s, r in crowd.ledger.labels.of([site])[site].items()}
    assert after == {s: r for s, r in before.items() if s not in wrong}
    digest = [s["taught.digest"] for (name, _), s in sorted(crowd.states().items()) if name == site]
    assert digest[0] != digest[1]
    evidence = crowd.ledger.verdicts.find(site=site)[-1].evidence.labelled
    assert evidence.taught_bona_fide + evidence.taught_attack == list(after.values()).count(TEACH)


def test_labels_alone_make_a_candidate(template, tmp_path):
    """Nothing new arrived: what people said since is reason enough for a candidate."""
    crowd = copy_crowd(template, tmp_path / "crowd")
    adapted(crowd)
    site = SITES[2]
    n = crowd.ledger.streams.site(site).ingested_offset
    say(crowd, site, range(n))
    cycle = adapted(crowd)
    made = {v.site: v.state for v in crowd.ledger.verdicts.find(cycle=cycle)}
    assert made[site] is not None
    assert all(state is None for s, state in made.items() if s != site)


def test_what_judges_counts_for_health_and_what_teaches_does_not(template, tmp_path):
    from pipeline.control.candidates import pointer
    from pipeline.control.presentations import ReplayTarget, replay_presentations

    crowd = copy_crowd(template, tmp_path / "crowd")
    site = SITES[1]
    serves = pointer(crowd.ledger, None)
    counts = replay_presentations(crowd.d.config, crowd.ledger, [ReplayTarget(site, serves, serves)])
    roles = [r.role for r in crowd.ledger.labels.of([site])[site].values()]
    assert len(counts.wrong) == roles.count(JUDGE)


def test_a_presentation_with_broken_features_spoils_no_other(tmp_path):
    crowd = new_crowd(tmp_path)  # one of its sites sends NaN and infinity
    fix_split(crowd.ledger)
    crowd.arrive(0)
    say(crowd, HOSTILE, range(LENGTH[HOSTILE]))
    row, labels = crowd.ledger.streams.site(HOSTILE), crowd.ledger.labels.of([HOSTILE])[HOSTILE]
    model = load_model(crowd.ledger.sources.champion().path)
    own = teaching.labelled(crowd.d.config, crowd.ledger, model, row, labels)
    assert 0 < len(own.rows) < LENGTH[HOSTILE]
    assert np.isfinite(own.block.z).all()
    assert all(r.role for r in crowd.ledger.labels.of([HOSTILE])[HOSTILE].values())
    adapted(crowd)
    taught_state = crowd.states()[HOSTILE, LENGTH[HOSTILE]]
    assert all(torch.isfinite(t).all() for t in taught_state.values() if t.is_floating_point())
