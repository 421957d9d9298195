"""The motion autoencoder, and what the three scripts share: one-line errors, atomic file writes, safe loading."""

from __future__ import annotations

import argparse
import errno
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

FEATURE_SUFFIXES = (".pt", ".pth", ".npy", ".safetensors")
CODE_VERSION = 6  # of the format: checkpoints of another version are refused, latents are made again
EMBEDDING_VERSION = 2  # of the motion embedding: outputs of another version are made again
LEVELS, TOP = 6, 255 - 6 * 22  # of stored energies: levels per factor of 2; the level of energy 1 (255 is 2 ** 22)
EXTRA_RMS = 0.14  # root mean square of the extras in the latent, whose channels have 1
SLOTS_KEPT = 16  # block sizes for which the code caches the slots of the coefficients
CELLS = 256  # cells of features [T, N, C] that are coded at once
STATS_NAME = "stats.pt"  # in a folder of latents
LARGEST = 1e15  # limit for a feature's numbers: squares of larger ones, summed over a clip, overflow float32
# The first bytes of a pointer that replaces a file, and the command that fetches the file itself.
POINTERS = {b"version https://git-lfs.github.com/spec/": "git lfs pull", b"/annex/objects/": "git annex get"}
OTHER_VALUES = "other values as JSON"  # key in the metadata of a .safetensors, which holds only strings
STILL = 1e-3  # relative to the scale of the PCA channels: smaller changes count as none
CONTENT = 1 / 20  # scale of the embedding's content channels
FARTHEST = 0.4  # the most that one pass can add to a cell's motion, in cells
REST = 0.01  # cells per step: slower motion counts as rest
# Time steps on each side over which motion is smoothed: aliasing errors alternate over time, motion does not.
CELLS_OVER, CAMERA_OVER = 1, 3
OBJECTS_OVER = 12  # the same for whether objects move at all, which changes more slowly than how they move
TOKENS = 2**14  # tokens whose motion is measured at once
FINGERPRINT_BYTES = 2**16
TEMPORARY_SUFFIX = ".vfm.tmp"  # of half-written files
LEFTOVER_SECONDS = 24 * 3600  # after this time, a half-written file counts as abandoned


# ---------------------------------------------------------------------------------------------------------------------
# The motion autoencoder
#
# A clip is cut into blocks of at most 24 time steps x 16 x 16 cells, which are coded one by one: [24, 10, 15] is one
# block, [48, 30, 45] is 2 x 2 x 3 blocks of [24, 15, 15]. Features [T, N, C] have no grid: each cell is a block.
# A linear code (`SpaceTimeCode`), fitted by train.py's `fit_code`, turns C = 768 channels into D = 192. On top of it,
# an invertible network is trained to bring the cosine similarities between tokens closer to those of the features.
#
#   x [B, T, H, W, 768] --> z = (x - mean) / scale; each position has its own mean if all clips have one shape
#    |  fitted: SpaceTimeCode.encode
#    +--> z @ basis --> cosine transform of each block: L = 24 * 10 * 15 frequencies x 768 components
#    |        +--> the L * 192 most important of these L * 768 coefficients are kept:
#    |             of components < 192: at their own frequency and channel ---+--> inverse transform --> @ mix -+
#    |             of the others (extras): scaled down, in the empty slots ---+                                 |
#    |                                                                                                          v
#    |                                                                       code's latent [B, T, H, W, 192]
#    |  trained: InvertibleNetwork                                                                              |
#    |     odd channels += network(even), even channels += network(odd); then a gain for each channel  <--------+
#    |     network: [z, delta z] [S, T, 192] --> convolution, transformer layer over T --> [S, T, 96], S = B * H * W
#    v
#   latent [B, T, H, W, 192]
#    |
#    +--> the inverse of the steps above, in reverse order --> reconstruction [B, T, H, W, 768]
#    |
#    +--> motion_embedding [B, T, 192]: what the picture shows, and how it moves
# ---------------------------------------------------------------------------------------------------------------------

Size = tuple[int, int, int]  # of a block: time steps, rows, columns
Place = tuple[slice, ...]  # the slices that cut a block out of clips [B, T, ...]


@dataclass(frozen=True)
class Config:
    """The settings of a `MotionFeatureAutoencoder`: most are flags of train.py, all are recorded in checkpoints."""

    input_dim: int = 768  # channels C of the features
    model_dim: int = 384  # width of the networks
    latent_dim: int = 192  # channels D of the latent
    num_heads: int = 8
    num_layers: int = 2  # transformer layers, each in its own network; these change odd and even channels in turn
    dropout: float = 0.1
    use_token: bool = False  # the encoder sees [x, delta_x], not delta_x alone: still content is coded too
    block: Size = (24, 16, 16)  # the most time steps, rows and columns that are coded together
    # T, N or T, H, W of the training clips; all 1 if these differ in shape or are large; () if only some have a grid.
    clip_shape: tuple[int, ...] = ()
    version: int = CODE_VERSION

    def __post_init__(self) -> None:
        if self.version != CODE_VERSION:
            raise UserError(f"version {self.version} of the code, but this is version {CODE_VERSION}: train anew")
        if self.model_dim % self.num_heads:
            raise UserError(
                f"--model_dim {self.model_dim} does not divide by --num_heads {self.num_heads}; change one of them"
            )
        if self.latent_dim < 2:
            raise UserError(f"--latent_dim {self.latent_dim} is too small; take at least 2")
        if self.latent_dim > self.input_dim:
            raise UserError(
                f"--latent_dim {self.latent_dim} is above --input_dim {self.input_dim}: that would not compress"
            )


def to_sequences(x: Tensor) -> Tensor:
    """[B, T, N, C] or [B, T, H, W, C] -> [B * N, T, C]: each spatial position becomes a sequence. [S, T, C] is returned
    as it is."""
    return x.movedim(1, -2).flatten(0, -3)


def from_sequences(sequences: Tensor, like: Tensor) -> Tensor:
    """[B * N, T, D] -> the layout of `like` ([B, T, N, ...], [B, T, H, W, ...] or [S, T, ...]) with D channels."""
    batch, length, *cells, _ = like.shape
    return sequences.view(batch, *cells, length, -1).movedim(-2, 1)


def to_grid(x: Tensor) -> Tensor:
    """[B, T, H, W, C] as it is; [B, T, N, C], whose grid is unknown -> N clips of one cell, [B * N, T, 1, 1, C]."""
    return x if x.ndim == 5 else to_sequences(x)[:, :, None, None]


def from_grid(grid: Tensor, like: Tensor) -> Tensor:
    """The inverse of `to_grid` for features in the layout of `like`, with any number of channels."""
    return grid if like.ndim == 5 else from_sequences(grid[:, :, 0, 0], like)


