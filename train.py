"""Train a motion autoencoder on a folder of features.

In: a folder of .pt, .pth or .npy files, each the feature [T, N, C] or [T, H, W, C] of a clip (vfm_feature.py's).
Out: <save_dir>/motion_ae_epoch{N}.pt after each epoch, for encode.py and `MotionFeatureAutoencoder.from_checkpoint`.

    python train.py --feature_dir ../dataset/vfm_features_motion_top100/VideoMAEv2 --use_token
    python train.py --feature_dir features --input_dim 352 --latent_dim 88 --epochs 100 --use_token
"""

from __future__ import annotations

import argparse
import math
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from losses import motion_autoencoder_loss
from model import (
    ArgumentParser,
    MotionFeatureAutoencoder,
    UserError,
    find_features,
    load_feature,
    number,
    open_device,
    run_script,
    save_atomically,
)

IN_MEMORY_BYTES = 2 * 1024**3  # feature sets up to this size are read once and kept
STEP_POSITIONS = 64  # of a clip, that a training step takes
FIT_POSITIONS = 256  # of a clip, that the linear path, and the error, is measured on
FIT_BATCHES = 128
MAX_BLOCK = 24  # time steps that are coded together: what vfm_feature.py gives by default, or half of it
MODEL_FLAGS = ("input_dim", "model_dim", "latent_dim", "num_heads", "num_layers", "dropout", "use_token")

Weights = tuple[float, float, float]  # of reconstruction, temporal difference, latent smoothness
Code = Callable[[Tensor], tuple[Tensor, Tensor]]  # x -> (latent, reconstruction)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


class FeatureFolder(Dataset):
    """The features of `paths`, each [T, N, C] in the dtype of its file; small sets are kept in memory.

    Opening it looks at every file's shape, and raises `UserError` for the first that is no feature of `input_dim`.
    """

    def __init__(self, paths: list[Path], input_dim: int) -> None:
        self.paths = paths
        self.input_dim = input_dim
        self.shapes: list[tuple[int, int]] = []  # (T, N) a file
        total_bytes = 0
        for path in paths:
            feature, _ = load_feature(path, input_dim, mmap=True)
            self.shapes.append((feature.shape[0], feature.shape[1:-1].numel()))
            total_bytes += feature.numel() * feature.element_size()
        self.kept = [self.read(path) for path in paths] if total_bytes <= IN_MEMORY_BYTES else None

    def read(self, path: Path) -> Tensor:
        feature, _ = load_feature(path, self.input_dim)
        return feature.flatten(1, -2)  # [T, N, C]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | str:
        """A file that has gone bad since the first look comes back as its error's text: a `UserError` raised in a
        loader process would reach the user as that process's traceback."""
        if self.kept is not None:
            return self.kept[index]
        try:
            return self.read(self.paths[index])
        except UserError as error:
            return str(error)


class EqualShapeBatches(Sampler[list[int]]):
    """Batches of indices of files of one (T, N), so that clips of different sizes train together; the last batch of a
    shape may be smaller. Shuffled by (seed, epoch) alone: any epoch's order can be had again. No seed: in order."""

    def __init__(self, shapes: list[tuple[int, int]], batch_size: int, seed: int | None = None) -> None:
        self.shapes, self.batch_size, self.seed, self.epoch = shapes, batch_size, seed, 0

    def __len__(self) -> int:
        return sum(-(-self.shapes.count(shape) // self.batch_size) for shape in set(self.shapes))

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.shapes)))
        shuffle = random.Random(f"{self.seed} {self.epoch}").shuffle if self.seed is not None else lambda _: None
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
        return iter(batches)


def stack_clips(clips: list[Tensor | str]) -> Tensor | str:
    """Clips [T, N, C] -> a batch [B, T, N, C]; the text of the first error among them instead."""
    errors = [clip for clip in clips if isinstance(clip, str)]
    return errors[0] if errors else torch.stack(clips)


def make_loader(folder: FeatureFolder, batch_size: int, num_workers: int, seed: int | None = None) -> DataLoader:
    workers = 0 if folder.kept is not None else num_workers
    return DataLoader(
        folder,
        batch_sampler=EqualShapeBatches(folder.shapes, batch_size, seed),
        num_workers=workers,
        collate_fn=stack_clips,
        persistent_workers=workers > 0,
    )


def batches(loader: DataLoader, device: torch.device) -> Iterator[Tensor]:
    """The loader's batches on `device`; raises the `UserError` of a file that could not be read."""
    for batch in loader:
        if isinstance(batch, str):
            raise UserError(batch)
        yield batch.to(device, non_blocking=True).float()  # float16 travels, float32 is computed with


