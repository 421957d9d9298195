"""The motion embedding, on drawn textures that move by known amounts."""

import math

import numpy as np
import pytest
import torch

from encode import movement
from model import (
    FRAME_MOTION,
    TOKENS,
    MotionFeatureAutoencoder,
    describe_motion_embedding,
    motion_channels,
)
from train import fit_code

NAMES = list(FRAME_MOTION)
CAMERA = ["camera right", "camera down", "turn", "zoom"]


def columns(motion, *names):
    """Some channels of the output of `motion_channels`, by name."""
    return motion[..., [NAMES.index(name) for name in names]]


def drawn(right=0.0, down=0.0, turn=0.0, zoom=0.0, steps=6, size=(10, 15), channels=12, seed=0):
    """[1, T, H, W, channels]: sums of waves of 5 to 15 cells, moved by that much (cells, radians, log) at each step."""
    generator = torch.Generator().manual_seed(seed)
    length = 5 + 10 * torch.rand(channels, 6, generator=generator)
    angle, phase = 2 * torch.pi * torch.rand(2, channels, 6, generator=generator)
    y, x = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in size), indexing="ij")
    maps = []
    for t in range(steps):
        u, v = x - right * t, y - down * t
        cos, sin = math.cos(turn * t) * math.exp(-zoom * t), math.sin(turn * t) * math.exp(-zoom * t)
        u, v = (cos * u + sin * v)[..., None, None], (cos * v - sin * u)[..., None, None]  # where it was at t = 0
        waves = (2 * torch.pi / length * (angle.cos() * u + angle.sin() * v) + phase).sin()  # [H, W, channels, 6]
        maps.append(waves.sum(dim=-1) / 3**0.5)
    return torch.stack(maps)[None]


def noisy(maps):
    return maps + 0.3 * torch.randn(maps.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(10, 15), (16, 16)])
@pytest.mark.parametrize(
    "moved",
    [
        *({"right": 0.3}, {"right": -0.3}, {"down": 0.2}, {"down": -0.2}, {"right": 0.2, "down": -0.3}),
        *({"turn": 0.03}, {"turn": -0.03}, {"zoom": 0.03}, {"zoom": -0.03}, {"right": 1.5}, {"down": -1.5}),
    ],
)
def test_the_channels_say_which_way_and_how_far(moved, size):
    motion = motion_channels(drawn(**moved, size=size, steps=4))[0, 1:].mean(dim=0)
    wanted = torch.tensor([moved.get(name.split()[-1], 0.0) for name in CAMERA])
    torch.testing.assert_close(columns(motion, *CAMERA), wanted, atol=0.01, rtol=0.12)
    torch.testing.assert_close(columns(motion, "picture right", "picture down"), wanted[:2], atol=0.01, rtol=0.12)
    assert columns(motion, "fit") > 0.95
    speed = wanted[:2].norm().item()
    if speed:
        assert columns(motion, "log speed").item() == pytest.approx(math.log(1 + (speed / 0.01) ** 2) / 2, abs=0.15)


def test_a_preview_sees_the_movement_in_features_of_any_scale():
    x = 7 + 40 * drawn(right=0.3, down=-0.2, steps=5, channels=150)[0].half()
    curves = movement(x)
    np.testing.assert_allclose(curves["right"], [0.3] * 4, atol=0.04)
    np.testing.assert_allclose(curves["down"], [-0.2] * 4, atol=0.04)


def test_an_object_is_not_the_camera():
    maps = drawn(steps=5, size=(12, 24))
    maps[:, :, :6, :8] = drawn(right=-0.4, steps=5, size=(12, 24))[:, :, :6, :8]  # the upper left
    motion = motion_channels(maps)[0, 2:-1].mean(dim=0)
    assert columns(motion, "picture right") < -0.02
    assert columns(motion, "camera right", "camera down").abs().max() < 0.02
    still = motion_channels(drawn(right=0.4, steps=5))[0, 2:-1].mean(dim=0)
    assert columns(motion, "log object speed") > columns(still, "log object speed") + 1


def test_without_objects_all_cells_count():
    """Robust least squares alone, which leaves noisy cells out, has an error of 0.012 cells here."""
    errors = []
    for seed in range(4):
        chance = torch.Generator().manual_seed(seed)
        maps = drawn(right=0.3, steps=24, seed=seed)
        motion = motion_channels(maps + 0.3 * torch.randn(maps.shape, generator=chance))[0, 1:]
        errors.append(columns(motion, "camera down").square().mean().sqrt())
    assert torch.stack(errors).mean() < 0.009


