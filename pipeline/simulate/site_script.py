"""Plans what happens at a simulated site: presentations, rig, drift and faults, without rendering.

Hours count from the start of the script. A plan follows from (script, phase, seed), so labels never need the
pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple
from zlib import crc32

import numpy as np

from pipeline.simulate.render import BONA_FIDE, Presentation
from pipeline.simulate.rig import TRAINING, UNSEEN, SensorRig, variant
from pipeline.simulate.shifted_rigs import SHIFTED
from pipeline.types import check_site_id

COMMISSIONING, RED_TEAM = "commissioning", "red-team"  # kinds of labels that somebody vouches for
RED_SPECIES = ("print_flat", "print_cutout", "replay", "mask_rigid", "mask_silicone")


class Phase(NamedTuple):
    """Hours of the script, cut into segments of about equal rows."""

    start: float
    end: float
    segments: int
    first: int  # number of the first segment


PHASES = {1: Phase(0, 24, 3, 0), 2: Phase(24, 36, 2, 3)}


@dataclass(frozen=True)
class Missing:
    """A modality gives nothing between two hours."""

    modality: Literal["rgb", "depth", "ir"]
    start: float
    end: float


@dataclass(frozen=True)
class Stretch:
    """Other traffic between two hours: an attack burst, or a one-class stretch with prior 1."""

    start: float
    end: float
    prior: float  # share of bona fide sessions
    rate: float = 1.0  # factor on the site's rate
    species: tuple[str, ...] = ()  # () = the site's own


@dataclass(frozen=True)
class Broken:
    """The camera delivers rubbish in ``share`` of the captures between two hours."""

    kind: Literal["black", "constant", "truncated"]
    start: float
    end: float
    share: float = 1.0


@dataclass(frozen=True)
class Drift:
    """Rates of drift per day, exponential: illuminator, depth noise and white balance.

    The illuminator fades, depth noise grows and white balance turns warm.
    """

    ir_fade: float = 0.0
    depth_noise: float = 0.0
    warm: float = 0.0


@dataclass(frozen=True)
class SiteScript:
    """One site: where it is, what it has, who comes, what goes wrong."""

    site: str
    rig: SensorRig
    region: str
    tenant: str
    hardware: str
    rate: float = 8.5  # captures per hour
    prior: float = 0.8  # share of bona fide sessions
    species: tuple[str, ...] = ("print_flat", "replay", "mask_rigid")
    swap: tuple[float, SensorRig] | None = None  # another rig from this hour on
    drift: Drift = Drift()
    missing: tuple[Missing, ...] = ()
    stretches: tuple[Stretch, ...] = ()
    broken: Broken | None = None
    hostile: tuple[Literal["garbage", "schema", "bomb"], ...] = ()  # phase 1: two more files, one row
    redteam: int = 40  # presentations of the red team in phase 2, half of them attacks
    commissioning: int = 0  # bona fide an installer presents in the first hour, and as many attacks
    mislabelled: bool = False  # the installer swaps the two classes in every label


@dataclass(frozen=True)
class Shot:
    """One planned capture."""

    sample_id: str
    session_id: str
    hour: float
    what: Presentation
    frame: int
    vouched: str  # kind of the label that somebody vouches for; "" for captures of the stream


class _Session(NamedTuple):
    """One presentation before it has a name."""

    start: float
    what: Presentation
    frames: int
    vouched: str = ""


def plan(script: SiteScript, *, phase: int, seed: int) -> list[Shot]:
    """What is presented at the site in ``phase``, in order of time; sessions of one to three captures."""
    check_site_id(script.site)
    when, code = PHASES[phase], crc32(script.site.encode())
    rng = np.random.default_rng([seed, code, phase])
    base = 200_000 + code % 7_000 * 100  # people of this site: 0-59 come daily, 60-99 attack
    sessions = _stream(script, when, base, rng)
    if phase == 1:
        apart = np.random.default_rng([seed, code, phase, 1])  # the stream stays the same without it
        sessions += _commissioning(script, when, base, sessions, apart)
    if phase == 2:
        sessions += _red_team(script, when, base, rng)
    sessions.sort(key=lambda session: session.start)
    shots: list[Shot] = []
    for number, s in enumerate(sessions):
        for frame in range(s.frames):
            name = f"{script.site}-{phase}{len(shots):05d}"
            session = f"{script.site}-{phase}-s{number:04d}"
            shots.append(Shot(name, session, s.start + frame / 1800, s.what, frame, s.vouched))
    return shots


def attack_kit(script: SiteScript) -> tuple[str, ...]:
    """Returns the species an installer brings: those the site meets, then the others of a red team."""
    return tuple(dict.fromkeys((*script.species, *RED_SPECIES)))


def rig_at(script: SiteScript, hour: float) -> SensorRig:
    """The rig as swap and drift have left it at ``hour``."""
    rig = script.swap[1] if script.swap and hour >= script.swap[0] else script.rig
    days, drift = hour / 24, script.drift
    if drift == Drift():
        return rig
    turn = float(np.exp(drift.warm * days))
    red, green, blue = rig.white
    return replace(
        rig,
        ir_power=rig.ir_power * float(np.exp(-drift.ir_fade * days)),
        white=(red * turn, green, blue / turn),
        depth_noise=rig.depth_noise * float(np.exp(drift.depth_noise * days)),
    )


PRINTS = ("print_flat", "print_bent", "print_cutout")
PLACES = {"spotlight": (30, 31), "flooded": (32, 33), "pane": (34, 35), "wide": (36, 41)}  # seeds of variants
LABELS = 32  # bona fide, and as many attacks, that an installer of the demo presents
REPLAYED = ((15, 18, 0.15), (30, 32, 0.2))  # hours between which the mall meets replays, and their prior
MASKS = ("mask_rigid", "mask_silicone", "partial_glasses")


def demo_fleet(seed: int = 0) -> list[SiteScript]:
    """Returns eighteen sites: three clean controls, an unseen device, eight shifted, six other troubles.

    The controls have rigs of training families. Six of the shifted sites have commissioning labels, of which
    those of the dock are swapped, and so has one control.
    """
    trained = [variant(rig, seed * 100 + k) for k, rig in enumerate(TRAINING.values())]
    unseen = variant(UNSEEN["E"], seed * 100 + 10)
    again = variant(UNSEEN["F"], seed * 100 + 21)
    terminal = SiteScript(
        "terminal-gate", unseen, "eu-west", "aerogate", "e-tof-940", species=(*PRINTS, "replay", "mask_rigid")
    )
    return [*_controls(trained), terminal, *_shifted(seed), *_troubled(trained, again)]


def _controls(trained: list[SensorRig]) -> list[SiteScript]:
    a, b, c, _ = trained
    return [
        SiteScript("lobby-north", a, "eu-central", "meridian", "a-structured-850"),
        SiteScript(
            "lobby-south", b, "eu-central", "meridian", "b-outdoor-850", prior=0.85, commissioning=LABELS
        ),
        SiteScript("office-gate", c, "us-east", "halden", "c-tof-940", species=MASKS),
    ]


def _shifted(seed: int) -> list[SiteScript]:
    """Returns two sites of each family of SHIFTED, which refuse a fifth to a half of their people."""
    lamp, lamp2, flood, flood2, pane, pane2, dome, dome2 = (
        variant(SHIFTED[family], seed * 100 + place) for family, places in PLACES.items() for place in places
    )
    night = (Missing("rgb", 0, 6), Missing("rgb", 20, 30))
    replays = tuple(Stretch(start, end, p, rate=3, species=("replay",)) for start, end, p in REPLAYED)
    labelled = partial(SiteScript, commissioning=LABELS)
    return [
        labelled("depot-lamp", lamp, "us-west", "freightline", "spotlight-850"),
        labelled(
            "turnstile-depth-out",
            dome,
            "ap-south",
            "transitcorp",
            "wide-850",
            missing=(Missing("depth", 8, 27),),
        ),
        labelled("mall-kiosk", flood, "us-east", "brightmart", "flooded-850", prior=0.95, stretches=replays),
        SiteScript(
            "phone-onboarding",
            flood2,
            "ap-south",
            "novabank",
            "flooded-850",
            prior=0.75,
            species=(*PRINTS, "replay"),
        ),
        labelled("teller-window", pane, "eu-west", "novabank", "pane-850"),
        SiteScript("ticket-window", pane2, "ap-south", "transitcorp", "pane-850", prior=0.85),
        labelled("arena-dome", dome2, "us-east", "meridian", "wide-850", species=(*PRINTS, "mask_rigid")),
        labelled(
            "dock-night",
            lamp2,
            "us-west",
            "freightline",
            "spotlight-850",
            prior=0.85,
            species=MASKS,
            missing=night,
            mislabelled=True,
        ),
    ]


def _troubled(trained: list[SensorRig], again: SensorRig) -> list[SiteScript]:
    a, b, c, d = trained
    return [
        SiteScript(
            "gate-ageing",
            c,
            "eu-west",
            "aerogate",
            "c-tof-940",
            drift=Drift(ir_fade=0.8, depth_noise=0.6, warm=0.12),
        ),
        SiteScript(
            "vault-ir-dead", a, "us-east", "novabank", "a-structured-850", missing=(Missing("ir", 10, 34),)
        ),
        SiteScript(
            "gate-oneclass",
            again,
            "eu-central",
            "halden",
            "f-kiosk-850",
            species=("print_cutout", "mask_rigid"),
            stretches=(Stretch(0, 28, 1.0), Stretch(28, 30, 0.1, rate=3)),
        ),
        SiteScript("branch-swap", d, "eu-west", "novabank", "d-crop-850", swap=(14, b)),
        SiteScript(
            "yard-broken", b, "us-west", "freightline", "b-outdoor-850", broken=Broken("black", 7, 36, 0.9)
        ),
        SiteScript(
            "edge-untrusted",
            d,
            "ap-south",
            "brightmart",
            "d-crop-850",
            hostile=("garbage", "schema", "bomb"),
            broken=Broken("truncated", 4, 9, 0.5),
        ),
    ]


def _stream(script: SiteScript, when: Phase, base: int, rng: np.random.Generator) -> list[_Session]:
    """Who comes by himself: visits at the site's rate, bona fide or an attack."""
    sessions: list[_Session] = []
    hour = when.start
    while (hour := hour + float(rng.exponential(2 / (script.rate * _now(script, hour).rate)))) < when.end:
        now = _now(script, hour)
        genuine = rng.random() < now.prior
        species = BONA_FIDE if genuine else str(rng.choice(now.species or script.species))
        sessions.append(_Session(hour, _presentation(base, species, rng), 1 + int(rng.integers(3))))
    return sessions


