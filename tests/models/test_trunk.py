from __future__ import annotations

import pytest
import torch

from pipeline.models import MobileConfig, TinyConfig, TrunkConfig
from pipeline.models.trunk import build_trunk, features, fold, prepare
from pipeline.models.trunks.tiny import Block

SIZE = 32


CONFIGS: dict[str, TrunkConfig] = {
    "tiny": TinyConfig(width=8, features=16),
    "mobile": MobileConfig(kind="mobile", features=16),
}


def frames(count: int = 6) -> torch.Tensor:
    return torch.randint(0, 256, (count, 5, SIZE, SIZE), dtype=torch.uint8)


def trained(kind: str = "tiny") -> torch.nn.Module:
    """A trunk whose norms have seen data, so that folding has something to fold."""
    trunk = build_trunk(CONFIGS[kind], SIZE).train()
    for _ in range(3):
        trunk(prepare(frames(16)), torch.ones(16, 3, dtype=torch.bool))
    for block in [m for m in trunk.modules() if isinstance(m, Block)]:
        torch.nn.init.normal_(block.norm.weight, 1.0, 0.3)
        torch.nn.init.normal_(block.norm.bias, 0.0, 0.3)
    return trunk


@pytest.mark.parametrize("kind", ["tiny", "mobile"])
def test_absent_pixels_never_reach_a_feature(kind: str) -> None:
    trunk, x = trained(kind), frames()
    present = torch.tensor(
        [[1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]], dtype=torch.bool
    )
    other = x.clone()
    for m, (begin, end) in enumerate(((0, 3), (3, 4), (4, 5))):
        other[~present[:, m], begin:end] = 255 - other[~present[:, m], begin:end]
    assert torch.equal(features(trunk, x, present), features(trunk, other, present))


@pytest.mark.parametrize("kind", ["tiny", "mobile"])
def test_a_modality_is_read_by_itself(kind: str) -> None:
    trunk, x, present = trained(kind), frames(), torch.ones(6, 3, dtype=torch.bool)
    other = x.clone()
    other[:, 4] = 255 - other[:, 4]
    z, w = features(trunk, x, present), features(trunk, other, present)
    assert torch.equal(z[:, :2], w[:, :2])
    assert not torch.allclose(z[:, 2], w[:, 2])


@pytest.mark.parametrize("kind", ["tiny", "mobile"])
def test_no_sample_moves_another_at_inference(kind: str) -> None:
    trunk, x, present = trained(kind), frames(), torch.ones(6, 3, dtype=torch.bool)
    whole = features(trunk, x, present)
    assert torch.allclose(whole[2:3], features(trunk, x[2:3], present[2:3]), atol=1e-5)
    assert torch.allclose(whole.flip(0), features(trunk, x.flip(0), present), atol=1e-5)
    assert torch.allclose(whole, features(trunk, x, present, batch=4), atol=1e-5)


def test_folded_equals_unfolded() -> None:
    trunk, x, present = trained(), frames(), torch.ones(6, 3, dtype=torch.bool)
    folded = fold(trunk)
    assert torch.allclose(features(trunk, x, present), features(folded, x, present), atol=1e-4)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in trunk.modules()), (
        "the trunk that is trained keeps its norms"
    )


def test_absent_rows_do_not_teach_the_norms() -> None:
    one, two = build_trunk(TinyConfig(width=8), SIZE).train(), build_trunk(TinyConfig(width=8), SIZE).train()
    two.load_state_dict(one.state_dict())
    x, present = frames(8), torch.ones(8, 3, dtype=torch.bool)
    black = torch.cat([x, torch.zeros_like(x)])
    one(prepare(x), present)
    two(prepare(black), torch.cat([present, torch.zeros_like(present)]))
    for name, t in one.state_dict().items():
        assert torch.allclose(t.float(), two.state_dict()[name].float(), atol=1e-5), name


def test_a_batch_without_a_modality_still_reaches_every_parameter() -> None:
    trunk = build_trunk(TinyConfig(width=8), SIZE).train()
    trunk(prepare(frames(4)), torch.tensor([[True, False, True]] * 4)).sum().backward()
    assert all(p.grad is not None for p in trunk.parameters())


def test_prepare_forgets_gain_and_background() -> None:
    x = 60 + frames(2) // 4
    ready = prepare(x)
    assert torch.allclose(prepare(2 * x), ready, atol=0.4)
    assert float(ready.mean(dim=(2, 3))[:, 3:].abs().max()) < 1e-4
    black = x.clone()
    black[:, :, :8] = 0
    assert bool((prepare(black)[:, :, :8] == 0).all())
    assert torch.allclose(prepare(black)[:, :, 8:], ready[:, :, 8:], atol=0.2), (
        "removing background must not shift a face"
    )


def test_prepare_takes_each_frame_by_itself_and_survives_flat_ones() -> None:
    x = frames(3)
    x[1] = 0
    x[2] = 200
    ready = prepare(x)
    assert torch.equal(prepare(x[:1]), ready[:1])
    assert bool((ready[1:].abs() < 1e-4).all())
