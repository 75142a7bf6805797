"""Defines evaluation protocols over domains and patterns of missing modalities.

``present`` is a uint8 bit mask per sample, bit m = modality m of ``Modality``. Nothing here reads or draws
anything.
"""

from __future__ import annotations

import re
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.types import Modality

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

FULL = (1 << len(Modality)) - 1
PATTERNS: dict[str, int] = {  # modalities that are left
    "full": FULL,
    "no-depth": FULL & ~(1 << Modality.DEPTH),
    "no-ir": FULL & ~(1 << Modality.IR),
    "no-depth-ir": 1 << Modality.RGB,
    "no-rgb": FULL & ~(1 << Modality.RGB),
}
CHANNELS: dict[Modality, slice] = {
    Modality.RGB: slice(0, 3),
    Modality.DEPTH: slice(3, 4),
    Modality.IR: slice(4, 5),
}


INSTRUMENTS: tuple[
    tuple[str, str], ...
] = (  # pattern of a set's own species name → kind of attack instrument
    (r"cloth_.*|print|print_flat|print_bent|paper|m502..", "print"),
    (r"0[1-6]_(e|en|enm)_[sb]|print_cutout|partial_eyes", "cut-out print"),
    (r"screen|replay", "replay"),
    (r"paper_mask", "paper mask"),
    (r"mask_3d.*|mask_rigid|rigid_mask|half_mask|m504..", "rigid mask"),
    (r"fake_head|mannequin.*|m503..", "mannequin"),
    (r"silicone.*|mask_silicone|flexible_mask|m507..", "silicone mask"),
    (r"m505..", "transparent mask"),
    (r"glasses|partial_glasses|m50[18]..", "glasses"),
    (r"makeup|m506..", "make-up"),
    (r"tattoo|m509..", "tattoo"),
)


class Protocol(NamedTuple):
    """A protocol that trains on ``sources`` and tests on ``target``."""

    sources: tuple[str, ...]
    target: str
    name: str  # CPS->W


class LimitedProtocol(NamedTuple):
    """A protocol that trains on ``sources`` and tests on all ``targets`` together."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    name: str  # CW->PS


def leave_one_domain_out(domains: Sequence[str]) -> list[Protocol]:
    """Returns one protocol per domain, which is the target; raises ValueError for fewer than two domains."""
    ordered = _ordered(domains, at_least=2)
    protocols: list[Protocol] = []
    for target in ordered:
        sources = tuple(d for d in ordered if d != target)
        protocols.append(Protocol(sources, target, _name(sources, (target,))))
    return protocols


def limited_source(domains: Sequence[str], keep: int = 2) -> list[LimitedProtocol]:
    """Returns every choice of ``keep`` source domains; the others are the targets.

    CW->PS and PS->CW are the two that papers publish. Raises ValueError for an impossible ``keep``.
    """
    ordered = _ordered(domains, at_least=2)
    if not 1 <= keep < len(ordered):
        raise ValueError(f"keep: {keep}; allowed are 1 to {len(ordered) - 1} of the {len(ordered)} domains")
    protocols: list[LimitedProtocol] = []
    for sources in combinations(ordered, keep):
        targets = tuple(d for d in ordered if d not in sources)
        protocols.append(LimitedProtocol(sources, targets, _name(sources, targets)))
    return protocols


def instrument(species: str) -> str:
    """Returns the kind of instrument of a species, comparable between sets; an unknown species is its own."""
    return next((kind for form, kind in INSTRUMENTS if re.fullmatch(form, species)), species)


def pattern(name: str) -> int:
    """Returns the bit mask of a missing-modality pattern; raises ValueError for an unknown name."""
    if name not in PATTERNS:
        raise ValueError(f"pattern {name!r}: allowed are {', '.join(PATTERNS)}")
    return PATTERNS[name]


def keep_only(present: NDArray[np.uint8], mask: int) -> NDArray[np.uint8]:
    """Returns ``present`` [N] with only the modalities of ``mask`` left."""
    return present & np.uint8(mask)


def any_present(present: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Returns [N], True where any modality is left."""
    return (present & np.uint8(FULL)) != 0


def as_bools(present: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Converts bit masks [N] to bool [N, M]."""
    return (present[:, None] >> np.arange(len(Modality), dtype=np.uint8)) & 1 == 1


def as_bits(present: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Converts bool [N, M] to bit masks [N]."""
    return (present << np.arange(len(Modality), dtype=np.uint8)).sum(axis=1).astype(np.uint8)


def zero_absent(frame: NDArray[np.uint8], present: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns a copy of ``frame`` [N, 5, H, W] with zeros wherever a modality is absent."""
    out = frame.copy()
    for modality, channels in CHANNELS.items():
        out[present & (1 << modality) == 0, channels] = 0
    return out


def _ordered(domains: Sequence[str], *, at_least: int) -> tuple[str, ...]:
    if len(set(domains)) != len(domains) or len(domains) < at_least:
        raise ValueError(
            f"domains {', '.join(domains) or 'none'}: at least {at_least} different ones are needed"
        )
    return tuple(sorted(domains))


def _name(sources: Sequence[str], targets: Sequence[str]) -> str:
    glue = "" if all(len(d) == 1 for d in (*sources, *targets)) else "+"
    return f"{glue.join(sources)}->{glue.join(targets)}"
