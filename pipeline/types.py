"""The nouns: modalities, labels, batches of features and what a site step reports.

Tensor letters everywhere: ``K`` sites, ``B`` samples, ``M`` modalities, ``F`` features, ``D`` head width,
``C,H,W`` image. A score is P(bona fide) in [0, 1], everywhere.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator

if TYPE_CHECKING:
    from torch import Tensor

SITE_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


class PalisadeError(Exception):
    """Base of the errors that a person can act on: the message is one line, the class has its exit code."""

    exit_code: ClassVar[int] = 2  # usage or configuration; 4: a guard failed; 5: infrastructure


class Modality(IntEnum):
    """Sensor channels; the value is the index on tensor axis M."""

    RGB = 0
    DEPTH = 1
    IR = 2


class Label(IntEnum):
    """ISO/IEC 30107 classes."""

    UNKNOWN = -1
    ATTACK = 0
    BONA_FIDE = 1


class Section(BaseModel):
    """Base of every configuration section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Method(Section):
    """Base of a method's settings.

    ``kind`` is the name of the method's module, which is its default in every subclass.
    """

    kind: str = Field(description="name of the method: a module of the folder methods")

    @field_validator("kind")
    @classmethod
    def _names_its_module(cls, kind: str) -> str:
        if kind != (expected := cls.model_fields["kind"].default):
            raise ValueError(f"these are the settings of {expected!r}")
        return kind


class Features(NamedTuple):
    """A batch of trunk features; ``torch.func.vmap`` adds the leading axis K."""

    z: Tensor  # [B, M, F] float32; rows of absent modalities are ignored whatever they hold
    present: Tensor  # [B, M] bool
    valid: Tensor  # [B] bool; False marks padding, which must change nothing
    session: Tensor  # [B] int64 pseudonym; captures of one session are not independent, whoever stands there


class Lesson(NamedTuple):
    """What looking at a batch found, before anything is learned from it."""

    batch: Features  # rows that cannot be used are invalid in it
    score: Tensor  # [B] P(bona fide)
    source: Tensor  # [B] P(bona fide) of the source model
    vote: Tensor  # [B] P(bona fide) of the heads together
    disagreement: Tensor  # [B] nats between the heads
    label: Tensor  # [B] 1 / 0
    used: Tensor  # [B] 1 where the sample may teach, else 0


class Outcome(NamedTuple):
    """What one site step reports; every score was taken before the step learned from its sample."""

    score: Tensor  # [B] P(bona fide)
    pseudo_label: Tensor  # [B] int8: 1 / 0 where the sample was used with that label, -1 where it was not
    disagreement: Tensor  # [B] nats between the heads
    omega: Tensor  # [] loss weight after the step
    instability: Tensor  # [] D_t of this step
    restored: Tensor  # [] bool: this step went back to the last good snapshot


def check_site_id(site: str) -> str:
    """Return ``site`` if it is a safe site id, else raise ValueError; paths are built from ids that passed
    here.
    """
    if not SITE_ID.fullmatch(site):
        raise ValueError(
            f"site id {site!r}: allowed are 1-63 of a-z 0-9 _ -, starting with a letter or digit"
        )
    return site