def test_cells_that_change_their_look_count_less():
    maps = drawn(right=0.3, steps=6, size=(12, 18), seed=2)
    maps[:, :, 3:9, 6:12] = drawn(steps=6, seed=3)[:, :1, :6, :6]  # a screen that stands still
    maps[:, :, 3:9, 6:12] += 2 * torch.randn(1, 6, 6, 6, 12, generator=torch.Generator().manual_seed(4))  # and flickers
    assert columns(motion_channels(maps)[0, 2:-1].mean(dim=0), "camera right") == pytest.approx(0.3, abs=0.04)


def test_they_are_zero_at_rest_at_the_first_step_and_almost_without_texture():
    maps = drawn(right=0.3, down=0.1)
    assert not motion_channels(maps)[:, 0].any()
    assert not motion_channels(maps[:, :1]).any()
    assert not motion_channels(maps[:, :1].expand(-1, 5, -1, -1, -1)).any()
    flat = 1 + 1e-4 * torch.randn(1, 5, 10, 15, 4, generator=torch.Generator().manual_seed(0))
    assert columns(motion_channels(flat), *CAMERA).abs().max() < 0.02


def test_shaking_from_step_to_step_is_smoothed():
    places = torch.tensor([0.0, 0.3, 0.2, 0.5, 0.4, 0.7, 0.6, 0.9])  # cells: on average 0.1 a step and more
    shaking = torch.cat([drawn(right=place.item(), steps=2)[:, 1:] for place in places], dim=1)
    right = columns(motion_channels(shaking), "camera right")[0, 3:-2]
    assert right.min() > 0.05 and right.max() < 0.2


def test_a_border_that_never_moves_does_not_matter():
    moving = drawn(right=0.3, down=-0.2)
    framed = moving.clone()
    border = torch.ones(10, 15, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    framed[:, :, border] = moving[:, :1, border]
    motion = columns(motion_channels(framed)[0, 1:].mean(dim=0), *CAMERA)
    torch.testing.assert_close(motion, torch.tensor([0.3, -0.2, 0.0, 0.0]), atol=0.02, rtol=0.15)


def test_time_reversed_movement_changes_sign_and_the_rest_stays():
    maps = noisy(drawn(right=0.2, down=-0.1, turn=0.02, zoom=0.01))
    forth, back = motion_channels(maps)[:, 1:], motion_channels(maps.flip(1))[:, 1:].flip(1)
    kinds = ("right", "down", "turn", "zoom")
    sign = torch.tensor([-1.0 if name.split()[-1] in kinds else 1.0 for name in NAMES])
    torch.testing.assert_close(back, forth * sign, atol=1e-3, rtol=1e-2)


def test_mirrored_right_and_turn_change_sign_and_the_rest_stays():
    maps = noisy(drawn(right=0.2, down=-0.1, turn=0.02, zoom=0.01))
    plain, mirrored = motion_channels(maps), motion_channels(maps.flip(3))
    sign = torch.tensor([-1.0 if name.split()[-1] in ("right", "turn") else 1.0 for name in FRAME_MOTION])
    torch.testing.assert_close(mirrored, plain * sign, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 3), (3, 3), (4, 5)])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_any_grid_and_length_with_finite_gradients(size, steps):
    maps = torch.randn(2, steps, *size, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for x in (maps, 0 * maps):
        motion = motion_channels(x)
        assert motion.shape == (2, steps, len(NAMES)) and motion.isfinite().all()
        if steps > 1:
            motion.sum().backward()
            assert maps.grad.isfinite().all()


def test_the_gradient_leads_to_the_motion():
    """Descending on the distance between two clips' motion makes one move as the other does."""
    maps, wanted = drawn(steps=2), columns(motion_channels(drawn(right=0.3, steps=2)), *CAMERA)
    maps.requires_grad_()
    loss = (columns(motion_channels(maps), *CAMERA) - wanted).square().sum()
    (gradient,) = torch.autograd.grad(loss, maps)
    nearer = (columns(motion_channels(maps - 5 * gradient), *CAMERA) - wanted).square().sum()
    assert nearer < 0.9 * loss


def test_bfloat16_and_compiled_say_the_same():
    maps = drawn(right=0.3, down=0.1)
    plain = motion_channels(maps)
    model = MotionFeatureAutoencoder(64, latent_dim=maps.shape[-1], model_dim=16, num_layers=1).eval()
    embedding = model.embed(maps)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.embed(maps), embedding)
        torch.testing.assert_close(motion_channels(maps), plain)
        coarse = motion_channels(maps.bfloat16())
    torch.testing.assert_close(columns(coarse, *CAMERA), columns(plain, *CAMERA), atol=0.01, rtol=0.02)
    compiled = torch.compile(motion_channels, fullgraph=True, backend="aot_eager")(maps)
    torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("latent_dim", [2, 6, 44, 88, 96, 192])
