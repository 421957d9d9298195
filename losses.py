"""The training loss of the motion autoencoder: reconstruction, temporal difference, latent smoothness."""

from __future__ import annotations

import torch
from torch import Tensor


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
