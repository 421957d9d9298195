"""The model and its loss, through their public functions, on made-up features."""

import copy
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from made_up import ROOT

from encode import encode_clip
from losses import motion_autoencoder_loss, relation_errors
from model import MotionFeatureAutoencoder, UserError, blocks, cut, load_feature, resample_latent
from train import fit_code

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


def test_both_layouts_say_the_same_where_cells_are_coded_one_by_one():
    model = awake(MotionFeatureAutoencoder(**SMALL, use_token=True, block=(24, 1, 1)).eval())
    x = torch.randn(2, 5, 2, 3, 12)
    grid, flat = model(x), model(x.flatten(2, 3))
    torch.testing.assert_close(grid["reconstruction"].flatten(2, 3), flat["reconstruction"])
    content = (grid["motion_embedding"], flat["motion_embedding"])
    torch.testing.assert_close(*(embedding[..., :5] for embedding in content))  # the sixth is motion over the grid


def awake(model):
    """The model with its networks, which start at zero, taking part."""
    for network in model.network.networks:
        torch.nn.init.normal_(network.head.weight, std=0.1)
    torch.nn.init.normal_(model.network.log_gain, std=0.1)
    torch.nn.init.normal_(model.network.offset, std=0.1)
    return model


def test_positions_do_not_mix():
    """Those of a layout without a grid, and those of different blocks of a grid."""
    model = awake(fitted(made_up_clips().unflatten(2, (2, 5))))
    for grid, place, block in (((4,), (2,), (2,)), ((7, 10), (2, 6), (slice(2, 4), slice(5, 10)))):
        x = torch.randn(1, 24, *grid, 48)
        model.code.clip_shape = () if len(grid) == 1 else (24, 2, 5)
        changed = x.clone()
        changed[(slice(None), slice(None), *place)] += 1.0
        difference = (model(x)["reconstruction"] - model(changed)["reconstruction"]).abs().amax(dim=(0, 1, -1))
        assert difference[block].max() > 0.1
        difference[block] = 0.0
        assert difference.max() < 1e-5


def test_the_networks_know_the_time_step():
    model = awake(MotionFeatureAutoencoder(**SMALL, use_token=True).eval())
    still = torch.randn(1, 4, 6).expand(9, -1, -1).transpose(0, 1)  # [S, T, D]
    assert model.network(still).diff(dim=1).abs().amax(dim=(0, 2)).min() > 1e-3


@pytest.mark.parametrize("use_token", [True, False])
@pytest.mark.parametrize(("latent_dim", "num_layers"), [(6, 2), (7, 3), (2, 1)])
def test_the_network_is_undone_exactly(latent_dim, num_layers, use_token):
    sizes = {**SMALL, "latent_dim": latent_dim, "num_layers": num_layers, "use_token": use_token}
    network = awake(MotionFeatureAutoencoder(**sizes).eval().double()).network
    z = torch.randn(5, 9, latent_dim, dtype=torch.float64)
    latent = network(z)
    assert (latent - z).abs().amax(dim=(0, 1)).min() > 1e-3  # each channel takes part
    torch.testing.assert_close(network.inverse(latent), z, rtol=0, atol=1e-10)


def test_training_starts_from_the_fitted_code():
    """And what the network does changes the latent, but nothing that is decoded from it."""
    x = made_up_clips(count=4)
    model = fitted(x)
    before = model(x)
    torch.testing.assert_close(before["latent"], model.encoder(x, linear=True), atol=0, rtol=0)
    after = awake(model)(x)
    assert (after["latent"] - before["latent"]).std() > 0.05
    for name in ("reconstruction", "motion_embedding"):
        torch.testing.assert_close(after[name], before[name], atol=1e-4, rtol=1e-4)


def test_the_halves_work_by_themselves():
    model = awake(fitted(made_up_clips()))
    x = made_up_clips(count=2, seed=1)
    encoder, decoder = copy.deepcopy(model.encoder), copy.deepcopy(model.decoder)
    output = model(x)
    torch.testing.assert_close(encoder(x), output["latent"])
    torch.testing.assert_close(decoder(output["latent"]), output["reconstruction"])


