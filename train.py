"""Train a motion autoencoder on a folder of features.

In: a folder of .pt, .pth or .npy files, each the feature [T, N, C] or [T, H, W, C] of a clip (vfm_feature.py's).
Out, in --save_dir: motion_ae_epoch{N}.pt after each epoch and motion_ae_best.pt, for encode.py and
`MotionFeatureAutoencoder.from_checkpoint`; metrics.csv and loss_curves.png.

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
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from losses import motion_autoencoder_loss
from model import (
    ArgumentParser,
    MotionFeatureAutoencoder,
    UserError,
    add_model_flags,
    find_features,
    from_first_rank,
    join_ranks,
    load_checked,
    load_feature,
    number,
    open_device,
    rank,
    remove_leftovers,
    run_script,
    save_atomically,
    say,
    whole_file,
)

IN_MEMORY_BYTES = 2 * 1024**3  # feature sets up to this size are read once and kept
STEP_POSITIONS = 64  # of a clip, that a training step takes
FIT_POSITIONS = 256  # of a clip, that the linear path, and the error, is measured on
FIT_BATCHES = 128
MAX_BLOCK = 24  # time steps that are coded together: what vfm_feature.py gives by default, or half of it
MODEL_FLAGS = ("input_dim", "model_dim", "latent_dim", "num_heads", "num_layers", "dropout", "use_token")
# with the feature set and the clips of a step, all that decides what a run computes
RUN_FLAGS = (
    *MODEL_FLAGS,
    *("epochs", "lr", "weight_decay", "recon_weight", "motion_weight", "smooth_weight"),
    *("val_fraction", "seed", "precision"),
)
TERMS = ("loss", "reconstruction", "motion", "smoothness")

Weights = tuple[float, float, float]  # of reconstruction, temporal difference, latent smoothness
Code = Callable[[Tensor], tuple[Tensor, Tensor]]  # x -> (latent, reconstruction)
Result = TypeVar("Result")


# ---------------------------------------------------------------------------------------------------------------------
# Ranks: torchrun's processes. Each takes its share of every step's clips; the first one prints and writes.
# ---------------------------------------------------------------------------------------------------------------------


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: list[float]) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def report(line: str) -> None:
    if rank() == 0:
        print(line, flush=True)  # a job's log shows it at once


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


class FeatureFile(NamedTuple):
    path: Path
    shape: tuple[int, int]  # T, N
    bytes: int


def for_each_file(work: Callable[[Path], Result], paths: list[Path]) -> list[Result]:
    """`work` of every path, several at a time. Raises `UserError` after all, having named each file that raised one."""

    def attempt(path: Path) -> Result | UserError:
        try:
            return work(path)
        except UserError as error:
            return error

    with ThreadPoolExecutor() as pool:
        results = list(tqdm(pool.map(attempt, paths), "files", len(paths), leave=False, disable=None, delay=1))
    errors = [result for result in results if isinstance(result, UserError)]
    if len(errors) == 1:
        raise errors[0]
    for error in errors:
        say(f"warning: {error}")
    if errors:
        raise UserError(f"{len(errors)} of {len(paths)} feature files cannot be used; mend them or take them out")
    return results


def look_at_files(folder: Path, input_dim: int) -> list[FeatureFile]:
    """Every feature file below `folder`; its numbers are not read. Raises `UserError` that names all misfits."""

    def look(path: Path) -> FeatureFile:
        feature, _ = load_feature(path, input_dim, mmap=True)
        shape = (feature.shape[0], feature.shape[1:-1].numel())
        return FeatureFile(path, shape, feature.numel() * feature.element_size())

    return for_each_file(look, find_features(folder))


def fingerprint(files: list[FeatureFile], folder: Path) -> str:
    """A hash of the names, shapes and sizes of a feature set."""
    listing = [(file.path.relative_to(folder).as_posix(), file.shape, file.bytes) for file in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]


def split_files(files: list[Result], val_fraction: float, seed: int) -> tuple[list[Result], list[Result]]:
    """Training and held-out files: the same for the same files, fraction and seed. Below 10 files none is held out."""
    count = round(len(files) * val_fraction) if len(files) >= 10 else 0
    held_out = set(random.Random(seed).sample(files, min(count, len(files) - 1)))
    return [file for file in files if file not in held_out], [file for file in files if file in held_out]


class Clips(Dataset):
    """Clips [T, n, C] in the dtype of their file; small sets are kept in memory.

    An item's key is (index, n, seed): up to n random positions of a clip. They are independent sequences and neighbours
    say nearly the same, so a step need not pay for all 1350 of a DINOv2 clip. Nor does the way from a loader process.
    """

    def __init__(self, files: list[FeatureFile], input_dim: int) -> None:
        self.files, self.input_dim = files, input_dim
        fits = sum(file.bytes for file in files) <= IN_MEMORY_BYTES
        self.kept = for_each_file(self.read, [file.path for file in files]) if fits else None

    def read(self, path: Path) -> Tensor:
        feature, _ = load_feature(path, self.input_dim)
        return feature.flatten(1, -2)  # [T, N, C]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int, str]) -> Tensor | str:
        """A file that has gone bad since the first look comes back as its error's text: a `UserError` raised in a
        loader process would reach the user as that process's traceback."""
        index, count, seed = key
        try:
            clip = self.kept[index] if self.kept is not None else self.read(self.files[index].path)
        except UserError as error:
            return str(error)
        if clip.shape[1] <= count:
            return clip
        return clip[:, sorted(random.Random(seed).sample(range(clip.shape[1]), count))]