def test_every_channel_has_its_name(latent_dim):
    model = MotionFeatureAutoencoder(192, latent_dim=latent_dim, model_dim=16, num_layers=1).eval()
    names = describe_motion_embedding(model.config)
    content = latent_dim - {2: 1, 6: 1, 44: 5, 88: 11, 96: 11, 192: 11}[latent_dim]
    latent = torch.zeros(1, 5, 10, 15, latent_dim)
    latent[..., :12] = drawn(right=0.3, steps=5)[..., :latent_dim]
    embedding, flat = model.embed(latent), model.embed(latent.flatten(2, 3))
    assert len(names) == embedding.shape[-1] == latent_dim
    assert len(set(names)) == latent_dim
    assert names[0] == "content 1" and names[content] == "camera right"
    torch.testing.assert_close(embedding[..., :content], latent[..., :content].mean(dim=(2, 3)) / 20)
    torch.testing.assert_close(flat[..., :content], embedding[..., :content])
    assert not flat[..., content:].any()  # no grid, no motion
    count = min(max(44, latent_dim * 3 // 2), 192)
    beyond = torch.zeros(*latent.shape[:-1], count - latent_dim)  # components that it has not kept
    motion = motion_channels(torch.cat([latent, beyond], dim=-1))
    for index, name in enumerate(names[content:], content):
        torch.testing.assert_close(embedding[..., index], columns(motion, name)[..., 0])


def test_a_pattern_that_is_there_in_all_clips_does_not_hold_motion_back():
    """The positions of ViTs stand still, whatever moves."""
    moving = torch.cat(
        [drawn(right=right, steps=6, seed=seed) for seed, right in enumerate((0.3, -0.2, 0.1, -0.3) * 2)]
    )
    pattern = 2 * moving.std() * torch.randn(moving.shape[2:], generator=torch.Generator().manual_seed(5))
    sizes = {
        "latent_dim": moving.shape[-1],
        "model_dim": 16,
        "num_layers": 1,
        "use_token": True,
        "block": (6, *moving.shape[2:4]),
    }
    model = MotionFeatureAutoencoder(moving.shape[-1], **sizes, clip_shape=moving.shape[1:4]).eval()
    fit_code(model.code, list(moving + pattern))
    names = describe_motion_embedding(model.config)
    right = model(moving + pattern)["motion_embedding"][:, 1:, names.index("camera right")].mean(dim=1)
    torch.testing.assert_close(right, torch.tensor([0.3, -0.2, 0.1, -0.3] * 2), atol=0.1, rtol=0)


def test_a_long_clip_is_embedded_in_parts_without_seams(monkeypatch):
    model = MotionFeatureAutoencoder(48, latent_dim=32, model_dim=16, num_layers=1).eval()
    generator = torch.Generator().manual_seed(0)
    maps = noisy(drawn(right=0.02, steps=600, size=(6, 9), channels=32))
    assert maps[..., 0].numel() > TOKENS  # that are looked at at once
    in_parts = motion_channels(maps)
    with monkeypatch.context() as at_once:
        at_once.setattr("model.TOKENS", maps.numel())
        torch.testing.assert_close(in_parts, motion_channels(maps), atol=1e-5, rtol=0)
    latent = maps + torch.randn(1, 600, 1, 1, 32, generator=generator)
    for x in (latent, latent.flatten(2, 3), latent[:, :17], latent[:, :1]):
        torch.testing.assert_close(model.embed(x[:1])[0], model.embed(x)[0], atol=1e-5, rtol=0)