def test_motion_only_cannot_see_what_stands_still():
    model = awake(MotionFeatureAutoencoder(**SMALL, use_token=False).eval())
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
        "smoothness": np.mean(np.diff(latent, axis=1) ** 2) / np.mean(latent.reshape(-1, 2).var(axis=0)),
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


def test_smoothness_rewards_neither_shrinking_nor_shifting():
    x, latent = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 2)
    changed = (latent, latent * 1e-3, latent * 1e3, latent + 10.0)
    smoothness = [motion_autoencoder_loss(x, x, z)[1]["smoothness"].item() for z in changed]
    assert smoothness == pytest.approx([smoothness[0]] * 4, rel=1e-4)


@pytest.mark.parametrize("change", [{"num_heads": 3}, {"latent_dim": 13}, {"latent_dim": 1}])
def test_sizes_that_cannot_be_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        MotionFeatureAutoencoder(**{**SMALL, **change})


def made_up_clips(count=24, length=24, seed=0):
    """Clips [count, T, 10, 48]: a moving part of few dimensions, a still part of many, a mean, noise."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(48, 48, generator=torch.Generator().manual_seed(99)) / 7
    moving = torch.randn(count, length, 10, 12, generator=rng).cumsum(dim=1) * 0.3
    speed = torch.rand(count, 1, 1, 1, generator=rng) * 2 + 0.2
    still = torch.randn(count, 1, 10, 48, generator=rng) * torch.linspace(2, 1, 48)
    noise = 0.05 * torch.randn(count, length, 10, 48, generator=rng)
    return (torch.nn.functional.pad(moving * speed, (0, 36)) + still) @ mixing + noise + 0.5


def fitted(x, latent_dim=16, use_token=True):
    block = (min(24, x.shape[1]), *(x.shape[2:4] if x.ndim == 5 else (1, 1)))
    model = MotionFeatureAutoencoder(48, 16, latent_dim, 2, 1, use_token=use_token, block=block).eval()
    fit_code(model.code, list(x))
    return model


def clips_of_things(count, seed):
    """Clips [count, 8, 10, 48], each of four things, of forty: a token is a sum of them, each there or not."""
    rng, things = torch.Generator().manual_seed(seed), torch.randn(40, 48, generator=torch.Generator().manual_seed(5))
    chosen = [things[torch.randperm(40, generator=rng)[:4]] for _ in range(count)]
    shares = 0.3 * torch.randn(count, 8, 10, 4, generator=rng).cumsum(dim=1)
    shares += 2 * torch.randn(count, 1, 10, 4, generator=rng)
    return shares.relu() @ torch.stack(chosen)[:, None] + 1


def test_a_turned_basis_keeps_relations_and_what_is_reconstructed():
    """Of clips that it was not learned on: by PCA's basis relations lose half as much again. `mix` is symmetric, so
    that each channel of the latent stays near the component of its number, and decoding undoes it."""
    x, held_out = clips_of_things(40, 0), clips_of_things(10, 1)
    models = {}
    for name, weight in {"PCA": 0.0, "turned": 1.0}.items():
        models[name] = MotionFeatureAutoencoder(48, 16, 12, 2, 1, use_token=True, block=(8, 1, 1)).eval()
        fit_code(models[name].code, list(x), relation_weight=weight)
    related, reconstructed = {}, {}
    for name, model in models.items():
        latent = model.encode(held_out)
        clips = zip(held_out, latent, strict=True)
        errors_of = [torch.stack([*relation_errors(clip[None], z[None]).values()]) for clip, z in clips]
        related[name], reconstructed[name] = torch.stack(errors_of).mean(dim=0), model.decode(latent)
        assert (model.code.basis.mT @ model.code.basis - torch.eye(48)).abs().max() < 1e-5
    assert (related["turned"] < 0.75 * related["PCA"]).all()  # of all tokens, and of those that move most
    assert errors(held_out, reconstructed["turned"])[0] < 1.05 * errors(held_out, reconstructed["PCA"])[0]
    code = models["turned"].code
    assert (code.mix - code.mix.mT).abs().max() < 1e-5 < (code.mix - code.mix.diagonal().diag()).abs().max()
    assert (code.mix @ code.unmix - torch.eye(12)).abs().max() < 1e-5


def errors(x, reconstruction):
    error = (reconstruction - x).double()
    return error.square().mean().item(), error.diff(dim=1).square().mean().item()


def pca(x, latent_dim, held_out):
    """Motion-weighted PCA in numpy: its code of the held-out clips, and their reconstruction."""
    mean = x.mean(dim=(0, 1, 2))
    covariance = sum(np.cov(part.flatten(0, 2).numpy().T, ddof=0) for part in (x, x.diff(dim=1)))
    basis = torch.from_numpy(np.linalg.eigh(covariance)[1][:, ::-1][:, :latent_dim].copy()).float()
    latent = (held_out - mean) @ basis
    return latent, latent @ basis.T + mean


def test_what_a_position_shows_in_all_clips_costs_no_channels():
    """As with the positions of ViTs: the code has it from training, where all clips have the same."""
    position = torch.randn(24, 10, 48, generator=torch.Generator().manual_seed(3))
    train, held_out = made_up_clips() + position, made_up_clips(count=8, seed=1) + position
    models = [
        MotionFeatureAutoencoder(48, 16, 16, 2, 1, use_token=True, clip_shape=shape).eval()
        for shape in ((24, 10), (1, 1))
    ]
    for model in models:
        fit_code(model.code, list(train))
    ours, without = (sum(errors(held_out, model(held_out)["reconstruction"])) for model in models)
    assert ours < 0.5 * without
    with_grid = models[0](held_out.unflatten(2, (2, 5)))["reconstruction"].flatten(2, 3)  # as by --grid
    assert sum(errors(held_out, with_grid)) < 0.5 * without
    for other, kept in ((held_out[:, :20], 1.5), (held_out[:, :, :7], 2.0)):  # other steps; other cells
        with pytest.warns(UserWarning, match="those trained on have (24|10): the mean over these"):
            assert sum(errors(other, models[0](other)["reconstruction"])) < kept * without


def test_chance_is_no_position():
    """A few clips' mean at a position would else be taken from all others."""
    model = MotionFeatureAutoencoder(48, 16, 16, 2, 1, use_token=True, clip_shape=(24, 10)).eval()
    fit_code(model.code, list(made_up_clips(count=8)))
    assert model.code.mean.std(dim=(0, 1)).max() < 0.05