class EqualShapeBatches(Sampler[list[tuple[int, int, str]]]):
    """Batches of keys of `Clips`, of one (T, N) each, so that different sizes train together; the last batch of a shape
    may be smaller. Order and positions depend on (seed, epoch) alone: any epoch can be had again.

    Each of `ranks` has its share of every batch. One whose share is empty gets a clip of another's, to take part in the
    step; `shares` says so.
    """

    def __init__(self, clips: Clips, batch_size: int, positions: int, seed: int, shuffled: bool, ranks: int) -> None:
        self.shapes = [file.shape for file in clips.files]
        self.batch_size, self.positions, self.seed = batch_size, positions, seed
        self.shuffled, self.ranks, self.epoch = shuffled, ranks, 0

    def __len__(self) -> int:
        return sum(-(-self.shapes.count(shape) // self.batch_size) for shape in set(self.shapes))

    def whole_batches(self) -> list[list[int]]:
        """The indices of all ranks' batches of this epoch."""
        order = list(range(len(self.shapes)))
        shuffle = random.Random(f"{self.seed} {self.epoch}").shuffle if self.shuffled else lambda _: None
        shuffle(order)
        groups: dict[tuple[int, int], list[int]] = {}
        for index in order:
            groups.setdefault(self.shapes[index], []).append(index)
        batches = [
            group[start : start + self.batch_size]
            for group in groups.values()
            for start in range(0, len(group), self.batch_size)
        ]
        shuffle(batches)
        return batches

    def share(self, batch: list[int]) -> list[int]:
        return batch[rank() :: self.ranks]

    def shares(self) -> list[tuple[int, int]]:
        """Of each batch, how many clips are this rank's, and how many there are."""
        return [(len(self.share(batch)), len(batch)) for batch in self.whole_batches()]

    def __iter__(self) -> Iterator[list[tuple[int, int, str]]]:
        for batch in self.whole_batches():
            mine = self.share(batch) or batch[:1]
            yield [(index, self.positions, f"{self.seed} {self.epoch} {index}") for index in mine]


def stack_clips(clips: list[Tensor | str]) -> Tensor | str:
    """Clips [T, N, C] -> a batch [B, T, N, C]; the text of the first error among them instead."""
    errors = [clip for clip in clips if isinstance(clip, str)]
    return errors[0] if errors else torch.stack(clips)


def ignore_sigterm(worker: int) -> None:
    """Schedulers send it to all processes of a job: the main one says so, and ends its loader processes."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def make_loader(
    clips: Clips, batch_size: int, positions: int, args: argparse.Namespace, shuffled: bool = False, ranks: int = 1
) -> DataLoader:
    workers = 0 if clips.kept is not None else min(args.num_workers, os.cpu_count())
    return DataLoader(
        clips,
        batch_sampler=EqualShapeBatches(clips, batch_size, positions, args.seed, shuffled, ranks),
        num_workers=workers,
        collate_fn=stack_clips,
        worker_init_fn=ignore_sigterm,
        persistent_workers=workers > 0,
        pin_memory=torch.device(args.device).type == "cuda",
        generator=torch.Generator(),  # else starting workers changes what dropout draws, and --resume would tell
    )


def batches(loader: DataLoader, device: torch.device) -> Iterator[tuple[Tensor, int, int]]:
    """This rank's share of each batch [B, T, n, C] on `device`, how many of its clips count, and how many the batch has
    on all ranks. Raises `UserError` for a file that could not be read, and for a loader process that was killed."""
    progress = tqdm(loader, unit="batch", leave=False, disable=True if rank() else None)
    try:
        for batch, (mine, whole) in zip(progress, loader.batch_sampler.shares(), strict=True):
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch.to(device, non_blocking=True).float(), mine, whole  # float16 travels, float32 is computed with
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"{error}; if memory ran out, lower --num_workers") from None


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def relative_loss(
    model: MotionFeatureAutoencoder, x: Tensor, reconstruction: Tensor, latent: Tensor, weights: Weights
) -> tuple[Tensor, dict[str, Tensor]]:
    """`motion_autoencoder_loss` in units of the features' variance: a change of scale changes no step and no figure."""
    scale = model.encoder.code.scale
    return motion_autoencoder_loss(x / scale, reconstruction.float() / scale, latent.float(), *weights)


class Means:
    """Running means, over the clips of all ranks, of the loss and its terms."""

    def __init__(self) -> None:
        self.sums, self.count = [0.0] * len(TERMS), 0

    def add(self, loss: Tensor, terms: dict[str, Tensor], clips: int) -> float:
        """Returns the loss."""
        values = torch.stack([loss.detach(), *(terms[name] for name in TERMS[1:])]).tolist()  # one wait for the device
        self.sums = [total + value * clips for total, value in zip(self.sums, values, strict=True)]
        self.count += clips
        return values[0]

    def values(self) -> dict[str, float]:
        *sums, count = sum_over_ranks([*self.sums, self.count])
        return {name: total / count for name, total in zip(TERMS, sums, strict=True)}


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over a twentieth of the run, then a cosine down to 0."""
    return peak * (min(1.0, (step + 1) / (0.05 * steps + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps)))


class Trainer:
    """A model in training: its optimizer, the running mean of its weights, and which of all steps comes next."""

    def __init__(self, model: MotionFeatureAutoencoder, args: argparse.Namespace, steps: int) -> None:
        self.model, self.lr, self.step, self.steps = model, args.lr, 0, steps
        self.weights = (args.recon_weight, args.motion_weight, args.smooth_weight)
        self.autocast = args.precision == "bfloat16"
        self.network = DistributedDataParallel(model, broadcast_buffers=False) if dist.is_initialized() else model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
        # the mean over the last tenth or so of the run generalises better than the last step's weights
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - min(1.0, 10 / steps)))

    def state(self) -> dict[str, Any]:
        """With the averaged model, what it takes to go on."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}

    def go_on(self, checkpoint: dict[str, Any]) -> None:
        """Raises `UserError` for a checkpoint that is not what `state` and the averaged model gave."""
        try:
            state = checkpoint["training"]
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.averaged.module.load_state_dict(checkpoint["model"])
            self.step = state["step"]
            self.averaged.n_averaged.fill_(self.step)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(
                f"--resume: the checkpoint's training state does not fit ({type(error).__name__})"
            ) from None

    def train_epoch(self, clips: Iterable[tuple[Tensor, int, int]]) -> dict[str, float]:
        """One step for each of `batches`; the mean of the loss and its terms.

        Raises `UserError` when the loss is not finite.
        """
        self.model.train()
        means = Means()
        for x, mine, whole in clips:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
                output = self.network(x)
            loss, terms = relative_loss(self.model, x, output["reconstruction"], output["latent"], self.weights)
            check_finite(means.add(loss, terms, mine), self.lr)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, self.steps, self.lr)
            self.optimizer.zero_grad()
            (loss * (mine * num_ranks() / whole)).backward()  # ranks' gradients are averaged: each clip counts the same
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.averaged.update_parameters(self.model)
            self.step += 1
        return means.values()


def check_finite(loss: float, lr: float) -> None:
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss}; lower --lr (now {lr:g})")


