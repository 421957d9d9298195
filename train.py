"""Train a motion autoencoder on a folder of features.

In: a folder of vfm_feature.py's .pt files (or .pth, .npy, .safetensors), each a clip [T, N, C] or [T, H, W, C].
Out, in --save_dir: motion_ae_epoch{N}.pt after each epoch and motion_ae_best.pt, for encode.py and
`MotionFeatureAutoencoder.from_checkpoint`; metrics.csv and loss_curves.png; motion_ae_last.pt, only for --resume.

    python train.py --feature_dir ../dataset/vfm_features_motion_top100/VideoMAEv2 --use_token
    python train.py --feature_dir features --input_dim 352 --latent_dim 88 --epochs 100 --use_token --resume
    torchrun --nproc_per_node=4 train.py --feature_dir features --use_token --precision bfloat16
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import itertools
import json
import math
import random
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from losses import (
    COMPARED,
    FeatureErrors,
    LossWeights,
    compare,
    compared_tokens,
    find_moving,
    motion_autoencoder_loss,
    relation_error,
    relation_errors,
    relation_loss,
)
from model import (
    ArgumentParser,
    Config,
    MotionFeatureAutoencoder,
    SpaceTimeCode,
    UserError,
    blocks,
    cut,
    file_fingerprint,
    find_features,
    group_by_reason,
    load_checked,
    load_feature,
    make_folder,
    number,
    principal_components,
    provenance,
    ranks,
    run_script,
    save_atomically,
    to_sequences,
)

FIT_TOKENS = 2**18  # the linear code is fitted on clips that together have about this many tokens
WHOLE_TOKENS = 2**13  # clips with at most this many tokens are used whole in that fit, of larger ones one block
OWN_WEIGHT = 0.8  # extra weight of components < D in the choice of coefficients, relative to the mean weight
GAIN_POWER = 0.4  # each channel is divided by its spread to this power before `mix` is learned
LOW_PASS = 2  # low-pass PCA: LOW_PASS * D components, of whose frequencies 1 / LOW_PASS are kept
RELATED_CLIPS, RELATED_TOKENS = 512, 256  # of `learn_relations`: clips; tokens in each of a clip's sets (all, moving)
RELATED_STEPS, STEPS_A_SET = 4800, 8  # steps of `learn_relations`: at most, and at most per set of tokens
RELATED_BATCH, RELATED_AT_ONCE = 12, 128  # batch of `learn_relations`: sets, and tokens of each set
RELATED_RATE = 7e-3  # peak learning rate of `learn_relations` for C = 352; smaller for larger C
STEP_TOKENS, STEP_BLOCKS = 2**16, 8  # the most tokens, and blocks in time, of a clip in a training step
STEP_PAIRED = 384  # tokens of a clip whose pairwise cosines a training step compares
SPREAD_POSITIONS = 8  # positions of a clip at which the latent's mean and variance are measured
EARNED = 0.01  # share of epoch 0's loss that the network must save: it costs three quarters of the encoding time
# Flags that do not change the result. --resume checks all others, the features, and the number of clips per step.
HARMLESS = ("feature_dir", "save_dir", "resume", "overwrite", "batch_size", "num_workers", "keep_epochs", "device")


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--feature_dir", type=Path, required=True, help="features, searched recursively")
    add("--save_dir", type=Path, default=Path("./checkpoints"), help="folder of the checkpoints")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        nargs="?",
        type=Path,
        const=True,
        metavar="PATH",
        help="go on with an interrupted run, from PATH or else motion_ae_last.pt in --save_dir, if there is one",
    )
    start.add_argument("--overwrite", action="store_true", help="throw away the checkpoints that --save_dir holds")
    defaults = parser.add_model_flags("What the autoencoder is made of.") | {"input_dim": None}  # taken from the files
    add("--epochs", type=number(int, 0), default=10, help="passes over the training files; 0: the linear code alone")
    add("--batch_size", type=number(int, 1), default=2, help="clips a step, of each rank")
    add("--lr", type=number(float, 0), default=2e-4, help="peak learning rate")
    add("--weight_decay", type=number(float, 0), default=1e-4, help="AdamW's weight decay")
    add("--num_workers", type=number(int, 0), default=4, help="threads that read ahead")
    add("--recon_weight", type=number(float, 0), default=1.0, help="weight of the reconstruction")
    add("--motion_weight", type=number(float, 0), default=1.0, help="weight of temporal differences")
    add("--smooth_weight", type=number(float, 0), default=0.05, help="weight of latent smoothness")
    add("--relation_weight", type=number(float, 0), default=1.0, help="weight of the cosines between tokens")
    add("--val_fraction", type=number(float, 0, 0.9), default=0.1, help="files held out, if there are at least 10")
    add("--keep_epochs", choices=["all", "best"], default="all", help="best: no motion_ae_epoch{N}.pt beside the best")
    add("--precision", choices=["float32", "bfloat16"], default="float32", help="bfloat16: faster steps, by autocast")
    add("--seed", type=number(int, 0), default=0, help="of weights, split and order")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1...")
    return parser.parse_args(argv, argparse.Namespace(**defaults))


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


class FeatureFile(NamedTuple):
    path: Path
    shape: tuple[int, ...]  # T, N or T, H, W
    channels: int
    content: str  # `file_fingerprint`
    origin: str
    video: str  # its source: the entry `video`, else the path in the folder without a window's number _NNN


def look_at_files(folder: Path, input_dim: int | None) -> list[FeatureFile]:
    """Every feature file below `folder`; only a small part of each is read. All must have `input_dim` channels or, if
    that is None, the same number. Raises `UserError` after naming all files that do not fit."""

    def look(path: Path) -> FeatureFile | str:
        try:
            feature, metadata = load_feature(path, input_dim, mmap=True, check=False)
            *shape, channels = feature.shape
            if input_dim is None and "model" not in metadata and channels < max(shape):
                raise UserError(
                    f"{path}: shape {[*shape, channels]} can have its channels on any axis; give --input_dim "
                    f"{channels} if it is the last"
                )
            video = str(metadata.get("video") or path.relative_to(folder).with_name(re.sub(r"_\d{3,}$", "", path.stem)))
            return FeatureFile(path, tuple(shape), channels, file_fingerprint(path), provenance(metadata), video)
        except (UserError, OSError) as error:
            return str(error)

    paths = find_features(folder)
    with ThreadPoolExecutor() as pool:
        files = list(tqdm(pool.map(look, paths), "files", len(paths), leave=False, disable=None, delay=1))
    failures = {str(path): reason for path, reason in zip(paths, files, strict=True) if isinstance(reason, str)}
    lines = group_by_reason(failures)
    if len(lines) == 1:
        raise UserError(lines[0])
    for line in lines:
        print(f"failed: {line}", file=sys.stderr)
    if failures:
        raise UserError(f"{len(failures)} of {len(paths)} feature files cannot be used; fix or remove them")
    by_channels = {file.channels: file.path for file in files}
    if len(by_channels) > 1:
        told = " and ".join(f"{path} has C = {channels}" for channels, path in by_channels.items())
        raise UserError(f"{told}; give a folder of features of one model")
    if all(file.shape[0] == 1 for file in files):
        raise UserError(
            f"all features have one time step, such as {files[0].path} of shape {[*files[0].shape, *by_channels]}, and "
            "so no motion; if that axis is a batch's, save [T, H, W, C] without it"
        )
    origins = sorted({file.origin for file in files if file.origin})
    if len(origins) > 1:
        raise UserError(f"{folder} holds features of {' and of '.join(origins)}; give a folder of one of them")
    return files


def hash_of_files(files: list[FeatureFile], folder: Path) -> str:
    """A hash of a feature set: its files' names, shapes and contents."""
    listing = [(file.path.relative_to(folder).as_posix(), file.shape, file.content) for file in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]