@pytest.mark.parametrize("length", [5, 24, 30, 48])
def test_the_code_is_never_worse_than_pca(length):
    """Not even where nothing stands still, so that there is nothing to gain."""
    mixing = torch.linspace(3, 0.3, 48).diag() @ torch.randn(48, 48, generator=torch.Generator().manual_seed(99))
    train, held_out = (torch.randn(n, length, 10, 48, generator=torch.Generator().manual_seed(n)) for n in (24, 8))
    train, held_out = train @ mixing, held_out @ mixing
    ours = fitted(train)(held_out)["reconstruction"]
    assert sum(errors(held_out, ours)) < 1.001 * sum(errors(held_out, pca(train, 16, held_out)[1]))


@pytest.mark.parametrize("length", [7, 24, 30, 48])
def test_the_code_beats_pca_on_clips_it_has_not_seen(length):
    train, held_out = made_up_clips(length=length), made_up_clips(count=8, length=length, seed=1)
    ours = fitted(train)(held_out)["reconstruction"]
    _, reference = pca(train, 16, held_out)
    assert sum(errors(held_out, ours)) < 0.9 * sum(errors(held_out, reference))


def test_the_code_keeps_token_relations():
    train, held_out = made_up_clips(), made_up_clips(count=8, seed=1)

    def distance(latent):
        """Mean absolute change of the cosine between any two tokens of a clip."""
        cosines = [torch.nn.functional.normalize(tokens.flatten(1, 2), dim=-1) for tokens in (held_out, latent)]
        before, after = (c @ c.mT for c in cosines)
        return (before - after).abs().mean().item()

    model = fitted(train)
    kept = distance(model.encode(held_out))
    assert kept < 1.05 * distance(pca(train, 16, held_out)[0])
    model.code.load_state_dict({**model.code.state_dict(), "mix": torch.eye(16)})
    assert kept < distance(model.encode(held_out))  # than by the components as they are