@torch.no_grad()
def measure(model: MotionFeatureAutoencoder, code: Code, clips: Iterable[Tensor], weights: Weights) -> dict[str, float]:
    """The mean loss and terms over `clips` of any `code`: x -> (latent, reconstruction)."""
    means = Means()
    for x in clips:
        latent, reconstruction = code(x)
        means.add(*relative_loss(model, x, reconstruction, latent, weights), len(x))
    return means.values()


def autoencoder_code(model: MotionFeatureAutoencoder) -> Code:
    """x -> (latent, reconstruction) of the model."""

    def encode_and_decode(x: Tensor) -> tuple[Tensor, Tensor]:
        latent = model.encode(x)
        return latent, model.decode(latent)

    return encode_and_decode


def principal_component_code(model: MotionFeatureAutoencoder) -> Code:
    """Motion-weighted PCA of the latent's size, x -> (latent, reconstruction): what the model has to beat."""
    code = model.encoder.code
    basis = code.basis[:, : model.config["latent_dim"]]

    def encode_and_decode(x: Tensor) -> tuple[Tensor, Tensor]:
        latent = code.normalise(x) @ basis
        return latent, code.restore(latent @ basis.mT)

    return encode_and_decode


@torch.no_grad()
def fit_trust(model: MotionFeatureAutoencoder, clips: Iterable[Tensor], weights: Weights) -> None:
    """Set how much of the decoder's refinement to add: the share, in [0, 1], with the least error on held-out clips.

    A few hundred steps on a small data set teach a network its clips by heart; then the share falls to 0.
    """
    agreement = energy = 0.0
    for x in clips:
        linear, refinement = model.decoder.parts(model.encode(x))
        error = (x - model.encoder.code.restore(linear)) / model.encoder.code.scale
        for weight, e, r in ((weights[0], error, refinement), (weights[1], error.diff(dim=1), refinement.diff(dim=1))):
            agreement += weight * (e * r).sum().item() / max(e.shape[1], 1)
            energy += weight * r.square().sum().item() / max(e.shape[1], 1)
    agreement, energy = sum_over_ranks([agreement, energy])
    model.decoder.trust.fill_(min(max(agreement / energy, 0.0), 1.0) if energy else 1.0)


