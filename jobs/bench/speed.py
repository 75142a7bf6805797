"""Times a fit beside a bare PyTorch loop on the same data, and adaptation beside scoring alone."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pipeline.data.augment import augment
from pipeline.data.decode import CHANNELS
from pipeline.data.features import mask_to_bool
from pipeline.data.featurise import torch_trunk
from pipeline.models import tail as tails
from pipeline.models.graph import TrunkGraph
from pipeline.models.trunk import build_trunk, features, fold, graph_of, prepare
from pipeline.site import bank
from pipeline.site.trust import entropy
from pipeline.source import fit as fits
from pipeline.source.contract import Batch
from pipeline.source.sampler import draw, make_batch, prefetch, stratify
from pipeline.types import Features

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from pipeline.data.corpus import Corpus
    from pipeline.data.featurise import Featurise
    from pipeline.models.checkpoint import SourceModel
    from pipeline.site.contract import SiteMethod
    from pipeline.source.fit import Task

WARM, BLOCK, BLOCKS = 5, 10, 4  # steps before the clock starts; steps in a row; blocks of each loop, in turns


class Speed(NamedTuple):
    """Seconds of one step, one after the other, and samples per second with loading ahead."""

    load: float
    forward: float
    backward: float
    optimizer: float
    samples: float  # per second of a fit
    bare: float  # per second of the bare loop


class Cost(NamedTuple):
    """What the trunk costs for one capture with every modality, on one core."""

    macs: int  # multiplications with an addition, of convolutions and linear layers
    milliseconds: float  # as ingest runs it
    by_torch: float  # milliseconds


def capture_cost(task: Task, *, captures: int = 64) -> Cost:
    """Counts and times the trunk of ``task`` at inference."""
    trunk, total = fold(build_trunk(task.model.trunk, task.size)), 0
    frames = torch.randint(0, 256, (captures, CHANNELS, task.size, task.size), dtype=torch.uint8)
    present = torch.ones(captures, tails.MODALITIES, dtype=torch.bool)

    def count(module: nn.Module, _: object, out: Tensor) -> None:
        nonlocal total
        weight = cast("Tensor", module.weight)
        total += out.numel() // out.shape[1] * weight.numel() if out.dim() == 4 else weight.numel()

    layers = [m for m in trunk.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [m.register_forward_hook(count) for m in layers]
    features(trunk, frames[:1], present[:1])
    for hook in hooks:
        hook.remove()
    ways: list[Featurise] = [torch_trunk(trunk)]
    if trunk.exported:
        ways.append(TrunkGraph(graph_of(trunk, task.size)))
    arrays, seconds = (frames.numpy(), present.numpy()), list[float]()
    with fits.threads(1):
        for way in ways:
            way(*arrays)
            began = time.perf_counter()
            way(*arrays)
            seconds.append(time.perf_counter() - began)
    return Cost(total, 1000 * seconds[-1] / captures, 1000 * seconds[0] / captures)


def measure(task: Task, corpora: Sequence[Corpus], *, workers: int = 1) -> Speed:
    """Times ``task`` on ``corpora`` in this process; the two loops take turns, to meet the same machine."""
    parts = _split(task, corpora)
    ours, bare = _fitted(task, corpora), _bare(task, corpora, workers)
    seconds = {"ours": 0.0, "bare": 0.0}
    for loop in (ours, bare):
        for _ in range(WARM):
            next(loop)
    for _ in range(BLOCKS):
        for name, loop in (("ours", ours), ("bare", bare)):
            began = time.perf_counter()
            for _ in range(BLOCK):
                next(loop)
            seconds[name] += time.perf_counter() - began
    seen = BLOCKS * BLOCK * task.method.batch
    return Speed(**parts, samples=seen / seconds["ours"], bare=seen / seconds["bare"])


def _split(task: Task, corpora: Sequence[Corpus]) -> dict[str, float]:
    """Returns the mean seconds of each part of a step when nothing overlaps."""
    state, cells, method = fits.begin(task, domains=len(corpora)), stratify(corpora), task.method
    spent: dict[str, float] = dict.fromkeys(("load", "forward", "backward", "optimizer"), 0.0)
    last = 0.0

    def lap(part: str) -> None:
        nonlocal last
        now = time.perf_counter()
        spent[part] += now - last
        last = now

    for at in range(WARM + BLOCK):
        if at == WARM:
            spent = dict.fromkeys(spent, 0.0)
        last = time.perf_counter()
        drawn = make_batch(method, draw(method, corpora, cells, step=at, rank=0, world=1), step=at, rank=0)
        lap("load")
        fits.step(state, *drawn, lap=lap)
        lap("optimizer")
    return {part: total / BLOCK for part, total in spent.items()}


def _fitted(task: Task, corpora: Sequence[Corpus]) -> Iterator[None]:
    state, cells, method = fits.begin(task, domains=len(corpora)), stratify(corpora), task.method
    steps = range(WARM + BLOCKS * BLOCK)
    for at, drawn in prefetch(lambda at: draw(method, corpora, cells, step=at, rank=0, world=1), steps):
        fits.step(state, *make_batch(method, drawn, step=at, rank=0))
        yield


def _bare(task: Task, corpora: Sequence[Corpus], workers: int) -> Iterator[None]:
    """Fits as one would by hand: a shuffling DataLoader that augments in workers, loss, backward, step."""
    state = fits.begin(task, domains=len(corpora))
    generator = torch.Generator().manual_seed(task.method.seed)
    rows = _Rows(corpora)
    loader = DataLoader(
        rows,
        batch_size=task.method.batch,
        shuffle=True,
        drop_last=len(rows) > task.method.batch,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_collate,
        generator=generator,
    )
    while True:
        for batch in loader:
            state.optimizer.zero_grad(set_to_none=True)
            terms: dict[str, Tensor] = state.module(batch, generator)
            torch.stack(list(terms.values())).sum().backward()
            torch.nn.utils.clip_grad_norm_(state.objective.parameters(), fits.CLIP)
            state.optimizer.step()
            task.method.after_step(state.objective.extra)
            yield


def adaptation(
    model: SourceModel, methods: Mapping[str, SiteMethod], *, batch: int, sites: int = 16
) -> dict[str, float]:
    """Returns by method the time of trunk, score and learning over that of trunk and score alone.

    Each step has a mixed batch of ``sites``; one thread; all take turns, so that they meet the same machine.
    """
    frames, mixed = _mixed(model, sites, batch)
    present = mixed.present.flatten(0, 1)
    z = features(model.trunk, frames, present)
    states = {name: bank.stack([m.init(model.tail)] * sites) for name, m in methods.items()}

    def forward_only() -> None:
        features(model.trunk, frames, present)
        with torch.no_grad():
            tails.score(model.tail, z, present)

    def adapt(name: str) -> None:
        features(model.trunk, frames, present)
        states[name], _ = bank.step(methods[name], model.tail, states[name], mixed)

    spent = _in_turns({"": forward_only, **{name: partial(adapt, name) for name in methods}})
    return {name: spent[name] / spent[""] for name in methods}


class Banked(NamedTuple):
    """What adapting many sites in one step gains: ratios of sites per second."""

    alone: float  # over the same method, one site after the other, K = 64
    tent: float  # over a loop that back-propagates entropy through the trunk, site by site
    tent_trunk: float  # the same where the bank pays for the trunk too
    wide: float  # cost of a site at K = 256 over that at K = 16


def banked(model: SourceModel, method: SiteMethod, *, batch: int) -> Banked:
    """Measures ``method`` on mixed batches; one thread, all in turns."""
    sites = 64
    frames, mixed = _mixed(model, sites, batch)
    states = {k: bank.stack([method.init(model.tail)] * k) for k in (1, 16, sites, 256)}
    batches = {k: _mixed(model, k, batch)[1] for k in (1, 16, 256)} | {sites: mixed}

    def together(k: int) -> None:
        states[k], _ = bank.step(method, model.tail, states[k], batches[k])

    def with_trunk() -> None:
        features(model.trunk, frames, mixed.present.flatten(0, 1))
        together(sites)

    banks = {str(k): partial(together, k) for k in states}
    tent = partial(_tent_through_trunk, model, frames[:batch], mixed.present[0])
    spent = _in_turns({**banks, "trunk": with_trunk, "tent": tent})
    one, through_trunk = spent[str(sites)] / sites, spent["tent"] * sites / spent["trunk"]
    wide = (spent["256"] / 256) / (spent["16"] / 16)
    return Banked(spent["1"] / one, spent["tent"] / one, through_trunk, wide)


def _tent_through_trunk(model: SourceModel, frames: Tensor, present: Tensor) -> None:
    """Takes one step of one site as TENT (Wang et al., 2021): every scale and shift of the trunk moves."""
    moving = [p for p in model.trunk.parameters() if p.dim() <= 1]
    own = [p.detach().clone() for p in moving]
    for p in moving:
        p.requires_grad_(True)
    p = tails.score(model.tail, model.trunk(prepare(frames), present), present)
    entropy(p).mean().backward()
    with torch.no_grad():
        for parameter, before in zip(moving, own, strict=True):
            assert parameter.grad is not None
            parameter -= 1e-3 * parameter.grad
            parameter.copy_(before)  # the next site has its own
            parameter.grad = None
            parameter.requires_grad_(False)


def _mixed(model: SourceModel, sites: int, batch: int) -> tuple[Tensor, Features]:
    """Returns random frames [sites * batch, 5, H, W] and their features as one batch of a bank."""
    random = torch.Generator().manual_seed(0)
    size, shape = model.manifest.size, (sites, batch)
    frames = torch.randint(0, 256, (sites * batch, 5, size, size), generator=random, dtype=torch.uint8)
    there = torch.ones(sites * batch, tails.MODALITIES, dtype=torch.bool)
    z = features(model.trunk, frames, there)
    valid, session = torch.ones(shape, dtype=torch.bool), torch.arange(sites * batch).view(shape)
    return frames, Features(z.view(*shape, *z.shape[1:]), there.view(*shape, -1), valid, session)


def _in_turns(runs: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    """Returns the seconds of each run, the median of BLOCK rounds after WARM; one thread."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    with fits.threads(1):
        for at in range(WARM + BLOCK):
            for name, run in runs.items():
                began = time.perf_counter()
                run()
                if at >= WARM:
                    spent[name].append(time.perf_counter() - began)
    return {name: float(np.median(seconds)) for name, seconds in spent.items()}


class _Rows(Dataset[tuple[np.ndarray, int, int, int]]):
    """(frame, present, label, domain) of every training row."""

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        self.corpora = corpora
        self.at = [
            (e, int(i)) for e, c in enumerate(corpora) for i in np.flatnonzero(np.asarray(c.split) == "train")
        ]

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, int, int]:
        e, i = self.at[index]
        c = self.corpora[e]
        return c.frame[i], int(c.present[i]), int(c.label[i]), e


def _collate(rows: list[tuple[np.ndarray, int, int, int]]) -> Batch:
    frame, present, label, domain = zip(*rows, strict=True)
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    frames = (
        augment(torch.from_numpy(np.stack(frame)).float() / 255, generator).mul_(255).round_().to(torch.uint8)
    )
    there = torch.from_numpy(mask_to_bool(np.array(present, np.uint8)))
    return Batch(prepare(frames), there, torch.tensor(label), torch.tensor(domain), 0.5)