def test_the_code_of_all_dimensions_loses_nothing():
    x = made_up_clips(count=4)
    torch.testing.assert_close(fitted(x, latent_dim=48)(x)["reconstruction"], x, atol=1e-3, rtol=1e-3)


def test_cells_of_a_block_share_what_they_have_in_common():
    """Fields that are smooth over the grid take fewer errors in blocks of 5 x 7 cells than of one."""

    def smooth(count, seed):
        rng = torch.Generator().manual_seed(seed)
        coarse = torch.randn(count * 24, 48, 2, 3, generator=rng)
        fine = torch.nn.functional.interpolate(coarse, (5, 7), mode="bilinear").unflatten(0, (count, 24))
        return fine.movedim(2, -1) * torch.linspace(2, 0.5, 48)  # [count, 24, 5, 7, 48]

    train, held_out = smooth(24, 0), smooth(8, 1)
    blocks = errors(held_out, fitted(train)(held_out)["reconstruction"])
    cells = errors(held_out, fitted(train.flatten(2, 3))(held_out.flatten(2, 3))["reconstruction"].view_as(held_out))
    assert sum(blocks) < 0.8 * sum(cells)


def test_motion_weight_buys_motion():
    train, held_out = made_up_clips(), made_up_clips(count=8, seed=1)
    found = []
    for weight in (1.0, 10.0, 100.0):
        model = fitted(train)
        fit_code(model.code, list(train), 1.0, weight)
        found.append(errors(held_out, model(held_out)["reconstruction"])[1])
    reference = errors(held_out, pca(train, 16, held_out)[1])[1]
    assert found[0] > found[1] > found[2]
    assert found[1] < reference


def test_a_large_motion_weight_keeps_most_of_what_stands_still():
    """It would be free to go, did it not jump from block to block."""
    train, held_out = made_up_clips(length=48), made_up_clips(count=8, length=48, seed=1)
    model, found = fitted(train), []
    for weight in (1.0, 100.0):
        fit_code(model.code, list(train), 1.0, weight)
        found.append(errors(held_out, model(held_out)["reconstruction"])[0])
    assert found[1] < 1.25 * found[0]


def test_smooth_weight_smooths_and_loses_nothing():
    train, held_out = made_up_clips(), made_up_clips(count=8, seed=1)
    smoothness, total = [], []
    for weight in (0.0, 0.05, 1.0, 10.0):
        model = fitted(train)
        fit_code(model.code, list(train), smooth_weight=weight)
        output = model(held_out)
        _, terms = motion_autoencoder_loss(held_out, output["reconstruction"], output["latent"])
        smoothness.append(terms["smoothness"].item())
        total.append(sum(errors(held_out, output["reconstruction"])))
    assert smoothness == sorted(smoothness, reverse=True) and smoothness[2] < 0.8 * smoothness[0]
    assert max(total) < 1.25 * min(total)


@pytest.mark.parametrize("use_token", [True, False])
def test_a_block_starts_where_the_last_one_ended(use_token):
    """What a block as a whole is, compared with the others of its clip, is motion too: it is not lost."""
    train = torch.randn(8, 1, 6, 48).expand(-1, 96, -1, -1) + torch.randn(8, 4, 6, 48).repeat_interleave(24, dim=1)
    model = fitted(train + 0.1 * torch.randn(train.shape), use_token=use_token)
    output = model(train)["reconstruction"]
    assert errors(train, output)[1] < 0.3 * train.diff(dim=1).square().mean()