def weighted_error(means: dict[str, float], weights: Weights, use_token: bool) -> float:
    """What PCA is compared by; for motion alone, the error of the temporal differences."""
    return weights[0] * means["reconstruction"] + weights[1] * means["motion"] if use_token else means["motion"]


def describe(means: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in means.items() if name != "loss")


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves in --save_dir
# ---------------------------------------------------------------------------------------------------------------------


def epoch_path(save_dir: Path, epoch: int) -> Path:
    return save_dir / f"motion_ae_epoch{epoch}.pt"


def newest_checkpoint(save_dir: Path) -> Path | None:
    epochs = [re.fullmatch(r"motion_ae_epoch(\d+)\.pt", path.name) for path in save_dir.glob("motion_ae_epoch*.pt")]
    return epoch_path(save_dir, max(int(match[1]) for match in epochs if match)) if any(epochs) else None


def remove_outputs(save_dir: Path) -> None:
    for pattern in ("motion_ae_epoch*.pt", "motion_ae_best.pt", "metrics.csv", "loss_curves.png"):
        for path in save_dir.glob(pattern):
            path.unlink()


def find_start(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint to go on from; None to train from the start.

    Raises `UserError` where checkpoints of another run would be lost, or --resume would not give what it has begun.
    """
    try:
        args.save_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save_dir {args.save_dir} cannot be made: {error.strerror}") from None
    if not os.access(args.save_dir, os.W_OK):
        raise UserError(f"--save_dir {args.save_dir} cannot be written")
    remove_leftovers(args.save_dir)
    there = sorted(args.save_dir.glob("motion_ae_*.pt"))
    path = newest_checkpoint(args.save_dir) if args.resume is True else args.resume
    if there and not args.overwrite and (path is None or path.parent.resolve() != args.save_dir.resolve()):
        raise UserError(
            f"--save_dir {args.save_dir} holds {there[-1].name} of another run; go on with that run by --resume, give "
            "another --save_dir, or lose it by --overwrite"
        )
    if path is None:
        if args.resume:
            report(f"no checkpoint in {args.save_dir} yet: training from the start")
        return None
    checkpoint = load_checked(path)
    if not isinstance(checkpoint, dict) or not {"settings", "epoch", "history", "pca_mean"} <= checkpoint.keys():
        raise UserError(f"--resume {path}: no checkpoint of train.py, or of an older one")
    names = {"clips_per_step": "--batch_size times ranks", "fingerprint": "the fingerprint of --feature_dir"}
    for name, ours in settings.items():
        recorded = checkpoint["settings"].get(name)
        if ours != recorded:
            raise UserError(
                f"{names.get(name, f'--{name}')} {ours} contradicts {path}, begun with {recorded}; resume with what it "
                "was begun with, or train anew in another --save_dir"
            )
    if checkpoint["epoch"] == args.epochs:
        report(f"{path} is the last of {args.epochs} epochs: nothing left to do")
    elif "training" not in checkpoint:
        raise UserError(f"--resume {path}: only the newest checkpoint of a run can be gone on from")
    else:
        report(f"going on after epoch {checkpoint['epoch']} of {args.epochs}, from {path}")
    return checkpoint


def remove_training_state(path: Path) -> None:
    """Only the newest checkpoint needs it, and it is two thirds of a file."""
    if path.exists():
        checkpoint = load_checked(path, mmap=True)
        if checkpoint.pop("training", None):
            save_atomically(checkpoint, path)


def write_metrics(history: list[dict[str, float]], path: Path) -> None:
    """A row an epoch, as CSV: all names and numbers, so that nothing needs quotes."""
    lines = [",".join(map(str, line)) for line in (history[0], *(row.values() for row in history))]
    with whole_file(path) as file:
        file.write("\n".join([*lines, ""]).encode())


def draw_curves(history: list[dict[str, float]], measured_on: str, path: Path) -> None:
    """The loss and its terms over the epochs: of training, of the files measured on, and of PCA."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(10, 3), layout="constrained")
    for axes, term in zip(figure.subplots(1, 3), TERMS[:3], strict=True):
        axes.plot(epochs, [row[f"train_{term}"] for row in history], ".-", label="training, with dropout")
        axes.plot(epochs, [row[f"val_{term}"] for row in history], ".-", label=measured_on)
        axes.axhline(history[-1][f"pca_{term}"], color="gray", linestyle="--", label=f"{measured_on}, PCA")
        axes.set(title="loss" if term == "loss" else f"{term} error", xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=80)


def write_around(checkpoint: dict[str, Any], measured_on: str, save_dir: Path) -> None:
    """All that follows from the newest checkpoint in `save_dir`. A run that was killed in between has it all made again
    when it goes on."""
    history = checkpoint["history"]
    best = save_dir / "motion_ae_best.pt"
    if not best.exists() or history[-1]["val_loss"] < min((row["val_loss"] for row in history[:-1]), default=math.inf):
        save_atomically({name: value for name, value in checkpoint.items() if name != "training"}, best)
    write_metrics(history, save_dir / "metrics.csv")
    draw_curves(history, measured_on, save_dir / "loss_curves.png")
    remove_training_state(epoch_path(save_dir, checkpoint["epoch"] - 1))


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--feature_dir", type=Path, required=True, help="features, searched recursively")
    parser.add_argument("--save_dir", type=Path, default=Path("./checkpoints"), help="folder of the checkpoints")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        nargs="?",
        type=Path,
        const=True,
        metavar="PATH",
        help="go on with an interrupted run, from PATH or else the newest checkpoint in --save_dir, if there is one",
    )
    start.add_argument("--overwrite", action="store_true", help="throw away the checkpoints that --save_dir holds")
    add_model_flags(parser)
    parser.add_argument("--epochs", type=number(int, 1), default=10, help="passes over the training files")
    parser.add_argument("--batch_size", type=number(int, 1), default=2, help="clips a step, of each rank")
    parser.add_argument("--lr", type=number(float, 0), default=2e-4, help="peak learning rate")
    parser.add_argument("--weight_decay", type=number(float, 0), default=1e-4, help="AdamW's weight decay")
    parser.add_argument("--num_workers", type=number(int, 0), default=4, help="processes that read ahead")
    parser.add_argument("--recon_weight", type=number(float, 0), default=1.0, help="weight of the reconstruction")
    parser.add_argument("--motion_weight", type=number(float, 0), default=1.0, help="weight of temporal differences")
    parser.add_argument("--smooth_weight", type=number(float, 0), default=0.05, help="weight of latent smoothness")
    parser.add_argument(
        "--val_fraction", type=number(float, 0, 0.9), default=0.1, help="files held out, where there are at least 10"
    )
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16"], default="float32", help="bfloat16: faster steps, by autocast"
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of weights, split and order")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1...")
    return parser.parse_args(argv)


