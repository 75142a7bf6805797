"""Fits one source model: objective, the only ``backward()``, and a state that can be resumed.

It knows no Ray.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from pipeline.models import ModelConfig, fit_state
from pipeline.models import tail as tails
from pipeline.models.checkpoint import Manifest, SourceModel, seal
from pipeline.models.trunk import build_trunk, fold
from pipeline.source.calibrate import (
    replay_samples,
    transfer_boundaries,
    validation_features,
    validation_reference,
)
from pipeline.source.sampler import FitError, check_validation, draw, make_batch, prefetch, stratify
from pipeline.stats import metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Generator, Tensor

    from pipeline.data.corpus import Corpus
    from pipeline.models.trunk import Trunk
    from pipeline.source.contract import Batch, SourceMethod
    from pipeline.source.sampler import Draw

    Params = dict[str, Tensor]
    Report = Callable[["Fit", dict[str, float]], None]

CLIP = 5.0  # largest gradient norm
WARMUP = 0.05  # share of the steps in which the rate rises
FROZEN_TAIL = "site."  # the site adapter is the identity in a source model
TRUNK, TAIL = "model.trunk.", "model._tail."


@dataclass(frozen=True)
class Task:
    """A fit to run, with the facts for its manifest."""

    method: SourceMethod
    model: ModelConfig
    size: int
    data: dict[str, str] = field(default_factory=dict)  # domain → digest of its corpus
    fingerprint: str = ""
    revision: str = ""
    parents: tuple[str, ...] = ()


@dataclass
class Fit:
    """An unfinished fit; ``module`` is the objective, or the objective as ``wrap`` wrapped it."""

    task: Task
    objective: Objective
    module: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0


class Objective(nn.Module):
    """Trunk, tail and the method's own tensors; ``forward`` is the loss, so DDP works unchanged.

    A tensor of ``extra`` named after a tail tensor stands in for it during the fit, one row per domain; the
    model gets their mean.
    """

    def __init__(self, method: SourceMethod, trunk: Trunk, tail: Params, *, domains: int) -> None:
        super().__init__()
        self.method, self.trunk = method, trunk
        extra = method.extra(domains, tail)
        learned = {n: not n.startswith(FROZEN_TAIL) and n not in extra for n in tail}
        self._tail = nn.ParameterDict(
            {_parameter_name(n): nn.Parameter(t, requires_grad=learned[n]) for n, t in tail.items()}
        )
        self._extra = nn.ParameterDict({_parameter_name(n): nn.Parameter(t) for n, t in extra.items()})

    @property
    def tail(self) -> Params:
        return {_tensor_name(n): p for n, p in self._tail.items()}

    @property
    def extra(self) -> Params:
        return {_tensor_name(n): p for n, p in self._extra.items()}

    def trunk_features(self, frames: Tensor, present: Tensor) -> Tensor:
        with torch.autocast(
            frames.device.type, torch.bfloat16, enabled=_uses_bfloat16(self.method.precision, frames.device)
        ):
            z = self.trunk(frames, present)
        return z.float()

    def forward(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        return self.method.losses(self, batch, generator)

    def final_tail(self) -> Params:
        tail = {**self.tail, **{n: t.mean(dim=0) for n, t in self.extra.items() if n in self.tail}}
        return {n: t.detach().cpu().clone() for n, t in tail.items()}


def fit(
    task: Task,
    corpora: Sequence[Corpus],
    *,
    report: Report | None = None,
    every: int = 100,
    draws: Callable[[int], Draw] | None = None,
) -> SourceModel:
    """Fits ``task`` in this process on the train split; the threshold comes from the val split.

    Raises FitError if a class is missing or the loss is not finite.
    """
    check_validation(corpora)
    state = begin(task, domains=len(corpora))
    advance(state, corpora, until=task.method.steps, report=report, every=every, draws=draws)
    return finish(state, corpora)


def advance(
    state: Fit,
    corpora: Sequence[Corpus],
    *,
    until: int,
    rank: int = 0,
    world: int = 1,
    report: Report | None = None,
    every: int = 100,
    draws: Callable[[int], Draw] | None = None,
) -> None:
    """Advances ``state`` to step ``until``, as one of ``world`` workers.

    ``draws`` may hand out the samples of a step that were drawn before, for another method. ``report`` is
    called after each ``every`` steps, and after the last, with the mean loss terms since the call before.
    """
    cells = stratify(corpora)
    method = state.task.method
    draws = draws or (lambda at: draw(method, corpora, cells, step=at, rank=rank, world=world))
    sums: dict[str, float] = {}
    since = 0
    for at, drawn in prefetch(draws, range(state.step, until)):
        for name, value in step(state, *make_batch(method, drawn, step=at, rank=rank)).items():
            sums[name] = sums.get(name, 0.0) + value
        since += 1
        if report is not None and (state.step % every == 0 or state.step == method.steps):
            report(state, {name: total / since for name, total in sums.items()})
            sums, since = {}, 0


def begin(task: Task, *, domains: int, wrap: Callable[[nn.Module], nn.Module] | None = None) -> Fit:
    """Returns a fit at step 0: weights from the seed (or ``source.start``) and their optimizer."""
    generator = torch.Generator().manual_seed(task.method.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.method.seed)
        trunk = build_trunk(task.model.trunk, task.size)
    tail = tails.init_tail(task.model.tail, task.model.trunk.features, generator=generator)
    if task.method.start:
        _load_start(Path(task.method.start), trunk, tail)
    objective = Objective(task.method, trunk, tail, domains=domains)
    objective.train()
    module = wrap(objective) if wrap else objective
    optimizer = torch.optim.AdamW(
        _parameter_groups(objective, task.method.weight_decay), lr=task.method.lr, fused=True
    )
    return Fit(task, objective, module, optimizer)


def step(
    state: Fit, given: Batch, generator: Generator, *, lap: Callable[[str], None] | None = None
) -> dict[str, float]:
    """Takes one optimizer step in place and returns the loss terms before it: the only ``backward()``.

    ``lap`` is told when the forward and the backward pass are done.
    """
    method = state.task.method
    device = next(state.objective.parameters()).device
    given = given._replace(
        **{n: t.to(device) for n, t in given._asdict().items() if isinstance(t, torch.Tensor)}
    )
    terms: dict[str, Tensor] = state.module(given, generator)
    total = torch.stack(list(terms.values())).sum()
    if lap:
        lap("forward")
    if not bool(torch.isfinite(total)):
        odd = ", ".join(f"{n}={float(t.detach()):.3g}" for n, t in terms.items())
        raise FitError(
            f"step {state.step}: the loss is not finite ({odd}); lower source.lr (now {method.lr:g})"
        )
    for group in state.optimizer.param_groups:
        group["lr"] = method.lr * schedule(state.step, method.steps)
    state.optimizer.zero_grad(set_to_none=True)
    total.backward()
    if lap:
        lap("backward")
    nn.utils.clip_grad_norm_(state.objective.parameters(), CLIP)
    state.optimizer.step()
    method.after_step(state.objective.extra)
    state.step += 1
    return {name: float(t.detach()) for name, t in terms.items()}


def schedule(step: int, steps: int) -> float:
    """Returns the factor on the rate: linear warm-up, then half a cosine down to 1 %."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def save(state: Fit, folder: Path) -> None:
    """Saves everything that the rest of the fit depends on, as safetensors and JSON."""
    tensors = {f"model.{n}": t for n, t in state.objective.state_dict().items()}
    for i, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{n}": torch.as_tensor(t) for n, t in moments.items()}
    facts = {"step": state.step, "kind": state.task.method.kind, "fingerprint": state.task.fingerprint}
    fit_state.write(folder, tensors, facts)


