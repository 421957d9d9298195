"""How features are compared: the training loss, the error figures, and the relations between tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

RELATION_TOKENS = 512  # of a clip, whose cosines are compared
METRICS = ["reconstruction_error", "motion_error", "cosine"]  # of `FeatureErrors`
COMPARED = {  # with PCA: the columns of metrics.csv
    "reconstruction": "reconstruction_error",
    "motion": "motion_error",
    "relations": "relations_loss",
    "of moving": "relations_of_moving_loss",
}
LossWeights = tuple[float, float, float, float]  # of reconstruction, temporal difference, smoothness, relations


def motion_autoencoder_loss(
    x: Tensor,
    reconstruction: Tensor,
    latent: Tensor,
    recon_weight: float = 1.0,
    motion_weight: float = 1.0,
    smooth_weight: float = 0.05,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of three terms, and the terms by themselves (detached, unweighted scalars).

    x, reconstruction: [B, T, N, C] or [B, T, H, W, C]; latent: the same layout with its own channels. Raises
    `ValueError` for other shapes.

    - `reconstruction`: mean squared error.
    - `motion`: mean squared error between the temporal differences of reconstruction and x; 0 for T = 1.
    - `smoothness`: `latent_smoothness`.
    """
    if x.ndim not in (4, 5) or reconstruction.shape != x.shape or latent.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"x {list(x.shape)}, reconstruction {list(reconstruction.shape)} and latent {list(latent.shape)} are not "
            "[B, T, N, C] or [B, T, H, W, C] of the same clips; give x[None] of one clip x"
        )
    terms = {"reconstruction": (reconstruction - x).square().mean(), "smoothness": latent_smoothness(latent)}
    difference = (reconstruction - x).diff(dim=1)
    terms["motion"] = difference.square().mean() if x.shape[1] > 1 else x.new_zeros(())
    loss = (
        recon_weight * terms["reconstruction"] + motion_weight * terms["motion"] + smooth_weight * terms["smoothness"]
    )
    return loss, {name: term.detach() for name, term in terms.items()}


def latent_smoothness(latent: Tensor) -> Tensor:
    """The mean squared temporal difference of a latent [B, T, ..., D] over its variance; 0 for T = 1.

    Without the division a model would lower it by shrinking its latent, and with the mean square in place of the
    variance by shifting it; neither smooths anything.
    """
    if latent.shape[1] == 1:
        return latent.new_zeros(())
    deviation = latent - latent.mean(dim=tuple(range(latent.ndim - 1)), keepdim=True)
    return latent.diff(dim=1).square().mean() / deviation.square().mean().clamp_min(torch.finfo(latent.dtype).tiny)


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

    def add(self, x: Tensor, reconstruction: Tensor, goes_on: bool = False) -> None:
        """x, reconstruction: [B, T, ..., C], of clips or of parts of them. `goes_on`: this part follows upon the last
        one in time, so that the change between them counts too."""
        x, reconstruction = x.float(), reconstruction.float()
        if not self.tokens:  # the first mean is subtracted from all: sums of large numbers lose the small ones
            self.origin = x.flatten(0, -2).mean(dim=0)
            self.sum = torch.zeros(x.shape[-1], dtype=torch.float64)
        deviation, error = x - self.origin, reconstruction - x
        self.tokens += x[..., 0].numel()
        self.sum += deviation.flatten(0, -2).sum(dim=0).cpu().double()
        self.energy += deviation.square().sum().item()
        self.error += error.square().sum().item()
        self.cosine += F.cosine_similarity(x, reconstruction, dim=-1).sum().item()
        if goes_on:
            x, error = (torch.cat(pair, dim=1) for pair in zip(self.last, (x, error), strict=True))
        self.motion_energy += x.diff(dim=1).square().sum().item()
        self.motion_error += error.diff(dim=1).square().sum().item()
        self.last = x[:, -1:], error[:, -1:]

    def figures(self) -> dict[str, float]:
        variance = self.energy - self.sum.square().sum().item() / self.tokens
        return {
            "reconstruction_error": self.error / variance if variance > 1e-9 * self.energy else math.nan,
            "motion_error": self.motion_error / self.motion_energy if self.motion_energy else math.nan,
            "cosine": self.cosine / self.tokens,
        }


def compare(ours: dict[str, float], theirs: dict[str, float], weights: LossWeights) -> dict[str, float]:
    """Each error over PCA's, and `total`, the weighted reconstruction and motion loss over PCA's; NaN where PCA makes
    none."""
    pairs = {name: (ours[column], theirs[column]) for name, column in COMPARED.items()}
    pairs["total"] = tuple(
        weights[0] * means["reconstruction_loss"] + weights[1] * means["motion_loss"] for means in (ours, theirs)
    )
    return {name: a / b if b > 1e-6 else math.nan for name, (a, b) in pairs.items()}


