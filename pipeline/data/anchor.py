"""The sealed anchor set: labelled features replayed against every candidate, never trained on, pinned by digest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pipeline.data.blobs import BadBlob, get, put
from pipeline.data.protocols import PATTERNS

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.storage import Place


@dataclass(frozen=True)
class AnchorSet:
    """N labelled samples under one trunk."""

    z: Tensor  # [N, M, F] float32
    present: Tensor  # [N, M] bool
    label: Tensor  # [N] int8
    species: tuple[str, ...]  # [N] PAI species

    def replayed(self) -> tuple[tuple[str, ...], Tensor]:
        """Names of the missing-modality patterns and what each leaves present: [P, N, M] bool."""
        keep = torch.tensor([[bool(mask >> m & 1) for m in range(self.present.shape[1])] for mask in PATTERNS.values()])
        return tuple(PATTERNS), self.present & keep[:, None, :]


def seal(root: Place, anchor: AnchorSet) -> str:
    """Store ``anchor`` → its digest; the ledger pins it."""
    names = sorted(set(anchor.species))
    index = torch.tensor([names.index(s) for s in anchor.species])
    tensors = {"z": anchor.z.half(), "present": anchor.present, "label": anchor.label, "species": index.to(torch.int32)}
    return put(root, {**tensors, "names": _text(json.dumps(names))})


def open_sealed(root: Place, digest: str) -> AnchorSet:
    """The anchor set whose bytes have ``digest``; raises BadBlob when they have changed."""
    t = get(root, digest)
    if set(t) != {"z", "present", "label", "species", "names"}:
        raise BadBlob(f"anchor set {digest[:12]}: holds {sorted(t)}, not an anchor set; train seals a new one")
    names = json.loads(bytes(t["names"].tolist()).decode())
    return AnchorSet(t["z"].float(), t["present"], t["label"], tuple(names[i] for i in t["species"].tolist()))


def _text(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