def test_axes_are_cut_into_near_equal_parts():
    assert cut(25, 24) == [slice(0, 13), slice(13, 25)]
    assert {part.stop - part.start for part in cut(500, 24)} == {23, 24}
    assert [part.stop - part.start for part in cut(45, 16)] == [15, 15, 15]
    assert len(blocks((48, 30, 45), (24, 16, 16))) == 12


@pytest.mark.parametrize("length", [25, 48, 500])
def test_motion_error_is_not_much_larger_across_blocks(length):
    """Than within them, twice at most, where tokens walk at random."""
    model = fitted(made_up_clips().unflatten(2, (2, 5)))
    x = made_up_clips(count=1, length=length, seed=2).unflatten(2, (2, 5))
    change = (model(x)["reconstruction"] - x).diff(dim=1).square().mean(dim=(0, 2, 3, 4))  # [T - 1]
    seams = torch.tensor([part.start - 1 for part in cut(length, 24)[1:]])
    within = torch.ones(length - 1, dtype=torch.bool).index_fill(0, seams, False)
    assert change[seams].mean() < 2 * change[within].mean()


@pytest.mark.parametrize(("factor", "shift"), [(1000.0, 0.0), (1e-4, 0.0), (1.0, 100.0), (30.0, -500.0)])
def test_scale_and_shift_raise_no_relative_error(factor, shift):
    x = made_up_clips()
    changed = x * factor + shift
    plain, scaled = (
        errors(x, fitted(x)(x)["reconstruction"]),
        errors(changed, fitted(changed)(changed)["reconstruction"]),
    )
    scaled = [value / factor**2 for value in scaled]
    if shift:  # cosines around a large mean are all alike and easily kept, which leaves more room for the rest
        assert sum(scaled) < 1.001 * sum(plain)
    else:
        assert scaled == pytest.approx(plain, rel=1e-3)


def test_motion_alone_moves_at_least_as_right_as_pca_of_the_differences():
    def drifting(count, seed):
        """Fast and small in some directions, slow and large in others: which to keep depends on what is asked."""
        rng = torch.Generator().manual_seed(seed)
        fast = torch.randn(count, 24, 10, 48, generator=rng) * torch.linspace(2, 0, 48)
        slow = torch.linspace(-1, 1, 24)[:, None, None] * torch.randn(count, 1, 10, 48, generator=rng)
        return fast + slow * torch.linspace(0, 20, 48)

    train, held_out = drifting(24, 0), drifting(8, 1)
    flat, held_out_delta = train.diff(dim=1).flatten(0, 2).numpy(), held_out.diff(dim=1)
    basis = torch.from_numpy(np.linalg.eigh(flat.T @ flat)[1][:, ::-1][:, :16].copy())
    reference = (held_out_delta @ basis @ basis.T - held_out_delta).square().mean().item()
    ours = fitted(train, use_token=False)(held_out)["reconstruction"]
    assert errors(held_out, ours)[1] <= reference


def test_still_features_and_dead_channels_are_no_harm():
    x = made_up_clips()[:, :1].expand(-1, 24, -1, -1).clone()
    x[..., 5] = 3.0
    for use_token in (True, False):
        output = fitted(x, use_token=use_token)(made_up_clips(count=2, seed=1))
        assert all(value.isfinite().all() for value in output.values())
    copies = made_up_clips(count=1).expand(3, -1, -1, -1)  # nothing but the mean
    assert all(value.isfinite().all() for value in fitted(copies)(copies).values())
    constant = fitted(torch.ones(2, 24, 10, 48))(torch.ones(1, 24, 10, 48))
    torch.testing.assert_close(constant["reconstruction"], torch.ones(1, 24, 10, 48))


def test_a_channel_far_from_zero_is_learned_from():
    """Were tokens kept for it in float16, one of 1e5 spreads would overflow."""
    x = torch.randn(8, 6, 3, 3, 12)
    x[..., 3] += 1e5
    model = MotionFeatureAutoencoder(**SMALL, use_token=True, block=(6, 3, 3), clip_shape=(6, 3, 3)).eval()
    fit_code(model.code, list(x), relation_weight=1.0)
    assert model.encode(x).isfinite().all()


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e4])
def test_the_latent_has_one_scale(factor):
    x = made_up_clips() * factor
    spread = fitted(x).encode(x).std(dim=(0, 1, 2))
    assert spread.square().mean().sqrt().item() == pytest.approx(1, rel=0.05)


