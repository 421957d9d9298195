"""The motion autoencoder, and what the three scripts share: one-line errors, whole files, safe loading."""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import itertools
import math
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D

FEATURE_SUFFIXES = (".pt", ".pth", ".npy")
DETAIL_RMS = 0.15  # of a detail channel, a frame channel having 1: moves cosines little, clear of float16's rounding
STILL = 1e-3  # of the frame channels' scale: movement below it counts as none
TOKENS = 2**14  # tokens that `encode_long` takes at once
TEMPORARY_SUFFIX = ".vfm.tmp"  # of half-written files
LEFTOVER_SECONDS = 24 * 3600  # after which a half-written file is nobody's
FINGERPRINT_BYTES = 2**16


# ---------------------------------------------------------------------------------------------------------------------
# The motion autoencoder
# ---------------------------------------------------------------------------------------------------------------------


def frame_differences(x: Tensor) -> Tensor:
    """`delta[:, t] = x[:, t] - x[:, t - 1]` and `delta[:, 0] = 0`, for x [B, T, ...]; same shape."""
    return torch.cat([torch.zeros_like(x[:, :1]), x.diff(dim=1)], dim=1)


def time_positions(length: int, dim: int, like: Tensor) -> Tensor:
    """Sinusoidal positions [length, dim] ("Attention Is All You Need"): without them attention sees a bag of frames."""
    frequency = torch.exp(torch.arange(0, dim, 2, device=like.device) * (-np.log(10000.0) / dim))
    angle = torch.arange(length, device=like.device)[:, None] * frequency  # [length, ceil(dim / 2)]
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :dim].to(like.dtype)


def cosine_transform(length: int, like: Tensor) -> Tensor:
    """The orthonormal cosine transform (DCT-II) [frequency, time], in the dtype and on the device of `like`."""
    time = torch.arange(length, device=like.device)
    matrix = torch.cos(torch.pi / length * (time + 0.5) * time[:, None]) * (2 / length) ** 0.5
    return (matrix * torch.where(time == 0, 0.5**0.5, 1.0)[:, None]).to(like.dtype)


class TransformerLayer(nn.Module):
    """A pre-norm transformer layer, [S, T, dim] -> [S, T, dim]; `dropout` acts on what each half adds.

    nn.TransformerEncoderLayer keeps all T x T scores in memory on the CPU, in eval mode as with dropout on them.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.projection = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        # [S, T, 3 * dim] -> [3, S, heads, T, dim / heads]
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [S, T, dim]
        x = x + self.dropout(self.projection(attended))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class TemporalNetwork(nn.Module):
    """Temporal convolution, then temporal transformer: [S, T, in_dim] -> [S, T, out_dim], S independent sequences.

    The last layer starts at zero, so that a network on top of a linear path starts as that path.
    """

    def __init__(
        self, in_dim: int, model_dim: int, out_dim: int, num_heads: int, num_layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_dim, model_dim, kernel_size=3, padding=1, padding_mode="replicate")
        self.layers = nn.Sequential(*(TransformerLayer(model_dim, num_heads, dropout) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(model_dim)
        self.head = nn.Linear(model_dim, out_dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.gelu(self.conv(x.mT)).mT  # [S, T, in_dim] -> [S, T, model_dim]
        h = h + time_positions(h.shape[1], h.shape[2], h)
        return self.head(self.norm(self.layers(h)))


def to_sequences(x: Tensor) -> Tensor:
    """[B, T, N, C] or [B, T, H, W, C] -> [B * N, T, C]: each spatial position is a sequence of its own."""
    return x.flatten(2, -2).transpose(1, 2).flatten(0, 1)


def from_sequences(sequences: Tensor, like: Tensor) -> Tensor:
    """[B * N, T, D] -> the layout of `like` ([B, T, N, ...] or [B, T, H, W, ...]) with D channels."""
    batch, length = like.shape[:2]
    return sequences.unflatten(0, (batch, -1)).transpose(1, 2).reshape(batch, length, *like.shape[2:-1], -1)


def principal_components(covariance: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix in columns, largest eigenvalue first, each column's largest entry positive."""
    vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1)
    return vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()


