"""How features are compared: the training loss, the error figures, and the relations between tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

METRICS = ["reconstruction_error", "motion_error", "cosine"]  # of `FeatureErrors`


def motion_autoencoder_loss(
    x: Tensor,
    reconstruction: Tensor,
    latent: Tensor,
    recon_weight: float = 1.0,
    motion_weight: float = 1.0,
    smooth_weight: float = 0.05,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of three terms, and the terms by themselves (detached, unweighted scalars).

    x, reconstruction: [B, T, N, C] or [B, T, H, W, C]; latent: the same layout with its own channels.

    - `reconstruction`: mean squared error.
    - `motion`: mean squared error between the temporal differences of reconstruction and x; 0 for T = 1.
    - `smoothness`: mean squared temporal difference of the latent over its variance. Without the division the model
      would lower this term by shrinking its latent, and with its mean square in place of its variance by shifting it;
      neither smooths anything.
    """
    terms = {"reconstruction": (reconstruction - x).square().mean()}
    if x.shape[1] > 1:
        terms["motion"] = (reconstruction.diff(dim=1) - x.diff(dim=1)).square().mean()
        deviation = latent - latent.mean(dim=tuple(range(latent.ndim - 1)), keepdim=True)
        variance = deviation.square().mean().clamp_min(torch.finfo(latent.dtype).tiny)
        terms["smoothness"] = latent.diff(dim=1).square().mean() / variance
    else:
        terms["motion"] = terms["smoothness"] = x.new_zeros(())
    loss = (
        recon_weight * terms["reconstruction"] + motion_weight * terms["motion"] + smooth_weight * terms["smoothness"]
    )
    return loss, {name: term.detach() for name, term in terms.items()}


class FeatureErrors:
    """The error figures of one clip or of many, added up part by part. Every table, curve and report uses these.

    - `reconstruction_error`: squared error over the variance around the mean token; 1 is what that mean alone would do.
    - `motion_error`: squared error of the temporal differences over their square; 1 is what a still picture would do.
    - `cosine`: mean cosine similarity between a token and its reconstruction.

    NaN where there is nothing to be relative to: features of one value, or clips of one step.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.error = self.energy = self.motion_error = self.motion_energy = self.cosine = 0.0

    def add(self, x: Tensor, reconstruction: Tensor) -> None:
        """x, reconstruction: [B, T, ..., C]. Clips may be split into parts along any axis but time and channels."""
        x, reconstruction = x.float(), reconstruction.float()
        if not self.tokens:  # the first mean is subtracted from all: sums of large numbers lose the small ones
            self.origin = x.flatten(0, -2).mean(dim=0)
            self.sum = torch.zeros(x.shape[-1], dtype=torch.float64)
        deviation = x - self.origin
        self.tokens += x[..., 0].numel()
        self.sum += deviation.flatten(0, -2).sum(dim=0).cpu().double()
        self.energy += deviation.square().sum().item()
        self.error += (reconstruction - x).square().sum().item()
        self.motion_energy += x.diff(dim=1).square().sum().item()
        self.motion_error += (reconstruction - x).diff(dim=1).square().sum().item()
        self.cosine += F.cosine_similarity(x, reconstruction, dim=-1).sum().item()

    def figures(self) -> dict[str, float]:
        variance = self.energy - self.sum.square().sum().item() / self.tokens
        return {
            "reconstruction_error": self.error / variance if variance > 1e-9 * self.energy else math.nan,
            "motion_error": self.motion_error / self.motion_energy if self.motion_energy else math.nan,
            "cosine": self.cosine / self.tokens,
        }


def token_relations(tokens: Tensor) -> Tensor:
    """The cosine similarity of every pair of tokens: [..., K, C] -> [..., K, K]."""
    tokens = F.normalize(tokens, dim=-1)
    return tokens @ tokens.mT


def token_relation_distillation(align: Tensor, target: Tensor, margin: float = 0.1) -> Tensor:
    """How far the relations between all tokens of a clip differ beyond `margin`: VideoREPA's alignment loss.

    align: [B, C, T, H, W], of the model in training; target: [B, D, T, H, W]; their channels may differ. Returns a
    scalar. Source: "VideoREPA: Learning Physics for Video Generation through Relational Alignment with Foundation
    Models" (https://github.com/aHapBean/VideoREPA).
    """
    align, target = (token_relations(x.flatten(2).mT) for x in (align, target))  # [B, THW, THW]
    return F.relu((align - target).abs() - margin).mean()
