"""Declares the functions of a site method: to start, to step through a stream, to learn from labels.

A method is a module of ``pipeline/site/methods`` with a ``Config``, a subclass of ``SiteMethod`` (or
``Selective``) whose ``kind`` is the module's name. This file imports no torch, so that a configuration is
read at once.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.types import Method

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.types import Features, Lesson, Outcome

    Params = dict[str, Tensor]
    State = dict[str, Tensor]


class SiteMethod(Method):
    """Section ``site``: the settings of a method and its two pure functions."""

    @abstractmethod
    def init(self, tail: Params) -> State:
        """Returns the state of one new site: a dict of fixed-shape tensors that holds ``tail.MOVABLE``."""

    @abstractmethod
    def step(self, tail: Params, state: State, batch: Features) -> tuple[State, Outcome]:
        """Predicts the batch of ONE site first and learns from it afterwards.

        No Python branch depends on a tensor's value, so that ``torch.func.vmap`` gives K sites;
        ``pipeline.site.bank`` is the only place that knows the axis K.
        """


class Taught(SiteMethod):
    """A method that also learns from the site's labelled presentations.

    Its state holds a memory of them (``pipeline.site.taught``), which the caller fills.
    """

    taught: int = Field(
        default=64, ge=8, le=128, description="labelled presentations that a site's memory holds"
    )

    @abstractmethod
    def teach(self, tail: Params, state: State) -> State:
        """Learns anew from the memory in ``state`` of ONE site, starting at the source model.

        What was learned from the stream is dropped; like ``step``, it has no branch on a tensor's value.
        """


class LabelsAlone(Taught):
    """A method that learns nothing from a stream: it scores it, and remembers it if it keeps a reservoir."""

    def step(self, tail: Params, state: State, batch: Features) -> tuple[State, Outcome]:
        """Scores the batch and remembers it."""
        from pipeline.site import taught

        return taught.watch(tail, state, batch)


class Selective(SiteMethod):
    """A method whose step is ``observe``, then ``conclude``.

    The bank skips the gradients when no site has a sample to learn from. Without a used sample ``conclude``
    must give the same bits with and without ``learn``.
    """

    @abstractmethod
    def observe(self, tail: Params, state: State, batch: Features) -> tuple[State, Lesson]:
        """Scores the batch and marks the samples that may teach."""

    @abstractmethod
    def conclude(self, tail: Params, state: State, lesson: Lesson, *, learn: bool) -> tuple[State, Outcome]:
        """Learns from the samples that may teach if ``learn``, and remembers all of them."""

    def step(self, tail: Params, state: State, batch: Features) -> tuple[State, Outcome]:
        """Observes the batch, then learns from it."""
        return self.conclude(tail, *self.observe(tail, state, batch), learn=True)