def _commissioning(
    script: SiteScript, when: Phase, base: int, stream: list[_Session], rng: np.random.Generator
) -> list[_Session]:
    """What an installer presents in the first hour: people of the stream, and attacks of every kind."""
    regulars = sorted({s.what.subject for s in stream if s.what.species == BONA_FIDE})
    order: list[int] = rng.permutation(len(regulars)).tolist()
    kit = attack_kit(script)
    sessions: list[_Session] = []
    for k in range(script.commissioning):
        genuine = _presentation(base, BONA_FIDE, rng)
        if order:
            genuine = genuine._replace(subject=regulars[order[k % len(order)]])
        for what in (genuine, _presentation(base, kit[k % len(kit)], rng)):
            sessions.append(_Session(when.start + float(rng.uniform(0, 1)), what, 1, COMMISSIONING))
    return sessions


def _red_team(script: SiteScript, when: Phase, base: int, rng: np.random.Generator) -> list[_Session]:
    """Presentations at any time of the phase, bona fide and attacks in turn."""
    sessions: list[_Session] = []
    for k in range(script.redteam):
        species = BONA_FIDE if k % 2 else RED_SPECIES[k // 2 % len(RED_SPECIES)]
        start = float(rng.uniform(when.start, when.end))
        sessions.append(_Session(start, _presentation(base, species, rng), 1, RED_TEAM))
    return sessions


def _now(script: SiteScript, hour: float) -> Stretch:
    usual = Stretch(0, 0, script.prior)
    return next((s for s in script.stretches if s.start <= hour < s.end), usual)


def _presentation(base: int, species: str, rng: np.random.Generator) -> Presentation:
    person = int(rng.integers(60)) if species == BONA_FIDE else 60 + int(rng.integers(40))
    return Presentation(base + person, species, int(rng.integers(2**31)))