def split_files(paths: list[Path], val_fraction: float, seed: int) -> tuple[list[Path], list[Path]]:
    """Training and held-out files: the same for the same files, fraction and seed. Below 10 files none is held out."""
    count = round(len(paths) * val_fraction) if len(paths) >= 10 else 0
    held_out = set(random.Random(seed).sample(paths, min(count, len(paths) - 1)))
    return [path for path in paths if path not in held_out], [path for path in paths if path in held_out]


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def sample_positions(x: Tensor, count: int) -> Tensor:
    """`count` random positions of x [B, T, N, C], at most: they are independent sequences and neighbours say nearly the
    same, so a step need not pay for all 1350 of a DINOv2 clip."""
    if x.shape[2] <= count:
        return x
    return x[:, :, torch.randperm(x.shape[2], device=x.device)[:count]]


def relative_loss(
    model: MotionFeatureAutoencoder, x: Tensor, reconstruction: Tensor, latent: Tensor, weights: Weights
) -> tuple[Tensor, dict[str, Tensor]]:
    """`motion_autoencoder_loss` in units of the features' variance: a change of scale changes no step and no figure."""
    scale = model.encoder.code.scale
    return motion_autoencoder_loss(x / scale, reconstruction / scale, latent, *weights)


class Means:
    """Running means over clips of named values."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count = 0

    def add(self, values: dict[str, Tensor], clips: int) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.item() * clips
        self.count += clips

    def values(self) -> dict[str, float]:
        return {name: total / self.count for name, total in self.sums.items()}


def train_epoch(
    model: MotionFeatureAutoencoder, clips: Iterable[Tensor], weights: Weights, step: Callable[[Tensor], None]
) -> dict[str, float]:
    """One pass over `clips`, `step` taking each batch's loss; the mean of the loss and its terms over clips."""
    model.train()
    means = Means()
    for x in clips:
        x = sample_positions(x, STEP_POSITIONS)
        output = model(x)
        loss, terms = relative_loss(model, x, output["reconstruction"], output["latent"], weights)
        step(loss)
        means.add({"loss": loss.detach(), **terms}, len(x))
    return means.values()


@torch.no_grad()
def measure(
    model: MotionFeatureAutoencoder,
    code: Code,
    clips: Iterable[Tensor],
    weights: Weights,
) -> dict[str, float]:
    """The mean loss and terms over `clips` of any `code`: x -> (latent, reconstruction)."""
    means = Means()
    for x in clips:
        latent, reconstruction = code(x)
        loss, terms = relative_loss(model, x, reconstruction, latent, weights)
        means.add({"loss": loss, **terms}, len(x))
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
    model.decoder.trust.fill_(min(max(agreement / energy, 0.0), 1.0) if energy else 1.0)


def describe(means: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in means.items() if name != "loss")


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input_dim", type=number(int, 1), default=768, help="channels C of the features")
    parser.add_argument("--model_dim", type=number(int, 1), default=384, help="width of encoder and decoder")
    parser.add_argument("--latent_dim", type=number(int, 2), default=192, help="channels of the latent")
    parser.add_argument("--num_heads", type=number(int, 1), default=8, help="attention heads")
    parser.add_argument("--num_layers", type=number(int, 1), default=2, help="transformer layers, each way")
    parser.add_argument("--dropout", type=number(float, 0, 1), default=0.1, help="dropout while training")
    parser.add_argument("--use_token", action="store_true", help="the encoder sees [x, delta_x], not delta_x alone")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--feature_dir", type=Path, required=True, help="features, searched recursively")
    parser.add_argument("--save_dir", type=Path, default=Path("./checkpoints"), help="folder of the checkpoints")
    add_model_flags(parser)
    parser.add_argument("--epochs", type=number(int, 1), default=10, help="passes over the training files")
    parser.add_argument("--batch_size", type=number(int, 1), default=2, help="clips a step")
    parser.add_argument("--lr", type=number(float, 0), default=2e-4, help="peak learning rate")
    parser.add_argument("--weight_decay", type=number(float, 0), default=1e-4, help="AdamW's weight decay")
    parser.add_argument("--num_workers", type=number(int, 0), default=4, help="processes that read ahead")
    parser.add_argument("--recon_weight", type=number(float, 0), default=1.0, help="weight of the reconstruction")
    parser.add_argument("--motion_weight", type=number(float, 0), default=1.0, help="weight of temporal differences")
    parser.add_argument("--smooth_weight", type=number(float, 0), default=0.05, help="weight of latent smoothness")
    parser.add_argument(
        "--val_fraction", type=number(float, 0, 0.9), default=0.1, help="files held out, where there are at least 10"
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of weights, split and order")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1...")
    return parser.parse_args(argv)


