"""A small trained tail and a door whose captures have shifted: what a site's labels must mend."""

from __future__ import annotations

from functools import lru_cache

import torch

from pipeline.models import TailConfig, tail

F = 16  # features
STEPS = 150  # of the fit of the small tail


def draw(n: int, *, seed: int, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns bona fide and attack features, each [n, M, F]; ``shift`` moves the bona fide ones."""
    g = torch.Generator().manual_seed(seed)
    axis = torch.randn(3, F, generator=torch.Generator().manual_seed(99))
    other = torch.randn(3, F, generator=torch.Generator().manual_seed(98))
    noise = 0.7 * torch.randn(2 * n, 3, F, generator=g)
    return noise[:n] + 0.6 * axis + shift * (other - axis), noise[n:] - 0.6 * axis


@lru_cache(maxsize=1)
def source() -> dict[str, torch.Tensor]:
    """A tail that was fitted to tell the two apart, with the features that it replays."""
    params = tail.init_tail(TailConfig(width=8, rank=4), F, generator=torch.Generator().manual_seed(0))
    bona_fide, attack = draw(64, seed=1)
    z, present = torch.cat([bona_fide, attack]), torch.ones(128, 3, dtype=torch.bool)
    label = torch.cat([torch.ones(64), torch.zeros(64)])
    learned = {n: t.clone().requires_grad_(True) for n, t in params.items() if not n.startswith("site.")}
    optimizer = torch.optim.Adam(learned.values(), lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        logit = tail.forward({**params, **learned}, z, present).logit
        torch.nn.functional.binary_cross_entropy_with_logits(
            logit, label[:, None].expand_as(logit)
        ).backward()
        optimizer.step()
    fitted = {**params, **{n: t.detach() for n, t in learned.items()}}
    real, fake = (tail.forward(fitted, x, present[:64]).logit[:, tail.FUSED] for x in draw(64, seed=2))
    q = torch.linspace(0, 1, tail.QUANTILES)
    logit = torch.stack([fake.quantile(q), real.quantile(q)]).expand(2**tail.MODALITIES, -1, -1).clone()
    return {
        **fitted,
        "reference.logit": logit,
        "reference.boundary": torch.tensor([-0.3, 0.2]),
        "replay.z": z[::4],
        "replay.present": present[::4],
        "replay.label": label[::4],
    }


def door(*, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns 96 bona fide and 96 attack presentations of a site whose sensors moved the bona fide ones."""
    return draw(96, seed=7, shift=shift)