def token_relations(tokens: Tensor) -> Tensor:
    """The cosine similarity of every pair of tokens: [..., K, C] -> [..., K, K]."""
    tokens = F.normalize(tokens, dim=-1)
    return tokens @ tokens.mT


def relation_error(x: Tensor, latent: Tensor, chosen: Tensor | None = None) -> Tensor:
    """The mean absolute change of the cosines between tokens, from x [B, K, C] to the latent [B, K, D]: of all pairs,
    or of the pairs of those `chosen` [B, K]."""
    change = (token_relations(x) - token_relations(latent)).abs()
    if chosen is None:
        return change.mean()
    pairs = chosen[:, :, None] & chosen[:, None, :]
    return (change * pairs).sum() / pairs.sum().clamp_min(1)


def compared_tokens(x: Tensor) -> dict[str, Tensor]:
    """Which tokens of a clip [T, ..., C] are compared, as indices into its T * ... tokens: for `relations`
    `RELATION_TOKENS` evenly spread over it, for `relations_of_moving` as many of the tenth that moves most since the
    step before."""
    moves = F.pad(x.diff(dim=0).norm(dim=-1).flatten(1), (0, 0, 1, 0)).flatten()
    fastest = moves.argsort(descending=True)[: max(2, len(moves) // 10)]
    chosen = {}
    for name, some in {"relations": torch.arange(len(moves), device=x.device), "relations_of_moving": fastest}.items():
        chosen[name] = some[torch.linspace(0, len(some) - 1, min(RELATION_TOKENS, len(some)), device=x.device).long()]
    return chosen


def relation_errors(x: Tensor, latent: Tensor) -> dict[str, Tensor]:
    """The `relation_error` of a clip [1, T, ..., C] and its latent, of each of its `compared_tokens`."""
    tokens = [part.flatten(1, -2) for part in (x, latent)]
    return {name: relation_error(*(part[:, some] for part in tokens)) for name, some in compared_tokens(x[0]).items()}


def find_moving(x: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Of clips [B, T, N, C]: the quarter of the positions that moves most in any of the clips, or the `least` that are
    needed, [Q]; and of all tokens which are of the tenth that moves most, [B, T, N]."""
    moves = F.pad(x.diff(dim=1).norm(dim=-1), (0, 0, 1, 0))  # [B, T, N]
    fast = (moves / moves.mean(dim=(1, 2), keepdim=True).clamp_min(1e-12)).mean(dim=(0, 1)).argsort(descending=True)
    ranks_of = moves.flatten(1).argsort(descending=True).argsort()
    moving = (ranks_of < -(-ranks_of.shape[1] // 10)).view_as(moves)
    return fast[: max(least, len(fast) // 4)], moving


def relation_loss(
    x: Tensor, latent: Tensor, moving: Tensor, smooth_weight: float = 0.05, relation_weight: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The terms of the training loss that a network on the code's latent changes, weighted and added up, and each by
    itself (detached). Reconstruction and motion error are the code's whatever it does, since decoding takes it off
    again.

    x: features [B, T, P, C] of P positions, the first half of them of all and the others of those that move, latent:
    [B, T, P, D], moving: [B, T, P], which of these tokens are of the tenth that moves most.
    """
    half = -(-x.shape[2] // 2)
    terms = {
        "relations": relation_error(x[:, :, :half].flatten(1, 2), latent[:, :, :half].flatten(1, 2)),
        "relations_of_moving": relation_error(x.flatten(1, 2), latent.flatten(1, 2), moving.flatten(1)),
        "smoothness": latent_smoothness(latent),
    }
    loss = relation_weight * (terms["relations"] + terms["relations_of_moving"]) / 2
    return loss + smooth_weight * terms["smoothness"], {name: term.detach() for name, term in terms.items()}


def token_relation_distillation(align: Tensor, target: Tensor, margin: float = 0.1) -> Tensor:
    """How far the relations between all tokens of a clip differ beyond `margin`: VideoREPA's alignment loss.

    align: [B, C, T, H, W], of the model in training; target: [B, D, T, H, W]; their channels may differ. Returns a
    scalar. Raises `ValueError` for other shapes, as far as they can be told. Source: "VideoREPA: Learning Physics for
    Video Generation through Relational Alignment with Foundation Models" (https://github.com/aHapBean/VideoREPA).
    """
    alike = align.shape[:1] + align.shape[2:] == target.shape[:1] + target.shape[2:]
    last = align.shape == target.shape and align.shape[-1] > align.shape[1]  # wider than it has channels
    if align.ndim != 5 or not alike or last:
        raise ValueError(
            f"align {list(align.shape)} and target {list(target.shape)} are not [B, C, T, H, W] with the same B, T, H "
            "and W; of [B, T, H, W, C] give x.permute(0, 4, 1, 2, 3)"
        )
    align, target = (token_relations(x.flatten(2).mT) for x in (align, target))  # [B, THW, THW]
    return F.relu((align - target).abs() - margin).mean()
