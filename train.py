"""Train a motion autoencoder on a folder of features.

In: a folder of .pt, .pth or .npy files, each the feature [T, N, C] or [T, H, W, C] of a clip (vfm_feature.py's).
Out, in --save_dir: motion_ae_epoch{N}.pt after each epoch and motion_ae_best.pt, for encode.py and
`MotionFeatureAutoencoder.from_checkpoint`; metrics.csv and loss_curves.png; motion_ae_last.pt, for --resume alone.

    python train.py --feature_dir ../dataset/vfm_features_motion_top100/VideoMAEv2 --use_token
    python train.py --feature_dir features --input_dim 352 --latent_dim 88 --epochs 100 --use_token --resume
    torchrun --nproc_per_node=4 train.py --feature_dir features --use_token --precision bfloat16
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from losses import METRICS, FeatureErrors, motion_autoencoder_loss
from model import (
    ArgumentParser,
    Config,
    MotionFeatureAutoencoder,
    SpaceTimeCode,
    Tile,
    UserError,
    add_model_flags,
    check_numbers,
    file_fingerprint,
    find_features,
    group_by_reason,
    load_checked,
    load_feature,
    make_folder,
    number,
    open_device,
    principal_components,
    provenance,
    ranks,
    run_script,
    save_atomically,
    say,
    tiles,
    to_sequences,
    weighted_moment,
    whole_file,
)

STEP_TOKENS = 2**13  # of a clip, in a training step; larger clips are cut into tiles, all of which an epoch sees
MEASURE_TOKENS = 2**14  # of a clip, that errors are measured on
FIT_CLIPS, FIT_TOKENS = 256, 2**18  # that the linear code is measured on, at most
WORTH = 0.02  # of the error; training that takes off less is not worth its time
MODEL_FLAGS = [field.name for field in fields(Config) if field.name not in ("block", "positions")]
# With the features and the clips of a step, these flags decide the result; --resume checks that they are the same.
RUN_FLAGS = [
    *MODEL_FLAGS,
    *("epochs", "lr", "weight_decay", "recon_weight", "motion_weight", "smooth_weight"),
    *("val_fraction", "seed", "precision"),
]

LossWeights = tuple[float, float, float]  # of reconstruction, temporal difference, latent smoothness
Clip = TypeVar("Clip")


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
    add_model_flags(parser)
    add("--epochs", type=number(int, 1), default=10, help="passes over the training files")
    add("--batch_size", type=number(int, 1), default=2, help="clips a step, of each rank")
    add("--lr", type=number(float, 0), default=2e-4, help="peak learning rate")
    add("--weight_decay", type=number(float, 0), default=1e-4, help="AdamW's weight decay")
    add("--num_workers", type=number(int, 0), default=4, help="processes that read ahead")
    add("--recon_weight", type=number(float, 0), default=1.0, help="weight of the reconstruction")
    add("--motion_weight", type=number(float, 0), default=1.0, help="weight of temporal differences")
    add("--smooth_weight", type=number(float, 0), default=0.05, help="weight of latent smoothness")
    add("--val_fraction", type=number(float, 0, 0.9), default=0.1, help="files held out, if there are at least 10")
    add("--precision", choices=["float32", "bfloat16"], default="float32", help="bfloat16: faster steps, by autocast")
    add("--seed", type=number(int, 0), default=0, help="of weights, split and order")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1...")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


class FeatureFile(NamedTuple):
    path: Path
    shape: tuple[int, ...]  # T, N or T, H, W
    content: str  # `file_fingerprint`
    origin: str


def look_at_files(folder: Path, input_dim: int | None) -> tuple[list[FeatureFile], int]:
    """Every feature file below `folder`, of which few numbers are read, and their channels C: `input_dim` or, without
    it, what they have. Raises `UserError` after naming all misfits."""

    def look(path: Path) -> tuple[FeatureFile, int] | str:
        try:
            feature, metadata = load_feature(path, input_dim, mmap=True, check=False)
            content = file_fingerprint(path)
        except (UserError, OSError) as error:
            return str(error)
        *shape, channels = feature.shape
        if input_dim is None and "model" not in metadata and channels < max(shape):
            return (
                f"{path}: shape {[*shape, channels]} can have its channels on any axis; give --input_dim {channels} if "
                "it is the last"
            )
        return FeatureFile(path, tuple(shape), content, provenance(metadata)), channels

    paths = find_features(folder)
    with ThreadPoolExecutor() as pool:
        found = list(tqdm(pool.map(look, paths), "files", len(paths), leave=False, disable=None, delay=1))
    failures = {str(path): reason for path, reason in zip(paths, found, strict=True) if isinstance(reason, str)}
    lines = group_by_reason(failures)
    if len(lines) == 1:
        raise UserError(lines[0])
    for line in lines:
        say(f"warning: {line}")
    if failures:
        raise UserError(f"{len(failures)} of {len(paths)} feature files cannot be used; fix or remove them")
    files = [file for file, _ in found]
    by_channels = {channels: file.path for file, channels in found}
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
    return files, *by_channels


def hash_of_files(files: list[FeatureFile], folder: Path) -> str:
    """A hash of a feature set: its files' names, shapes and contents."""
    listing = [(file.path.relative_to(folder).as_posix(), file.shape, file.content) for file in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]