def restore(state: Fit, folder: Path) -> None:
    """Restores the state of ``save``; raises FitError for another configuration, ValueError for damage."""
    tensors, meta = fit_state.read(folder)
    mine = {"kind": state.task.method.kind, "fingerprint": state.task.fingerprint}
    for name, value in mine.items():
        if meta[name] != value:
            raise FitError(
                f"{folder}: saved fit has {name} {meta[name]!r}, this one {value!r}; choose another run name"
            )
    model = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    state.objective.load_state_dict(model)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        if name.startswith("optimizer."):
            _, i, what = name.split(".", 2)
            moments.setdefault(int(i), {})[what] = t
    state.optimizer.load_state_dict(
        {"state": moments, "param_groups": state.optimizer.state_dict()["param_groups"]}
    )
    for p, moments_of in state.optimizer.state.items():
        for name, t in moments_of.items():
            if (
                t.shape == p.shape
            ):  # the fused step reads memory in order: a moment must be laid out like its parameter
                moments_of[name] = torch.empty_like(p, requires_grad=False).copy_(t)
    state.step = cast("int", meta["step"])


def finish(state: Fit, corpora: Sequence[Corpus]) -> SourceModel:
    """Folds the trunk, sets boundaries and threshold from the validation, and seals the model."""
    task, objective = state.task, state.objective
    trunk, tail = fold(objective.trunk).cpu(), objective.final_tail()
    domain, label, z, present = validation_features(trunk, corpora)
    tail["reference.pool"] = torch.tensor(tails.POOL)
    tail |= transfer_boundaries(tail, z, present, label, domain)
    tail |= validation_reference(tail, z, present, label, domain)
    manifest = Manifest(
        config=task.model,
        size=task.size,
        threshold=0.5,
        method=task.method.kind,
        domains=tuple(c.domain for c in corpora),
        data=task.data,
        parents=task.parents,
        fingerprint=task.fingerprint,
        revision=task.revision,
        architecture=objective.trunk.architecture(),
    )
    tail |= replay_samples(trunk, corpora)
    logit = tails.forward(tail, z, present).logit[:, tails.FUSED]
    score = torch.sigmoid(logit).numpy()
    threshold = 1 / (1 + math.exp(-metrics.transfer_threshold(logit.numpy(), label, domain)))
    names = [c.domain for c in corpora]
    figures = {
        f"val_hter_{names[e]}": metrics.hter(score[domain == e], label[domain == e], threshold)
        for e in range(len(names))
        if len(set(label[domain == e].tolist())) == 2
    }
    figures["val_hter"] = metrics.hter(score, label, threshold)
    figures["val_auc"] = metrics.auc(score, label)
    return seal(trunk, tail, manifest.model_copy(update={"threshold": threshold, "metrics": figures}))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs torch on ``count`` threads inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def scores(model: SourceModel, z: Tensor, present: Tensor) -> Tensor:
    """Returns P(bona fide) [N] of features [N, M, F]."""
    with torch.no_grad():
        return tails.score(model.tail, z, present)