class Moments:
    """Running sums over sequences [S, T, C], in float64: what the mean and the covariances of x and delta_x need."""

    def __init__(self) -> None:
        self.count = self.steps = 0
        self.sum = self.square = self.delta_square = torch.zeros(1, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        flat, delta = x.flatten(0, 1), x.diff(dim=1).flatten(0, 1)  # [S, T, C] -> [S * T, C] and [S * (T - 1), C]
        self.count, self.steps = self.count + len(flat), self.steps + len(delta)
        self.sum = self.sum + flat.sum(dim=0).cpu().double()
        self.square = self.square + (flat.mT @ flat).cpu().double()
        self.delta_square = self.delta_square + (delta.mT @ delta).cpu().double()

    def __add__(self, other: Moments) -> Moments:
        total = Moments()
        for name in vars(total):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def covariance(self, recon_weight: float = 1.0, motion_weight: float = 0.0) -> Tensor:
        """recon_weight * cov(x) + motion_weight * E[delta_x delta_x^T], [C, C]."""
        mean = self.sum / self.count
        covariance = self.square / self.count - mean[:, None] * mean
        return recon_weight * covariance + motion_weight * self.delta_square / max(self.steps, 1)


class SpaceTimeCode(nn.Module):
    """The linear path of the autoencoder: PCA of each frame, and in a few channels beside it what PCA leaves out.

    What a truncated PCA drops is mostly detail that stands still, and to repeat that at every time step is waste. So
    the first 7/8 of the latent's channels, the frame channels, hold the leading principal components of their own
    frame. The last 1/8, the detail channels, hold for each block of `block` time steps the block * detail_dim most
    important coefficients of the other components' cosine transform over time. Frame channels keep the cosines between
    tokens (VideoREPA's token relations); detail channels are small beside them, to leave these alone.

    `fit` measures all of it in closed form; nothing here is trained. Any T works: what remains after the last full
    block is a shorter block, which has its own choice of coefficients.
    """

    def __init__(self, input_dim: int, latent_dim: int, use_token: bool, block: int) -> None:
        super().__init__()
        self.use_token, self.block = use_token, block
        self.detail_dim = max(1, latent_dim // 8)
        self.frame_dim = latent_dim - self.detail_dim
        self.rest_dim = input_dim - self.frame_dim
        self.register_buffer("mean", torch.zeros(input_dim))
        self.register_buffer("scale", torch.ones(()))  # one number: a scale a channel would change what an error is
        self.register_buffer("basis", torch.eye(input_dim))  # columns: principal components
        self.register_buffer("center", torch.zeros(self.frame_dim))
        self.register_buffer("gain", torch.ones(self.frame_dim))
        # row L - 1, first L * detail_dim columns: which of a block of L steps' L * rest_dim coefficients are kept
        self.register_buffer("slots", torch.arange(block * self.detail_dim).repeat(block, 1))
        self.register_buffer("slot_gain", torch.ones(block, block * self.detail_dim))

    def normalise(self, x: Tensor) -> Tensor:
        """x [B, T, ..., C] -> what is coded: x without the training mean; for motion alone, x without the clip's mean
        over time, which is all that delta_x says (its running sum, up to a constant)."""
        return (x - (self.mean if self.use_token else x.mean(dim=1, keepdim=True))) / self.scale

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `normalise`; for motion alone, the training mean stands for what is not known."""
        return x * self.scale + self.mean

    def blocks(self, x: Tensor) -> list[Tensor]:
        """[S, T, R] -> the full blocks [S, T // block, block, R] and the rest of T as one shorter block, if any."""
        full = x.shape[1] - x.shape[1] % self.block
        parts = [x[:, :full].unflatten(1, (-1, self.block)), x[:, None, full:]]
        return [part for part in parts if part.shape[1] * part.shape[2]]

    def pack(self, rest: Tensor) -> Tensor:
        """Blocks of the components beyond the frame channels [S, n, L, R] -> detail channels [S, n * L, detail_dim]."""
        length = rest.shape[2]
        count = length * self.detail_dim
        coefficients = (cosine_transform(length, rest) @ rest).flatten(2)  # [S, n, L * R]
        kept = coefficients.index_select(-1, self.slots[length - 1, :count]) * self.slot_gain[length - 1, :count]
        return kept.unflatten(-1, (length, -1)).flatten(1, 2)

    def unpack(self, detail: Tensor) -> Tensor:
        """Detail channels in blocks [S, n, L, detail_dim] -> [S, n * L, R]; `pack` inverted, 0 for the lost."""
        length = detail.shape[2]
        count = length * self.detail_dim
        kept = detail.flatten(2) / self.slot_gain[length - 1, :count]
        empty = kept.new_zeros(*kept.shape[:2], length * self.rest_dim)
        coefficients = empty.index_copy(-1, self.slots[length - 1, :count], kept).unflatten(-1, (length, -1))
        return (cosine_transform(length, detail).mT @ coefficients).flatten(1, 2)

    def encode(self, x: Tensor) -> Tensor:
        """Normalised features [S, T, C] -> latent [S, T, D]."""
        frame, rest = (x @ self.basis).split([self.frame_dim, self.rest_dim], dim=-1)
        detail = torch.cat([self.pack(block) for block in self.blocks(rest)], dim=1)
        return torch.cat([(frame + self.center) * self.gain, detail], dim=-1)

    def decode(self, latent: Tensor) -> Tensor:
        """Latent [S, T, D] -> normalised features [S, T, C]."""
        frame, detail = latent.split([self.frame_dim, self.detail_dim], dim=-1)
        rest = torch.cat([self.unpack(block) for block in self.blocks(detail)], dim=1)
        return torch.cat([frame / self.gain - self.center, rest], dim=-1) @ self.basis.mT

    @torch.no_grad()
    def fit(self, clips: Callable[[], Iterable[Tensor]], recon_weight: float = 1.0, motion_weight: float = 1.0) -> None:
        """Measure the code on batches x [B, T, N, C], which `clips()` gives, twice the same.

        Basis: eigenvectors of recon_weight * cov(x) + motion_weight * cov(delta_x). Coefficients kept: those of most
        energy, each frequency weighted by what an error in it adds to the weighted loss.
        """
        if not self.use_token:  # what stands still cannot come back, so it shall not take room
            recon_weight, motion_weight = 0.0, 1.0
        halves = self.fit_mean_and_scale(clips)
        whole, *cross = (
            principal_components(moments.covariance(recon_weight, motion_weight)).to(self.basis)
            for moments in (halves[0] + halves[1], *halves)
        )
        self.basis.copy_(whole)

        lengths = range(1, self.block + 1)
        energies, counts = [self.basis.new_zeros(length, self.rest_dim) for length in lengths], [0] * self.block
        samples = []
        for index, x in enumerate(clips()):
            tokens = to_sequences(self.normalise(x))  # [S, T, C]
            # in the basis of the other half: a basis captures the clips that it was made from better than it should
            rest = (tokens @ cross[1 - index % 2])[..., self.frame_dim :]
            for length in lengths[: x.shape[1]]:
                start = rest[:, :length]
                energies[length - 1] += (cosine_transform(length, start) @ start).square().mean(dim=0) * len(x)
                counts[length - 1] += len(x)
            if len(samples) < 32:
                one = tokens[: len(tokens) // len(x)].flatten(0, 1)  # [N * T, C] of the first clip
                chosen = torch.linspace(0, len(one) - 1, 256).long().to(one.device)
                samples.append((to_sequences(x[:1]).flatten(0, 1)[chosen], one[chosen]))
        for energy, count in zip(energies, counts, strict=True):
            self.choose_slots(energy / max(count, 1), recon_weight, motion_weight)
        self.fit_gains(samples)

    def choose_slots(self, energy: Tensor, recon_weight: float, motion_weight: float) -> None:
        """Set `slots` and `slot_gain` of blocks of L steps from their coefficients' mean energy [L, rest_dim]."""
        length = len(energy)
        count = length * self.detail_dim
        frequency = torch.arange(length, device=energy.device) * torch.pi / length
        weight = recon_weight + motion_weight * (2 - 2 * frequency.cos())  # |delta|^2 of a cosine of unit energy
        # sorted, each frequency keeps its leading components: what was measured out of order was measured with noise
        value = energy.sort(dim=1, descending=True).values * weight[:, None]
        order = value.flatten().argsort(descending=True, stable=True)[:count]
        self.slots[length - 1, :count] = order
        self.slot_gain[length - 1, :count] = DETAIL_RMS / energy.flatten()[order].sqrt().clamp_min(1e-3)

    def fit_mean_and_scale(self, clips: Callable[[], Iterable[Tensor]]) -> tuple[Moments, Moments]:
        """Set `mean` and `scale`. Returns the moments of the features before scaling, of every other batch each."""
        self.mean.zero_()
        self.scale.fill_(1.0)
        halves, total, count = (Moments(), Moments()), 0.0, 0
        for index, x in enumerate(clips()):
            if index == 0:
                origin = x.mean(dim=(0, 1, 2))  # subtracted first: sums of large numbers lose the small ones
            halves[index % 2].add(to_sequences(self.normalise(x - origin)))
            total = total + (x - origin).mean(dim=(0, 1, 2)) * len(x)
            count += len(x)
        if not halves[1].count:  # a single batch has to do for both
            halves = (halves[0], halves[0])
        variance = (halves[0] + halves[1]).covariance().diagonal().mean().item()
        if not np.isfinite(variance):
            raise UserError("the features' squares overflow float32; divide the features by a constant first")
        self.mean.copy_(origin + total / count)
        self.scale.fill_(max(variance, 0.0) ** 0.5 or 1.0)
        return halves

    def fit_gains(self, samples: list[tuple[Tensor, Tensor]]) -> None:
        """Set each frame channel's gain (its spread to the power of -`power`) and centre (a share of the mean's
        coefficients), which decoding undoes: those that keep best the cosines between tokens of a clip.

        A truncated code makes tokens too much alike; smaller leading channels and a smaller mean make up for that.
        samples: of some clips, tokens [K, C] as they are and normalised.
        """

        def cosines(tokens: Tensor) -> Tensor:
            tokens = nn.functional.normalize(tokens, dim=-1)
            return tokens @ tokens.mT

        mean = (self.mean / self.scale) @ self.basis[:, : self.frame_dim]
        coefficients = [tokens @ self.basis[:, : self.frame_dim] for _, tokens in samples]
        spread = torch.cat(coefficients).std(dim=0).clamp_min(1e-3)
        best = float("inf")
        for power in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5):
            gain = spread**-power
            gain = gain / (spread * gain).square().mean().sqrt()
            for share in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5) if self.use_token else (0.0,):
                error = sum(
                    (cosines(x) - cosines((c + share * mean) * gain)).abs().mean().item()
                    for (x, _), c in zip(samples, coefficients, strict=True)
                )
                if error < best:
                    best = error
                    self.gain.copy_(gain)
                    self.center.copy_(share * mean)


class MotionFeatureEncoder(nn.Module):
    """Features -> latent, over time for each spatial position.

    forward: x [B, T, N, C] or [B, T, H, W, C], any T >= 1 -> latent of the same layout with `latent_dim` channels: the
    space-time code, to whose detail channels the network adds. The frame channels stay linear in their frame, so that
    training cannot trade the cosines between tokens for reconstruction.
    """

    def __init__(
        self,
        input_dim: int = 768,
        model_dim: int = 384,
        latent_dim: int = 192,
        num_heads: int = 8,
        num_layers: int = 2,
        dropout: float = 0.1,
        use_token: bool = False,
        block: int = 24,
    ) -> None:
        super().__init__()
        self.use_token = use_token
        self.code = SpaceTimeCode(input_dim, latent_dim, use_token, block)
        in_dim = 2 * input_dim if use_token else input_dim
        self.network = TemporalNetwork(in_dim, model_dim, self.code.detail_dim, num_heads, num_layers, dropout)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.code.normalise(x)
        delta = frame_differences(tokens)
        seen = to_sequences(torch.cat([tokens, delta], dim=-1) if self.use_token else delta)  # [B * N, T, C or 2C]
        latent = self.code.encode(to_sequences(tokens))
        frame, detail = latent.split([self.code.frame_dim, self.code.detail_dim], dim=-1)
        return from_sequences(torch.cat([frame, detail + self.network(seen)], dim=-1), like=x)


class MotionFeatureDecoder(nn.Module):
    """Latent -> features: latent [B, T, N, D] or [B, T, H, W, D] -> the same layout with `input_dim` channels.

    The network refines what the space-time code reconstructs; `trust` in [0, 1] is how much of that refinement held-out
    clips have shown to be right.
    """

    def __init__(
        self,
        input_dim: int = 768,
        model_dim: int = 384,
        latent_dim: int = 192,
        num_heads: int = 8,
        num_layers: int = 2,
        dropout: float = 0.1,
        use_token: bool = False,
        block: int = 24,
    ) -> None:
        super().__init__()
        self.code = SpaceTimeCode(input_dim, latent_dim, use_token, block)
        self.network = TemporalNetwork(input_dim, model_dim, input_dim, num_heads, num_layers, dropout)
        self.register_buffer("trust", torch.ones(()))

    def parts(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """latent -> what the space-time code reconstructs and the network's refinement of it, normalised features."""
        linear = self.code.decode(to_sequences(latent))  # [B * N, T, C]
        return from_sequences(linear, like=latent), from_sequences(self.network(linear), like=latent)

    def forward(self, latent: Tensor) -> Tensor:
        linear, refinement = self.parts(latent)
        return self.code.restore(linear + self.trust * refinement)


def position_slices(length: int, positions: int) -> list[slice]:
    """Cut the positions of a clip [T, N, ...] into slices of `TOKENS` tokens or little more; time stays whole."""
    width = max(1, TOKENS // length)
    return [slice(first, min(first + width, positions)) for first in range(0, positions, width)]


class MotionFeatureAutoencoder(nn.Module):
    """Compress features C -> latent_dim at every time step and position, and back.

    forward: x [B, T, N, C] or [B, T, H, W, C] -> dict of
    `latent` (the same layout, latent_dim channels), `reconstruction` (the shape of x),
    `motion_embedding` [B, T, latent_dim].

    With `use_token` the encoder sees `[x, delta_x]`; without it `delta_x` alone, so that what stands still is not in
    the latent.
    """

    def __init__(
        self,
        input_dim: int = 768,
        model_dim: int = 384,
        latent_dim: int = 192,
        num_heads: int = 8,
        num_layers: int = 2,
        dropout: float = 0.1,
        use_token: bool = False,
        block: int = 24,
    ) -> None:
        super().__init__()
        if model_dim % num_heads:
            raise UserError(f"--model_dim {model_dim} does not divide by --num_heads {num_heads}; change one of them")
        if latent_dim < 2:
            raise UserError(f"--latent_dim {latent_dim} is too small; take at least 2")
        if latent_dim > input_dim:
            raise UserError(f"--latent_dim {latent_dim} is above --input_dim {input_dim}: that would not compress")
        self.config = {
            "input_dim": input_dim,
            "model_dim": model_dim,
            "latent_dim": latent_dim,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "dropout": dropout,
            "use_token": use_token,
            "block": block,
        }
        sizes = (input_dim, model_dim, latent_dim, num_heads, num_layers, dropout)
        self.encoder = MotionFeatureEncoder(*sizes, use_token, block)
        self.decoder = MotionFeatureDecoder(*sizes, use_token, block)
        self.decoder.code = self.encoder.code  # one code, both ways

    @property
    def compression_ratio(self) -> float:
        return self.config["latent_dim"] / self.config["input_dim"]

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> MotionFeatureAutoencoder:
        """The model that train.py wrote to `path`, on the CPU, in eval mode, its parameters frozen.

        Raises `UserError` when the file is absent, unreadable or no checkpoint of train.py.
        """
        checkpoint = load_checked(Path(path))
        try:
            model = cls(**checkpoint["config"])
            model.load_state_dict(checkpoint["model"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            raise UserError(f"{path} is not a checkpoint of train.py; give one of its motion_ae_epoch*.pt") from None
        return model.eval().requires_grad_(False)

    def encode(self, x: Tensor) -> Tensor:
        """x [B, T, N, C] or [B, T, H, W, C] -> latent, differentiable in x."""
        return self.encoder(x)

    def decode(self, latent: Tensor) -> Tensor:
        """latent -> reconstruction of x."""
        return self.decoder(latent)

    @torch.no_grad()
    def encode_long(self, x: Tensor) -> Tensor:
        """One clip [T, N, C] or [T, H, W, C], any T, any floating dtype, anywhere (on disk too, by mmap) -> its latent
        [T, ..., D], on the CPU: what `encode` gives, to rounding.

        Positions are independent sequences, so they are cut: beside x and the latent it takes the memory of `TOKENS`
        tokens, or of one position's T.
        """
        clip = x.flatten(1, -2)  # [T, N, C]
        latent = torch.empty(*clip.shape[:2], self.config["latent_dim"])
        for positions in position_slices(*clip.shape[:2]):
            part = clip[None, :, positions].to(self.encoder.code.mean)  # [1, T, n, C], the model's device and dtype
            latent[:, positions] = self.encode(part)[0].cpu()
        return latent.unflatten(1, x.shape[1:-1])

    @torch.no_grad()
    def decode_long(self, latent: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The latent of one clip [T, N, D] or [T, H, W, D] -> its reconstruction in parts: (positions, [T, n, C] on
        the model's device), `positions` being a slice of N or of the flattened H, W."""
        clip = latent.flatten(1, -2)
        for positions in position_slices(*clip.shape[:2]):
            yield positions, self.decode(clip[None, :, positions].to(self.encoder.code.mean))[0]

    def embed(self, latent: Tensor) -> Tensor:
        """latent [B, T, ..., D] -> motion embedding [B, T, D]: what is there, and how much of it moves.

        The first channels are the mean over space of the latent's frame channels. The last, as many as there are detail
        channels, split the frame channels into that many groups, leading components first: the log of the mean over
        space of how far each group moved since the time step before (the first step repeats the second).
        """
        frames = latent.flatten(2, -2)[..., : self.encoder.code.frame_dim]  # [B, T, N, frame_dim]
        delta = frames.diff(dim=1) if latent.shape[1] > 1 else torch.zeros_like(frames)
        groups = delta.tensor_split(self.encoder.code.detail_dim, dim=-1)
        motion = torch.stack([group.norm(dim=-1).mean(dim=2) for group in groups], dim=-1)  # [B, T - 1 or 1, groups]
        motion = motion.clamp_min(STILL).log()
        motion = torch.cat([motion[:, :1], motion], dim=1)[:, -latent.shape[1] :]
        return torch.cat([frames.mean(dim=2), motion], dim=-1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        latent = self.encoder(x)
        return {"latent": latent, "reconstruction": self.decode(latent), "motion_embedding": self.embed(latent)}


# ---------------------------------------------------------------------------------------------------------------------
# Feature files and checkpoints: what one script writes and the next one reads
# ---------------------------------------------------------------------------------------------------------------------


def find_features(folder: Path) -> list[Path]:
    """Every feature file below `folder`, sorted; hidden files and folders (half-written files among them) are left out.

    Raises `UserError` when `folder` is no folder or holds no feature file.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder that holds the features")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in FEATURE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not paths:
        raise UserError(f"{folder} holds no {', '.join(FEATURE_SUFFIXES)} file; run vfm_feature.py first")
    return paths


def check_file(path: Path) -> None:
    """Raise `UserError` unless `path` is a file; a pipe would be waited for."""
    if not path.is_file():
        raise UserError(f"{path} is no file" if path.exists() else f"{path} does not exist")


def explain_bad_file(path: Path, error: Exception) -> str:
    """Why `path` could not be loaded, and what to do about it: the end of a sentence that begins with its name."""
    with open(path, "rb") as file:
        if file.read(64).startswith(b"version https://git-lfs"):
            return "is a Git LFS pointer instead of the file; run `git lfs pull` in the repository that it came with"
    if "weights_only" in str(error):
        return "holds objects that only unsafe loading could read; save plain tensors"
    return f"is damaged or of another format ({type(error).__name__}); make or download it again"


def load_checked(path: Path, mmap: bool = False) -> Any:
    """`torch.load` on the CPU that never runs code from the file. `mmap` leaves tensors on disk.

    Raises `UserError` when the file is absent, damaged, or holds more than tensors and plain values.
    """
    check_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged files raise almost anything
        if mmap:  # files of torch < 1.6 cannot be mapped
            return load_checked(path)
        raise UserError(f"{path} {explain_bad_file(path, error)}") from None


def load_feature(path: Path, input_dim: int | None = None, mmap: bool = False) -> tuple[Tensor, dict[str, Any]]:
    """One feature file and its `caption`, `video`, `model` and `thumbnails` (uint8 [F, h, w, 3]), where it has them.

    The file holds a tensor, an array (.npy), or a dict, read by `feature`, else `features`, else its first key.

    Returns the feature [T, N, C] or [T, H, W, C] in the dtype that it was stored in. With `mmap` the numbers stay on
    disk, and are not looked at. Raises `UserError` that names the file: not readable, wrong rank, `C != input_dim`,
    not floating point, NaN or infinity.
    """
    metadata: dict[str, Any] = {}
    if path.suffix.lower() == ".npy":
        check_file(path)
        try:
            data = np.load(path, mmap_mode="c" if mmap else None, allow_pickle=False)
            feature = torch.from_numpy(data if data.dtype.isnative else data.astype(data.dtype.newbyteorder("=")))
        except Exception as error:  # damaged, an archive, Python objects, text
            raise UserError(
                f"{path} is damaged or no array of numbers ({type(error).__name__}); save it with numpy.save"
            ) from None
    else:
        feature = load_checked(path, mmap)
        if isinstance(feature, dict):
            metadata = {key: feature[key] for key in ("caption", "video", "model") if isinstance(feature.get(key), str)}
            frames = feature.get("thumbnails")
            if isinstance(frames, Tensor) and frames.dtype == torch.uint8 and frames.ndim == 4 and frames.shape[3] == 3:
                metadata["thumbnails"] = frames
            key = next((key for key in ("feature", "features") if key in feature), next(iter(feature), None))
            feature = feature.get(key)
    if not isinstance(feature, Tensor) or feature.layout != torch.strided or feature.is_meta or feature.is_quantized:
        raise UserError(f"{path} holds no feature tensor; it holds {type(feature).__name__}")
    if feature.ndim not in (3, 4) or feature.numel() == 0:
        raise UserError(f"{path}: shape {list(feature.shape)}, but a feature is [T, N, C] or [T, H, W, C], not empty")
    if not feature.is_floating_point():
        raise UserError(f"{path}: dtype {feature.dtype}, but a feature is floating point")
    if input_dim is not None and feature.shape[-1] != input_dim:
        raise UserError(f"{path}: C is {feature.shape[-1]}, but --input_dim is {input_dim}; give --input_dim C")
    if not mmap and not feature.isfinite().all():
        raise UserError(f"{path} holds NaN or infinity; make it again in float32, or take it out")
    return feature.detach(), metadata


def weights_hash(weights: dict[str, Tensor]) -> str:
    """A hash of the weights, so that a file tells which ones made it wherever theirs came from."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().flatten().view(torch.uint8).numpy())
    return f"sha256:{digest.hexdigest()[:16]}"


# ---------------------------------------------------------------------------------------------------------------------
# Previews
# ---------------------------------------------------------------------------------------------------------------------

PREVIEW_MARK = "vfm_encoder preview"  # in the video's comment, which tells it from a clip of the same name
PREVIEW_STEPS = 240  # of a clip that a preview shows, at most
PREVIEW_FPS = 8
PANEL_PIXELS = 180 * 270  # of a picture in the video
SHEET_PIXELS = 120 * 180  # of one in the sheet
MARGIN, GAP, TITLE, CURVES = 40, 10, 25, 150  # pixels: left of the pictures, between them, above them, below them
THUMBNAIL_PIXELS = 120 * 180


def check_preview_packages() -> None:
    """Raise `UserError` where a package that only previews need is not here."""
    try:
        import av  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"--preview needs the package {error.name}; install it, or leave --preview out") from None


def preview_steps(length: int) -> list[int]:
    """The time steps of a clip that its preview shows: all, or `PREVIEW_STEPS` of them evenly spread."""
    return torch.linspace(0, length - 1, min(length, PREVIEW_STEPS), dtype=torch.float64).round().int().tolist()


def thumbnails(clip: np.ndarray) -> Tensor:
    """Frames, uint8 RGB [F, H, W, 3] -> as a preview shows them, uint8 [min(F, 240), h, w, 3]: evenly spread over the
    clip, of the same aspect ratio and at most 120 * 180 pixels each."""
    height, width = clip.shape[1:3]
    shrink = min(1.0, (THUMBNAIL_PIXELS / (height * width)) ** 0.5)
    size = max(1, round(height * shrink)), max(1, round(width * shrink))
    frames = torch.from_numpy(clip[preview_steps(len(clip))]).permute(0, 3, 1, 2)  # [F', 3, H, W]
    small = nn.functional.interpolate(frames, size, mode="bilinear", antialias=True)
    return small.permute(0, 2, 3, 1).contiguous()


def preview_comment(video: Path) -> str:
    """The comment in a video's metadata; empty where there is none, or no video."""
    import av

    try:
        with av.open(str(video)) as container:
            return container.metadata.get("comment", "")
    except (av.FFmpegError, OSError):
        return ""


def has_preview(path: Path) -> bool:
    """Whether the preview beside the file `path` was drawn from it as it is now."""
    video, sheet = path.with_suffix(".mp4"), path.with_suffix(".png")
    there = path.exists() and video.exists() and sheet.exists()
    return there and preview_comment(video) == f"{PREVIEW_MARK} of {file_fingerprint(path)}"


def noise_floor(x: Tensor) -> Tensor:
    """Differences that a preview must not blow up to look like a signal."""
    return 1e-4 * x.square().mean().sqrt() + 1e-12


def leading_components(x: Tensor) -> tuple[Tensor, float]:
    """The first three principal components of features [T, H, W, C], one basis and one scale for the whole clip, and
    their share of its variance: [steps, H, W, 3] of `preview_steps`, the 2nd to 98th percentile in [-0.5, 0.5]. What
    does not vary is 0."""
    tokens = x.flatten(0, -2)
    sample = tokens[torch.linspace(0, len(tokens) - 1, min(len(tokens), 4096)).long()].float()
    mean = sample.mean(dim=0)
    covariance = (sample - mean).mT @ (sample - mean) / len(sample)
    basis = nn.functional.pad(principal_components(covariance)[:, :3], (0, max(0, 3 - x.shape[-1])))
    spread = (sample - mean) @ basis  # [K, 3]
    low, high = spread.quantile(0.02, dim=0), spread.quantile(0.98, dim=0)
    noise = noise_floor(sample)
    steps = torch.stack([(x[step].float() - mean) @ basis for step in preview_steps(len(x))])
    share = spread.square().mean(dim=0).sum() / covariance.trace().clamp_min(noise**2)
    return (steps - (low + high) / 2) / (high - low).clamp_min(noise), share.item()


def relative_motion(x: Tensor) -> np.ndarray:
    """How far features [T, ..., C] move at each step but the first, [T - 1]: the root mean square of delta_x over that
    of x around its mean, so that features and latents compare."""
    some = x[preview_steps(len(x))].float()
    scale = (some - some.flatten(0, -2).mean(dim=0)).square().mean().sqrt().maximum(noise_floor(some))
    return np.array([((b.float() - a.float()).square().mean().sqrt() / scale).item() for a, b in itertools.pairwise(x)])


def draw_clip(
    pictures: dict[str, np.ndarray], motion: dict[str, np.ndarray], steps: list[int], area: int
) -> tuple[Figure, list[AxesImage], list[Line2D]]:
    """A figure of some time steps of a clip, the images in it, and the cursors on its curves.

    pictures: uint8 [F, h, w, 3] by title, a row for each; of a single step they are side by side. All are drawn `area`
    pixels large, in the first one's aspect ratio. motion: curves [T - 1] by name, drawn below.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    _, height, width, _ = next(iter(pictures.values())).shape
    aspect = min(max(width / height, 1 / 8), 8.0)
    width, height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
    rows, columns = (len(pictures), len(steps)) if len(steps) > 1 else (1, len(pictures))
    page_width = max(480, MARGIN + columns * (width + GAP))
    page_height = rows * (TITLE + height) + CURVES
    page_width, page_height = page_width + page_width % 2, page_height + page_height % 2  # H.264 wants even numbers
    figure = Figure(figsize=(page_width / 100, page_height / 100), dpi=100)
    FigureCanvasAgg(figure)

    page = figure.add_axes((0, 0, 1, 1), xlim=(0, page_width), ylim=(page_height, 0), autoscale_on=False)  # in pixels
    page.set_axis_off()
    images, length = [], len(next(iter(motion.values()))) + 1
    for index, (title, shown) in enumerate(pictures.items()):
        smoothing = "bilinear" if title == "frames" else "nearest"  # a token stays a block
        for step_index, step in enumerate(steps):
            row, column = (index, step_index) if len(steps) > 1 else (0, index)
            x, y = MARGIN + column * (width + GAP), TITLE + row * (TITLE + height)
            place = {"extent": (x, x + width, y + height, y), "aspect": "auto"}
            images.append(page.imshow(shown[step * len(shown) // length], interpolation=smoothing, **place))
        page.text(MARGIN if len(steps) > 1 else x, y - 5, title, fontsize=8)

    box = MARGIN, TITLE, page_width - MARGIN - GAP, CURVES - 2 * TITLE
    curves = figure.add_axes((box[0] / page_width, box[1] / page_height, box[2] / page_width, box[3] / page_height))
    for name, curve in motion.items():
        curves.plot(range(1, length), curve, linewidth=1.2, label=name)
    curves.set(xlim=(0, max(1, length - 1)), ylim=(0, 1.4 * max(0.1, *(max(y, default=0) for y in motion.values()))))
    curves.tick_params(labelsize=7)
    curves.legend(fontsize=7, loc="upper right", frameon=False, ncols=len(motion))
    return figure, images, [curves.axvline(step, color="tab:red") for step in steps]


def write_video(file: BinaryIO, pictures: dict[str, np.ndarray], motion: dict[str, np.ndarray], comment: str) -> None:
    """The clip as H.264 in MP4, in the form that browsers play: its pictures side by side, over the motion."""
    import av

    figure, images, cursors = draw_clip(pictures, motion, [0], PANEL_PIXELS)
    canvas = figure.canvas
    for artist in (*images, *cursors):
        artist.set_animated(True)  # left out of the rest, which is drawn once
    canvas.draw()
    still = canvas.copy_from_bbox(figure.bbox)
    count, length = max(map(len, pictures.values())), len(next(iter(motion.values()))) + 1
    with av.open(file, mode="w", format="mp4") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=PREVIEW_FPS, options={"crf": "20", "preset": "veryfast"})
        stream.width, stream.height = canvas.get_width_height()
        stream.pix_fmt, stream.thread_count = "yuv420p", 1  # the cores are the models'
        for index in range(count):
            canvas.restore_region(still)
            for image, shown in zip(images, pictures.values(), strict=True):
                image.set_data(shown[index * len(shown) // count])
            cursors[0].set_xdata([index * length / count] * 2)
            for artist in (*images, *cursors):
                artist.axes.draw_artist(artist)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(canvas.buffer_rgba()), format="rgba")))
        container.mux(stream.encode())


def write_preview(path: Path, feature: Tensor, latent: Tensor | None = None, frames: Tensor | None = None) -> None:
    """Beside the file `path`, `<stem>.mp4` and `<stem>.png`: what a clip's features look like, and how they move.

    feature, latent: [T, H, W, C] or [T, N, C], which is laid out as the grid nearest to a square. frames: `thumbnails`
    of the clip; their aspect ratio, or else the grid's, is that of all pictures. Both files are whole or not there;
    raises `OSError` where they cannot be written, and `UserError` where files of these names are no preview: the clip
    itself may lie there.
    """
    video, sheet = path.with_suffix(".mp4"), path.with_suffix(".png")
    if (video.exists() or sheet.exists()) and not preview_comment(video).startswith(PREVIEW_MARK):
        raise UserError(f"--preview would write over {video} or {sheet.name}; give another output folder")
    pictures, motion = {}, {}
    if frames is not None:
        pictures["frames"] = frames.numpy()
    for name, x in {"features": feature, "latent": latent}.items():
        if x is None:
            continue
        if x.ndim == 3:
            rows = max(divisor for divisor in range(1, math.isqrt(x.shape[1]) + 1) if x.shape[1] % divisor == 0)
            x = x.unflatten(1, (rows, -1))
        components, share = leading_components(x)
        told = f"{share:.0%} of the variance" if components.abs().max() > 0.01 else "NOTHING VARIES"
        if name == "features":
            reference = components
        else:  # turned so that what is alike has the same colours (orthogonal Procrustes)
            u, _, v = torch.linalg.svd(components.flatten(0, 2).mT @ reference.flatten(0, 2))
            components = components @ (u @ v)
        pictures[f"{name} {list(x.shape)}: {told}"] = ((components + 0.5).clamp(0, 1) * 255).byte().numpy()
        motion[f"motion of the {name}"] = relative_motion(x)

    sheet.unlink(missing_ok=True)  # the video is first: where it is there alone, the preview is not finished
    with whole_file(video) as file:
        write_video(file, pictures, motion, f"{PREVIEW_MARK} of {file_fingerprint(path)}")
    moments = np.linspace(0, len(feature) - 1, 6).round().astype(int).tolist()
    with whole_file(sheet) as file:
        draw_clip(pictures, motion, moments, SHEET_PIXELS)[0].savefig(file, format="png")


# ---------------------------------------------------------------------------------------------------------------------
# What every script does: errors in one line, ranks, whole files
# ---------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can mend. Its text is the one line they read: what is wrong, and what to do about it."""


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose errors are one line, as all errors here, and whose help shows every default."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: an int or float in [low, high], refused in words otherwise."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            wanted = f">= {low}" if math.isinf(high) else f"in [{low}, {high}]"
            raise argparse.ArgumentTypeError(f"{text} must be {wanted}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def add_model_flags(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """The autoencoder's flags. With `optional`, those not given are absent from the parsed arguments."""

    def add(flag: str, default: float, help: str, **options: Any) -> None:
        if optional:
            default, help = argparse.SUPPRESS, f"{help} (default: {default})"
        parser.add_argument(flag, default=default, help=help, **options)

    add("--input_dim", 768, "channels C of the features", type=number(int, 1))
    add("--model_dim", 384, "width of encoder and decoder", type=number(int, 1))
    add("--latent_dim", 192, "channels of the latent", type=number(int, 2))
    add("--num_heads", 8, "attention heads", type=number(int, 1))
    add("--num_layers", 2, "transformer layers, each way", type=number(int, 1))
    add("--dropout", 0.1, "dropout while training", type=number(float, 0, 1))
    add("--use_token", False, "the encoder sees [x, delta_x], not delta_x alone", action="store_true")


def join_ranks() -> None:
    """Open torchrun's process group, if there is one; a rank waits for the others as long as they take.

    `WORLD_SIZE` alone decides. Raises `UserError` where it promises a group that the other variables do not describe:
    what another job left in the environment must not make this one wait, or write nothing.
    """
    world_size = os.environ.get("WORLD_SIZE") or "1"
    if world_size == "1":
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {world_size}, but {', '.join(missing)} not set; start with torchrun, or unset WORLD_SIZE"
        )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(days=365))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"RANK {os.environ['RANK']} and WORLD_SIZE {world_size} describe no process group ({error}); start with "
            "torchrun, or unset them"
        ) from None


def rank() -> int:
    """Which of torchrun's processes this is; 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def from_first_rank(value: Any) -> Any:
    """Rank 0's `value`, on every rank."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def gather(value: Any) -> list[Any]:
    """Every rank's `value`, in their order, on rank 0; on the others an empty list."""
    values = [value] if rank() == 0 else []
    if dist.is_initialized():
        values = [None] * num_ranks() if rank() == 0 else None
        dist.gather_object(value, values)
    return values or []


def say(message: str) -> None:
    """One line on standard error, above the progress bars; of several ranks the first one speaks."""
    if rank() == 0:
        tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)


def open_device(name: str) -> torch.device:
    """The torch device of that name, `cuda` being this rank's GPU; raises `UserError` where the machine lacks it."""
    try:
        device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and num_ranks() > 1 else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name} is not on this machine; use cpu, cuda or cuda:N") from None
    if device.type == "meta":
        raise UserError("--device meta computes nothing; use cpu")
    return device


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that is at `path` whole or not at all: written beside it, then renamed onto it.

    Its temporary name is random: host names and process numbers are not unique where containers share a folder.
    Raises `OSError` when the disk is full or the folder cannot be written; the half-written file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the bytes do
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left of a `whole_file` in `folder`: those that nobody has written to for a day."""
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        with suppress(OSError):  # another run may have removed it
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()


def file_fingerprint(path: Path) -> str:
    """A hash that tells whether a file was replaced: of its size and of 64 KiB at its start, middle and end.

    Unlike its time, it survives copying. Videos keep an index of their frames at one end and .pt files the checksums of
    all tensors at theirs, so another video or feature of the same size shows there. Raises `OSError`.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        for start in (0, (size - FINGERPRINT_BYTES) // 2, size - FINGERPRINT_BYTES):
            file.seek(max(0, start))
            digest.update(file.read(FINGERPRINT_BYTES))
    return f"sha256:{digest.hexdigest()[:16]}"


def save_atomically(data: dict[str, Any], path: Path) -> None:
    """`torch.save` into a `whole_file`."""
    with whole_file(path) as file:
        try:
            torch.save(data, file)
        except RuntimeError as error:  # its archive complains of a short file and hides why, say a full disk
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def reuse_memory() -> None:
    """Let C's allocator (glibc's, where it is that) keep what is freed instead of handing it back to the kernel, which
    clears every page anew: on the CPU that took a tenth of the time of a forward pass and of decoding."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large arrays come from the heap too
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and the heap does not shrink


def run_script(main: Callable[[], int]) -> None:
    """Run a script's `main` and exit with its status; a `UserError` becomes one line on standard error and status 2."""
    name = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers end a job with it: as orderly as Ctrl-C
    reuse_memory()
    try:
        status = main()
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        status = 2
    except OSError as error:  # a full disk, a folder that vanished
        print(f"{name}: error: {error}; finished files are whole", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print(f"{name}: stopped; finished files are whole", file=sys.stderr)
        status = 130
    sys.exit(status)