def split_files(files: list[Clip], val_fraction: float, seed: int) -> tuple[list[Clip], list[Clip]]:
    """Training and held-out files: the same for the same files, fraction and seed. Below 10 files none is held out."""
    count = round(len(files) * val_fraction) if len(files) >= 10 else 0
    held_out = set(random.Random(seed).sample(files, min(count, len(files) - 1)))
    return [file for file in files if file not in held_out], [file for file in files if file in held_out]


class Clips(Dataset):
    """Tiles [T, n, C] or [T, h, w, C] of clips, in the dtype of their file. An item's key is (index, tile), a tile the
    part of the clip to read."""

    def __init__(self, files: list[FeatureFile], input_dim: int) -> None:
        self.files, self.input_dim, self.checked = files, input_dim, set()
        shapes = [(length, *grid) if len(grid) == 2 else (length, 1, 1) for length, *grid in (f.shape for f in files)]
        length, *grid = map(max, zip(*shapes, strict=True))
        # The blocks that are coded together: of the grid as few as `Config.block` allows, of one size.
        sides = [math.ceil(size / math.ceil(size / most)) for size, most in zip(grid, Config.block[1:], strict=True)]
        self.block = (min(length, Config.block[0]), *sides)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, Tile]) -> Tensor:
        index, tile = key
        path = self.files[index].path
        is_new = index not in self.checked
        clip, _ = load_feature(path, self.input_dim, mmap=True, check=is_new)
        clip = clip[tile].clone()  # the file is not mapped any longer
        if not is_new:
            check_numbers(clip, path)
        self.checked.add(index)
        return clip

    @property
    def positions(self) -> tuple[int, ...] | None:
        """The shape of all clips, if it is one and each fits into a training step: their means are then known."""
        shapes = {file.shape for file in self.files}
        return shapes.pop() if len(shapes) == 1 and len(self.tiles(0, STEP_TOKENS)) == 1 else None

    def tiles(self, index: int, tokens: int) -> list[Tile]:
        """A clip, cut into tiles of about that many tokens."""
        length, *grid = self.files[index].shape
        return tiles(length, tuple(grid), self.block, tokens)

    def random_tile(self, index: int, tokens: int, seed: str) -> Tensor:
        return self[index, random.Random(f"{seed} {index}").choice(self.tiles(index, tokens))]


