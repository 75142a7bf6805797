"""Moves the boundary with the stream's own scores; no weight moves.

By default the site's share of bona fide is estimated from the last scores by EM under label shift (Saerens et
al., Neural Computation 2002) and the boundary moves by its log odds, as Bayes' rule has it; the posteriors
are the sigmoids of the source's logits, whose boundary of equal errors stands for equal priors. With a
``prior`` that share is assumed, as quantile thresholds do, and the boundary moves to where the share of bona
fide calls equals it. Two classes: an assumed half makes half of a one-class door attacks, and the unbounded
estimate of such a door would let everything in; hence the estimate, the bound and the least count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from pipeline.models import tail as tails
from pipeline.site.contract import SiteMethod
from pipeline.site.trust import sane
from pipeline.types import Outcome

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.site.contract import Params, State
    from pipeline.types import Features

ROUNDS = 20  # of EM, from equal priors
SHARE = 0.01  # least share of a class that the estimate may reach
SHRUNK = 0.1  # least part of a radius that stays
HUGE = 1e9  # sorts the empty places of the ring behind every logit
PUBLISHED: dict[str, object] = {
    "prior": 0.5,  # classes are assumed to be balanced at the site
    "limit": 100.0,  # no bound that matters
    "rate": 1.0,  # the latest estimate, not a running one
}


class Config(SiteMethod):
    """Settings of the baseline."""

    kind: str = "recalibrate"
    prior: float | None = Field(
        default=None, gt=0, lt=1, description="assumed share of bona fide; null: estimated"
    )
    window: int = Field(default=256, ge=2, le=4096, description="how many of the last logits are kept")
    minimum: int = Field(default=64, ge=2, description="samples before the boundary moves")
    limit: float = Field(default=1.0, gt=0, description="logits; largest move of the boundary")
    rate: float = Field(default=0.01, gt=0, le=1, description="of the running move, per sample")

    def init(self, tail: Params) -> State:
        """Returns the movable tensors, the ring of source logits, and the boundary's move in logits."""
        return {
            **{k: v.clone() for k, v in tails.site_state(tail).items()},
            "ring": torch.zeros(self.window),
            "seen": torch.zeros((), dtype=torch.int64),
            "shift": torch.zeros(()),
        }

    def step(self, tail: Params, state: State, batch: Features) -> tuple[State, Outcome]:
        """Score the batch, keep its logits, move the boundary of every set of sensors by the same logits."""
        batch = sane(batch)
        score = tails.score(tails.with_site_state(tail, state), batch.z, batch.present)
        logit = tails.forward(tail, batch.z, batch.present).logit[
            :, tails.FUSED
        ]  # of the source: moves do not add up
        ring, seen = _keep(state, logit, batch.valid)
        held = torch.arange(self.window) < seen
        wanted = _log_odds(ring, held) if self.prior is None else -_quantile(ring, held, 1 - self.prior)
        rate = 1 - (1 - self.rate) ** batch.valid.sum()
        shift = state["shift"] + rate * (wanted.clamp(-self.limit, self.limit) - state["shift"])
        moves = batch.valid.any() & (seen >= self.minimum)
        shift = torch.where(moves, shift, state["shift"])
        pattern = torch.where(moves, _pattern(tail, shift), state["pattern"])
        unused = torch.full_like(score, -1, dtype=torch.int8)
        zero = torch.zeros(())
        outcome = Outcome(score, unused, torch.zeros_like(score), zero, zero, zero > 1)
        return {**state, "pattern": pattern, "ring": ring, "seen": seen, "shift": shift}, outcome


def _keep(state: State, logit: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """(ring, seen) after the valid rows took the oldest places."""
    ring, seen = state["ring"], state["seen"]
    slots = torch.arange(ring.shape[0])
    for i in range(valid.shape[0]):
        ring = torch.where((slots == seen % ring.shape[0]) & valid[i], logit[i], ring)
        seen = seen + valid[i]
    return ring, seen


def _log_odds(logit: Tensor, held: Tensor) -> Tensor:
    """Returns the log odds of the share of bona fide among the held logits.

    It supposes that attacks and bona fide were equally many at the source.
    """
    odds = torch.zeros_like(logit[0])
    for _ in range(ROUNDS):
        share = (torch.sigmoid(logit + odds) * held).sum() / held.sum().clamp(min=1)
        odds = torch.logit(share.clamp(SHARE, 1 - SHARE))
    return odds


def _quantile(logit: Tensor, held: Tensor, level: float) -> Tensor:
    """The value with a share ``level`` of the held logits below it, midway between two of them."""
    ordered = torch.sort(torch.where(held, logit, HUGE)).values
    count = held.sum()
    below = torch.minimum(torch.round(level * count).clamp(min=1), (count - 1).clamp(min=1)).long()
    return ordered.gather(0, torch.stack([below - 1, below])).mean()


def _pattern(tail: Params, shift: Tensor) -> Tensor:
    """Returns the source's ``pattern`` [2^M], moved so that every fused logit grows by ``shift``.

    A radius stays positive.
    """
    step = shift / tails.KAPPA
    if "linear" in tail:
        return tail["pattern"] + step
    radius = torch.exp(tail["log_rho"][tails.FUSED] + tail["pattern"])
    return tail["pattern"] + torch.log1p((step / radius).clamp(min=SHRUNK - 1))
