"""What to learn from one site's stream. One method is one file with a ``Config`` whose ``kind`` is the module's name.

The contract, two pure functions on the frozen config:

``init(tail) -> State``
    one site's state: a flat dict of tensors of fixed shapes; it always holds ``tail.MOVABLE``
``step(tail, state, batch) -> (State, Outcome)``
    predict first, learn afterwards; written for ONE site with no Python branch on tensor values, so that
    ``torch.func.vmap`` gives K sites (``pipeline.site.bank`` is the only place that knows the axis K)

This file holds the contract's type and the few pure pieces that more than one method is made of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from pipeline.models import tail as tails
from pipeline.site.trust import entropy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pipeline.types import Features, Lesson, Outcome

    Params = dict[str, Tensor]
    State = dict[str, Tensor]

__all__ = ["BETAS", "LARGEST", "LEARNED", "Selective", "SiteMethod", "adam", "entropy", "moments", "sane"]

LEARNED = tuple(
    name for name in tails.MOVABLE if name != "pattern"
)  # by gradients; pattern is counted, not learned
BETAS = (0.9, 0.999)
LARGEST = 1e4  # no trunk feature comes near; its square still sums without overflow


class SiteMethod(Protocol):
    """What ``bank`` and the jobs need of a method's Config."""

    @property
    def kind(self) -> str: ...
    def init(self, tail: Params) -> State: ...
    def step(self, tail: Params, state: State, batch: Features) -> tuple[State, Outcome]: ...


@runtime_checkable
class Selective(SiteMethod, Protocol):
    """A method whose step is ``observe`` then ``conclude``: a bank in which no site has anything to learn skips the gradients.

    Without a used sample, ``conclude`` must give the same bits with and without ``learn``.
    """

    def observe(self, tail: Params, state: State, batch: Features) -> tuple[State, Lesson]: ...
    def conclude(
        self, tail: Params, state: State, lesson: Lesson, *, learn: bool
    ) -> tuple[State, Outcome]: ...


def sane(batch: Features) -> Features:
    """Rows with a value beyond ``LARGEST`` or not finite in a present modality become padding; absent values become zero."""
    clean = torch.where(batch.present[..., None], batch.z, 0.0)
    ok = (clean.abs() <= LARGEST).all(-1).all(-1) & batch.present.any(-1)  # a NaN compares False
    valid = batch.valid & ok
    return batch._replace(z=torch.where(valid[:, None, None], clean, 0.0), valid=valid)


def moments(tail: Params, names: Sequence[str]) -> State:
    """Zero Adam moments for the named tensors."""
    zeros = {f"{m}.{n}": torch.zeros_like(tail[n]) for m in ("adam1", "adam2") for n in names}
    return {**zeros, "adam.t": torch.zeros(())}


def adam(state: State, grads: Params, *, lr: float, clip: float, when: Tensor) -> State:
    """One Adam step (Kingma & Ba 2015) on the tensors named in ``grads``; unchanged where ``when`` is False.

    The gradient is clipped to global norm ``clip``. A step that would leave a value that is not finite is not taken.
    """
    total = torch.sqrt(torch.stack([torch.sum(g * g) for g in grads.values()]).sum())
    scale = torch.clamp(clip / (total + 1e-12), max=1.0)
    ok = when & torch.isfinite(total)
    t = state["adam.t"] + 1
    new: State = {"adam.t": torch.where(ok, t, state["adam.t"])}
    for name, gradient in grads.items():
        g = torch.where(ok, gradient * scale, 0.0)
        first = BETAS[0] * state[f"adam1.{name}"] + (1 - BETAS[0]) * g
        second = BETAS[1] * state[f"adam2.{name}"] + (1 - BETAS[1]) * g * g
        move = lr * (first / (1 - BETAS[0] ** t)) / (torch.sqrt(second / (1 - BETAS[1] ** t)) + 1e-8)
        new[name] = torch.where(ok, state[name] - move, state[name])
        new[f"adam1.{name}"] = torch.where(ok, first, state[f"adam1.{name}"])
        new[f"adam2.{name}"] = torch.where(ok, second, state[f"adam2.{name}"])
    return {**state, **new}