def split_files(
    files: list[FeatureFile], val_fraction: float, seed: int
) -> tuple[list[FeatureFile], list[FeatureFile]]:
    """Training and held-out files; the same for the same files, fraction and seed. Videos are held out whole, since the
    windows of a video are alike. At least half of the files are for training. Of fewer than 10, none is held out."""
    sizes = collections.Counter(file.video for file in files)
    wanted, count = round(len(files) * val_fraction) if len(files) >= 10 else 0, 0
    held_out = set()
    for video in random.Random(seed).sample(sorted(sizes), len(sizes)):
        if count < wanted and count + sizes[video] <= len(files) / 2:
            held_out.add(video)
            count += sizes[video]
    return [file for file in files if file.video not in held_out], [file for file in files if file.video in held_out]


Part = tuple[int, slice]  # of a clip: the clip's index, and the time steps


class Clips:
    """A set of clips that is read in parts: one or more blocks in time, with the whole grid."""

    def __init__(self, files: list[FeatureFile]) -> None:
        self.files, self.checked = files, set()
        sizes = [file.shape if len(file.shape) == 3 else (file.shape[0], 1, 1) for file in files]
        # Along each axis, the largest size of the blocks that clips are cut into.
        self.block = tuple(
            max(cut(length, most)[0].stop for length in lengths)
            for lengths, most in zip(zip(*sizes, strict=True), Config.block, strict=True)
        )

    def read(self, index: int, place: tuple[slice, ...] = (slice(None),)) -> Tensor:
        """A part of a clip [T, N, C] or [T, H, W, C], in the dtype of its file."""
        file = self.files[index]
        clip, _ = load_feature(file.path, file.channels, mmap=True, check=index not in self.checked)
        self.checked.add(index)
        return clip[place].clone()  # a copy, which does not keep the file mapped

    @property
    def shape(self) -> tuple[int, ...]:
        """`Config.clip_shape`. The mean of each position is measured only if all clips are small and of one shape."""
        shapes = {file.shape for file in self.files}
        if len({len(shape) for shape in shapes}) > 1:
            return ()
        shape = shapes.pop()
        return (1,) * len(shape) if shapes or math.prod(shape) > WHOLE_TOKENS else shape

    def parts(self, index: int) -> list[slice]:
        """The time steps of a clip, cut at block borders into parts that are small enough for a training step."""
        length, *grid = self.files[index].shape
        steps = cut(length, self.block[0])
        count = max(1, min(STEP_BLOCKS, STEP_TOKENS // (self.block[0] * math.prod(grid))))
        runs = [steps[first : first + count] for first in range(0, len(steps), count)]
        return [slice(run[0].start, run[-1].stop) for run in runs]

    def to_measure(self, seed: int, device: str) -> Iterator[Tensor]:
        """Of each clip one of its `parts`, a random one but the same each time: [1, T, ..., C] in float32."""
        for index in tqdm(range(len(self.files)), unit="clip", leave=False, disable=None):
            part = random.Random(f"{seed} {index}").choice(self.parts(index))
            yield self.read(index, (part,))[None].to(device).float()

    def shuffled(self, seed: int, device: str) -> Iterator[Tensor]:
        """Clips in random order, [T, ..., C] in float32; of each large clip only one random block."""
        chance = random.Random(f"{seed} fit")
        order = chance.sample(range(len(self.files)), len(self.files))
        for index in tqdm(order, "clips", leave=False, disable=None, delay=1):
            shape = self.files[index].shape
            is_small = math.prod(shape) <= WHOLE_TOKENS
            place = (slice(None),) if is_small else chance.choice(blocks(shape, self.block))[1:]
            yield self.read(index, place).to(device).float()

    def to_fit(self, seed: int, device: str) -> list[Tensor]:
        """The first `shuffled` clips that together have `FIT_TOKENS` tokens: the linear code is fitted on these."""
        sample, tokens = [], 0
        for clip in self.shuffled(seed, device):
            sample.append(clip)
            tokens += clip[..., 0].numel()
            if tokens >= FIT_TOKENS:
                break
        return sample

    def batches(self, batch_size: int, seed: int, epoch: int) -> list[list[Part]]:
        """This rank's share of the batches of an epoch. The batches hold all parts of all clips, in an order that
        depends on (seed, epoch); the parts in one batch have the same shape.

        Every rank gets the same number of parts of each batch: the shuffled list of all parts of a shape is padded with
        parts from its start, as torch's DistributedSampler does.
        """
        groups: dict[tuple[int, ...], list[Part]] = {}  # by the parts' shape
        for index, file in enumerate(self.files):
            for part in self.parts(index):
                groups.setdefault((part.stop - part.start, *file.shape[1:]), []).append((index, part))
        chance, batches, size = random.Random(f"{seed} {epoch}"), [], batch_size * ranks.count
        for group in groups.values():
            order = chance.sample(group, len(group))
            order += [order[i % len(order)] for i in range(-len(order) % ranks.count)]
            batches += [order[start : start + size] for start in range(0, len(order), size)]
        chance.shuffle(batches)
        return [batch[ranks.index :: ranks.count] for batch in batches]

    def read_batches(self, batches: list[list[Part]], num_workers: int, device: str) -> Iterator[Tensor]:
        """Batches [B, T, ..., C] in float32 on `device`. The workers that read ahead are threads: tensors are copied
        and converted without Python's lock, and processes would need shared memory, of which containers have little."""

        def stack(batch: list[Part]) -> Tensor:
            clips = torch.stack([self.read(index, (part,)) for index, part in batch])
            return clips.pin_memory() if torch.device(device).type == "cuda" else clips

        to_read, ahead = iter(batches), collections.deque()
        with ThreadPoolExecutor(max(1, num_workers)) as pool:
            try:
                for _ in tqdm(batches, unit="batch", leave=False, disable=True if ranks.index else None):
                    more = itertools.islice(to_read, 2 + num_workers - len(ahead))
                    ahead.extend(pool.submit(stack, batch) for batch in more)
                    clips = ahead.popleft().result()
                    yield clips.to(device, non_blocking=True).float()  # sent as stored (float16), computed in float32
            finally:
                pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# The linear code
# ---------------------------------------------------------------------------------------------------------------------


def weighted_moment(clips: list[Tensor], recon_weight: float, motion_weight: float) -> Tensor:
    """recon_weight * E[x x^T] + motion_weight * E[delta_x delta_x^T], [C, C], of centred clips [1, T, ..., C]."""
    total = clips[0].new_zeros(2, *[clips[0].shape[-1]] * 2, dtype=torch.float64)
    counts = [0, 0]
    for x in map(to_sequences, clips):
        for index, rows in enumerate((x.flatten(0, 1), x.diff(dim=1).flatten(0, 1))):  # [S * T, C], [S * (T - 1), C]
            total[index] += rows.mT @ rows
            counts[index] += len(rows)
    return recon_weight * total[0] / counts[0] + motion_weight * total[1] / max(counts[1], 1)


def position_means(clips: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """The mean token [C] of clips [T, ..., C], or, if all have one `shape`, of each position [*shape, C]; in float64.

    ViTs show a token's position in all clips. Per channel, what positions add to the mean token is shrunk towards 0 by
    its share of sampling noise. This is estimated as for a quarter of the clips, since clips of one source are alike.
    """
    token = sum(x.flatten(0, -2).mean(dim=0, dtype=torch.float64) for x in clips) / len(clips)
    if math.prod(shape) == 1 or len(clips) == 1:
        return token
    position = sum(x.double() for x in clips) / len(clips) - token
    chance = sum((x - token - position).square().flatten(0, -2).mean(dim=0) for x in clips) / len(clips) ** 2
    energy = position.square().flatten(0, -2).mean(dim=0).clamp_min(1e-30)
    return token + position * (1 - 4 * chance / energy).clamp_min(0.0)


def frequency_weight(code: SpaceTimeCode, recon_weight: float, motion_weight: float) -> Tensor:
    """How much an error of unit energy in a DCT coefficient adds to the loss, by its frequency over time, [l]. Motion
    errors arise within a block and as jumps between blocks, as if the errors of different blocks were independent.

    This overestimates the jumps a little, which protects reconstruction at large motion weights. If reconstruction is
    not coded, only the constant (frequency 0) is taken to jump, by as much as the slowest cosine changes.
    """
    frequency = torch.arange(code.size[0], device=code.mean.device) * torch.pi / code.size[0]
    changes, constant = 2 - 2 * frequency.cos(), frequency == 0
    if code.codes_still_part:
        jumps = (2 + 2 * frequency.cos()) / code.size[0] / (1 + constant)
    else:
        jumps = changes[:2].amax() * constant
    return (recon_weight + motion_weight * (changes + jumps)).double()


def choose_related(clips: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Sample tokens of clips (pairs of x [T, ..., C], and what components see of it, `seen` [T, ..., P]). Each clip
    gives two sets of K = `RELATED_TOKENS`: of all its tokens, and of those that move most. Returns `seen` [n, K, P] and
    x as unit vectors [n, K, C], in bfloat16 (float32's range): for 512 clips with C = 768, 0.4 GB each."""
    chance, sets = torch.Generator().manual_seed(0), []
    for x, seen in itertools.islice(clips, RELATED_CLIPS):
        for some in compared_tokens(x).values():
            order = torch.randperm(len(some), generator=chance)[torch.arange(RELATED_TOKENS) % len(some)]
            some = some[order.to(some.device)]
            directions = nn.functional.normalize(x.flatten(0, -2)[some], dim=-1)
            sets.append((seen.flatten(0, -2)[some].bfloat16(), directions.bfloat16()))
    seen, directions = map(torch.stack, zip(*sets, strict=True))
    return seen, directions


@torch.enable_grad()
def learn_relations(matrix: Tensor, seen: Tensor, directions: Tensor) -> Tensor:
    """Train the `matrix` [P, D] by AdamW so that tokens `seen` @ matrix have the cosines between their `directions`.

    No closed form does this: PCA's leading components keep the most energy, but the components beyond them also
    contribute to a token's length and to its cosines with other tokens.
    """
    matrix, chance = nn.Parameter(matrix.float().clone()), torch.Generator().manual_seed(0)
    rate = RELATED_RATE * (352 / len(matrix)) ** 0.5  # scales with C as the entries of unit vectors do
    optimizer = torch.optim.AdamW([matrix], lr=rate)
    steps = min(RELATED_STEPS, STEPS_A_SET * len(seen))
    for step in tqdm(range(steps), "learning cosines", leave=False, disable=None, delay=1):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, rate)
        some = torch.randint(len(seen), (RELATED_BATCH, 1), generator=chance).to(seen.device)
        tokens = torch.randint(seen.shape[1], (RELATED_BATCH, RELATED_AT_ONCE), generator=chance).to(seen.device)
        loss = relation_error(directions[some, tokens].float(), seen[some, tokens].float() @ matrix)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return matrix.detach()


def flattening_gain(spread: Tensor) -> Tensor:
    """The gain [D] of components with this `spread`; the smaller the spread, the larger the gain. Without it, cosines
    would weigh the first components too much, since the components beyond D are lost."""
    return (spread / spread.mean().clamp_min(1e-6)).clamp_min(1e-3) ** -GAIN_POWER


def turned_basis(
    code: SpaceTimeCode, basis: Tensor, moment: Tensor, clips: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """A new basis [C, C] and the matrix `mix` [D, D]. The first D components of `basis` are trained to keep the cosines
    of clips; the new basis is the principal components of `moment` in their span, then those in its complement. With
    `mix`, the new first D keep these cosines. clips: features [T, ..., C] and what components see of them."""
    (seen, directions), own = choose_related(clips), basis[:, : code.latent_dim].float()
    own = own * flattening_gain((seen[:, :16].float() @ own).flatten(0, 1).std(dim=0))
    own = learn_relations(own, seen, directions).double()
    whole = torch.linalg.qr(torch.cat([own, torch.eye(len(own), dtype=own.dtype, device=own.device)], dim=1)).Q
    spans = whole.split([code.latent_dim, code.input_dim - code.latent_dim], dim=1)
    basis = torch.cat([span @ principal_components(span.mT @ moment @ span) for span in spans], dim=1)
    # Rotating a latent changes no cosine, so `mix` is free up to a rotation: the symmetric one is nearest to diagonal.
    turn, stretch, _ = torch.linalg.svd(basis[:, : code.latent_dim].mT @ own)
    return basis, turn * stretch @ turn.mT


@torch.no_grad()
def fit_code(
    code: SpaceTimeCode,
    clips: list[Tensor],
    recon_weight: float = 1.0,
    motion_weight: float = 1.0,
    smooth_weight: float = 0.05,
    relation_weight: float = 0.0,
    related: Iterable[Tensor] | None = None,
) -> None:
    """Fit the linear code to `clips` [T, N, C] or [T, H, W, C] and write its tables. Clips may have any sizes; if the
    code's config names a `clip_shape`, all must have that shape.

    Basis: eigenvectors of recon_weight * cov(x) + motion_weight * cov(delta_x). With a `relation_weight`, the basis is
    turned and `mix` is learned to keep the cosines of the clips `related` (default: `clips`). The more clips
    `related` has, the more there is to learn from.

    Coefficients kept: those with the most energy, weighted by what an error at their frequency adds to the loss.
    Components < D get extra weight (`OWN_WEIGHT`), the same at all frequencies, since what is lost of a token's own
    channels changes its cosines equally at any frequency.
    """
    if not code.codes_still_part:  # decoding cannot restore the still part, so no coefficient is spent on it
        recon_weight, motion_weight = 0.0, 1.0
    mean = position_means(clips, code.mean.shape[:-1] if code.codes_still_part else (1,))
    centred = [x - (mean.to(x) if code.codes_still_part else x.mean(dim=0)) for x in clips]
    scale = (sum(x.square().mean().item() for x in centred) / len(clips)) ** 0.5 or 1.0
    normalised = [x / scale for x in centred]

    moment = weighted_moment([x[None] for x in normalised], recon_weight, motion_weight)
    basis = principal_components(moment)
    kept = sum((x @ basis[:, : code.latent_dim].to(x)).square().sum(dim=-1).mean() for x in normalised) / len(clips)
    # The mean is shortened by the same factor as the centred tokens if only their first D components are kept.
    share = (kept / code.input_dim).sqrt() * code.codes_still_part

    def to_relate() -> Iterator[tuple[Tensor, Tensor]]:
        for x in clips if related is None else related:  # one by one: there can be many
            own = x - (mean.to(x) if code.codes_still_part else x.mean(dim=0))
            yield (x if code.codes_still_part else own), (own + share * mean.to(x)) / scale

    learns = relation_weight and code.latent_dim < code.input_dim
    if learns:
        basis, mix = turned_basis(code, basis, moment, to_relate())
    basis = basis.to(code.basis)
    energy = sum(code.block_energy(x @ basis) for x in normalised) / len(clips)
    parts = energy.split([code.latent_dim, code.input_dim - code.latent_dim], dim=-1)
    # Among the first D components, and among the others, true energies fall with rank; other orders are sampling noise.
    energy = torch.cat([part.sort(dim=-1, descending=True).values for part in parts], dim=-1)
    energy[0] = energy[:2].amax(dim=0)  # without the still part: a block's mean over time still differs from the clip's
    weight = frequency_weight(code, recon_weight, motion_weight)
    spread = energy[..., : code.latent_dim].mean(dim=(0, 1, 2)).sqrt().clamp_min(1e-3)
    mix = mix if learns else flattening_gain(spread).diag()
    mix = mix / ((spread[:, None] * mix).square().sum() / len(mix)).sqrt()
    own = torch.arange(code.input_dim, device=weight.device) < code.latent_dim
    importance = weight[:, None] + OWN_WEIGHT * weight.mean() * own
    code.write_tables(
        energy,
        importance,
        mean=mean.expand(code.mean.shape),
        scale=torch.tensor(scale),
        basis=basis,
        mean_share=share,
        mix=mix,
        unmix=torch.linalg.inv(mix),
        # Whittaker's smoother, argmin_y |z - y|^2 + smoothing * |delta y|^2, divides each frequency by a number, which
        # decoding undoes. With a fifth of smooth_weight, the default changes the error of the cosines by only 1 %.
        smoothing=torch.tensor(smooth_weight / 5),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training and measuring
# ---------------------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a twentieth of the run, and cosine decay to 0."""
    return peak * (min(1.0, (step + 1) / (0.05 * steps + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps)))


class PrincipalComponents:
    """The baseline that the model has to beat: motion-weighted PCA of `clips` [T, ..., C] around the code's mean, with
    `count` = D components. Its latent keeps the mean's components, since they affect the cosines.

    With `count` > D components, each block is also low-pass filtered: of its DCT coefficients those of lowest frequency
    are kept, as many as the latent has numbers. That is fair to a code of blocks, but the choice is fixed, not learned.
    """

    def __init__(self, code: SpaceTimeCode, clips: list[Tensor], weights: LossWeights, count: int) -> None:
        self.code, self.count = code, count
        moment = weighted_moment([self.centre(x[None]) for x in clips], *weights[:2])
        self.basis = principal_components(moment)[:, :count].float()

    def centre(self, x: Tensor) -> Tensor:
        return x - (self.code.mean_at(x.shape) if self.code.codes_still_part else x.mean(dim=1, keepdim=True))

    def mean(self, shape: tuple[int, ...]) -> Tensor:
        return self.code.mean_at(shape) @ self.basis * self.code.codes_still_part

    def encode(self, x: Tensor) -> Tensor:
        latent = self.centre(x) @ self.basis
        if self.count > self.code.latent_dim:
            latent = self.code.in_frequencies(self.low_pass, latent)
        return latent + self.mean(x.shape)

    def low_pass(self, coefficients: Tensor) -> Tensor:
        axes = [torch.arange(size, device=coefficients.device) / size for size in coefficients.shape[1:4]]
        order = sum(axis.square() for axis in torch.meshgrid(*axes, indexing="ij")).flatten().argsort(stable=True)
        dropped = order[round(len(order) * self.code.latent_dim / self.count) :]
        return coefficients.flatten(1, 3).index_fill(1, dropped, 0.0).view_as(coefficients)

    def decode(self, latent: Tensor) -> Tensor:
        return (latent - self.mean(latent.shape)) @ self.basis.mT + self.code.mean_at(latent.shape)


@torch.no_grad()
def measure(
    model: MotionFeatureAutoencoder | PrincipalComponents, clips: Iterable[Tensor], weights: LossWeights
) -> dict[str, float]:
    """The mean loss over `clips` [1, T, ..., C] and its terms, in units of the features' variance, and the figures of
    `FeatureErrors`. If only motion is coded, relations are those of x minus its mean over time."""
    errors, losses = FeatureErrors(), []
    scale = model.code.scale
    for x in clips:
        latent = model.encode(x)
        reconstruction = model.decode(latent)
        loss, terms = motion_autoencoder_loss(x / scale, reconstruction / scale, latent, *weights[:3])
        related = x if model.code.codes_still_part else x - x.mean(dim=1, keepdim=True)
        terms |= relation_errors(related, latent)
        loss += weights[3] * (terms["relations"] + terms["relations_of_moving"]) / 2
        losses.append({"loss": loss.item()} | {f"{name}_loss": term.item() for name, term in terms.items()})
        errors.add(x, reconstruction)
    return {**pd.DataFrame(losses).mean().to_dict(), **errors.figures()}


def loss_weights(args: argparse.Namespace) -> LossWeights:
    return args.recon_weight, args.motion_weight, args.smooth_weight, args.relation_weight


def train_epoch(
    model: MotionFeatureAutoencoder,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Tensor],
    rates: list[float],
    args: argparse.Namespace,
) -> dict[str, float]:
    """Take one step for each batch [B, T, ..., C], with its learning rate. Returns the mean loss and its terms over all
    ranks. `network`: the model's, bare or in DistributedDataParallel. Raises `UserError` if the loss is not finite."""
    model.train()
    losses = []
    for x, rate in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.no_grad():
            z = model.encoder(x, linear=True).flatten(2, -2)
            x = (x if args.use_token else x - x.mean(dim=1, keepdim=True)).flatten(2, -2)  # [B, T, N, C]
            count = min(x.shape[2], max(2, STEP_PAIRED // x.shape[1]) // 2)
            fast, moving = find_moving(x, count)
        some, some_fast = (torch.randperm(size, device=x.device)[:count] for size in (x.shape[2], len(fast)))
        chosen = torch.cat([some, fast[some_fast]])
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.precision == "bfloat16"):
            latent = network(z[:, :, chosen])
        loss, terms = relation_loss(x[:, :, chosen], latent.float(), moving[:, :, chosen], *loss_weights(args)[2:])
        if not loss.isfinite():
            raise UserError(f"the loss is {loss.item()}; lower --lr")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
        optimizer.step()
        losses.append({"loss": loss.item()} | {f"{name}_loss": term.item() for name, term in terms.items()})
    model.eval()
    return pd.DataFrame(ranks.gather(pd.DataFrame(losses).mean().to_dict())).mean().to_dict()


def sample_latents(model: MotionFeatureAutoencoder, clips: list[Tensor]) -> list[Tensor]:
    """The linear code's latents [P, T, D] at some positions of each of `clips` [T, ..., C], for `measure_spread`."""
    sample = []
    for x in clips:
        z = to_sequences(model.encoder(x[None], linear=True))
        sample.append(z[torch.linspace(0, len(z) - 1, min(len(z), SPREAD_POSITIONS)).long()])
    return sample


@torch.no_grad()
def measure_spread(model: MotionFeatureAutoencoder, sample: list[Tensor]) -> None:
    """Store in the model the mean and variance of each latent channel over `sample_latents` of the training clips."""
    tokens = torch.cat([model.network(z).flatten(0, 1) for z in sample])
    model.latent_mean.copy_(tokens.mean(dim=0))
    model.latent_var.copy_(tokens.var(dim=0, correction=0))


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves in --save_dir
# ---------------------------------------------------------------------------------------------------------------------


def open_save_dir(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint to resume from, or None to train from the start.

    Raises `UserError` if checkpoints of another run would be lost, or if --resume would not continue the same run.
    """
    make_folder(args.save_dir, "--save_dir")
    there = sorted(args.save_dir.glob("motion_ae_*.pt"))
    last = args.save_dir / "motion_ae_last.pt"
    path = (last if last.exists() else None) if args.resume is True else args.resume
    elsewhere = path is not None and path.parent.resolve() != args.save_dir.resolve()
    if there and not args.overwrite and (path is None or elsewhere):
        raise UserError(
            f"--save_dir {args.save_dir} holds {there[0].name} of an earlier run; go on with it by --resume, give "
            "another --save_dir, or delete it with --overwrite"
        )
    if path is None:
        if args.resume:
            report(f"no checkpoint in {args.save_dir} yet: training from the start")
        return None
    checkpoint = load_checked(path)
    if not isinstance(checkpoint, dict) or not {"settings", "epoch", "history", "optimizer"} <= checkpoint.keys():
        raise UserError(f"--resume {path}: it holds no training state; give the motion_ae_last.pt of a run")
    begun_with = checkpoint["settings"]
    for name, ours in settings.items():
        if ours != begun_with.get(name):
            told = {"clips_per_step": "--batch_size times ranks", "features": "the content of --feature_dir"}
            raise UserError(
                f"{told.get(name, f'--{name}')} {ours} contradicts {path}, begun with {begun_with.get(name)}; resume "
                "with what it was begun with, or train anew in another --save_dir"
            )
    if elsewhere:  # copy, so that --save_dir alone is enough to resume
        best_path = path.with_name("motion_ae_best.pt")
        best = load_checked(best_path) if best_path.is_file() else None
        if best and best["epoch"] <= checkpoint["epoch"]:  # a later one is from an epoch that will be trained again
            save_atomically(best, args.save_dir / best_path.name)
        save_atomically(checkpoint, last)
    left = args.epochs - checkpoint["epoch"]
    report(
        f"going on after epoch {checkpoint['epoch']} of {args.epochs}, from {path}"
        if left
        else f"{path}: nothing left to do"
    )
    return checkpoint


def draw_curves(history: list[dict[str, float]], measured_on: str) -> bytes:
    """A PNG of the errors by epoch: of the files measured on, of PCA, and for relations also of training."""
    table = pd.DataFrame(history).set_index("epoch")
    figure = Figure(figsize=(12, 3), layout="constrained")
    for axes, column in zip(figure.subplots(1, len(COMPARED)), COMPARED.values(), strict=True):
        for group, told, style in (("train", "training, with dropout", "tab:green"), ("val", measured_on, "tab:blue")):
            if f"{group}_{column}" in table:
                axes.plot(table[f"{group}_{column}"], ".-", color=style, label=told)
        axes.plot(table[f"pca_{column}"], "--", color="gray", label=f"{measured_on}, PCA")
        top = 1.1 * axes.dataLim.ymax
        title = column.rpartition("_")[0].replace("_", " ")
        axes.set(title=title, xlabel="epoch", ylim=(0, top if math.isfinite(top) and top else None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=80)
    return picture.getvalue()


def best_row(history: list[dict[str, float]]) -> dict[str, float]:
    """The row with the lowest held-out loss, or epoch 0's, if the network lowers that loss by too little (`EARNED`)."""
    best = min(history, key=lambda row: row["val_loss"])
    return best if best["val_loss"] < (1 - EARNED) * history[0]["val_loss"] else history[0]


def write_outputs(last: dict[str, Any], measured_on: str, save_dir: Path, keep_epochs: str) -> None:
    """Write the files that are derived from motion_ae_last.pt, which must be on disk first: if a run is killed before
    all of them are written, they are written again when it is resumed."""
    history = last["history"]
    weights = {name: value for name, value in last.items() if name != "optimizer"}
    if keep_epochs == "all":
        save_atomically(weights, save_dir / f"motion_ae_epoch{last['epoch']}.pt")
    if best_row(history) is history[-1]:
        save_atomically(weights, save_dir / "motion_ae_best.pt")
    save_atomically(pd.DataFrame(history).to_csv(index=False, na_rep="nan"), save_dir / "metrics.csv")
    save_atomically(draw_curves(history, measured_on), save_dir / "loss_curves.png")


def remove_outputs(save_dir: Path) -> None:
    """Remove an earlier run's files; first motion_ae_last.pt, from which it could be resumed."""
    for pattern in ("motion_ae_last.pt", "motion_ae_epoch*.pt", "motion_ae_best.pt", "metrics.csv", "loss_curves.png"):
        for path in save_dir.glob(pattern):
            path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def report(line: str) -> None:
    if ranks.index == 0:
        print(line, flush=True)  # so that a job's log shows it at once


def start_model(args: argparse.Namespace, clips: Clips, last: dict[str, Any] | None) -> MotionFeatureAutoencoder:
    """A new model, or that of the checkpoint `last`. Raises `UserError` for a checkpoint of another version."""
    torch.manual_seed(args.seed)
    sizes = {"block": clips.block, "clip_shape": clips.shape}
    flags = {name: getattr(args, name) for name in Config.__annotations__ if name in args}
    model = MotionFeatureAutoencoder(**flags, **sizes)
    try:
        if last:
            model.load_state_dict(last["model"])
    except RuntimeError:
        raise UserError("--resume: another version began that run; train anew in another --save_dir") from None
    return model.to(args.device).eval()


def start_run(
    args: argparse.Namespace, model: MotionFeatureAutoencoder, sample: list[Tensor], val_set: Clips, measured_on: str
) -> dict[str, Any]:
    """What a checkpoint holds besides the state of its epoch, such as PCA's errors on `val_set`. PCA is fitted on
    `sample`. Prints its errors and those of low-pass PCA."""
    weights, latent_dim = loss_weights(args), args.latent_dim
    sizes = {"low-pass PCA of blocks": min(LOW_PASS * latent_dim, args.input_dim), "motion-weighted PCA": latent_dim}
    for told, count in sizes.items():
        code = PrincipalComponents(model.code, sample, weights, count)
        pca_errors = measure(code, val_set.to_measure(args.seed, args.device), weights)
        errors = "  ".join(f"{kind} {pca_errors[column]:.4f}" for kind, column in COMPARED.items())
        report(f"{measured_on}, {told}: {errors}")
    return {
        "pca_errors": pca_errors,
        "history": [],
        "config": model.config,
        "args": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "versions": {"python": sys.version.split()[0], "torch": str(torch.__version__)},
    }


def train(
    args: argparse.Namespace,
    files: tuple[list[FeatureFile], list[FeatureFile]],
    settings: dict[str, Any],
    last: dict[str, Any] | None,
) -> None:
    """Run the epochs after checkpoint `last`, or all of them; epoch 0 is the linear code alone. All ranks train; rank 0
    measures and writes. `files`: those to train on, and those held out."""
    train_set, val_set = Clips(files[0]), Clips(files[1] or files[0])
    measured_on = "held out" if files[1] else "training files"
    model = start_model(args, train_set, last)
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    first = last["epoch"] + 1 if last else 0
    if last:
        optimizer.load_state_dict(last["optimizer"])
    if ranks.index == 0:
        sample = train_set.to_fit(args.seed, args.device)
        if not last:
            fit_code(model.code, sample, *loss_weights(args), train_set.shuffled(args.seed, args.device))
            last = start_run(args, model, sample, val_set, measured_on) | {"settings": settings}
            last["trained_on"] = next((file.origin for file in files[0] if file.origin), "")
            if args.overwrite:
                remove_outputs(args.save_dir)
        latents = sample_latents(model, sample)
    network = model.network
    if ranks.count > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
        network = DistributedDataParallel(network)  # it has no buffers

    for epoch in range(first, args.epochs + 1):
        start = time.perf_counter()
        torch.manual_seed(args.seed + epoch + 1_000_003 * ranks.index)  # for all randomness but the clips' order
        trained, rates = {}, [0.0]
        if epoch:
            parts = train_set.batches(args.batch_size, args.seed, epoch)
            steps = range((epoch - 1) * len(parts), epoch * len(parts))
            rates = [learning_rate(index, args.epochs * len(parts), args.lr) for index in steps]
            batches = train_set.read_batches(parts, args.num_workers, args.device)
            trained = train_epoch(model, network, optimizer, batches, rates, args)
        if ranks.index > 0:
            continue
        measure_spread(model, latents)
        measured = measure(model, val_set.to_measure(args.seed, args.device), loss_weights(args))
        ratios = compare(measured, last["pca_errors"], loss_weights(args))
        groups = {"train": trained, "val": measured, "pca": last["pca_errors"], "ratio": ratios}
        row = {"epoch": epoch, "lr": rates[-1], "seconds": time.perf_counter() - start}
        row |= {f"{group}_{name}": value for group in groups for name, value in groups[group].items()}
        last["history"].append(row)
        last |= {"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        told = f"training loss {trained['loss']:.4f}" if epoch else "the code alone"
        known = [f"{name} {ratio:.3f}" for name, ratio in ratios.items() if not math.isnan(ratio)]
        told += f" | {measured_on}, x PCA's: {'  '.join(known) or 'PCA makes no error'}"
        report(f"epoch {epoch}: {told} | {row['seconds']:.1f} s")
        save_atomically(last, args.save_dir / "motion_ae_last.pt")
        write_outputs(last, measured_on, args.save_dir, args.keep_epochs)
    if ranks.index == 0:
        best = best_row(last["history"])["epoch"]
        told = f"epoch {best}" + f" (no network takes {EARNED:.0%} off its loss)" * (not best and args.epochs > 0)
        flags = ["--checkpoint", f"{args.save_dir}/motion_ae_best.pt", "--input", str(args.feature_dir)]
        command = shlex.join(["python", "encode.py", *flags, "--output", "latents"])
        report(f"best: {told}, which is motion_ae_best.pt; to encode by it: {command}")


def main() -> int:
    ranks.join()
    args = ranks.from_first(parse_args)
    device = ranks.open_device(args.device)
    args.device = str(device)  # of this rank
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL and pinned memory use the current device
    all_files = ranks.from_first(lambda: look_at_files(args.feature_dir, args.input_dim))
    args.input_dim = all_files[0].channels
    files = split_files(all_files, args.val_fraction, args.seed)
    settings = {name: value for name, value in vars(args).items() if name not in HARMLESS}
    settings["clips_per_step"] = args.batch_size * ranks.count
    settings["features"] = hash_of_files(all_files, args.feature_dir)
    last = ranks.from_first(lambda: open_save_dir(args, settings))
    if last and ranks.index == 0:
        write_outputs(last, "held out" if files[1] else "training files", args.save_dir, args.keep_epochs)
    if not last or last["epoch"] < args.epochs:
        shapes = len({file.shape for file in files[0]})
        where = f"{ranks.count} x {device.type}" if ranks.count > 1 else device
        ratio = f"C = {args.input_dim} -> {args.latent_dim} (C/{args.input_dim / args.latent_dim:.3g})"
        report(f"{len(files[0])} training files, {len(files[1])} held out, {shapes} shapes; {ratio}; on {where}")
        if not args.use_token:
            report("without --use_token changes alone are coded: what stands still cannot come back")
        train(args, files, settings, last)
    return 0


if __name__ == "__main__":
    run_script(main)
