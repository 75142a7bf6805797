"""Computes Adam as a pure function whose moments are tensors of the site's state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from pipeline.site.contract import Params, State

BETAS = (0.9, 0.999)


def moments(tail: Params, names: Sequence[str]) -> State:
    """Returns zero Adam moments for the named tensors."""
    zeros = {f"{m}.{n}": torch.zeros_like(tail[n]) for m in ("adam1", "adam2") for n in names}
    return {**zeros, "adam.t": torch.zeros(())}


def adam(state: State, grads: Params, *, lr: float, clip: float, when: Tensor) -> State:
    """Takes one Adam step (Kingma & Ba 2015) on the tensors in ``grads``; unchanged where ``when`` is False.

    The gradient is clipped to global norm ``clip``. A step that would leave a value that is not finite is not
    taken.
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


def descend(
    loss: Callable[[Params], Tensor], start: Params, *, steps: int, lr: float, clip: float, when: Tensor
) -> Params:
    """Returns the tensors of ``start`` after ``steps`` Adam steps on ``loss``, each as ``adam`` takes it."""
    now: State = {**start, **moments(start, [*start])}
    for _ in range(steps):
        grads = torch.func.grad(loss)({n: now[n] for n in start})
        now = adam(now, grads, lr=lr, clip=clip, when=when)
    return {n: now[n] for n in start}