def _load_start(start: Path, trunk: Trunk, tail: Params) -> None:
    """Loads trunk and tail of the fit that ``save`` left in ``start``; raises FitError.

    A head that the stored fit lacks keeps its fresh weights.
    """
    try:
        stored, _ = fit_state.read(start)
        trunk.load_state_dict({n.removeprefix(TRUNK): t for n, t in stored.items() if n.startswith(TRUNK)})
    except (ValueError, RuntimeError) as e:
        raise FitError(
            f"source.start: {start} is no fit of this model.trunk: {' '.join(str(e).split())[:200]}"
        ) from None
    for name in tail:
        tensor = stored.get(f"{TAIL}{_parameter_name(name)}")
        if tensor is not None and tensor.shape == tail[name].shape:
            tail[name] = tensor


def _parameter_groups(objective: Objective, decay: float) -> list[dict[str, object]]:
    def decays(name: str, p: Tensor) -> bool:
        return (
            p.dim() > 1
            and not name.startswith("_extra.")
            and _tensor_name(name.removeprefix("_tail.")) not in tails.NO_DECAY
        )

    named = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]


def _uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Returns True if the trunk computes in bfloat16.

    Without hardware for it, bfloat16 is four times as slow as float32.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _parameter_name(name: str) -> str:
    return name.replace(".", "/")  # a parameter's name may not hold a dot


def _tensor_name(name: str) -> str:
    return name.replace("/", ".")
