"""Seals and checks the anchor set: labelled features that every candidate is judged on.

No model is ever trained on it; the ledger pins its digest.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from pipeline.data.blobs import BadBlob, get, put
from pipeline.data.protocols import PATTERNS
from pipeline.types import Label

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray
    from torch import Tensor

    from pipeline.storage import Place

MIN_SAMPLES = {
    "attacks": 150,
    "species": 4,
    "bona_fide": 500,
}  # attacks per species; see pipeline/guards/README.md
REQUIRED_TENSORS = {"z", "present", "label", "species", "names"}
OPTIONAL_TENSORS = {"key", "about"}  # sets that earlier versions sealed have neither


@dataclass(frozen=True)
class AnchorSet:
    """N labelled samples with their features under one trunk."""

    z: Tensor  # [N, M, F] float32
    present: Tensor  # [N, M] bool
    label: Tensor  # [N] int8
    species: tuple[str, ...]  # [N] PAI species
    key: Tensor | None = None  # [N, 32] uint8, sha256 of a sample's frames: the same sample under every trunk
    trunk: str = ""  # digest of the trunk that made z
    corpora: dict[str, str] = field(
        default_factory=dict
    )  # domain → digest of the corpus that the samples are from

    def replayed(self) -> tuple[tuple[str, ...], Tensor]:
        """Returns the names of the missing-modality patterns and the presence under each: [P, N, M] bool."""
        keep = torch.tensor(
            [[bool(mask >> m & 1) for m in range(self.present.shape[1])] for mask in PATTERNS.values()]
        )
        return tuple(PATTERNS), self.present & keep[:, None, :]

    def counts(self) -> dict[str, dict[str, int]]:
        """Returns the number of samples with any modality left, by species (with bona fide) and pattern."""
        patterns, present = self.replayed()
        seen, names = present.any(-1).numpy(), np.array(self.species)  # [P, N]
        listed = np.unique(names).tolist()
        return {s: dict(zip(patterns, seen[:, names == s].sum(1).tolist(), strict=True)) for s in listed}

    def keys(self) -> list[bytes]:
        """Returns each sample's key; empty if an earlier version sealed the set."""
        return [] if self.key is None else [bytes(k) for k in self.key.numpy()]


class Flaws(NamedTuple):
    """The flaws of an anchor set, one line each."""

    errors: tuple[str, ...]  # it must not be used
    warnings: tuple[str, ...]  # it shows less than it should


def frame_keys(frames: NDArray[np.uint8]) -> list[bytes]:
    """Returns the sha256 of each of N frames."""
    return [hashlib.sha256(np.ascontiguousarray(f).data).digest() for f in frames]


def flaws(anchor: AnchorSet, trained: Collection[bytes] | None) -> Flaws:
    """Returns the flaws of an anchor set, judged by its own samples and the training frames.

    ``trained`` holds the keys of the frames that models were trained on, or None if they are not available.
    """
    errors: list[str] = []
    warnings: list[str] = []
    if not torch.isfinite(anchor.z[anchor.present]).all():
        errors.append("features that are not finite: every candidate would be held")
    keys, label = anchor.keys(), anchor.label.numpy()
    if not keys:
        warnings.append(
            "sealed without item keys by an earlier version: not checked against the training corpora"
        )
    elif trained is None:
        warnings.append("the training corpora are not there: not checked against them")
    elif shared := sum(k in trained for k in keys):
        errors.append(f"{shared} of {len(keys)} samples are in the training split of data.domains")
    if twice := len(keys) - len(set(keys)):
        warnings.append(f"{twice} samples are there more than once")
    counts = anchor.counts()
    real = {s for s, y in zip(anchor.species, label.tolist(), strict=True) if y == Label.BONA_FIDE}
    attacks = {s: c for s, c in counts.items() if s not in real}
    if len(attacks) < MIN_SAMPLES["species"]:
        warnings.append(f"{len(attacks)} PAI species, at least {MIN_SAMPLES['species']} are needed")
    for species, seen in counts.items():
        need = MIN_SAMPLES["bona_fide" if species in real else "attacks"]
        pattern = min(seen, key=lambda p: seen[p])
        if seen[pattern] < need:
            warnings.append(f"{species}: {seen[pattern]} samples under {pattern}, at least {need} are needed")
    for kind, absent in (("attack", not attacks), ("bona fide presentation", not real)):
        if absent:
            errors.append(f"no {kind}: every candidate would be held")
    return Flaws(tuple(errors), tuple(warnings))


def seal(root: Place, anchor: AnchorSet) -> str:
    """Stores ``anchor`` and returns its digest, which is the same for the same content."""
    names = sorted(set(anchor.species))
    index = torch.tensor([names.index(s) for s in anchor.species])
    tensors = {
        "z": anchor.z.half(),
        "present": anchor.present,
        "label": anchor.label,
        "species": index.to(torch.int32),
    }
    if anchor.key is not None:
        about = json.dumps({"trunk": anchor.trunk, "corpora": anchor.corpora}, sort_keys=True)
        tensors |= {"key": anchor.key, "about": _encode_text(about)}
    return put(root, {**tensors, "names": _encode_text(json.dumps(names))})


def open_sealed(root: Place, digest: str) -> AnchorSet:
    """Returns the anchor set with this ``digest``; raises BadBlob if its bytes have changed."""
    try:
        t = get(root, digest)
    except BadBlob as e:
        raise type(e)(f"anchor set {e}, or make it anew with `palisade anchor seal`") from None
    if not REQUIRED_TENSORS <= set(t) <= REQUIRED_TENSORS | OPTIONAL_TENSORS:
        raise BadBlob(
            f"anchor set {digest[:12]}: holds {sorted(t)}, not an anchor set; run `palisade anchor seal`"
        )
    names = json.loads(_decode_text(t["names"]))
    about = json.loads(_decode_text(t["about"])) if "about" in t else {"trunk": "", "corpora": {}}
    species = tuple(names[i] for i in t["species"].tolist())
    return AnchorSet(
        t["z"].float(), t["present"], t["label"], species, t.get("key"), about["trunk"], about["corpora"]
    )


def _encode_text(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _decode_text(text: Tensor) -> str:
    return bytes(text.tolist()).decode()