class EqualShapeBatches(Sampler[list[tuple[int, Tile]]]):
    """This rank's share of batches of keys of `Clips`, each of tiles of one shape, in an order that depends on (seed,
    epoch). An epoch has all tiles of all clips.

    Every rank has as many tiles of each batch as the others: the tiles of a shape are filled up from their start, as
    torch's DistributedSampler does.
    """

    def __init__(self, clips: Clips, batch_size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = batch_size * ranks.count, seed, 0
        self.groups: dict[tuple[int, ...], list[tuple[int, Tile]]] = {}  # by the tiles' shape
        for index, file in enumerate(clips.files):
            for tile in clips.tiles(index, STEP_TOKENS):
                shape = tuple(len(range(*part.indices(size))) for part, size in zip(tile, file.shape, strict=True))
                self.groups.setdefault(shape, []).append((index, tile))

    def __len__(self) -> int:
        return sum(math.ceil(len(group) / self.size) for group in self.groups.values())

    def __iter__(self) -> Iterator[list[tuple[int, Tile]]]:
        chance = random.Random(f"{self.seed} {self.epoch}")
        batches = []
        for group in self.groups.values():
            order = chance.sample(group, len(group))
            order += [order[i % len(order)] for i in range(-len(order) % ranks.count)]
            batches += [order[start : start + self.size] for start in range(0, len(order), self.size)]
        chance.shuffle(batches)
        for batch in batches:
            yield batch[ranks.index :: ranks.count]


def ignore_sigterm(worker: int) -> None:
    """Schedulers send it to all processes of a job: the main one says so, and ends its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def make_loader(clips: Clips, sampler: EqualShapeBatches, args: argparse.Namespace) -> DataLoader:
    return DataLoader(
        clips,
        batch_sampler=sampler,
        num_workers=min(args.num_workers, os.cpu_count()),
        collate_fn=torch.stack,
        worker_init_fn=ignore_sigterm,
        pin_memory=torch.device(args.device).type == "cuda",
        generator=torch.Generator(),  # else starting workers changes the global random state, and a resumed run differs
    )


def training_batches(loader: DataLoader, device: str) -> Iterator[Tensor]:
    """Batches [B, T, ..., C] on `device`. Raises `UserError` for a file that cannot be read and for a killed worker."""
    try:
        for batch in tqdm(loader, unit="batch", leave=False, disable=True if ranks.index else None):
            yield batch.to(device, non_blocking=True).float()  # float16 travels, float32 is computed with
    except UserError as error:  # from a worker its text is a traceback, the last line of which is ours
        raise UserError(str(error).splitlines()[-1].removeprefix("model.UserError: ")) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"{error}; if memory ran out, lower --num_workers") from None


def clips_to_measure(clips: Clips, args: argparse.Namespace) -> Iterator[Tensor]:
    """Every clip by itself, [1, T, ..., C]; of large ones a random tile, the same each time."""
    for index in tqdm(range(len(clips)), unit="clip", leave=False, disable=None):
        yield clips.random_tile(index, MEASURE_TOKENS, f"{args.seed}")[None].to(args.device).float()


def clips_to_fit(clips: Clips, seed: int) -> list[Tensor]:
    """Random clips, or a random tile of each, [T, ..., C] in float32: what the linear code is measured on."""
    count = min(len(clips), FIT_CLIPS)
    share = STEP_TOKENS if clips.positions else FIT_TOKENS // count
    chosen = random.Random(f"{seed} fit").sample(range(len(clips)), count)
    sample, tokens = [], 0
    for index in tqdm(chosen, "clips", leave=False, disable=None, delay=1):
        sample.append(clips.random_tile(index, share, f"{seed} fit").float())
        tokens += sample[-1][..., 0].numel()
        if tokens >= FIT_TOKENS:  # of long clips the smallest tiles are larger than their share
            break
    return sample


# ---------------------------------------------------------------------------------------------------------------------
# Training and measuring
# ---------------------------------------------------------------------------------------------------------------------


def relative_loss(
    scale: Tensor, x: Tensor, reconstruction: Tensor, latent: Tensor, weights: LossWeights
) -> tuple[Tensor, dict[str, float]]:
    """`motion_autoencoder_loss` in units of the features' variance, so that their scale changes no step; and the loss
    and its terms as numbers. Raises `UserError` for a loss that is not finite."""
    loss, terms = motion_autoencoder_loss(x / scale, reconstruction.float() / scale, latent.float(), *weights)
    values = torch.stack([loss.detach(), *terms.values()]).tolist()  # one wait for the device
    if not math.isfinite(values[0]):
        raise UserError(f"the loss is {values[0]}; lower --lr")
    return loss, dict(zip(("loss", *(f"{name}_loss" for name in terms)), values, strict=True))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over a twentieth of the run, then a cosine down to 0."""
    return peak * (min(1.0, (step + 1) / (0.05 * steps + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps)))


class PrincipalComponents(nn.Module):
    """Motion-weighted PCA of `clips` [T, ..., C], of the latent's size, after the code's mean: what the model has to
    beat."""

    def __init__(self, code: SpaceTimeCode, clips: list[Tensor], weights: LossWeights) -> None:
        super().__init__()
        moment = weighted_moment([to_sequences(code.normalise(x[None])) for x in clips], *weights[:2])
        self.code, self.basis = code, principal_components(moment)[:, : code.latent_dim].float()

    def encode(self, x: Tensor) -> Tensor:
        return self.code.normalise(x) @ self.basis

    def decode(self, latent: Tensor) -> Tensor:
        return self.code.restore(latent @ self.basis.mT)


@torch.no_grad()
def measure(
    model: MotionFeatureAutoencoder | PrincipalComponents, clips: Iterable[Tensor], weights: LossWeights
) -> dict[str, float]:
    """The mean loss and its terms, and the figures of `FeatureErrors`, over `clips` [1, T, ..., C]."""
    errors, losses = FeatureErrors(), []
    for x in clips:
        latent = model.encode(x)
        reconstruction = model.decode(latent)
        losses.append(relative_loss(model.code.scale, x, reconstruction, latent, weights)[1])
        errors.add(x, reconstruction)
    return {**pd.DataFrame(losses).mean().to_dict(), **errors.figures()}


def compare(ours: dict[str, float], pca: dict[str, float], weights: LossWeights) -> float:
    """The weighted error over PCA's; NaN where PCA makes none."""
    ours, pca = (weights[0] * means["reconstruction_loss"] + weights[1] * means["motion_loss"] for means in (ours, pca))
    return ours / pca if pca > 1e-6 else math.nan


def describe_gain(last: dict[str, Any], measured_on: str, weights: LossWeights) -> str:
    """What the linear code does without the networks, and what training them added."""
    code = compare(last["code_errors"], last["pca_errors"], weights)
    best = min(row["ratio"] for row in last["history"])
    text = f"{measured_on}, without the networks: {describe(last['code_errors'])} | {code:.3f} x PCA's error"
    if math.isnan(code):
        return text
    gain = 1 - best / code
    advice = "" if gain >= WORTH else "; it paid on no set that was tried, of up to 378 views of 42 clips"
    return f"{text}; training them took off {round(gain, 3) + 0.0:.1%}{advice}"  # never -0.0%


def describe(errors: dict[str, float]) -> str:
    return "  ".join(f"{name.removesuffix('_error')} {errors[name]:.4f}" for name in METRICS)


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves in --save_dir
# ---------------------------------------------------------------------------------------------------------------------


def open_save_dir(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint to go on from; None to train from the start.

    Raises `UserError` where checkpoints of another run would be lost, or --resume would not give what it has begun.
    """
    make_folder(args.save_dir, "--save_dir")
    there = sorted(args.save_dir.glob("motion_ae_*.pt"))
    last = args.save_dir / "motion_ae_last.pt"
    path = (last if last.exists() else None) if args.resume is True else args.resume
    elsewhere = path is not None and path.parent.resolve() != args.save_dir.resolve()
    if there and not args.overwrite and (path is None or elsewhere):
        raise UserError(
            f"--save_dir {args.save_dir} holds {there[0].name} of another run; go on with that run by --resume, give "
            "another --save_dir, or delete it with --overwrite"
        )
    if path is None:
        if args.resume:
            report(f"no checkpoint in {args.save_dir} yet: training from the start")
        return None
    checkpoint = load_checked(path)
    if not isinstance(checkpoint, dict) or not {"settings", "epoch", "history", "optimizer"} <= checkpoint.keys():
        raise UserError(f"--resume {path}: it holds no training state; give the motion_ae_last.pt of a run")
    check_settings(settings, checkpoint["settings"], path)
    if elsewhere:  # so that the run can be resumed from here alone
        best_path = path.with_name("motion_ae_best.pt")
        best = load_checked(best_path) if best_path.is_file() else None
        if best and best["epoch"] <= checkpoint["epoch"]:
            save_atomically(best, args.save_dir / best_path.name)
        save_atomically(checkpoint, last)
    done = checkpoint["epoch"] == args.epochs
    report(
        f"{path} is the last of {args.epochs} epochs: nothing left to do"
        if done
        else f"going on after epoch {checkpoint['epoch']} of {args.epochs}, from {path}"
    )
    return checkpoint


def check_settings(settings: dict[str, Any], recorded: dict[str, Any], path: Path) -> None:
    """Raise `UserError` for the first setting that is not what the checkpoint at `path` was begun with."""
    names = {"clips_per_step": "--batch_size times ranks", "features": "the content of --feature_dir"}
    for name, ours in settings.items():
        if ours != recorded.get(name):
            raise UserError(
                f"{names.get(name, f'--{name}')} {ours} contradicts {path}, begun with {recorded.get(name)}; resume "
                "with what it was begun with, or train anew in another --save_dir"
            )


def draw_curves(history: list[dict[str, float]], measured_on: str, path: Path) -> None:
    """The loss while training, and the errors over the epochs, of the files measured on and of PCA."""
    table = pd.DataFrame(history).set_index("epoch")
    figure = Figure(figsize=(10, 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), ("loss", "reconstruction_error", "motion_error"), strict=True):
        if name == "loss":
            axes.plot(table["train_loss"], ".-", color="tab:green", label="training, with dropout")
        axes.plot(table[f"val_{name}"], ".-", color="tab:blue", label=measured_on)
        axes.plot(table[f"pca_{name}"], "--", color="gray", label=f"{measured_on}, PCA")
        axes.set(title=name.replace("_", " "), xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=80)


def write_outputs(last: dict[str, Any], measured_on: str, save_dir: Path) -> None:
    """The files that follow from motion_ae_last.pt, which is on the disk: a run that was killed before they were all
    written has them written again when it goes on."""
    history = last["history"]
    weights = {name: value for name, value in last.items() if name != "optimizer"}
    save_atomically(weights, save_dir / f"motion_ae_epoch{last['epoch']}.pt")
    if min(history, key=lambda row: row["val_loss"]) is history[-1]:
        save_atomically(weights, save_dir / "motion_ae_best.pt")
    with whole_file(save_dir / "metrics.csv") as file:
        pd.DataFrame(history).to_csv(file, index=False, na_rep="nan")
    draw_curves(history, measured_on, save_dir / "loss_curves.png")


def remove_outputs(save_dir: Path) -> None:
    """Remove an earlier run's files, the one to resume from first."""
    for pattern in ("motion_ae_last.pt", "motion_ae_epoch*.pt", "motion_ae_best.pt", "metrics.csv", "loss_curves.png"):
        for path in save_dir.glob(pattern):
            path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def report(line: str) -> None:
    if ranks.index == 0:
        print(line, flush=True)  # a job's log shows it at once


def describe_run(args: argparse.Namespace) -> dict[str, Any]:
    """What a checkpoint says of the run beside its settings."""
    return {
        "args": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "versions": {"python": sys.version.split()[0], "torch": str(torch.__version__)},
    }


def start_model(
    args: argparse.Namespace, clips: Clips, last: dict[str, Any] | None, weights: LossWeights
) -> tuple[MotionFeatureAutoencoder, PrincipalComponents | None]:
    """The model of the checkpoint `last`; or a new one, whose linear code rank 0 measures, and PCA of the same clips.
    Raises `UserError` for a checkpoint of another version."""
    torch.manual_seed(args.seed)
    sizes = {"block": clips.block, "positions": clips.positions or Config.positions}
    model = MotionFeatureAutoencoder(**{name: getattr(args, name) for name in MODEL_FLAGS}, **sizes)
    model.to(args.device)
    if last:
        try:
            model.load_state_dict(last["model"])
        except RuntimeError:
            raise UserError("--resume: another version began that run; train anew in another --save_dir") from None
    elif ranks.index == 0:
        sample = [x.to(args.device) for x in clips_to_fit(clips, args.seed)]
        model.code.fit(sample, args.recon_weight, args.motion_weight, args.smooth_weight)
        return model, PrincipalComponents(model.code, sample, weights)
    return model, None


class Training(nn.Module):
    """What a training step runs: the autoencoder without its motion embedding, which the loss does not see."""

    def __init__(self, model: MotionFeatureAutoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latent = self.model.encode(x)
        return latent, self.model.decode(latent)


def train_epoch(
    model: MotionFeatureAutoencoder,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    clips: Iterable[Tensor],
    rates: list[float],
    args: Any,
) -> dict[str, float]:
    """A step for each batch [B, T, ..., C], at its learning rate; the mean loss and its terms, on rank 0. `network`:
    `Training` of the model."""
    weights = (args.recon_weight, args.motion_weight, args.smooth_weight)
    model.train()
    losses = []
    for x, rate in zip(clips, rates, strict=True):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.precision == "bfloat16"):
            latent, reconstruction = network(x)
        loss, terms = relative_loss(model.code.scale, x, reconstruction, latent, weights)
        losses.append(terms)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return pd.DataFrame(ranks.gather(pd.DataFrame(losses).mean().to_dict())).mean().to_dict()


def train(
    args: argparse.Namespace,
    files: tuple[list[FeatureFile], list[FeatureFile]],
    settings: dict[str, Any],
    last: dict[str, Any] | None,
) -> None:
    """The epochs after `last`, or all. All ranks train; rank 0 measures and writes. `files`: to train on, held out."""
    train_set, val_set = (Clips(part, args.input_dim) for part in (files[0], files[1] or files[0]))
    measured_on = "held out" if files[1] else "training files"
    order = EqualShapeBatches(train_set, args.batch_size, args.seed)
    loader = make_loader(train_set, order, args)
    weights = (args.recon_weight, args.motion_weight, args.smooth_weight)
    compared = weights if args.use_token else (0.0, 1.0, 0.0)  # with PCA; motion alone does not code the rest
    model, components = start_model(args, train_set, last, compared)
    network = Training(model)
    if ranks.count > 1:
        network = DistributedDataParallel(network)  # gives every rank the parameters and buffers of rank 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    first = last["epoch"] + 1 if last else 1
    if last:
        optimizer.load_state_dict(last["optimizer"])
    elif ranks.index == 0:
        pca = measure(components, clips_to_measure(val_set, args), weights)
        code = measure(model.eval(), clips_to_measure(val_set, args), weights)
        last = {"history": [], "pca_errors": pca, "code_errors": code, "config": model.config, "settings": settings}
        last |= {"trained_on": next((file.origin for file in files[0] if file.origin), ""), **describe_run(args)}
        report(f"{measured_on}, motion-weighted PCA: {describe(pca)}")
        if args.overwrite:
            remove_outputs(args.save_dir)

    for epoch in range(first, args.epochs + 1):
        start = time.perf_counter()
        # with the order of clips, all chance of an epoch
        torch.manual_seed(args.seed + epoch + 1_000_003 * ranks.index)
        order.epoch = epoch
        steps = range((epoch - 1) * len(loader), epoch * len(loader))
        rates = [learning_rate(step, args.epochs * len(loader), args.lr) for step in steps]
        trained = train_epoch(model, network, optimizer, training_batches(loader, args.device), rates, args)
        if ranks.index > 0:
            continue
        measured = measure(model, clips_to_measure(val_set, args), weights)
        ratio = compare(measured, last["pca_errors"], compared)
        groups = {"train": trained, "val": measured, "pca": last["pca_errors"]}
        row = {"epoch": epoch} | {f"{group}_{name}": value for group in groups for name, value in groups[group].items()}
        row |= {"ratio": ratio, "lr": rates[-1], "seconds": time.perf_counter() - start}
        last["history"].append(row)
        last |= {"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        report(
            f"epoch {epoch}: training loss {trained['loss']:.4f} | {measured_on} {describe(measured)} | "
            + ("PCA makes no error" if math.isnan(ratio) else f"{ratio:.3f} x PCA's error")
            + f" | {row['seconds']:.1f} s"
        )
        save_atomically(last, args.save_dir / "motion_ae_last.pt")
        write_outputs(last, measured_on, args.save_dir)
    if ranks.index == 0:
        report(describe_gain(last, measured_on, compared))


def main() -> int:
    ranks.join()
    args = ranks.from_first(parse_args)
    device = open_device(args.device)
    args.device = str(device)  # of this rank
    if device.type == "cuda":
        torch.cuda.set_device(device)  # which NCCL and pinned memory go by
    given = getattr(args, "input_dim", None)
    all_files, args.input_dim = ranks.from_first(lambda: look_at_files(args.feature_dir, given))
    files = split_files(all_files, args.val_fraction, args.seed)
    settings = {name: getattr(args, name) for name in RUN_FLAGS}
    settings["clips_per_step"] = args.batch_size * ranks.count
    settings["features"] = hash_of_files(all_files, args.feature_dir)
    last = ranks.from_first(lambda: open_save_dir(args, settings))
    if last and ranks.index == 0:
        write_outputs(last, "held out" if files[1] else "training files", args.save_dir)
    if not last or last["epoch"] < args.epochs:
        shapes = len({file.shape for file in files[0]})
        where = f"{ranks.count} x {device.type}" if ranks.count > 1 else device
        report(f"{len(files[0])} training files, {len(files[1])} held out, {shapes} shapes; on {where}")
        train(args, files, settings, last)
    return 0


if __name__ == "__main__":
    run_script(main)