def cut(length: int, most: int) -> list[slice]:
    """Cut an axis into as few parts of at most `most` as possible, whose sizes differ by at most one: 25 -> 13 + 12."""
    count = -(-length // most)
    edges = [-(-length * index // count) for index in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


def blocks(shape: tuple[int, ...], most: Size) -> list[Place]:
    """Where the blocks of clips [B, T, H, W, ...] lie, each of at most `most` steps, rows and columns, sorted by cells,
    then by time. `shape`: T, H, W; or T, N, where each cell is coded alone, `CELLS` at once."""
    steps, *cells = map(cut, shape, most if len(shape) == 3 else (most[0], CELLS))
    return [(slice(None), step, *cell) for cell in itertools.product(*cells) for step in steps]


def cosine_transform(length: int, like: Tensor) -> Tensor:
    """The orthonormal cosine transform (DCT-II) [frequency, time], in the dtype and on the device of `like`."""
    step = torch.arange(length, device=like.device)
    matrix = torch.cos(torch.pi / length * (step + 0.5) * step[:, None]) * (2 / length) ** 0.5
    return (matrix * torch.where(step == 0, 0.5**0.5, 1.0)[:, None]).to(like.dtype)


def transform(x: Tensor, inverse: bool = False) -> Tensor:
    """The cosine transform of blocks [B, l, h, w, K] over their three axes, or its inverse."""
    for dim in (1, 2, 3):
        if x.shape[dim] > 1:
            matrix = cosine_transform(x.shape[dim], x)
            rows = x.flatten(0, dim - 1).flatten(2)  # [blocks and axes before it, the axis, axes after it and channels]
            x = ((matrix.mT if inverse else matrix) @ rows).view(x.shape)
    return x


def principal_components(covariance: Tensor) -> Tensor:
    """Eigenvectors (columns) of a symmetric matrix, largest eigenvalue first, the largest-magnitude entry positive."""
    vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1)
    return vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()


def resize_table(table: Tensor, size: Size) -> Tensor:
    """Mean energies [l, h, w, C] of a block's coefficients -> the table for blocks of another `size`, in float64."""
    return nn.functional.adaptive_avg_pool3d(table.double().movedim(-1, 0), size).movedim(0, -1)


class SpaceTimeCode(nn.Module):
    """The linear part of the autoencoder: a transform code whose latent keeps the layout of the features.

    First the features' mean is subtracted. Each position has its own if all training clips have the same shape, since
    ViT tokens show their position in every clip. The result is projected onto components, much as in PCA, then each
    block gets a cosine transform. Of a block's L * C coefficients, the L * D most important are kept (reverse
    water-filling). Those of component j < D stay at their frequency in channel j; after the inverse transform, channel
    j is component j of the same token, as far as it was kept. The slot of a coefficient that was not kept goes to an
    extra: a kept coefficient of a component >= D. There are as many extras as empty slots. Extras are scaled down, to
    change the cosines between tokens (VideoREPA's token relations) little. A share of the mean is added back, since
    cosines depend on it. Last, `mix` [D, D], a nearly diagonal matrix, brings these cosines close to the features'.

    train.py's `fit_code` writes the tables; the training epochs do not change them. Energies are stored as integer
    logarithms: every machine and precision then finds the same slots, and they take a quarter of the memory.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.codes_still_part, self.size = config.use_token, tuple(config.block)
        self.input_dim, self.latent_dim = config.input_dim, config.latent_dim
        self.clip_shape = tuple(config.clip_shape)
        self.register_buffer("mean", torch.zeros(*(self.clip_shape or (1, 1)), config.input_dim))
        self.register_buffer("scale", torch.ones(()))  # one for all channels: one for each would weight their errors
        self.register_buffer("basis", torch.eye(config.input_dim))  # columns: principal components
        self.register_buffer("mean_share", torch.ones(()))  # share of the mean that stays in the latent
        self.register_buffer("mix", torch.eye(config.latent_dim))
        self.register_buffer("unmix", torch.eye(config.latent_dim))  # inverse of `mix`
        self.register_buffer("smoothing", torch.zeros(()))
        self.register_buffer("energy", torch.full((*self.size, config.input_dim), TOP, dtype=torch.uint8))  # levels
        # Levels to add to a coefficient's energy to get its importance, by temporal frequency and component.
        own = torch.arange(config.input_dim) < config.latent_dim
        self.register_buffer("weight", own.int().repeat(self.size[0], 1))
        self.slots_of: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}  # cache of `slots`
        self.register_load_state_dict_post_hook(lambda code, _: code.slots_of.clear())

    def check(self, shape: tuple[int, ...], channels: int) -> None:
        """Raise `UserError` if features (or latents) do not have the rank or number of channels that the model takes,
        or are one clip without the batch axis, as far as the shape of the training clips shows it."""
        if shape[-1] != channels:
            if channels != self.input_dim:
                raise UserError(
                    f"the latent has {shape[-1]} channels, but the checkpoint gives {channels}; decode it by its own"
                )
            raise UserError(
                f"C is {shape[-1]}, but the checkpoint was trained on features of C = {channels}; permute the axes if "
                "C is not the last, or give the one that was trained on this model's features"
            )
        if len(self.clip_shape) == 3:
            looks_like_one_clip = shape[0] > 1 and shape[2] != math.prod(self.clip_shape[1:])
        else:
            looks_like_one_clip = (shape[0], math.prod(shape[1:3])) == self.clip_shape and shape[1] > 1
        if len(shape) not in (4, 5) or (len(shape) == 4 and looks_like_one_clip):
            raise UserError(
                f"{list(shape)} lacks the batch axis: give x[None] of one clip x; of features [B, T, H * W, C] on a "
                "grid give x.unflatten(2, (H, W))"
            )

    def mean_at(self, shape: tuple[int, ...]) -> Tensor:
        """The mean at each position, [1, T, ..., C], for clips of `shape` [B, T, ..., C]. If T differs from the
        training clips', it is averaged over time; if the number of cells does, over cells. A warning says so once."""
        length, *grid = shape[1:-1]
        mean = self.mean.flatten(1, -2)  # [T or 1, N or 1, C]
        for dim, size, name in ((0, length, "time steps"), (1, math.prod(grid), "cells")):
            if mean.shape[dim] not in (1, size):
                if not torch.compiler.is_compiling():
                    warnings.warn(
                        f"clips of {size} {name}, but those trained on have {mean.shape[dim]}: the mean over these "
                        f"{name} is used, and errors are larger; train on clips of this size to avoid it",
                        stacklevel=1,
                    )
                mean = mean.mean(dim=dim, keepdim=True)
        return mean.expand(length, math.prod(grid), -1).unflatten(1, grid)[None]

    def centre(self, mean: Tensor) -> Tensor:
        """The part of the mean [..., C] that stays in the latent, [..., D]: cosines between features depend on it."""
        share = self.mean_share * self.codes_still_part / self.scale
        return mean @ (share * self.basis[:, : self.latent_dim]) @ self.mix

    def write_tables(self, energy: Tensor, importance: Tensor, **tables: Tensor) -> None:
        """Set the buffers: the mean `energy` of each coefficient of a block [*size, C]; the `importance` of a
        coefficient of energy 1, by temporal frequency and component [l, C]; and the other `tables`."""
        energy, importance = ((x.clamp_min(2.0**-30).log2() * LEVELS).round().int() for x in (energy, importance))
        self.load_state_dict({**tables, "energy": (energy + TOP).clamp(0, 255), "weight": importance})

    def energies(self, size: Size, weighted: bool = False) -> Tensor:
        """The mean energy (`weighted`: importance) of each coefficient of a block of `size`: [l, h, w, C], float64."""
        levels = self.energy.int() - TOP + (self.weight[:, None, None] if weighted else 0)
        return resize_table((levels.double() / LEVELS).exp2(), size)

    @torch.no_grad()
    def slots(self, size: Size) -> tuple[Tensor, Tensor, Tensor]:
        """For each of the L * D slots of a block of `size`, before `mix`: its coefficient's index (of L * C), gain, and
        energy after the gain, [L * D] each. Cached for each size: assigning takes longer than encoding."""
        key = size, self.basis.device, self.basis.dtype
        if key not in self.slots_of:
            if len(self.slots_of) >= SLOTS_KEPT:
                self.slots_of.clear()
            with torch.inference_mode(False):  # later calls may need gradients
                self.slots_of[key] = self.assign_slots(size)
        return self.slots_of[key]

    def assign_slots(self, size: Size) -> tuple[Tensor, Tensor, Tensor]:  # constant shapes, for torch.compile
        importance = (self.energies(size, weighted=True).log2() * 2**16).round().int()
        channels = torch.arange(self.input_dim, device=importance.device)
        own = (channels < self.latent_dim).expand(importance.shape).flatten()
        importance, count = importance.flatten(), math.prod(size) * self.latent_dim
        least = importance.kthvalue(len(importance) - count + 1).values
        kept, ties = importance > least, importance == least
        kept |= ties & (ties.cumsum(0) <= count - kept.sum())  # of ties at the threshold, the first ones
        first, extras = (some.byte().argsort(descending=True, stable=True)[:count] for some in (own, kept & ~own))
        empty = ~kept[first]
        slot = torch.where(empty, extras[empty.cumsum(0) - 1], first)  # the first extra goes to the first empty slot
        energy = self.energies(size).flatten()[slot].float()
        # An extra's energy in the latent is proportional to its amplitude: for a given total energy of the extras,
        # noise on the latent then costs least (from the derivative of the error that a Wiener filter leaves).
        amplitude, is_extra = energy.sqrt().clamp_min(1e-3), ~own[slot]
        mean = (amplitude * is_extra).sum() / is_extra.sum().clamp_min(1)
        gain = EXTRA_RMS / (amplitude * mean).sqrt() / self.mix.diagonal().repeat(math.prod(size))  # after `mix`
        gain = torch.where(is_extra, gain, 1.0)
        frequency = torch.arange(size[0], device=gain.device) * torch.pi / size[0]
        damping = 1 / (1 + self.smoothing * (2 - 2 * frequency.cos()))  # Whittaker's smoother, undone by decoding
        gain = gain * damping.to(gain).repeat_interleave(len(slot) // size[0])
        return slot, gain.to(self.basis), energy * gain.square()

    def block_energy(self, components: Tensor) -> Tensor:
        """Each coefficient's mean energy over a clip's blocks, [*size, C] in float64; `components`: [T, ..., C]."""
        parts = (components[None][place] for place in blocks(components.shape[:-1], self.size))
        energies = [resize_table(transform(to_grid(part)).square().mean(dim=0), self.size) for part in parts]
        return sum(energies) / len(energies)

    def spread(self) -> Tensor:
        """The root mean square of each component, [C]."""
        return self.energies(self.size).mean(dim=(0, 1, 2)).sqrt().clamp_min(1e-3).to(self.basis)

    def encode(self, z: Tensor) -> Tensor:
        """Normalised features of a block [B, t, n, C] or [B, t, h, w, C] -> its latent, without the mean's share."""
        grid = to_grid(z)
        size = tuple(grid.shape[1:4])
        slot, gain, _ = self.slots(size)
        kept = transform(grid @ self.basis).flatten(1).index_select(1, slot) * gain  # [B, L * D]
        return from_grid(transform(kept.view(*grid.shape[:4], -1), inverse=True) @ self.mix, like=z)

    def components(self, latent: Tensor, count: int, noise: Tensor | None = None) -> Tensor:
        """The latent of a block, without the mean's share -> the first `count` principal components of its normalised
        features, as far as the latent holds them. `noise`: the variance [D] of the noise on each latent channel, which
        a Wiener filter then reduces in each slot."""
        grid = to_grid(latent) @ self.unmix
        size = tuple(grid.shape[1:4])
        slot, gain, energy = self.slots(size)
        trust = 1 / gain
        if noise is not None:
            noise = noise @ self.unmix.square()
            trust = trust * (energy / (energy + noise.repeat(len(slot) // len(noise)))).to(gain)
        kept = transform(grid).flatten(1) * trust  # [B, L * D]
        coefficients = kept.new_zeros(len(kept), math.prod(size) * self.input_dim).index_copy(1, slot, kept)
        coefficients = coefficients.view(-1, *size, self.input_dim)[..., :count]
        return from_grid(transform(coefficients, inverse=True), like=latent)

    def by_block(self, function: Callable[[Tensor, Place], Tensor], x: Tensor, channels: int) -> Tensor:
        """Call `function` on each block of x [B, T, ..., K] and its place, and put the results together on x's device:
        [B, T, ..., channels]. Each block is first moved to the device and dtype of the buffers."""
        result = torch.empty(*x.shape[:-1], channels, dtype=self.basis.dtype, device=x.device)
        for place in blocks(x.shape[1:-1], self.size):
            result[place] = function(x[place].to(self.basis), place).to(result)
        return result

    def in_frequencies(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x [B, T, ..., K] with `function` applied to the cosine coefficients [B, l, h, w, K] of each block."""

        def change(block: Tensor, _: Place) -> Tensor:
            return from_grid(transform(function(transform(to_grid(block))), inverse=True), like=block)

        return self.by_block(change, x, x.shape[-1])


class TemporalNetwork(nn.Module):
    """Temporal convolution, then a temporal transformer layer: [S, T, in_dim] -> [S, T, out_dim], S independent
    sequences. The last layer starts at zero, so that training starts from a network that adds nothing."""

    def __init__(self, in_dim: int, out_dim: int, config: Config) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_dim, config.model_dim, kernel_size=3, padding=1, padding_mode="replicate")
        self.positions = nn.Parameter(0.02 * torch.randn(config.block[0], config.model_dim))  # attention sees no order
        self.layer = nn.TransformerEncoderLayer(
            config.model_dim,
            config.num_heads,
            2 * config.model_dim,
            config.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.norm = nn.LayerNorm(config.model_dim)
        self.head = nn.Linear(config.model_dim, out_dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.gelu(self.conv(x.mT)).mT  # [S, T, in_dim] -> [S, T, model_dim]
        return self.head(self.norm(self.layer(h + self.positions[: x.shape[1]])))


class InvertibleNetwork(nn.Module):
    """The trained part: an invertible change of the code's latent [B, T, ..., D] along time, at each position alone. A
    long latent is processed in parts of at most a block's length.

    Additive coupling (NICE, https://arxiv.org/abs/1410.8516; RealNVP, https://arxiv.org/abs/1605.08803): a
    `TemporalNetwork` computes from the even channels what is added to the odd ones, the next one the reverse, and so on
    for `num_layers` networks. Then each channel gets a gain and an offset. `inverse` is exact for any weights. A
    network sees [z, delta_z] of its input channels, or only delta_z without `use_token`.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.sees_still_part, self.steps = config.use_token, config.block[0]
        self.at_rest = False  # if True, the network is known to change nothing and is skipped
        half = [-(-config.latent_dim // 2), config.latent_dim // 2]  # even channels, odd ones
        self.networks = nn.ModuleList(
            TemporalNetwork(half[layer % 2] * (1 + config.use_token), half[1 - layer % 2], config)
            for layer in range(config.num_layers)
        )
        self.log_gain = nn.Parameter(torch.zeros(config.latent_dim))
        self.offset = nn.Parameter(torch.zeros(config.latent_dim))

    def changes_nothing(self) -> bool:
        """Whether all weights that start at zero are still zero, as they are before training."""
        heads = [parameter for network in self.networks for parameter in network.head.parameters()]
        return not any(parameter.any() for parameter in (*heads, self.log_gain, self.offset))

    def couple(self, z: Tensor, layer: int, sign: int) -> Tensor:
        changes = []
        for part in cut(z.shape[1], self.steps):
            seen = z[:, part, layer % 2 :: 2]
            delta = nn.functional.pad(seen.diff(dim=1), (0, 0, 1, 0))  # 0 at t = 0
            changes.append(self.networks[layer](torch.cat([seen, delta], dim=-1) if self.sees_still_part else delta))
        z = z.clone()
        z[..., 1 - layer % 2 :: 2] += sign * torch.cat(changes, dim=1)
        return z

    def forward(self, z: Tensor) -> Tensor:
        if self.at_rest:
            return z
        latent = to_sequences(z)
        for layer in range(len(self.networks)):
            latent = self.couple(latent, layer, 1)
        return from_sequences(latent * self.log_gain.exp() + self.offset, like=z)

    def inverse(self, latent: Tensor) -> Tensor:
        if self.at_rest:
            return latent
        z = (to_sequences(latent) - self.offset) / self.log_gain.exp()
        for layer in reversed(range(len(self.networks))):
            z = self.couple(z, layer, -1)
        return from_sequences(z, like=latent)


class MotionFeatureEncoder(nn.Module):
    """Features -> latent: one half of `MotionFeatureAutoencoder`, whose modules `code` and `network` it shares.

    forward: x [B, T, N, C] or [B, T, H, W, C], any T >= 1, any floating dtype, on any device or memory-mapped from disk
    -> latent in the same layout with `latent_dim` channels, on x's device, in the model's dtype; differentiable in x.
    With `linear`, returns the code's latent, without the network. Blocks are encoded one by one, so beyond x and the
    latent this takes the memory of one block. Raises `UserError` for a shape that the model was not made for.
    """

    def __init__(self, code: SpaceTimeCode, network: InvertibleNetwork) -> None:
        super().__init__()
        self.code, self.network = code, network

    def forward(self, x: Tensor, linear: bool = False) -> Tensor:
        code = self.code
        code.check(x.shape, code.input_dim)
        mean = taken = code.mean_at(x.shape)
        if not code.codes_still_part:  # differences do not determine the clip's own mean over time
            parts = (x[:, part].to(code.basis) for part in cut(x.shape[1], code.size[0]))
            taken = (sum(part.sum(dim=1, keepdim=True) for part in parts) / x.shape[1]).expand(x.shape)

        def encode(block: Tensor, place: Place) -> Tensor:
            latent = code.encode((block - taken[place]) / code.scale) + code.centre(mean[place])
            return latent if linear else self.network(latent)

        return code.by_block(encode, x, code.latent_dim)


class MotionFeatureDecoder(nn.Module):
    """Latent -> features: the other half of `MotionFeatureAutoencoder`.

    forward: latent [B, T, N, D] or [B, T, H, W, D], on any device -> features in the same layout with `input_dim`
    channels, on the latent's device, block by block. Without `use_token`, the training mean replaces the clip's own
    mean, which is not coded. `noise`: the variance [D] of the noise on each latent channel, such as a generator's
    error; a Wiener filter then shrinks each coefficient accordingly.
    """

    def __init__(self, code: SpaceTimeCode, network: InvertibleNetwork) -> None:
        super().__init__()
        self.code, self.network = code, network

    def forward(self, latent: Tensor, noise: Tensor | None = None) -> Tensor:
        result = torch.empty(*latent.shape[:-1], self.code.input_dim, dtype=self.code.basis.dtype, device=latent.device)
        for place, block in self.blocks(latent, noise):
            result[place] = block.to(result)
        return result

    def blocks(self, latent: Tensor, noise: Tensor | None = None) -> Iterator[tuple[Place, Tensor]]:
        """Decode as `forward` does, but yield each block: its place, and its features on the model's device."""
        code = self.code
        code.check(latent.shape, code.latent_dim)
        mean = code.mean_at(latent.shape)
        if noise is not None:
            noise = noise / (2 * self.network.log_gain).exp()  # noise before the gain; the coupling hardly amplifies it
        for place in blocks(latent.shape[1:-1], code.size):
            linear = self.network.inverse(latent[place].to(code.basis)) - code.centre(mean[place])
            components = code.components(linear, code.input_dim, noise)
            yield place, components @ code.basis.mT * code.scale + mean[place]


# ---------------------------------------------------------------------------------------------------------------------
# The motion embedding: what the picture shows, and how it moves
# ---------------------------------------------------------------------------------------------------------------------

FRAME_MOTION = (
    *("camera right", "camera down", "turn", "zoom", "change", "log speed", "log change", "fit"),
    *("picture right", "picture down", "log object speed"),
)


def motion_names(latent_dim: int) -> tuple[str, ...]:
    """The names of the embedding's motion channels, at most an eighth of all."""
    return FRAME_MOTION[: max(1, latent_dim // 8)]


def describe_motion_embedding(config: dict[str, Any]) -> list[str]:
    """The name of each channel of the motion embedding of a model with this `config`, in order.

    The first channels are content: spatial means of the leading latent channels, minus the mean that all clips share,
    divided by 20. They are so small that motion decides the distance between two embeddings.
    The last channels, at most 1/8, are the motion of the picture since the previous time step, 0 at t = 0 and at rest;
    the most important come first, as many as fit:
    - camera right, camera down: the motion of the background at the picture's centre, in grid cells per step
    - turn: clockwise, in radians per step; zoom: the log of the factor per step, positive if things become larger
    - change: the root mean square change of the components, each divided by its spread
    - log speed: log(1 + (v / 0.01)^2) / 2 for the length v of (camera right, camera down); log object speed: for the
      cells' motion relative to the background; log change: for the motion that would account for all change
    - fit: the share of the change that the motion of the cells explains, 0 to 1
    - picture right, picture down: the mean motion of all cells, weighted less where motion explains the change poorly
    """
    motion = motion_names(config["latent_dim"])
    content = [f"content {index + 1}" for index in range(config["latent_dim"] - len(motion))]
    return [*content, *motion]


def inner(x: Tensor) -> Tensor:
    """x [..., H, W] without the cells at the border, where slopes are one-sided and features contain the backbone's
    padding, which never moves. An axis of one or two cells is left as it is."""
    rows, columns = (slice(1, -1) if size > 2 else slice(None) for size in x.shape[-2:])
    return x[..., rows, columns]


def slope(x: Tensor, dim: int) -> Tensor:
    """Central differences along `dim`; 0 if it has only one cell."""
    return torch.gradient(x, dim=dim)[0] if x.shape[dim] > 1 else torch.zeros_like(x)


def camera_flows(height: int, width: int, like: Tensor) -> Tensor:
    """The flow (right, down) of each cell for a camera motion of 1 in right, down, turn or zoom: [4, 2, H, W]."""
    sizes = height, width
    y, x = (torch.arange(size, device=like.device, dtype=like.dtype) - (size - 1) / 2 for size in sizes)
    y, x = y[:, None].expand(sizes), x.expand(sizes)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return torch.stack([one, zero, zero, one, -y, x, x, y]).unflatten(0, (4, 2))


def warp(maps: Tensor, flow: Tensor) -> Tensor:
    """maps [N, P, H, W], sampled bilinearly at the position of each cell plus its flow [N, 2, H, W]."""
    height, width = maps.shape[-2:]
    place = camera_flows(height, width, flow)[3]  # the flow of a zoom of 1 is each cell's position
    scale = 2 / torch.tensor([width, height], device=flow.device)
    return nn.functional.grid_sample(
        maps, (place + flow).permute(0, 2, 3, 1) * scale, padding_mode="border", align_corners=False
    )


def motion_equations(a: Tensor, b: Tensor, flow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lucas and Kanade's equations (1981) for the motion from feature maps a to b [N, P, H, W] beyond `flow`
    [N, 2, H, W]: at each inner cell, matrix @ further motion = vector. Returns the matrix [N, 2, 2, h, w], the vector
    [N, 2, h, w] and the squared change [N, h, w] that `flow` does not explain."""
    before, after = warp(a, -flow / 2), warp(b, flow / 2)
    change, middle = inner(after - before), (before + after) / 2  # [N, P, h, w], [N, P, H, W]
    slopes = inner(torch.stack([slope(middle, 3), slope(middle, 2)], dim=1))  # [N, 2, P, h, w]
    matrix = torch.einsum("niphw,njphw->nijhw", slopes, slopes)
    return matrix, -torch.einsum("niphw,nphw->nihw", slopes, change), change.square().sum(dim=1)


def cell_motion(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The motion [N, 2, h, w] of each inner cell from feature maps a to b [N, P, H, W], right and down in cells; the
    squared change [N, h, w] that it does not explain; and the matrix [N, 2, 2, h, w] of the equations. Each cell is
    fitted by least squares over its channels. More cells in an equation would blur motion more than steady it.

    Each of four passes warps the maps by the motion so far and adds at most `FARTHEST`: what seems to move more has
    changed its look, not its place. The first starts at zero, not at the camera's motion, which a cell may not share.
    """
    (height, width), floor = a.shape[-2:], STILL**2 * a.shape[1]
    flow = torch.zeros_like(inner(a[:, :2]))
    border = (width - flow.shape[3]) // 2, (height - flow.shape[2]) // 2
    for _ in range(4):
        full = nn.functional.pad(flow, (border[0], border[0], border[1], border[1]), mode="replicate")
        matrix, vector, left = motion_equations(a, b, full)
        texture = matrix.diagonal(dim1=1, dim2=2).sum(dim=-1)  # [N, h, w]
        damping = (0.02 * texture.mean(dim=(1, 2)) + floor)[:, None, None, None].expand(-1, 1, 1, 2).diag_embed()
        step = torch.linalg.solve(matrix.permute(0, 3, 4, 1, 2) + damping, vector.permute(0, 2, 3, 1))  # [N, h, w, 2]
        step = (step / (step.norm(dim=-1, keepdim=True) / FARTHEST).clamp_min(1)).permute(0, 3, 1, 2)
        flow = flow + step
    saved = step * (2 * vector - torch.einsum("nijhw,njhw->nihw", matrix, step))
    return flow, (left - saved.sum(dim=1)).clamp_min(0), matrix


def apparent_speed(a: Tensor, b: Tensor) -> Tensor:
    """The speed [N, h, w] of inner cells, in cells per step, from the size of their change between feature maps a and b
    [N, P, H, W]: the speed at which such maps would change as much if only shifted (Taylor's frozen field, 1938).

    The squared difference of two cells is modelled as factor * distance^power; distances 1 and 2 give factor and power.
    The speed has no direction, but where nothing moves it is far less noisy than the flow.
    """
    near, far = a.new_zeros(2, len(a), *a.shape[2:])
    for x, dim in itertools.product((a, b), (2, 3)):
        if x.shape[dim] > 1:
            step = x.diff(dim=dim).square().sum(dim=1)
            first, last = step.narrow(dim - 1, 0, 1), step.narrow(dim - 1, -1, 1)
            near = near + (torch.cat([first, step], dim=dim - 1) + torch.cat([step, last], dim=dim - 1)) / 8
            far = far + slope(x, dim).square().sum(dim=1)
    floor = STILL**2 * a.shape[1]
    near, far, change = inner(near), inner(far), inner((b - a).square().sum(dim=1))
    power = ((far.mean(dim=(1, 2)) + floor) / (near.mean(dim=(1, 2)) + floor)).log2().clamp(1, 2)[:, None, None]
    near, change = (nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False) for x in (near, change))
    return ((change + floor) / (near + 0.1 * near.mean(dim=(1, 2), keepdim=True) + floor)) ** (1 / power)


def camera_fits(flow: Tensor, matrix: Tensor, left: Tensor, speed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Two fits of the background's motion, [N, 10], for `camera_motion`: the robust fit (4), the plain one (4), the
    evidence that the background moves (1), and that objects move by themselves (1). A fit is right and down in cells,
    turn in radians, zoom as a logarithm. From `cell_motion`: `flow` [N, 2, h, w], `matrix`, `left` (unexplained
    change); from `apparent_speed`: `speed` [N, h, w].

    The robust fit is reweighted least squares that starts from the cells that changed least, not from the motion of
    all: a moving object also changes the cells around it whose receptive fields contain it. A cell counts less the more
    it changed beyond what the camera's motion predicts, the more its motion differs from the camera's (Geman and
    McClure, 1985), and the nearer it is to the centre, where objects are. Backbones pad their input with values that
    never move: this reduces the measured motion towards a border, but not along it, hence the `taper`. Objects move if
    the fits differ by more than noise allows (Hausman, 1978) and cells differ from the robust one. All constants were
    chosen on stills under a known camera and on real clips, with features of an EfficientNet.
    """
    flows = inner(camera_flows(*grid, flow))  # [4, 2, h, w]
    place = flows[3] / torch.tensor([grid[1] / 2, grid[0] / 2], device=flow.device)[:, None, None]  # -1 to 1
    taper = (place * torch.pi / 2).cos()  # [2, h, w]
    borders = 1 + 12 * place.abs().amax(dim=0).square()
    noise = (left + 0.1 * left.mean(dim=(1, 2), keepdim=True) + STILL**2).detach()
    texture = matrix.detach().diagonal(dim1=1, dim2=2).sum(dim=-1)
    # The share of the slopes that is no noise: noise would reduce the plain fit's motion (errors in variables).
    clean = texture / (texture + left.detach() / 4 + STILL**2)
    matrix = taper[:, None] * matrix * taper / noise[:, None, None]

    def fit(weights: Tensor, share: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """The motion [N, 4], and the normal matrix [N, 4, 4]. `share`: of the slopes, see `clean`."""
        normal = torch.einsum("nhw,kihw,nijhw,ljhw->nkl", weights * share, flows, matrix, flows)
        right_side = torch.einsum("nhw,kihw,nijhw,njhw->nk", weights, flows, matrix, flow)
        damping = 3e-3 * normal.diagonal(dim1=1, dim2=2) + 0.01
        return torch.linalg.solve(normal + damping.diag_embed(), right_side), normal

    fifth = speed.flatten(1).kthvalue(speed[0].numel() // 5 + 1, dim=1).values  # torch 2.10 cannot compile `quantile`
    slowest = fifth[:, None, None] + 0.003
    weights = borders * (slowest / speed.maximum(slowest)) ** 4
    for _ in range(2):
        moved = torch.einsum("nk,kihw->nihw", fit(weights)[0].detach(), flows)
        expected = moved.norm(dim=1)
        beside = (taper * (flow.detach() - moved)).square().sum(dim=1)
        beside = nn.functional.avg_pool2d(beside, 3, 1, 1, count_include_pad=False) / (0.006 + 0.18 * expected)
        expected = expected.maximum(slowest)
        weights = borders * (expected / speed.maximum(expected)) ** 3 / (1 + beside).square()
    (robust, normal), (plain, _) = fit(weights), fit(borders.sqrt().expand_as(clean), clean)
    moves, differs = (torch.einsum("nk,nkl,nl->n", x, normal, x).clamp_min(0) for x in (robust, robust - plain))
    return torch.cat([robust, plain, torch.stack([moves, differs * beside.mean(dim=(1, 2))], dim=1)], dim=1)


def smooth_over_time(x: Tensor, radius: int) -> Tensor:
    """Smooth x [B, T, C] over time, with binomial weights over `radius` steps on each side; the ends are repeated."""
    padded = nn.functional.pad(x.mT, (radius, radius), mode="replicate")
    weights = [math.comb(2 * radius, k) / 4**radius for k in range(2 * radius + 1)]
    return sum(weight * padded[..., k : k + x.shape[1]] for k, weight in enumerate(weights)).mT


def camera_motion(fits: Tensor) -> Tensor:
    """The background's motion [B, T, 4], smoothed over time, from `camera_fits` [B, T, 10]: the robust fit while
    objects move by themselves, else the plain one, which is less noisy. Motion that noise may cause is shrunk (after
    James and Stein, 1961)."""
    robust, plain, evidence = smooth_over_time(fits[..., :9], CAMERA_OVER).split([4, 4, 1], dim=2)
    objects = smooth_over_time(fits[..., 9:], OBJECTS_OVER)
    camera = plain.lerp(robust, (4 * (objects.detach() / 0.8).log()).sigmoid())
    return camera - (camera * (-3 * (evidence / 0.45).log()).sigmoid()).detach()  # detached: else no gradient at rest


def motion_channels(maps: Tensor) -> Tensor:
    """How the picture moves, from feature maps [B, T, H, W, P] whose channels have a root mean square near 1:
    [B, T, M], the channels of `FRAME_MOTION`, in float32. Differentiable; 0 at t = 0.

    Pairs of time steps are compared in batches of about `TOKENS` tokens, so that a long clip takes bounded memory.
    """
    batch, length, height, width, _ = maps.shape
    if length == 1:
        return maps.new_zeros(batch, 1, len(FRAME_MOTION), dtype=torch.float32)
    at_once = max(16, TOKENS // (height * width))
    pairs = zip(*(x.flatten(0, 1).split(at_once) for x in (maps[:, :-1], maps[:, 1:])), strict=True)
    with torch.autocast(maps.device.type, enabled=False):
        found = torch.cat([compare_maps(a, b) for a, b in pairs]).unflatten(0, (batch, length - 1))
        fits, length_of_change, apparent, fit, picture, objects = found.split([10, 1, 1, 1, 2, 1], dim=2)
        camera, picture = camera_motion(fits), smooth_over_time(picture, CELLS_OVER)
        speed = camera[..., :2].square().sum(dim=2, keepdim=True)
        speed, apparent, objects = ((1 + square / REST**2).log() / 2 for square in (speed, apparent, objects))
        moving = torch.cat([camera, length_of_change, speed, apparent, fit, picture, objects], dim=2)
        return nn.functional.pad(moving, (0, 0, 1, 0))


def compare_maps(a: Tensor, b: Tensor) -> Tensor:
    """The motion from feature maps a to b [N, H, W, P], before smoothing, [N, 16]: `camera_fits` (10), the length of
    the change, the squared motion that would account for the whole change, the share of the change that the flow
    explains, the picture's motion (2), the cells' squared motion relative to the background's."""
    a, b = (x.float().permute(0, 3, 1, 2) for x in (a, b))  # [N, P, H, W]
    flow, left, matrix = cell_motion(a, b)
    fits = camera_fits(flow, matrix, left, apparent_speed(a.detach(), b.detach()), a.shape[2:])
    floor = STILL**2 * a.shape[1]
    trust = (1 / (left + left.mean(dim=(1, 2), keepdim=True) + floor)).detach()[:, None]
    picture = (flow * trust).mean(dim=(2, 3)) / trust.mean(dim=(2, 3))

    change = inner((b - a).square().sum(dim=1)).mean(dim=(1, 2))  # [N]
    fit = (change - left.mean(dim=(1, 2))).clamp_min(0) / (change + floor)
    texture = matrix.diagonal(dim1=1, dim2=2).sum(dim=-1).mean(dim=(1, 2))
    apparent = 2 * change / (texture + floor)  # squared cells
    camera_flow = torch.einsum("nk,kihw->nihw", fits[:, :4], inner(camera_flows(*a.shape[2:], a)))
    objects = (flow - camera_flow).square().sum(dim=1).mean(dim=(1, 2))
    length_of_change = (change / a.shape[1] + STILL**2).sqrt() - STILL
    scalars = [x[:, None] for x in (length_of_change, apparent, fit)]
    return torch.cat([fits, *scalars, picture, objects[:, None]], dim=1)


class MotionFeatureAutoencoder(nn.Module):
    """Compress features C -> latent_dim at every time step and position, and back. Takes the fields of `Config`.

    forward: x [B, T, N, C] or [B, T, H, W, C] -> dict of
    `latent` (the same layout, latent_dim channels), `reconstruction` (the shape of x),
    `motion_embedding` [B, T, latent_dim].

    Its two halves, `encoder` and `decoder`, can be used separately; they share the modules `code` and `network`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        config = Config(*args, **kwargs)
        self.config = asdict(config)
        self.trained_on = ""  # `provenance` of the training features
        self.frozen = False
        self.code, self.network = SpaceTimeCode(config), InvertibleNetwork(config)
        shared = self.code, self.network
        # Not as submodules, so that the state dict names each weight once.
        self.__dict__ |= {"encoder": MotionFeatureEncoder(*shared), "decoder": MotionFeatureDecoder(*shared)}
        # Of each latent channel over the training clips: for `decode` with noise, and for models trained on latents.
        self.register_buffer("latent_mean", torch.zeros(config.latent_dim))
        self.register_buffer("latent_var", torch.ones(config.latent_dim))

    @property
    def compression_ratio(self) -> float:
        """latent_dim / input_dim: 0.25 at the defaults."""
        return self.config["latent_dim"] / self.config["input_dim"]

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> MotionFeatureAutoencoder:
        """The model that train.py wrote to `path`, on the CPU, its parameters frozen; it stays in eval mode.

        Raises `UserError` when the file is absent, unreadable or does not fit, with the reason.
        """
        if Path(path).is_dir():
            raise UserError(f"{path} is a folder; give the motion_ae_best.pt in it")
        checkpoint = load_checked(Path(path))
        if not isinstance(checkpoint, dict) or not all(
            isinstance(checkpoint.get(k), dict) for k in ("config", "model")
        ):
            raise UserError(f"{path} is not a checkpoint of train.py; give its motion_ae_best.pt")
        wrappers = re.compile(r"^(module\.|_orig_mod\.)+")  # of DistributedDataParallel and torch.compile
        weights = {wrappers.sub("", str(name)): weight for name, weight in checkpoint["model"].items()}
        try:
            model = cls(**checkpoint["config"])
            model.load_state_dict(weights)
            model.trained_on = str(checkpoint.get("trained_on", ""))
        except (UserError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} does not fit this version's model, train anew: {reason[:400]}") from None
        model.frozen, model.network.at_rest = True, model.network.changes_nothing()
        return model.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> MotionFeatureAutoencoder:
        """As for any module, but a model from a checkpoint stays in eval mode: a trainer turns on no dropout in it."""
        return super().train(mode and not self.frozen)

    def identity(self) -> dict[str, Any]:
        """What latents and embeddings depend on besides the feature: outputs with another identity are made again."""
        return {"weights": weights_hash(self.state_dict()), "embedding_version": EMBEDDING_VERSION, **self.config}

    def check_provenance(self, made_by: str) -> None:
        """Raise `UserError` for features whose `provenance` is not the training features', if both are known."""
        if made_by and self.trained_on and made_by != self.trained_on:
            raise UserError(
                f"the checkpoint was trained on features of {self.trained_on}, not of {made_by}; give the one that was "
                "trained on these"
            )

    def encode(self, x: Tensor) -> Tensor:
        """Features x [B, T, N, C] or [B, T, H, W, C] -> latent, differentiable in x: as `MotionFeatureEncoder` does."""
        return self.encoder(x)

    def decode(self, latent: Tensor, noise: float = 0.0) -> Tensor:
        """latent -> reconstruction of x, as `MotionFeatureDecoder` does. `noise`: standard deviation of noise on the
        latent, such as a generator's error, relative to each channel's over the training clips; 0: none."""
        return self.decoder(latent, noise**2 * self.latent_var if noise else None)

    def embed(self, latent: Tensor) -> Tensor:
        """latent [B, T, N, D] or [B, T, H, W, D] -> motion embedding [B, T, D] in float32: content and motion.

        `describe_motion_embedding` says what the channels are. The motion channels are 0 for [B, T, N, D], since it is
        unknown which cells are neighbours.
        """
        code, dim, motion_dim = self.code, latent.shape[-1], len(motion_names(latent.shape[-1]))
        with torch.autocast(latent.device.type, enabled=False):
            latent = code.by_block(lambda block, _: self.network.inverse(block), latent, dim)
            mean = code.mean_at(latent.shape)
            shared = code.centre(mean).to(latent.device)  # by all clips: the mean's part in the latent
            content = CONTENT * (latent.float() - shared).flatten(2, -2).mean(dim=2)[..., : dim - motion_dim]
            if latent.ndim == 4:
                return nn.functional.pad(content, (0, motion_dim))
            # Motion shows best in components, if not too few. Those beyond D, known from the extras, show zoom.
            count = min(max(44, dim * 3 // 2), code.input_dim)
            spread = code.spread()[:count]

            def maps(block: Tensor, place: Place) -> Tensor:
                return code.components(block - code.centre(mean[place]), count) / spread

            motion = motion_channels(code.by_block(maps, latent, count))
            return torch.cat([content, motion[..., :motion_dim]], dim=2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        latent = self.encode(x)
        return {"latent": latent, "reconstruction": self.decode(latent), "motion_embedding": self.embed(latent)}


def resample_latent(latent: Tensor, grid: tuple[int, int]) -> Tensor:
    """latent [B, T, H, W, D] -> [B, T, *grid, D], for a trainer with tokens on another grid: bilinear, antialiased.

    The token relations stay as close to the features' (resized in the same way) as on the latent's own grid; decoding,
    resizing and encoding again moves them further away. The result cannot be decoded: decode first, then resize the
    features. Raises `UserError` for a latent without a grid.
    """
    if latent.ndim != 5:
        raise UserError(f"a latent of shape {list(latent.shape)} has no grid; give [B, T, H, W, D]")
    maps = latent.flatten(0, 1).movedim(-1, 1)  # [B * T, D, H, W]
    maps = nn.functional.interpolate(maps, grid, mode="bilinear", antialias=True)
    return maps.movedim(1, -1).unflatten(0, latent.shape[:2])


# ---------------------------------------------------------------------------------------------------------------------
# Feature files and checkpoints: what one script writes and the next one reads
# ---------------------------------------------------------------------------------------------------------------------


def find_files(folder: Path, suffixes: tuple[str, ...], recursive: bool = True) -> list[Path]:
    """Every file in `folder`, and below if `recursive`, with one of `suffixes`, sorted; hidden files and folders
    (half-written files among them), pipes and devices are left out.

    Linked folders are searched as well, unless their target is searched anyway. A broken link is listed like a file, so
    that reading it raises an error that names it. Raises `UserError` for a folder that cannot be listed.
    """
    top, found = folder.resolve(), []

    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"{error.filename} cannot be searched ({error.strerror})")

    def leads_elsewhere(link: Path) -> bool:
        target = link.resolve()
        if target.is_relative_to(top):
            return any(part.startswith(".") for part in target.relative_to(top).parts)
        return target not in map(Path.resolve, link.parents)

    for here, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        visible = [Path(here, name) for name in names if not name.startswith(".")]
        found += [path for path in visible if path.suffix.lower() in suffixes and (path.is_file() or not path.exists())]
        below = [Path(here, name) for name in subfolders if recursive and not name.startswith(".")]
        subfolders[:] = [path.name for path in below if not path.is_symlink() or leads_elsewhere(path)]
    return sorted(found)


def check_names(paths: list[Path]) -> list[Path]:
    """Return `paths`. Raises `UserError` if two differ only in their suffix: their outputs would have the same name."""
    by_name: dict[Path, Path] = {}
    for path in paths:
        if (other := by_name.setdefault(path.with_suffix(""), path)) != path:
            raise UserError(f"{other} and {path} differ in their suffix alone; rename or remove one")
    return paths


def find_features(folder: Path) -> list[Path]:
    """Every feature file below `folder`. Raises `UserError` when `folder` is not a folder or holds no feature file, and
    what `check_names` raises."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder that holds the features")
    paths = find_files(folder, FEATURE_SUFFIXES)
    if not paths:
        raise UserError(f"{folder} holds no {', '.join(FEATURE_SUFFIXES)} file; run vfm_feature.py first")
    return check_names(paths)


def check_file(path: Path) -> bytes:
    """The first bytes of a file. Raises `UserError` if it is not a regular file (reading a pipe would wait), a broken
    link, or only the pointer that Git LFS or git-annex leaves in place of a file that was not fetched."""
    if path.is_symlink() and not path.exists():
        told = f"{path} is a link to {os.readlink(path)}, which is not there"
        raise UserError(f"{told}; run `git annex get` in its repository, or mend the link")
    if not path.is_file():
        raise UserError(f"{path} is no file" if path.exists() else f"{path} does not exist")
    with open(path, "rb") as file:
        start = file.read(64)
    for mark, command in POINTERS.items():
        if start.startswith(mark):
            raise UserError(f"{path} is a pointer, not the file itself; run `{command}` in its repository")
    return start


def read_torch(path: Path, mmap: bool, check: bool) -> Any:
    """Load a file with `torch.load`. With `check`, also verify the checksums of its zip archive, which torch.load
    ignores: raises `ValueError` that names the first entry whose bytes are not as written. The check takes 0.07 s for a
    checkpoint of 60 MB, loading it 0.09 s."""
    if check and zipfile.is_zipfile(path):  # files of torch < 1.6 are no zip archives
        with zipfile.ZipFile(path) as archive:
            has_crc = any(entry.CRC for entry in archive.infolist())  # torch can be told to write no checksums
            if has_crc and (entry := archive.testzip()):
                raise ValueError(f"{entry.partition('/')[2]} in it is not as it was written")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception:  # files of torch < 1.6 or with names not in UTF-8 cannot be mapped; other files fail again
        return torch.load(path, map_location="cpu", weights_only=True)


def load_checked(path: Path, mmap: bool = False, check: bool = True) -> Any:
    """What a file holds, on the CPU: for a .npy a tensor; for a .safetensors a dict of tensors and metadata, as
    `save_atomically` writes it; for any other what `torch.load` returns. Never runs code from the file.

    `mmap` leaves tensors on disk (those of a .safetensors always stay there); `check` reads the file once to compare
    its checksums, which only torch.save writes. Raises `UserError` when the file is absent, damaged, larger than
    memory, or holds more than tensors and plain values.
    """
    start, suffix = check_file(path), path.suffix.lower()
    try:
        writer, is_its = {
            ".npy": ("np.save", start.startswith(b"\x93NUMPY")),
            ".safetensors": ("safetensors", start[8:9] == b"{"),
        }.get(suffix, ("torch.save", start.startswith((b"PK", b"\x80"))))  # zip archive, or pickle (torch < 1.6)
        if not is_its:
            raise ValueError(f"no file of {writer} begins with {start[:32].decode('latin-1')!r}")
        if suffix == ".npy":
            return torch.from_numpy(np.load(path, mmap_mode="c" if mmap else None, allow_pickle=False))
        if suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                others = json.loads(metadata.pop(OTHER_VALUES, "{}"))
                return {name: file.get_tensor(name) for name in file.keys()} | others | metadata  # noqa: SIM118
        return read_torch(path, mmap, check)
    except Exception as error:  # damaged files raise almost anything
        cause = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        if is_out_of_memory(error):
            raise UserError(f"{path} does not fit into memory ({cause})") from None
        if re.search("weights_only|allow_pickle|Python objects", str(error)):
            raise UserError(f"{path} holds objects that only unsafe loading could read; save plain tensors") from None
        raise UserError(f"{path} is damaged or of another format ({cause}); make or download it again") from None


def is_plain(value: Any) -> bool:
    """Whether an entry of a feature file is a string, a number, or a sequence of these."""
    if isinstance(value, Tensor):
        return value.ndim <= 1 and value.dtype in (torch.int32, torch.int64)
    items = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(item, str | int | float) for item in items)


def load_feature(
    path: Path, input_dim: int | None = None, mmap: bool = False, check: bool = True
) -> tuple[Tensor, dict[str, Any]]:
    """Read a feature file: the feature, and a dict of the other entries that are strings, numbers or sequences of
    these, such as `caption`, `video` and `model`.

    The file holds a tensor, an array (.npy), or a dict (.pt, .safetensors) with the feature under `feature`, else
    `features`, else its first key. If it also has `grid` ([H, W]), a feature [T, H * W, C] becomes [T, H, W, C].

    Returns the feature [T, N, C] or [T, H, W, C] in its stored dtype. With `mmap` its numbers stay on disk. Raises
    `UserError` that names the file if it is unreadable, of the wrong rank, of `C != input_dim`, or not floating point
    of at least 16 bits. `check` reads all numbers once, a few time steps at a time, and also refuses wrong checksums,
    nothing but zeros, NaN, infinity, and numbers that overflow float32 when they are squared and summed.
    """
    if path.suffix.lower() not in FEATURE_SUFFIXES:
        raise UserError(f"{path} is not a {', '.join(FEATURE_SUFFIXES)} file")
    data = load_checked(path, mmap, check)
    entries = data if isinstance(data, dict) else {"feature": data}
    key = next((key for key in ("feature", "features") if key in entries), next(iter(entries), None))
    is_latent = key not in ("feature", "features") and {"latent", "motion_embedding"} <= entries.keys()
    if is_latent or entries.keys() == {"mean", "var"}:
        raise UserError(f"{path}: latents, not features; give the folder of features")
    feature, grid = entries.get(key), entries.get("grid")
    names = [name for name in entries if isinstance(name, str) and name not in (key, "grid")]
    metadata = {name: entries[name] for name in names if is_plain(entries[name])}
    if not isinstance(feature, Tensor) or feature.layout != torch.strided or feature.is_meta or feature.is_quantized:
        raise UserError(f"{path} holds no feature tensor; it holds {type(feature).__name__}")
    shape = list(feature.shape)
    # A model's output saved with its batch axis. vfm_feature.py, which records `model`, writes no batch axis.
    is_batch = len(shape) == 4 and shape[0] == 1 and "model" not in metadata
    if len(shape) not in (3, 4) or is_batch or feature.numel() == 0:
        raise UserError(
            f"{path}: shape {shape}, but a feature is [T, N, C] or [T, H, W, C] of one clip, not empty; save [0] of a "
            "batch, and a clip of one time step as [1, H * W, C]"
        )
    if not feature.is_floating_point() or feature.element_size() == 1:  # few functions support float8
        raise UserError(f"{path}: dtype {feature.dtype}, but a feature is floating point, of 16 bits or more")
    if input_dim not in (None, shape[-1]):
        raise UserError(
            f"{path}: C is {shape[-1]}, but --input_dim is {input_dim}; permute the axes if C is not the last, or give "
            f"--input_dim {shape[-1]}"
        )
    if check:
        largest = torch.stack([part.abs().amax() for part in feature.split(8)]).amax().item()
        if not 0 < largest < LARGEST:  # NaN fails this too
            raise UserError(
                f"{path}: its largest number is {largest:.1g}; a feature's are finite, not all 0, and their squares "
                "fit into float32: make it again, or remove it"
            )
    grid = grid.tolist() if isinstance(grid, Tensor) else grid
    is_size = isinstance(grid, list | tuple) and all(isinstance(size, int) and size > 0 for size in grid)
    if is_size and len(grid) == 2 and len(shape) == 3 and math.prod(grid) == shape[1]:
        feature = feature.unflatten(1, tuple(grid))
    return feature.detach(), metadata


def group_by_reason(failures: dict[str, str]) -> list[str]:
    """Failures (file -> message) -> one line for each reason: it names one file and says how many more there are."""
    files: dict[str, list[str]] = {}
    for file, message in failures.items():
        files.setdefault(message.removeprefix(file), []).append(file)
    return [f"{one}{f' and {len(more)} more' if more else ''}{reason}" for reason, (one, *more) in files.items()]


def provenance(metadata: dict[str, Any]) -> str:
    """What a feature comes from, as far as its file says: the VFM, its weights and layers, and whether it is a mean
    over the grid; "" if the file does not say."""
    if not {"model", "weights"} <= metadata.keys():
        return ""
    layers = f", layers {metadata['layers']}" if "layers" in metadata else ""
    return f"{metadata['model']} (weights {metadata['weights']}{layers}{', pooled' * ('pool' in metadata)})"


def weights_hash(weights: dict[str, Tensor]) -> str:
    """A hash of weights by name and value: the same whichever file they were loaded from."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"sha256:{digest.hexdigest()[:16]}"


def find_latents(folder: Path) -> list[Path]:
    """Every output of encode.py or vfm_feature.py below a folder, sorted, without the statistics (`STATS_NAME`)."""
    return [path for path in find_files(folder, (".pt", ".safetensors")) if path.name != STATS_NAME]


class LatentDataset(Dataset):
    """The latents (.pt, .safetensors) that encode.py or vfm_feature.py --motion_checkpoint wrote below a folder, for a
    DataLoader.

    `dataset[0]`, or by stem `dataset["0000"]`, is a dict of `stem` (the file's path in the folder without its suffix;
    `dataset.stems` lists all), `latent` [T, N, D] or [T, H, W, D], `motion_embedding` [T, D] and `caption` ("" if the
    file has none); `dataset.load("0000")` returns all that the file holds. Without `normalise`, only what is
    used is read from disk: `dataset["0000"]["latent"][:8]` reads eight steps.

    With `normalise`, each latent channel is scaled by the folder's stats.pt to mean 0 and variance 1 over the training
    clips of the model, as generators need it. To decode, give the model `latent * dataset.std + dataset.mean`.

    Raises `UserError` for a folder without latents, for a stats.pt that is absent or of other latents, and for a file
    that is not a latent.
    """

    def __init__(self, folder: str | Path, normalise: bool = False) -> None:
        folder = Path(folder)
        paths = check_names(find_latents(folder)) if folder.is_dir() else []
        self.paths = {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}
        if not self.paths:
            raise UserError(
                f"{folder} holds no latents; make them with encode.py or vfm_feature.py --motion_checkpoint"
            )
        self.stems = list(self.paths)
        first = self.load(self.stems[0])  # a folder of features is refused here
        self.normalise = normalise
        if normalise:
            stats = load_checked(folder / STATS_NAME)
            shapes = [getattr(x, "shape", None) for x in stats.values()] if isinstance(stats, dict) else []
            if shapes != [first["latent"].shape[-1:]] * 2:
                raise UserError(f"{folder / STATS_NAME} is not of these latents; make them again with --overwrite")
            self.mean, self.std = stats["mean"], stats["var"].clamp_min(1e-12).sqrt()

    def __len__(self) -> int:
        return len(self.stems)

    def load(self, stem: str) -> dict[str, Any]:
        """All that the file of a clip holds; its tensors stay on disk."""
        if stem not in self.paths:
            raise UserError(f"no latent is named {stem}; the first of {len(self.stems)} is {self.stems[0]}")
        saved = load_checked(self.paths[stem], mmap=True, check=False)
        if not isinstance(saved, dict) or not {"latent", "motion_embedding"} <= saved.keys():
            raise UserError(f"{self.paths[stem]} holds no latent; give a folder of encode.py's outputs alone")
        return saved

    def __getitem__(self, which: int | str) -> dict[str, Any]:
        stem = which if isinstance(which, str) else self.stems[which]
        saved = self.load(stem)
        latent, embedding, caption = saved["latent"], saved["motion_embedding"], str(saved.get("caption", ""))
        if self.normalise:
            latent = (latent - self.mean) / self.std
        return {"stem": stem, "latent": latent, "motion_embedding": embedding, "caption": caption}


# ---------------------------------------------------------------------------------------------------------------------
# What every script does: errors in one line, ranks, atomic file writes
# ---------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can fix. Its text, one line, says what is wrong and what to do about it."""


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: an int or float in [low, high]; for other values the error states these limits."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            wanted = f">= {low}" if math.isinf(high) else f"in [{low}, {high}]"
            raise argparse.ArgumentTypeError(f"{text} must be {wanted}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


MODEL_FLAGS = {  # fields of `Config`: their help, and their argparse type; None: a switch
    "input_dim": ("channels C of the features; if not given, the files or the checkpoint say it", number(int, 1)),
    "model_dim": ("width of the networks", number(int, 1)),
    "latent_dim": ("channels of the latent", number(int, 2)),
    "num_heads": ("attention heads", number(int, 1)),
    "num_layers": ("transformer layers, each in a network of its own", number(int, 1)),
    "dropout": ("dropout while training", number(float, 0, 1)),
    "use_token": ("the encoder sees [x, delta_x], not delta_x alone", None),
}


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose errors are one line, like all errors here, and whose help shows every default."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def add_model_flags(self, about: str) -> dict[str, Any]:
        """Add `MODEL_FLAGS` as a group; the parsed arguments lack flags that are not given. Returns the defaults."""
        group = self.add_argument_group("model", about)
        for name, (told, kind) in MODEL_FLAGS.items():
            options = {"type": kind} if kind else {"action": "store_true"}
            told += f" (default: {getattr(Config, name)})"
            group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=told, **options)
        return {name: getattr(Config, name) for name in MODEL_FLAGS}

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


class Ranks:
    """This process among those that torchrun started; without torchrun it is the only one, index 0 of 1.

    Rank 0 lists files, plans and reports. If a process ends early, the others end too: rank 0 with an error, the other
    ranks silently, since rank 0 may have ended first and said what is wrong.
    """

    index, count = 0, 1

    def join(self) -> None:
        """Open torchrun's process group, if `WORLD_SIZE` says that there is one; ranks wait up to a day for each other.

        Without `WORLD_SIZE`, other variables that another job may have left in the environment are ignored. Raises
        `UserError` for a group that cannot be opened.
        """
        world_size = os.environ.get("WORLD_SIZE") or "1"
        if world_size == "1":
            return
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(days=1))
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"WORLD_SIZE is {world_size}, but there is no process group ({error}); start with torchrun, or unset it"
            ) from None
        self.index, self.count = dist.get_rank(), dist.get_world_size()

    def open_device(self, name: str) -> torch.device:
        """The torch device of that name; `cuda` is this rank's GPU. Raises `UserError` where the machine lacks it."""
        try:
            own_gpu = f"cuda:{os.environ.get('LOCAL_RANK', self.index)}"
            device = torch.device(own_gpu if name == "cuda" and self.count > 1 else name)
            torch.ones(1, device=device).item()
        except (RuntimeError, AssertionError, NotImplementedError):
            raise UserError(f"--device {name} is not on this machine; use cpu, cuda or cuda:N") from None
        return device

    def broadcast(self, value: Any = None, source: int = 0) -> Any:
        """The `value` of the rank `source`, on every rank. The methods below are built on it."""
        values = [value]
        if self.count > 1:
            try:
                dist.broadcast_object_list(values, source)
            except RuntimeError:  # the connection is closed
                if self.index > 0:
                    os._exit(2)  # a normal exit can abort in the broken process group (torch 2.10)
                raise UserError("another process of this run has ended; what it said says why") from None
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, in the order of the ranks, on every rank."""
        return [self.broadcast(value, source) for source in range(self.count)]

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Call `make` on rank 0 only, and return its result on every rank. An error on rank 0 ends all ranks."""
        return self.broadcast(make() if self.index == 0 else None)

    @contextmanager
    def first_then_others(self) -> Iterator[None]:
        """Rank 0 runs the body of `with`, then the others do: they find what rank 0 has downloaded or made. An error on
        rank 0 ends all ranks."""
        if self.index > 0:
            self.broadcast()
        yield
        if self.index == 0:
            self.broadcast()


ranks = Ranks()


def say(message: str) -> None:
    """One line on standard error, above the progress bars; only rank 0 prints it."""
    if ranks.index == 0:
        tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)


def make_folder(folder: Path, flag: str) -> None:
    """Make the folder that `flag` names, and remove half-written files of killed runs from it: those not written to for
    a day. Raises `UserError` if the folder cannot be made or written into."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"{flag} {folder} is no folder that can be written into ({error.strerror}); give another"
        ) from None
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        with suppress(OSError):  # another run may have removed it
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()


def file_fingerprint(path: Path) -> str:
    """A hash that tells whether a file was replaced: of its size and of 64 KiB each at its start, middle and end.

    Unlike the modification time, the hash survives copying. Videos have an index of their frames at the start or end,
    .pt files have the checksums of all tensors at the end, so another video or feature of the same size has another
    hash. Raises what `check_file` raises, and `OSError`.
    """
    check_file(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        for start in (0, (size - FINGERPRINT_BYTES) // 2, size - FINGERPRINT_BYTES):
            file.seek(max(0, start))
            digest.update(file.read(FINGERPRINT_BYTES))
    return f"sha256:{digest.hexdigest()[:16]}"


def save_atomically(data: dict[str, Any] | str | bytes, path: Path) -> None:
    """Write text, bytes or a dict to `path` atomically: to a temporary file beside it, which is then renamed to `path`.
    A dict is written as .safetensors if that is the suffix, else by `torch.save`.

    In a .safetensors, strings become metadata, and so do all other values that are not tensors, as JSON under one key.
    The temporary name is random: host names and process numbers are not unique where containers share a folder. Raises
    `OSError` when the disk is full or the folder cannot be written; the half-written file is removed.
    """
    if isinstance(data, str):
        data = data.encode(errors="backslashreplace")  # file names may not be valid UTF-8
    elif isinstance(data, dict) and path.suffix == ".safetensors":
        tensors = {name: value.contiguous() for name, value in data.items() if isinstance(value, Tensor)}
        strings = {name: value for name, value in data.items() if isinstance(value, str)}
        others = {name: value for name, value in data.items() if name not in tensors | strings}
        data = to_safetensors(tensors, {**strings, OTHER_VALUES: json.dumps(others)})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            if isinstance(data, dict):
                torch.save(data, file)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the bytes do
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save raises it on a full disk; its context is the OSError
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    finally:
        temporary.unlink(missing_ok=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory is full: Python's MemoryError, or one of torch's errors for it."""
    told = "DefaultCPUAllocator" in str(error) or os.strerror(errno.ENOMEM) in str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and told)


def interrupt_again(lost: Any) -> None:
    """As `sys.unraisablehook`: Python drops what is raised within a callback, so Ctrl-C is raised anew after it."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
        sys.__unraisablehook__(lost)


def run_script(main: Callable[[], int]) -> None:
    """Run a script's `main` and exit with its status; a `UserError` becomes one line on standard error and status 2."""
    for number in (signal.SIGTERM, signal.SIGALRM):  # schedulers stop jobs with SIGTERM: treat it like Ctrl-C
        signal.signal(number, signal.default_int_handler)
    sys.unraisablehook = interrupt_again
    script = Path(sys.argv[0]).name
    warnings.formatwarning = lambda message, *_: f"{script}: warning: {message}\n"  # one line, like all messages
    for stream in (sys.stdout, sys.stderr):  # file names can hold what a terminal cannot show
        stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(status)
    except UserError as error:
        status, told = 2, f"error: {error}"
    except OSError as error:  # a full disk, a folder that vanished
        status, told = 1, f"error: {error}; finished files are whole"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        hint = "lower --batch_size, of vfm_feature.py also --dinov2_chunk or the input size, or use --device cpu"
        where = "the device's" if isinstance(error, torch.OutOfMemoryError) else "the machine's"
        status, told = 2, f"error: {where} memory is full; {hint}"
    except KeyboardInterrupt:
        flags = " with --resume" * (script == "train.py") + " without --overwrite" * ("--overwrite" in sys.argv)
        status, told = 130, f"stopped; finished files are whole, and the same command{flags} goes on"
    print(f"{script}: {told}", file=sys.stderr)
    sys.stdout.flush()
    leave = os._exit if dist.is_initialized() else sys.exit  # a normal exit can abort while other ranks run
    leave(status)
