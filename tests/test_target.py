"""The trained model inside other people's code: as an alignment target, compiled, and under DistributedDataParallel."""

import re

import pytest
import torch
import torch.distributed as dist
from torch import nn

from losses import motion_autoencoder_loss, token_relation_distillation
from model import MotionFeatureAutoencoder


@pytest.fixture
def checkpoint(tmp_path):
    """A model whose networks, which start at zero, take part."""
    model = MotionFeatureAutoencoder(768, 16, 192, 2, 2, use_token=True, block=(6, 2, 2))
    for network in model.network.networks:
        nn.init.normal_(network.head.weight, std=0.1)
    torch.save({"config": model.config, "model": model.state_dict()}, tmp_path / "motion_ae_best.pt")
    return tmp_path / "motion_ae_best.pt"


def test_a_latent_is_a_target_for_videorepa_s_loss(checkpoint):
    features = torch.randn(2, 768, 6, 2, 3)  # VideoREPA's align_target
    model = MotionFeatureAutoencoder.from_checkpoint(checkpoint)
    target = model.encode(features.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
    assert target.shape == (2, 192, 6, 2, 3)

    align = torch.randn(2, 32, 6, 2, 3, requires_grad=True)  # of a video model, other channels
    loss = token_relation_distillation(align, target)
    loss.backward()
    assert align.grad.abs().max() > 0
    assert token_relation_distillation(3 * target, target) < 1e-6
    relations = [
        torch.cosine_similarity(tokens[:, :, :, None], tokens[:, :, None], dim=1)  # [B, 36, 36], every pair by itself
        for tokens in (align.flatten(2), target.flatten(2))
    ]
    beyond = ((relations[0] - relations[1]).abs() - 0.1).clamp_min(0)
    torch.testing.assert_close(loss, beyond.mean())


def test_features_in_another_layout_are_refused():
    """[B, T, H, W, D] as they come from `encode`: their relations would be those of other tokens."""
    latent, align = torch.randn(2, 6, 2, 3, 16), torch.randn(2, 32, 6, 2, 3)
    for wrong in ((align, latent), (latent, latent + 1), (align[0], align[0]), (align, align[:, :, :5])):
        with pytest.raises(ValueError, match=re.escape("give x.permute(0, 4, 1, 2, 3)")):
            token_relation_distillation(*wrong)
    token_relation_distillation(align, latent.permute(0, 4, 1, 2, 3))
    for wrong in ((latent[0, 0],) * 3, (latent, latent[:1], latent), (latent, latent, latent[:, :5])):
        with pytest.raises(ValueError, match=re.escape("give x[None] of one clip x")):
            motion_autoencoder_loss(*wrong)


@pytest.mark.parametrize("length", [6, 9])
def test_encode_compiles_in_one_graph(checkpoint, length):
    model = MotionFeatureAutoencoder.from_checkpoint(checkpoint)
    x = torch.randn(1, length, 2, 2, 768, requires_grad=True)
    compiled = torch.compile(model.encode, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, model.encode(x))
    compiled.square().sum().backward()
    gradient, x.grad = x.grad, None
    model.encode(x).square().sum().backward()
    torch.testing.assert_close(gradient, x.grad)


def test_encode_in_lower_precision_comes_close(checkpoint):
    model = MotionFeatureAutoencoder.from_checkpoint(checkpoint)
    x = torch.randn(1, 6, 2, 2, 768)
    expected = model.encode(x)
    for dtype, bound in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        latent = model.to(dtype).encode(x.to(dtype))
        assert latent.dtype == dtype
        assert (latent - expected).norm() < bound * expected.norm()


def test_a_frozen_encoder_is_part_of_a_model_under_ddp(checkpoint):
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(8, 192)
            self.target = MotionFeatureAutoencoder.from_checkpoint(checkpoint)

        def forward(self, x, features):
            return (self.project(x) - self.target.encode(features)).square().mean()

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        student = nn.parallel.DistributedDataParallel(Student())
        before = {name: value.clone() for name, value in student.module.target.state_dict().items()}
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.1)
        student(torch.randn(1, 6, 2, 2, 8), torch.randn(1, 6, 2, 2, 768)).backward()
        assert student.module.project.weight.grad.abs().max() > 0
        optimizer.step()
        after = student.module.target.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    finally:
        dist.destroy_process_group()