def fit_linear_path(
    model: MotionFeatureAutoencoder, clips: Clips, args: argparse.Namespace, device: torch.device
) -> None:
    """Rank 0 fits, on clips of all ranks' first batches; the others get what it found."""
    if rank() == 0:
        loader = make_loader(clips, args.batch_size * num_ranks(), FIT_POSITIONS, args, shuffled=True)
        model.encoder.code.fit(
            lambda: (x for x, _, _ in islice(batches(loader, device), FIT_BATCHES)),
            args.recon_weight,
            args.motion_weight,
        )
    if dist.is_initialized():
        for buffer in model.encoder.code.buffers():
            dist.broadcast(buffer, src=0)


def train_and_measure(
    trainer: Trainer,
    train_clips: Iterable[tuple[Tensor, int, int]],
    val_clips: Callable[[], Iterable[Tensor]],
    fit: bool,
) -> tuple[dict[str, float], dict[str, float]]:
    """An epoch: the means of training, and those of the averaged model, whose trust is fitted first if `fit`."""
    train_mean = trainer.train_epoch(train_clips)
    model = trainer.averaged.module.eval()
    if fit:
        fit_trust(model, val_clips(), trainer.weights)
    val_mean = measure(model, autoencoder_code(model), val_clips(), trainer.weights)
    check_finite(val_mean["loss"], trainer.lr)
    return train_mean, val_mean