def test_the_latent_survives_float16():
    model = fitted(made_up_clips())
    x = made_up_clips(count=4, seed=1)
    whole = errors(x, model.decode(model.encode(x)))
    assert sum(errors(x, model.decode(model.encode(x).half().float()))) < 1.01 * sum(whole)


def test_the_model_in_float16_codes_what_stands_still():
    """Energies of coefficients beyond the range of float16: the constant of a block has that of all of its tokens."""
    x = torch.randn(8, 1, 1, 1, 1) * torch.randn(48) + 0.01 * torch.randn(8, 24, 10, 15, 48)
    model = fitted(x)
    assert model.code.energies(model.code.size).max() > torch.finfo(torch.float16).max
    whole, half = model.encode(x[:1]), copy.deepcopy(model).half().encode(x[:1].half())
    torch.testing.assert_close(half.float(), whole, atol=3e-2, rtol=1e-2)


@pytest.mark.parametrize("use_token", [True, False])
def test_a_clip_is_coded_block_by_block(use_token, tmp_path):
    """Each as a clip by itself: but for motion alone, where the mean over time of the whole clip is taken off. Features
    can lie on disk, in half precision."""
    model = awake(fitted(made_up_clips().unflatten(2, (2, 5)), use_token=use_token))
    x = torch.randn(1, 50, 3, 6, 48).cumsum(dim=1)
    latent = model.encode(x)
    alone = x if use_token else x - x.mean(dim=1, keepdim=True)
    for place in blocks((50, 3, 6), model.code.size):
        if use_token:
            torch.testing.assert_close(model.encode(alone[place]), latent[place], atol=1e-4, rtol=1e-4)
        part = model.decode(latent)[place]
        torch.testing.assert_close(model.decode(latent[place]), part, atol=1e-3, rtol=1e-4)
    np.save(tmp_path / "x.npy", x[0].half().numpy())
    mapped = load_feature(tmp_path / "x.npy", mmap=True)[0][None]
    torch.testing.assert_close(model.encode(mapped), model.encode(x.half().float()))