def compare(ours: dict[str, float], pca: dict[str, float], weights: Weights, use_token: bool) -> str:
    """The weighted error against PCA's; for motion alone, the error of the temporal differences."""
    ours_error, pca_error = (
        weights[0] * means["reconstruction"] + weights[1] * means["motion"] if use_token else means["motion"]
        for means in (ours, pca)
    )
    return f"{ours_error / pca_error:.3f} x PCA's error" if pca_error > 1e-6 else "PCA makes no error"


def main() -> int:
    args = parse_args()
    device = open_device(args.device)
    weights = (args.recon_weight, args.motion_weight, args.smooth_weight)
    torch.manual_seed(args.seed)

    train_paths, val_paths = split_files(find_features(args.feature_dir), args.val_fraction, args.seed)
    train_set, val_set = FeatureFolder(train_paths, args.input_dim), FeatureFolder(val_paths, args.input_dim)
    train_loader = make_loader(train_set, args.batch_size, args.num_workers, args.seed)
    val_loader = make_loader(val_set if val_paths else train_set, args.batch_size, args.num_workers)
    print(f"{len(train_set)} training files, {len(val_set)} held out, {len(set(train_set.shapes))} shapes; on {device}")
    flags = {name: getattr(args, name) for name in MODEL_FLAGS}
    block = min(MAX_BLOCK, max(steps for steps, _ in train_set.shapes))
    model = MotionFeatureAutoencoder(**flags, block=block).to(device)
    try:
        args.save_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save_dir {args.save_dir} cannot be made: {error.strerror}") from None

    def sample_clips() -> Iterator[Tensor]:
        torch.manual_seed(args.seed)  # the same positions each time
        for x in islice(batches(train_loader, device), FIT_BATCHES):
            yield sample_positions(x, FIT_POSITIONS)

    def val_clips() -> Iterator[Tensor]:
        torch.manual_seed(args.seed)
        for x in batches(val_loader, device):
            yield sample_positions(x, FIT_POSITIONS)

    model.encoder.code.fit(sample_clips, args.recon_weight, args.motion_weight)
    measured_on = "held out" if val_paths else "training files"
    pca_mean = measure(model, principal_component_code(model), val_clips(), weights)
    print(f"errors in units of the features' variance; {measured_on}, motion-weighted PCA: {describe(pca_mean)}")

    steps = args.epochs * len(train_loader)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.05 * steps + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    # the mean over the last tenth or so of the run generalises better than the last step's weights
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - min(1.0, 10 / steps)))

    def step(loss: Tensor) -> None:
        if not loss.isfinite():
            raise UserError(f"the loss is {loss.item()}; lower --lr (now {args.lr})")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(model)

    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        torch.manual_seed(args.seed + epoch)  # with the order of clips, all that is random in an epoch
        train_loader.batch_sampler.epoch = epoch
        progress = tqdm(train_loader, desc=f"epoch {epoch}", unit="batch", leave=False, disable=None)
        train_mean = train_epoch(model, batches(progress, device), weights, step)
        result = averaged.module.eval()
        if val_paths:
            fit_trust(result, val_clips(), weights)
        val_mean = measure(result, autoencoder_code(result), val_clips(), weights)
        print(
            f"epoch {epoch}: train {describe(train_mean)} | {measured_on} {describe(val_mean)} | "
            f"{compare(val_mean, pca_mean, weights, args.use_token)} | trust {result.decoder.trust.item():.2f} | "
            f"{time.perf_counter() - start:.1f} s"
        )
        checkpoint = {
            "model": result.state_dict(),
            "config": model.config,
            "epoch": epoch,
            "train_mean": train_mean,
            "val_mean": val_mean if val_paths else None,
            "pca_mean": pca_mean,
            "training": {  # what it takes to go on from here
                "model": model.state_dict(),
                "averaged_steps": averaged.n_averaged,
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            },
            "args": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "versions": {"python": sys.version.split()[0], "torch": str(torch.__version__)},
        }
        save_atomically(checkpoint, args.save_dir / f"motion_ae_epoch{epoch}.pt")
    return 0


if __name__ == "__main__":
    run_script(main)
