"""Defines the rendered streams of ``palisade bench site``; in each, one thing happens at a time.

A scenario is drawn from a pool of rendered captures of its rig, so what happens is known for every sample.
Nobody of the pool is in a training corpus. A long stream meets the same people again, as a door does. The
probe of a pool is never in a stream: errors before and after are counted on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.data.protocols import FULL
from pipeline.simulate.corpora import synth
from pipeline.simulate.render import BONA_FIDE, SPECIES, Presentation
from pipeline.simulate.rig import TRAINING, UNSEEN, variant
from pipeline.simulate.shifted_rigs import SHIFTED
from pipeline.simulate.site_script import Drift, SiteScript, rig_at
from pipeline.types import Modality

if TYPE_CHECKING:
    from numpy.typing import NDArray

PEOPLE = 500_000  # first subject of the pools
VISITORS, VISITS = 40, 6  # bona fide people of a pool, and how often each is captured, two frames each time
ATTACKS = 25  # presentations of each species in a pool, two frames each
PROBE = {"bona_fide": 300, "attack": 100}  # presentations in a probe: bona fide, and of each species
USUAL = ("print_flat", "print_bent", "replay", "mask_rigid")  # attacks where a stretch names none
LEVELS = 6  # of a rig that ages
WORN_IN_PART = ("partial_eyes", "partial_glasses")
POISON = (
    "mask_silicone",
    "partial_eyes",
    "print_cutout",
)  # what an attacker who wants to be learned from holds
RGB_ONLY = 1 << Modality.RGB
NO_IR = FULL & ~(1 << Modality.IR)
NO_DEPTH = FULL & ~(1 << Modality.DEPTH)
RIGS = {
    **UNSEEN,
    "A2": variant(TRAINING["A"], 501),
    **{
        f"C{k}": rig_at(
            SiteScript(
                "ageing", TRAINING["C"], "", "", "", drift=Drift(ir_fade=0.8, depth_noise=0.6, warm=0.1)
            ),
            hour=48.0 * k / (LEVELS - 1),
        )
        for k in range(LEVELS)
    },
    **SHIFTED,
}
REPLACED = {  # family of SHIFTED -> what the new camera has that the old one had not
    "spotlight": "its NIR lamp lights a part of the face",
    "flooded": "its NIR lamp is too strong for arm's length",
    "pane": "it looks through a window that mirrors",
    "wide": "its lens is wide, its depth has fringes",
}
PROBED = ("E", "F", "A2")


class Stretch(NamedTuple):
    """Consecutive samples of a scenario."""

    samples: int
    rig: str
    prior: float  # share of bona fide
    species: tuple[str, ...] = USUAL
    present: int = FULL  # modalities that are left
    poison: float = 0.0  # share of the samples that the attacker adds, chosen by score
    blind: bool = False  # the attacker covers depth and infrared
    label: str = ""  # what a timeline writes over it


@dataclass(frozen=True)
class Scenario:
    """One stream: its stretches in order, and what a reader should know."""

    name: str
    group: str
    what: str
    stretches: tuple[Stretch, ...]
    adaptive: bool = False  # the attacker adapts a model of its own on the same stream and asks that

    @property
    def probe(self) -> str | None:
        """Rig whose probe counts errors after the stream."""
        rig = self.stretches[-1].rig
        return rig if rig in PROBED else None


class Drawn(NamedTuple):
    """The samples of a stream, N of them."""

    row: NDArray[np.int64]  # [N] in the pool's corpus
    session: NDArray[np.int64]  # [N]
    present: NDArray[np.uint8]  # [N] what of it is left
    poison: NDArray[np.bool_]  # [N] placed there to be learned from


ORDINARY = Stretch(600, "E", 0.8)
TARGETED = Stretch(1000, "F", 0.9)


def scenarios(scale: float = 1.0) -> list[Scenario]:
    """Returns all scenarios in the order of the page; ``scale`` shortens every stretch."""
    every = [*_shifted(), *_clean_and_doors(), *_unseen_and_missing(), *_poisoning(), *_sensors()]
    return [
        replace(s, stretches=tuple(t._replace(samples=round(t.samples * scale)) for t in s.stretches))
        for s in every
    ]


def clips() -> list[synth.Clip]:
    """Returns the clips to render: the pool of every rig (``train``) and the probes (``test``).

    The domain of a clip is its rig.
    """
    plan: list[synth.Clip] = []
    for at, (name, rig) in enumerate(RIGS.items()):
        rng = np.random.default_rng([at, 61])
        ageing = name.startswith("C")
        visits, attacks = (2, 8) if ageing else (VISITS, ATTACKS)
        whole = [(k, BONA_FIDE, 2) for k in range(VISITORS) for _ in range(visits)]
        whole += [(VISITORS + k % 12, s, 2) for s in (USUAL if ageing else SPECIES) for k in range(attacks)]
        tested = [(60 + k % 30, BONA_FIDE, 1) for k in range(PROBE["bona_fide"])]
        tested += [(90 + k % 10, s, 1) for s in SPECIES for k in range(PROBE["attack"])]
        for split, wanted in (("train", whole), ("test", tested if name in PROBED else [])):
            for person, species, frames in wanted:
                what = Presentation(PEOPLE + 1000 * at + person, species, int(rng.integers(2**31)))
                video = len(plan)
                plan += [synth.Clip(split, name, video, what, rig, frame) for frame in range(frames)]
    return plan


def draw(
    scenario: Scenario,
    *,
    rig: NDArray[np.str_],
    pai: NDArray[np.str_],
    video: NDArray[np.str_],
    logit: NDArray[np.float32],
) -> Drawn:
    """Samples of ``scenario`` from the pool's rows: the rig, species, video and source logit of each [P].

    A session is a video: its frames come together. The attacker's captures are those of POISON that the model
    calls bona fide with the least margin; where there are too few, those it refuses with the least.
    """
    rng = np.random.default_rng(sum(map(ord, scenario.name)))
    rows: list[NDArray[np.int64]] = []
    poison: list[NDArray[np.bool_]] = []
    present: list[NDArray[np.uint8]] = []
    for s in scenario.stretches:
        mine = rig == s.rig
        bad = rng.random(s.samples) < s.poison
        genuine = rng.random(s.samples) < s.prior
        picked = np.empty(s.samples, np.int64)
        for wanted, allowed in ((genuine, [BONA_FIDE]), (~genuine, s.species)):
            picked[wanted] = _visits(
                np.flatnonzero(mine & np.isin(pai, allowed)), video, int(wanted.sum()), rng
            )
        if bad.any():
            picked[bad] = rng.choice(
                marginal(np.flatnonzero(mine & np.isin(pai, POISON)), logit), int(bad.sum())
            )
        rows.append(picked)
        poison.append(bad)
        present.append(np.where(bad & s.blind, RGB_ONLY, s.present).astype(np.uint8))
    row = np.concatenate(rows)
    _, session = np.unique(video[row], return_inverse=True)
    new = np.r_[True, session[1:] != session[:-1]]
    return Drawn(row, np.cumsum(new).astype(np.int64), np.concatenate(present), np.concatenate(poison))


def at_a_door(
    label: NDArray[np.int8],
    video: NDArray[np.str_],
    usable: NDArray[np.bool_],
    *,
    samples: int = 600,
    prior: float = 0.8,
) -> NDArray[np.int64]:
    """Returns rows of a labelled corpus [N] as the stream of a door with ``prior`` bona fide."""
    rng = np.random.default_rng(67)
    genuine, row = rng.random(samples) < prior, np.empty(samples, np.int64)
    for wanted, y in ((genuine, 1), (~genuine, 0)):
        row[wanted] = _visits(np.flatnonzero(usable & (label == y)), video, int(wanted.sum()), rng)
    return row


def marginal(rows: NDArray[np.int64], logit: NDArray[np.float32], count: int = 30) -> NDArray[np.int64]:
    """The ``count`` attacks of ``rows`` nearest to the bona fide side of the boundary, those on it first."""
    margin = logit[rows]
    order = np.lexsort((np.abs(margin), margin < 0))
    return rows[order[:count]]


def events(scenario: Scenario) -> tuple[tuple[tuple[float, str], ...], tuple[tuple[float, float, str], ...]]:
    """(position, label) of each change, and (from, to, label) of what lasts."""
    marks: list[tuple[float, str]] = []
    spans: list[tuple[float, float, str]] = []
    at = 0
    for before, s in zip((None, *scenario.stretches), scenario.stretches, strict=False):
        if before is not None and before.rig != s.rig and not before.rig.startswith("C"):
            marks.append((float(at), "another camera"))
        if s.label:
            spans.append((float(at), float(at + s.samples), s.label))
        at += s.samples
    return tuple(marks), tuple(spans)


def _visits(
    rows: NDArray[np.int64], video: NDArray[np.str_], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """``count`` of ``rows``, visit after visit in a random order, again from the start when all have come."""
    drawn: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    while sum(map(len, drawn)) < count:
        names = np.unique(video[rows])
        place = dict(zip(names.tolist(), rng.permutation(len(names)).tolist(), strict=True))
        drawn.append(rows[np.argsort([place[v] for v in video[rows].tolist()], kind="stable")])
    return np.concatenate(drawn)[:count]


def _shifted() -> list[Scenario]:
    """Returns streams whose device, light or sensor changes the scores."""
    return [
        *(
            Scenario(
                f"rig-{rig.lower()}",
                "shifted",
                f"a device family that no source has: rig {rig}",
                (ORDINARY._replace(rig=rig),),
            )
            for rig in UNSEEN
        ),
        Scenario(
            "rig-ageing",
            "shifted",
            "the illuminator fades to a fifth, depth noise triples",
            tuple(Stretch(150, f"C{k}", 0.8) for k in range(LEVELS)),
        ),
        Scenario(
            "rig-swapped",
            "shifted",
            "a known camera is replaced by an unseen one",
            (Stretch(400, "A2", 0.8), Stretch(500, "G", 0.8)),
        ),
    ]


def _clean_and_doors() -> list[Scenario]:
    """Returns a stream in which nothing happens, and doors of one class that meet a burst of attacks."""
    burst = Stretch(100, "E", 0.0, species=("print_cutout", "replay", "mask_silicone"), label="attacks only")
    return [
        Scenario(
            "clean", "clean", "a device of a known family, nothing happens", (Stretch(800, "A2", 0.85),)
        ),
        *(
            Scenario(
                f"door-{prior:g}",
                "one-class",
                f"{prior:.0%} bona fide, then a burst of attacks",
                (Stretch(n, "E", prior), burst),
            )
            for prior, n in ((1.0, 4000), (0.99, 2000), (0.9, 1000), (0.5, 1000))
        ),
    ]


def _unseen_and_missing() -> list[Scenario]:
    """Returns streams with species that no source has, and with a sensor that is dead most of the time."""
    return [
        Scenario(
            "unseen-species",
            "unseen",
            "species that no source has, in bursts",
            (
                TARGETED._replace(samples=500),
                Stretch(200, "F", 0.5, species=WORN_IN_PART, label="unseen species"),
                TARGETED._replace(samples=200),
            ),
        ),
        Scenario(
            "ir-dead",
            "missing",
            "infrared is dead for most of the stream",
            (
                ORDINARY._replace(samples=150),
                ORDINARY._replace(samples=600, present=NO_IR, label="IR missing"),
            ),
        ),
        Scenario(
            "depth-dead",
            "missing",
            "depth is dead for most of the stream",
            (
                ORDINARY._replace(samples=150),
                ORDINARY._replace(samples=600, present=NO_DEPTH, label="depth missing"),
            ),
        ),
    ]


def _poisoning() -> list[Scenario]:
    """Returns streams whose attacker wants to be learned from: by drip, burst, blinding and a surrogate."""
    return [
        *(
            Scenario(
                f"drip-{share:.0%}".replace("%", ""),
                "poisoning",
                f"{share:.0%} of the captures are attacks that score just bona fide",
                (TARGETED._replace(poison=share),),
            )
            for share in (0.01, 0.05, 0.2)
        ),
        Scenario(
            "burst-100",
            "poisoning",
            "100 such attacks in a row",
            (
                TARGETED._replace(samples=450),
                TARGETED._replace(samples=100, poison=1.0, label="poison"),
                TARGETED._replace(samples=450),
            ),
        ),
        Scenario(
            "blinding-5",
            "poisoning",
            "5% attacks that cover depth and infrared",
            (TARGETED._replace(poison=0.05, blind=True),),
        ),
        Scenario(
            "adaptive-5",
            "poisoning",
            "5% attacks that a surrogate, adapted on the same stream, likes best",
            (TARGETED._replace(poison=0.05),),
            adaptive=True,
        ),
    ]


def _sensors() -> list[Scenario]:
    """Returns streams whose camera is replaced by one of SHIFTED, which refuses people it knew before."""
    return [
        Scenario(
            f"sensor-{name}",
            "sensor",
            f"a known camera is replaced: {what}",
            (Stretch(300, "A2", 0.8), Stretch(500, name, 0.8)),
        )
        for name, what in REPLACED.items()
    ]