def metrics_row(trainer: Trainer, epoch: int, means: dict[str, dict[str, float]], use_token: bool) -> dict[str, float]:
    """An epoch's row of metrics.csv. `means`: of training, of the averaged model on the files measured on, of PCA."""
    row = {f"{name}_{term}": value for name, terms in means.items() for term, value in terms.items()}
    ours, pca = (weighted_error(means[name], trainer.weights, use_token) for name in ("val", "pca"))
    return {
        "epoch": epoch,
        **row,
        "ratio": ours / pca if pca > 1e-6 else math.nan,
        "trust": trainer.averaged.module.decoder.trust.item(),
        "lr": trainer.optimizer.param_groups[0]["lr"],
    }


def main() -> int:
    args = parse_args()
    device = open_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # which NCCL and pinned memory go by
    join_ranks()
    files = from_first_rank(look_at_files(args.feature_dir, args.input_dim) if rank() == 0 else None)
    settings = {name: getattr(args, name) for name in RUN_FLAGS}
    settings["clips_per_step"] = args.batch_size * num_ranks()
    settings["fingerprint"] = fingerprint(files, args.feature_dir)
    train_files, val_files = split_files(files, args.val_fraction, args.seed)
    measured_on = "held out" if val_files else "training files"
    checkpoint = from_first_rank(find_start(args, settings) if rank() == 0 else None)
    if checkpoint and rank() == 0 and epoch_path(args.save_dir, checkpoint["epoch"]).exists():
        write_around(checkpoint, measured_on, args.save_dir)
    if checkpoint and checkpoint["epoch"] == args.epochs:
        return 0

    train_set = Clips(train_files, args.input_dim)
    val_set = Clips(val_files, args.input_dim) if val_files else train_set
    shapes = len({file.shape for file in train_files})
    where = f"{num_ranks()} x {device.type}" if num_ranks() > 1 else device
    report(f"{len(train_files)} training files, {len(val_files)} held out, {shapes} shapes; on {where}")
    train_loader, val_loader = (
        make_loader(clips, settings["clips_per_step"], positions, args, shuffled, num_ranks())
        for clips, positions, shuffled in ((train_set, STEP_POSITIONS, True), (val_set, FIT_POSITIONS, False))
    )

    torch.manual_seed(args.seed)
    block = min(MAX_BLOCK, max(file.shape[0] for file in train_files))
    model = MotionFeatureAutoencoder(**{name: getattr(args, name) for name in MODEL_FLAGS}, block=block).to(device)
    if checkpoint is None:
        fit_linear_path(model, train_set, args, device)
    trainer = Trainer(model, args, args.epochs * len(train_loader))

    def val_clips() -> Iterator[Tensor]:
        return (x for x, mine, _ in batches(val_loader, device) if mine)

    if checkpoint:
        trainer.go_on(checkpoint)
    else:
        pca_mean = measure(model, principal_component_code(model), val_clips(), trainer.weights)
        checkpoint = {"epoch": 0, "pca_mean": pca_mean, "history": []}
    pca_mean, history = checkpoint["pca_mean"], checkpoint["history"]
    report(f"errors in units of the features' variance; {measured_on}, motion-weighted PCA: {describe(pca_mean)}")

    about = {
        "config": model.config,
        "pca_mean": pca_mean,
        "settings": settings,
        "args": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "versions": {"python": sys.version.split()[0], "torch": str(torch.__version__)},
    }
    if args.overwrite and rank() == 0:
        remove_outputs(args.save_dir)
    for epoch in range(checkpoint["epoch"] + 1, args.epochs + 1):
        start = time.perf_counter()
        torch.manual_seed(args.seed + epoch + 1_000_003 * rank())  # with the order of clips, all chance of an epoch
        train_loader.batch_sampler.epoch = epoch
        train_mean, val_mean = train_and_measure(trainer, batches(train_loader, device), val_clips, bool(val_files))
        row = metrics_row(trainer, epoch, {"train": train_mean, "val": val_mean, "pca": pca_mean}, args.use_token)
        row["seconds"] = time.perf_counter() - start
        history.append(row)
        report(
            f"epoch {epoch}: train {describe(train_mean)} | {measured_on} {describe(val_mean)} | "
            + ("PCA makes no error" if math.isnan(row["ratio"]) else f"{row['ratio']:.3f} x PCA's error")
            + f" | trust {row['trust']:.2f} | {row['seconds']:.1f} s"
        )
        means = {"train_mean": train_mean, "val_mean": val_mean if val_files else None}
        weights = trainer.averaged.module.state_dict()
        checkpoint = {"model": weights, "epoch": epoch, "history": history, **means, **about}
        checkpoint["training"] = trainer.state()
        if rank() == 0:
            save_atomically(checkpoint, epoch_path(args.save_dir, epoch))
            write_around(checkpoint, measured_on, args.save_dir)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    run_script(main)
