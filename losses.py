"""How features are compared: the training losses, the error metrics, and the relations between tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

RELATION_TOKENS = 512  # tokens of a clip whose cosine similarities are compared
METRICS = ["reconstruction_error", "motion_error", "cosine"]  # of `FeatureErrors`
COMPARED = {  # errors that are compared with PCA's: name -> column of metrics.csv without prefix
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
    """The mean squared temporal difference of a latent [B, T, ..., D], divided by its variance; 0 for T = 1.

    Without the division, a model would lower this by shrinking its latent; with the mean square in place of the
    variance, by shifting it. Neither makes the latent smoother.
    """
    if latent.shape[1] == 1:
        return latent.new_zeros(())
    deviation = latent - latent.mean(dim=tuple(range(latent.ndim - 1)), keepdim=True)
    return latent.diff(dim=1).square().mean() / deviation.square().mean().clamp_min(torch.finfo(latent.dtype).tiny)


class FeatureErrors:
    """The error metrics of one or more clips, accumulated part by part. Every table, curve and report uses these.

    - `reconstruction_error`: squared error divided by the variance around the mean token, which alone would score 1.
    - `motion_error`: squared error of temporal differences over the squared differences; a still picture would score 1.
    - `cosine`: mean cosine similarity between a token and its reconstruction.

    NaN where the divisor is 0: constant features, or clips of one step.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.error = self.energy = self.motion_error = self.motion_energy = self.cosine = 0.0

    def add(self, x: Tensor, reconstruction: Tensor, goes_on: bool = False) -> None:
        """x, reconstruction: [B, T, ..., C], of clips or parts of clips. `goes_on`: this part directly follows the last
        one in time, so the change between the two counts too."""
        x, reconstruction = x.float(), reconstruction.float()
        if not self.tokens:  # the first part's mean is subtracted from all: sums of large numbers lose precision
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
    """Each error divided by PCA's, and `total`: the weighted reconstruction and motion loss divided by PCA's. NaN where
    PCA has no error."""
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
    """The mean absolute change of the cosines between tokens, from x [B, K, C] to the latent [B, K, D]: over all pairs,
    or over the pairs of tokens in the mask `chosen` [B, K]."""
    change = (token_relations(x) - token_relations(latent)).abs()
    if chosen is None:
        return change.mean()
    pairs = chosen[:, :, None] & chosen[:, None, :]
    return (change * pairs).sum() / pairs.sum().clamp_min(1)


def compared_tokens(x: Tensor) -> dict[str, Tensor]:
    """Which tokens of a clip [T, ..., C] are compared, as indices into its T * ... tokens. For `relations`, at most
    `RELATION_TOKENS`, evenly spread over the clip; for `relations_of_moving`, at most as many, from the tenth of the
    tokens that changed most since the previous step."""
    moves = F.pad(x.diff(dim=0).norm(dim=-1).flatten(1), (0, 0, 1, 0)).flatten()
    fastest = moves.argsort(descending=True)[: max(2, len(moves) // 10)]
    chosen = {}
    for name, some in {"relations": torch.arange(len(moves), device=x.device), "relations_of_moving": fastest}.items():
        chosen[name] = some[torch.linspace(0, len(some) - 1, min(RELATION_TOKENS, len(some)), device=x.device).long()]
    return chosen


def relation_errors(x: Tensor, latent: Tensor) -> dict[str, Tensor]:
    """The `relation_error` of a clip [1, T, ..., C] and its latent, for each set of its `compared_tokens`."""
    tokens = [part.flatten(1, -2) for part in (x, latent)]
    return {name: relation_error(*(part[:, some] for part in tokens)) for name, some in compared_tokens(x[0]).items()}


def find_moving(x: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """For clips [B, T, N, C]: indices [Q] of the quarter of positions that move most on average over the clips, at
    least `least`; and a mask [B, T, N] of the tenth of each clip's tokens that moves most."""
    moves = F.pad(x.diff(dim=1).norm(dim=-1), (0, 0, 1, 0))  # [B, T, N]
    fast = (moves / moves.mean(dim=(1, 2), keepdim=True).clamp_min(1e-12)).mean(dim=(0, 1)).argsort(descending=True)
    ranks_of = moves.flatten(1).argsort(descending=True).argsort()
    moving = (ranks_of < -(-ranks_of.shape[1] // 10)).view_as(moves)
    return fast[: max(least, len(fast) // 4)], moving


def relation_loss(
    x: Tensor, latent: Tensor, moving: Tensor, smooth_weight: float = 0.05, relation_weight: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The terms of the training loss that the network on the code's latent changes: their weighted sum, and each by
    itself (detached, unweighted). Reconstruction and motion errors depend only on the code, since decoding inverts the
    network.

    x: features [B, T, P, C] of P positions; the first half is drawn from all positions, the second from those that
    move. latent: [B, T, P, D]. moving: mask [B, T, P] of the tokens in the tenth that moves most.
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
    """The mean difference beyond `margin` of the relations between all tokens of a clip: VideoREPA's alignment loss.

    align: [B, C, T, H, W], of the model in training; target: [B, D, T, H, W]; their channels may differ. Returns a
    scalar. Raises `ValueError` for shapes that are recognisably different. Source: "VideoREPA: Learning Physics for
    Video Generation through Relational Alignment with Foundation Models" (https://github.com/aHapBean/VideoREPA).
    """
    alike = align.shape[:1] + align.shape[2:] == target.shape[:1] + target.shape[2:]
    last = align.shape == target.shape and align.shape[-1] > align.shape[1]  # W > C: channels are probably last
    if align.ndim != 5 or not alike or last:
        raise ValueError(
            f"align {list(align.shape)} and target {list(target.shape)} are not [B, C, T, H, W] with the same B, T, H "
            "and W; of [B, T, H, W, C] give x.permute(0, 4, 1, 2, 3)"
        )
    align, target = (token_relations(x.flatten(2).mT) for x in (align, target))  # [B, THW, THW]
    return F.relu((align - target).abs() - margin).mean()