def test_a_long_clip_fits_in_memory():
    """All scores between 8,000 steps of 8 heads would take 2 GB; coefficients of all blocks together 0.6 GB."""
    code = """
import resource, torch
from model import MotionFeatureAutoencoder
model = MotionFeatureAutoencoder(48, 32, 16, 8, 1, use_token=True).eval().requires_grad_(False)
x = torch.randn(1, 8000, 200, 48, dtype=torch.bfloat16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
latent = model.encode(x)
for _ in model.decoder.blocks(latent):
    pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 300  # MiB, of which the latent takes 100


@pytest.mark.parametrize(
    ("clip_shape", "shape"),
    [
        ((24, 2, 5), (24, 2, 5, 48)),  # one clip on a grid, without the batch axis
        ((1, 1, 1), (24, 2, 5, 48)),
        ((24, 10), (24, 2, 5, 48)),
        ((24, 10), (24, 10, 48)),
        ((), (24, 10, 48)),
    ],
)
def test_a_clip_without_batch_axis_is_refused(clip_shape, shape):
    model = MotionFeatureAutoencoder(48, 16, 16, 2, 1, use_token=True, block=(24, 2, 5), clip_shape=clip_shape).eval()
    for function, channels in ((model.encode, 48), (model.decode, 16)):
        with pytest.raises(UserError, match=re.escape("lacks the batch axis: give x[None]")):
            function(torch.randn(*shape[:-1], channels))
        function(torch.randn(1, *(shape[:-1] if len(shape) == 4 and clip_shape != (24, 10) else (24, 10)), channels))
    with pytest.raises(UserError, match="C is 47, but the checkpoint was trained on features of C = 48"):
        model.encode(torch.randn(1, 24, 10, 47))


def test_noise_on_a_latent_is_shrunk_where_decoding_is_told_of_it():
    train, x = made_up_clips(), made_up_clips(count=8, seed=1)
    model = awake(fitted(train))
    latent = model.encode(train)
    model.latent_var.copy_(latent.var(dim=(0, 1, 2)))
    latent = model.encode(x)
    torch.testing.assert_close(model.decode(latent, noise=0.0), model.decode(latent), atol=0, rtol=0)
    for noise, share in ((0.1, 1.0), (0.3, 0.8), (1.0, 0.5)):
        noisy = latent + noise * model.latent_var.sqrt() * torch.randn(latent.shape)
        plain, told = (sum(errors(x, model.decode(noisy, told))) for told in (0.0, noise))
        assert told < share * plain


def test_encode_is_differentiable():
    x = made_up_clips(count=1).requires_grad_()
    fitted(made_up_clips()).encode(x).square().sum().backward()
    assert x.grad.abs().amin() > 0


def test_feature_files_in_every_form(tmp_path):
    x = torch.randn(3, 2, 2, 4).half()
    forms = {
        "tensor.pt": x,
        "feature.pt": {"features": x + 1, "feature": x, "caption": "a cat", "video": "0.mp4", "model": "m", "fps": 2.5},
        "features.pth": {"other": {"nested": 1}, "features": x, "times": torch.arange(3) / 2, 7: "seven", "none": None},
        "first.pt": {"tokens": x, "frame_indices": [0, 2, 4], "rows": [[1], [2]]},
        "bfloat16.pt": x.bfloat16(),
    }
    kept = {  # words, numbers and rows of these
        "feature.pt": {"caption": "a cat", "video": "0.mp4", "model": "m", "fps": 2.5},
        "first.pt": {"frame_indices": [0, 2, 4]},
    }
    for name, data in forms.items():
        torch.save(data, tmp_path / name)
        feature, metadata = load_feature(tmp_path / name, 4)
        torch.testing.assert_close(feature, x.bfloat16() if name == "bfloat16.pt" else x)
        assert metadata == kept.get(name, {})
    for dtype in ("<f2", "<f4", "<f8"):
        np.save(tmp_path / "array.npy", x.numpy().astype(dtype))
        for mmap in (False, True):
            torch.testing.assert_close(load_feature(tmp_path / "array.npy", 4, mmap)[0].half(), x)


def test_features_of_8_bits_and_of_another_byte_order_are_refused(tmp_path):
    torch.save(torch.ones(3, 2, 4).to(torch.float8_e4m3fn), tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt: dtype torch\.float8_e4m3fn, but a feature is floating point, of 16"):
        load_feature(tmp_path / "x.pt")
    np.save(tmp_path / "x.npy", np.ones((3, 2, 4), dtype=">f4"))
    with pytest.raises(UserError, match=r"x\.npy is damaged or of another format \(given numpy array has byte order"):
        load_feature(tmp_path / "x.npy")


def test_a_clip_of_one_step_is_not_taken_for_a_batch(tmp_path):
    torch.save({"feature": torch.ones(1, 2, 3, 4), "model": "DINOv2"}, tmp_path / "x.pt")  # as vfm_feature.py says
    assert load_feature(tmp_path / "x.pt")[0].shape == (1, 2, 3, 4)
    torch.save(torch.ones(1, 6, 4), tmp_path / "x.pt")
    assert load_feature(tmp_path / "x.pt")[0].shape == (1, 6, 4)


def test_a_latent_that_is_not_finite_is_an_error():
    model = fitted(made_up_clips())
    model.network.offset.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        encode_clip(model, made_up_clips(count=1)[0])


def test_a_model_from_a_checkpoint_stays_frozen(tmp_path):
    """Whatever a trainer around it calls; and without training, or at epoch 0, its networks are not run."""
    for model, at_rest in ((fitted(made_up_clips()), True), (awake(fitted(made_up_clips())), False)):
        torch.save({"config": model.config, "model": model.state_dict()}, tmp_path / "ck.pt")
        loaded, x = MotionFeatureAutoencoder.from_checkpoint(tmp_path / "ck.pt"), made_up_clips(count=1)
        trainer = torch.nn.ModuleDict({"target": loaded, "student": torch.nn.Dropout()}).train()
        assert trainer["student"].training and not any(module.training for module in loaded.modules())
        assert loaded.network.at_rest == at_rest
        torch.testing.assert_close(loaded.encode(x), model.encode(x))
        assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    model = MotionFeatureAutoencoder(**SMALL)
    for config in (model.config | {"version": 2}, {**SMALL, "block": (24, 1, 1), "positions": (1, 1)}):
        torch.save({"config": config, "model": model.state_dict()}, tmp_path / "ck.pt")
        with pytest.raises(UserError, match="does not fit this version's model, train anew"):
            MotionFeatureAutoencoder.from_checkpoint(tmp_path / "ck.pt")


def test_a_checkpoint_gives_the_same_latent_elsewhere(tmp_path):
    """In another process, with other numbers of threads; blocks of every size."""
    model = fitted(made_up_clips().unflatten(2, (2, 5)))
    torch.save({"config": model.config, "model": model.state_dict()}, tmp_path / "ck.pt")
    x = made_up_clips(count=1, length=31, seed=1).unflatten(2, (2, 5))
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import torch; torch.set_num_threads(1); from model import MotionFeatureAutoencoder as Model;"
        f"latent = Model.from_checkpoint(r'{tmp_path}/ck.pt').encode(torch.load(r'{tmp_path}/x.pt'));"
        f"torch.save(latent, r'{tmp_path}/latent.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "latent.pt"), model.encode(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_checkpoints_with_wrappers_names_load(tmp_path, prefix):
    model = fitted(made_up_clips())
    weights = {prefix + name: weight for name, weight in model.state_dict().items()}
    torch.save({"config": model.config, "model": weights}, tmp_path / "ck.pt")
    x = made_up_clips(count=1)
    torch.testing.assert_close(MotionFeatureAutoencoder.from_checkpoint(tmp_path / "ck.pt").encode(x), model.encode(x))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: weights.pop("code.basis"), 'Missing key(s) in state_dict: "code.basis"'),
        (lambda weights: weights.update(extra=torch.zeros(1)), 'Unexpected key(s) in state_dict: "extra"'),
        (lambda weights: weights.update({"code.mean": torch.zeros(9)}), "size mismatch for code.mean"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_why(tmp_path, change, reason):
    model = MotionFeatureAutoencoder(**SMALL)
    weights = model.state_dict()
    change(weights)
    torch.save({"config": model.config, "model": weights}, tmp_path / "ck.pt")
    with pytest.raises(UserError, match=re.escape(reason)):
        MotionFeatureAutoencoder.from_checkpoint(tmp_path / "ck.pt")


@pytest.mark.parametrize("grid", [(12, 15), (5, 6)])
def test_a_latent_on_another_grid_keeps_the_relations(grid):
    chance = torch.Generator().manual_seed(0)
    coarse = torch.randn(12 * 8, 48, 4, 5, generator=chance)
    clips = torch.nn.functional.interpolate(coarse, (8, 10), mode="bicubic")
    clips = clips.movedim(1, -1).unflatten(0, (12, 8)).cumsum(dim=1) * torch.linspace(2, 0.2, 48)
    model = fitted(clips, latent_dim=12)
    x, latent = clips[:1], model.encode(clips[:1])
    resized = resample_latent(latent, grid)
    wanted = resample_latent(x, grid)
    assert resized.shape == (1, 8, *grid, 12)
    again = model.encode(resample_latent(model.decode(latent), grid))
    ours, others, before = (
        relation_errors(features, code)["relations"]
        for features, code in ((wanted, resized), (wanted, again), (x, latent))
    )
    assert ours < others and ours < 1.2 * before
    with pytest.raises(UserError, match="no grid"):
        resample_latent(latent.flatten(2, 3), grid)
