from __future__ import annotations

import torch

from pipeline.data import augment as a


def frames(count: int = 16, size: int = 24) -> torch.Tensor:
    return torch.rand(count, 5, size, size, generator=torch.Generator().manual_seed(3))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_same_generator_same_draw_and_the_input_is_left_alone() -> None:
    x = frames()
    before = x.clone()
    first, again = a.augment(x, seeded()), a.augment(x, seeded())
    assert torch.equal(first, again)
    assert torch.equal(x, before)
    assert not torch.equal(first, a.augment(x, seeded(1)))


def test_range_and_shape_stay() -> None:
    out = a.augment(frames(), seeded())
    assert out.shape == frames().shape
    assert out.min() >= 0
    assert out.max() <= 1


def test_no_return_stays_no_return() -> None:
    x = frames()
    x[:, a.DEPTH, :12] = 0
    still = a.change_geometry(x, seeded())[:, a.DEPTH] == 0
    out = a.augment(x, seeded())[:, a.DEPTH]
    assert bool((out[still] == 0).all())
    assert float((out[~still] > 0).float().mean()) > 0.8


def test_geometry_is_joint() -> None:
    plane = frames()[:, :1]
    moved = a.change_geometry(plane.expand(-1, 5, -1, -1), seeded())
    assert all(torch.allclose(moved[:, 0], moved[:, c], atol=1e-5) for c in range(5))
    assert not torch.equal(moved[:, 0], plane[:, 0])


def test_half_of_the_samples_are_mirrored_and_a_point_stays_near() -> None:
    x = torch.zeros(400, 5, 32, 32)
    x[:, :, 15:18, 7:10] = 1.0
    at = a.change_geometry(x, seeded())[:, 0].amax(dim=1).argmax(dim=1)
    left = at < 16
    assert 0.4 < float(left.float().mean()) < 0.6
    assert bool(((at >= 2) & (at <= 13) | (at >= 18) & (at <= 29)).all())


def test_an_edge_of_depth_is_near_or_nothing_but_never_between() -> None:
    x = torch.full((64, 5, 32, 32), 0.8)
    x[:, :, :, 16:] = 0.0
    depth = a.change_geometry(x, seeded())[:, a.DEPTH]
    assert bool(((depth - 0.8).abs() < 1e-4).logical_or(depth == 0).all())


def test_sensors_differ_per_modality_and_per_sample() -> None:
    grey = torch.full((64, 5, 16, 16), 0.5)
    level = a.change_sensor(grey, seeded()).mean(dim=(2, 3))
    assert level.std(dim=0).min() > 0.02
    assert abs(float(torch.corrcoef(level[:, [3, 4]].T)[0, 1])) < 0.5


def test_depth_polarity_flips_in_some_and_touches_nothing_else() -> None:
    x = frames(200)
    out = a.invert_depth(x, seeded())
    inverted = torch.isclose(out[:, a.DEPTH], 1 - x[:, a.DEPTH]).flatten(1).all(dim=1)
    same = (out[:, a.DEPTH] == x[:, a.DEPTH]).flatten(1).all(dim=1)
    assert bool((inverted ^ same).all())
    assert 0.2 < float(inverted.float().mean()) < 0.4
    assert torch.equal(out[:, [0, 1, 2, 4]], x[:, [0, 1, 2, 4]])
