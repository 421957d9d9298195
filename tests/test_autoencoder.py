"""The model and its loss, through their public functions, on made-up features."""

import numpy as np
import pytest
import torch

from losses import motion_autoencoder_loss
from model import MotionFeatureAutoencoder, UserError, frame_differences, load_feature

SMALL = {"input_dim": 12, "model_dim": 16, "latent_dim": 6, "num_heads": 2, "num_layers": 1}


@pytest.mark.parametrize("use_token", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 6, 12), (2, 5, 2, 3, 12), (1, 1, 6, 12), (1, 11, 1, 12)])
def test_shapes(shape, use_token):
    model = MotionFeatureAutoencoder(**SMALL, use_token=use_token)
    output = model(torch.randn(shape))
    assert output["latent"].shape == (*shape[:-1], 6)
    assert output["reconstruction"].shape == shape
    assert output["motion_embedding"].shape == (*shape[:2], 6)
    assert model.compression_ratio == 0.5


def test_both_layouts_say_the_same():
    model = MotionFeatureAutoencoder(**SMALL, use_token=True).eval()
    x = torch.randn(2, 5, 2, 3, 12)
    grid, flat = model(x), model(x.flatten(2, 3))
    torch.testing.assert_close(grid["reconstruction"].flatten(2, 3), flat["reconstruction"])
    torch.testing.assert_close(grid["motion_embedding"], flat["motion_embedding"])


def test_frame_differences():
    x = np.random.default_rng(0).normal(size=(2, 4, 3, 5)).astype(np.float32)
    expected = np.zeros_like(x)
    for t in range(1, 4):
        expected[:, t] = x[:, t] - x[:, t - 1]
    np.testing.assert_allclose(frame_differences(torch.from_numpy(x)).numpy(), expected)


def test_positions_do_not_mix():
    model = MotionFeatureAutoencoder(**SMALL, use_token=True).eval()
    for network in (model.encoder.network, model.decoder.network):  # they start at zero
        torch.nn.init.normal_(network.head.weight)
    x = torch.randn(1, 5, 4, 12)
    changed = x.clone()
    changed[:, :, 2] += 1.0
    difference = (model(x)["reconstruction"] - model(changed)["reconstruction"]).abs().amax(dim=(0, 1, 3))
    assert difference[2] > 1e-2
    assert difference[[0, 1, 3]].max() < 1e-5


def test_motion_only_cannot_see_what_stands_still():
    model = MotionFeatureAutoencoder(**SMALL, use_token=False).eval()
    x = torch.randn(1, 5, 4, 12)
    still = torch.randn(1, 1, 4, 12)
    torch.testing.assert_close(model.encode(x), model.encode(x + still), atol=1e-4, rtol=1e-4)


def test_loss_is_what_numpy_says():
    rng = np.random.default_rng(1)
    x, reconstruction = rng.normal(size=(2, 2, 4, 3, 5))
    latent = rng.normal(size=(2, 4, 3, 2))
    terms = {
        "reconstruction": np.mean((reconstruction - x) ** 2),
        "motion": np.mean((np.diff(reconstruction, axis=1) - np.diff(x, axis=1)) ** 2),
        "smoothness": np.mean(np.diff(latent, axis=1) ** 2) / np.mean(latent**2),
    }
    loss, found = motion_autoencoder_loss(*map(torch.from_numpy, (x, reconstruction, latent)), 2.0, 3.0, 0.5)
    assert {name: term.item() for name, term in found.items()} == pytest.approx(terms)
    expected = 2.0 * terms["reconstruction"] + 3.0 * terms["motion"] + 0.5 * terms["smoothness"]
    assert loss.item() == pytest.approx(expected)


def test_loss_of_a_single_frame_has_no_motion():
    x = torch.randn(2, 1, 3, 5)
    loss, terms = motion_autoencoder_loss(x, x + 1, torch.randn(2, 1, 3, 2), 1.0, 1.0, 1.0)
    assert loss.item() == pytest.approx(1.0, rel=1e-5)
    assert terms["motion"] == terms["smoothness"] == 0


def test_smoothness_does_not_reward_shrinking():
    x, latent = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 2)
    smoothness = [motion_autoencoder_loss(x, x, latent * s)[1]["smoothness"].item() for s in (1.0, 1e-3, 1e3)]
    assert smoothness == pytest.approx([smoothness[0]] * 3)


@pytest.mark.parametrize("change", [{"num_heads": 3}, {"latent_dim": 13}])
def test_sizes_that_cannot_be_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        MotionFeatureAutoencoder(**{**SMALL, **change})


def test_feature_files_in_every_form(tmp_path):
    x = torch.randn(3, 2, 2, 4).half()
    forms = {
        "tensor.pt": x,
        "feature.pt": {"other": 1, "features": x + 1, "feature": x, "caption": "a cat", "video": "0.mp4", "model": "m"},
        "features.pth": {"other": 1, "features": x},
        "first.pt": {"tokens": x, "other": 1},
        "bfloat16.pt": x.bfloat16(),
    }
    for name, data in forms.items():
        torch.save(data, tmp_path / name)
        feature, metadata = load_feature(tmp_path / name, 4)
        torch.testing.assert_close(feature, x.bfloat16() if name == "bfloat16.pt" else x)
        assert metadata == ({"caption": "a cat", "video": "0.mp4", "model": "m"} if name == "feature.pt" else {})
    for dtype in ("<f2", ">f4", "<f8"):
        np.save(tmp_path / "array.npy", x.numpy().astype(dtype))
        for mmap in (False, True):
            torch.testing.assert_close(load_feature(tmp_path / "array.npy", 4, mmap)[0].half(), x)
