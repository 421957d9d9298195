"""How the autoencoder stands against linear algebra on features of your own.

In: a folder of features, as train.py takes it. The files whose name or `video` matches --held_out (else a seeded fifth)
are kept out of training; hold out whole sources where files come from several, or all codes look better than they are.
Out: a table of this autoencoder, its linear code without the networks, PCA, motion-weighted PCA and a linear space-time
code of the same size, on what was held out:
- reconstruction, motion: `FeatureErrors` over all held-out clips; total: the weighted sum of the mean squared errors
  relative to motion-weighted PCA's
- relations: the mean absolute change of the cosine between two tokens of a clip, from features to latent (of PCA with
  and without the features' mean, the better): all pairs, those within a time step, between steps, and pairs of the
  tenth of the tokens that moves most
- motion R2, content R2: how well a ridge regression, leaving one clip out, reads from the motion embedding at t and its
  change since t - 1 the log of the mean length of delta_x, and the mean of x over space (for PCA: of the mean latent).

With --camera FOLDER, of features [T, H, W, C] of stills under a camera of known motion, a second table. `camera`
[T, 4] in these files is what the camera did since the step before: right, down (cells), turn (radians), zoom (log). A
ridge regression from the embedding at t and its change, fitted on the stills that --held_out does not match, reads from
the embeddings of the others
- right, down, turn, zoom, and the log of the speed in cells: R2
- the sign of each, at steps that move by more than half the root mean square: the share that is right.
Flow: the cosine between the embedding's own channels right and down and the mean over the frame of `flow`
[T, H, W, 2] (right and down in cells), where the features that are held out have it. Rows beside ours: the mean over
space of features, of PCA, of differences, and three moments over five steps of the first (as in SemanticMoments).

With --ratios 4 8 16 32, a table of its own, of latents of a quarter to a 32nd of the channels: PCA, the closed form
(epoch 0) and the last epoch of train.py. --models FOLDER keeps what is trained, and goes on with what it holds.

With --student VIDEOS, another: does a latent serve as a target? Small networks see videos and learn the relations
between the tokens of a target: the features, or what each code makes of them at --ratios (else 4 16 32). The error of
each is the mean absolute difference between its cosines and those of features that are held out. A seed gives the same
first weights, clips and tokens whatever the target, so that the ratio to the error of the features' student has less
spread than the errors. VIDEOS has the files that the features' `video` names.

--json FILE adds these two tables to those in the file. --ablation adds what the trained autoencoder is worth without
each of its parts; --front PICTURE draws the errors of the linear code at several motion weights.

    python tests/bench_autoencoder.py ../dataset/vfm_features_motion_top100/VideoMAEv2
    python tests/bench_autoencoder.py features --held_out "^main" --latent_dim 88 --camera stills
    python tests/bench_autoencoder.py features --held_out "^main" --latent_dim 88 --ablation --front front.png
    python tests/bench_autoencoder.py features --held_out "^main" --ratios 4 8 16 32 --models runs --json figures.json
    python tests/bench_autoencoder.py features --held_out "^main" --student videos --models runs --json figures.json
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from losses import FeatureErrors, token_relations  # noqa: E402
from model import (  # noqa: E402  (the scripts are no installed package)
    MotionFeatureAutoencoder,
    UserError,
    cosine_transform,
    describe_motion_embedding,
    find_features,
    from_sequences,
    load_checked,
    load_feature,
    number,
    principal_components,
    run_script,
    to_sequences,
    weighted_moment,
    whole_file,
)
from train import split_files  # noqa: E402
from vfm_feature import Job, Sampling, decode_windows  # noqa: E402

FRONT = (1.0, 3.0, 10.0, 30.0)  # motion weights
SIZE_COLUMNS = ("reconstruction", "motion", "relations", "of moving")
RELATIONS = ("relations", "in a step", "between steps", "of moving")
TOKENS = 1000  # of a clip, whose relations are compared
PICTURE = (80, 120)  # height and width that students see
STUDENT_RATIOS = (4, 16, 32)
STUDENT_STEPS, STUDENT_TOKENS = 6, 300  # of a clip, that a student sees at a time, and whose relations it learns
STUDENT_CLIPS, STUDENT_RATE = 3, 1e-3  # of a training step: clips, and the peak learning rate
# x [1, T, ..., C] -> latent [1, T, ..., D], reconstruction, embedding [1, T, D]
Code = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def load(path: Path) -> Tensor:
    return load_feature(path)[0].float()[None]  # [1, T, N, C] or [1, T, H, W, C]


def split(paths: list[Path], pattern: str | None, seed: int) -> tuple[list[Path], list[Path]]:
    """Training and held-out files."""
    if pattern is None:
        return split_files(paths, 0.2, seed)
    held_out = [path for path in paths if re.search(pattern, load_feature(path, mmap=True)[1].get("video", path.name))]
    return [path for path in paths if path not in held_out], held_out


def train(paths: list[Path], flags: list[str], save_dir: Path) -> list[Path]:
    """The checkpoints of the epochs of train.py on `paths`, in order."""
    with tempfile.TemporaryDirectory() as folder:
        for index, path in enumerate(paths):
            (Path(folder) / f"{index:06d}{path.suffix}").symlink_to(path.resolve())
        command = [sys.executable, str(ROOT / "train.py"), "--feature_dir", folder, "--save_dir", str(save_dir)]
        subprocess.run([*command, *flags], check=True)
    return sorted(save_dir.glob("motion_ae_epoch*.pt"), key=lambda path: int(re.findall(r"\d+", path.name)[-1]))


def our_code(model: MotionFeatureAutoencoder) -> Code:
    def code(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output = model(x)
        return output["latent"], output["reconstruction"], output["motion_embedding"]

    return code


def pca_code(paths: list[Path], mean: Tensor, latent_dim: int, motion_weight: float, keep_mean: bool) -> Code:
    """PCA of each frame, by the eigenvectors of cov(x) + motion_weight * cov(delta_x); the latent without the mean's
    coefficients, or with them."""
    sequences = [to_sequences(load(path) - mean) for path in paths]  # [N, T, C] each
    basis = principal_components(weighted_moment(sequences, 1.0, motion_weight))[:, :latent_dim].float()

    def code(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        latent = (x - mean) @ basis
        return latent + keep_mean * (mean @ basis), latent @ basis.mT + mean, latent.flatten(2, -2).mean(dim=2)

    return code


def space_time_code(paths: list[Path], mean: Tensor, length: int, latent_dim: int, motion_weight: float) -> Code:
    """Cosine transform over the clip's time steps, PCA of each frequency, and of these coefficients the
    length * latent_dim of most weighted energy, laid out over the time steps by importance."""
    transform = cosine_transform(length, mean)
    covariance = torch.zeros(length, len(mean), len(mean))
    for path in paths:
        coefficients = (transform @ to_sequences(load(path) - mean)).transpose(0, 1)  # [T, N, C]
        covariance += coefficients.mT @ coefficients / coefficients.shape[1] / len(paths)
    energy, basis = torch.linalg.eigh(covariance)  # [T, C], [T, C, C]
    frequency = torch.arange(length) * torch.pi / length
    weighted = energy * (1 + motion_weight * (2 - 2 * frequency.cos()))[:, None]
    kept = weighted.flatten().argsort(descending=True)[: length * latent_dim]

    def code(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        coefficients = (transform @ to_sequences(x - mean)).transpose(0, 1) @ basis  # [T, N, C]
        numbers = coefficients.transpose(0, 1).flatten(1)[:, kept]  # [N, T * D]
        latent = from_sequences(numbers.unflatten(1, (length, latent_dim)), like=x)
        flat = torch.zeros(len(numbers), weighted.numel()).index_copy(1, kept, numbers)
        coefficients = flat.unflatten(1, weighted.shape).transpose(0, 1) @ basis.mT  # [T, N, C]
        reconstruction = from_sequences(transform.mT @ coefficients.transpose(0, 1), like=x) + mean
        return latent, reconstruction, latent.flatten(2, -2).mean(dim=2)

    return code


def with_change(embedding: Tensor) -> Tensor:
    """[T, D] -> what the probes read, [T - 1, 2 D]: the embedding and its change since the step before."""
    return torch.cat([embedding[1:], embedding.diff(dim=0)], dim=1).double()


def ridge(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Ridge regression from x [K, P] to y [K, Q], fitted."""
    mean, spread = x.mean(dim=0), x.std(dim=0).clamp_min(1e-9)
    x, penalty = (x - mean) / spread, 0.03 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(x.mT @ x + penalty, x.mT @ (y - y.mean(dim=0)))
    return lambda new: (new - mean) / spread @ weights + y.mean(dim=0)


def linear_code(paths: list[Path], config: dict[str, Any], weight: float, smooth: float) -> MotionFeatureAutoencoder:
    """The autoencoder as it is before its networks are trained."""
    model = MotionFeatureAutoencoder(**config).eval()
    model.code.fit([load(path)[0] for path in paths], 1.0, weight, smooth)
    return model


def without(model: MotionFeatureAutoencoder, *parts: str) -> MotionFeatureAutoencoder:
    """A copy of the model without these parts."""
    model = copy.deepcopy(model)
    if "encoder network" in parts:
        nn.init.zeros_(model.encoder.network.head.weight), nn.init.zeros_(model.encoder.network.head.bias)
    if "decoder network" in parts:
        nn.init.zeros_(model.decoder.network.head.weight), nn.init.zeros_(model.decoder.network.head.bias)
    if "gain and centre" in parts:
        model.code.gain.fill_(1.0), model.code.centre.zero_()
    if "guests" in parts:
        model.code.importance[..., model.code.latent_dim :] = 0
        model.code.source.copy_(model.code.arrange(model.code.size))
    return model


def ablation(model: MotionFeatureAutoencoder, paths: list[Path], weight: float) -> dict[str, Code]:
    """The model without each of its parts. Blocks of one cell are measured anew, without networks."""
    parts = ("encoder network", "decoder network", "gain and centre", "guests")
    codes = {f"without {part}": our_code(without(model, part)) for part in parts}
    cells = linear_code(
        paths, model.config | {"block": (model.config["block"][0], 1, 1)}, weight, 5 * model.code.smoothing.item()
    )
    return codes | {"without networks, blocks of one cell": our_code(cells)}


def draw_front(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Motion error over reconstruction error, a curve through the linear code's motion weights."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    front = {name: row for name, row in rows.items() if name.startswith("weight ")}
    points = [(row["reconstruction"], row["motion"]) for row in front.values()]
    axes.plot(*zip(*points, strict=True), "o-", label="ours, by --motion_weight")
    for name, point in zip(front, points, strict=True):
        axes.annotate(name.removeprefix("weight "), point, (2, 5), textcoords="offset points", fontsize=8)
    for name in ("PCA", "motion-weighted PCA", "linear space-time code"):
        if name in rows:
            axes.plot(rows[name]["reconstruction"], rows[name]["motion"], "s", label=name)
    axes.set(xlabel="reconstruction error", ylabel="motion error", xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


def probe(embeddings: list[Tensor], targets: list[Tensor]) -> float:
    """R2 of ridge regression from [e[t], e[t] - e[t - 1]] to [T - 1, Q], fitted without the clip that it reads."""
    inputs = [with_change(e) for e in embeddings]
    residual = total = 0.0
    for index, (x_out, y_out) in enumerate(zip(inputs, targets, strict=True)):
        x = torch.cat([x for i, x in enumerate(inputs) if i != index])
        y = torch.cat([y for i, y in enumerate(targets) if i != index]).double()
        residual += (y_out - ridge(x, y)(x_out)).square().sum().item()
        total += (y_out - y.mean(dim=0)).square().sum().item()
    return 1 - residual / total


def moments_over_time(x: Tensor) -> Tensor:
    """x [T, C] -> [T, 3 C]: mean, standard deviation and cube root of the third moment over five steps around each."""
    windows = torch.cat([x[:1]] * 2 + [x] + [x[-1:]] * 2).unfold(0, 5, 1)  # [T, C, 5]
    mean = windows.mean(dim=2)
    deviation = windows - mean[..., None]
    third = deviation.pow(3).mean(dim=2)
    return torch.cat([mean, deviation.square().mean(dim=2).sqrt(), third.sign() * third.abs().pow(1 / 3)], dim=1)


def camera_probe(embeddings: list[Tensor], cameras: list[Tensor], held_out: list[bool]) -> dict[str, float]:
    """How well a regression, fitted on the other stills, reads the `cameras` [T, 4] of held-out ones."""
    names = ("right", "down", "turn", "zoom")
    x = [with_change(embedding) for embedding in embeddings]
    moves = [camera[1:].double() for camera in cameras]  # [T - 1, 4]
    y = [torch.cat([move, move[:, :2].norm(dim=1, keepdim=True).clamp_min(0.01).log()], dim=1) for move in moves]

    def choose(parts: list[Tensor], out: bool) -> Tensor:
        return torch.cat([part for part, is_out in zip(parts, held_out, strict=True) if is_out == out])

    read, true = ridge(choose(x, False), choose(y, False))(choose(x, True)), choose(y, True)
    unread = (read - true).square().sum(dim=0) / (true - true.mean(dim=0)).square().sum(dim=0)
    row = dict(zip((*names, "log speed"), (1 - unread).tolist(), strict=True))
    enough = torch.cat(moves).square().mean(dim=0).sqrt() / 2
    for index, name in enumerate(names):
        moving = [move[:, index].abs() > enough[index] for move in moves]
        x_moving = [part[rows] for part, rows in zip(x, moving, strict=True)]
        signs = [move[rows, index : index + 1].sign() for move, rows in zip(moves, moving, strict=True)]
        read = ridge(choose(x_moving, False), choose(signs, False))(choose(x_moving, True))
        row[f"sign of {name}"] = (read.sign() == choose(signs, True)).double().mean().item()
    return row


@torch.inference_mode()
def camera_table(
    model: MotionFeatureAutoencoder, pca: Code, stills: list[Path], clips: list[Path], pattern: str | None
) -> dict[str, dict[str, float]]:
    """The rows of the second table: `stills` have a `camera`; held-out `clips` may have a `flow`."""
    names = describe_motion_embedding(model.config)
    motion = [index for index, name in enumerate(names) if not name.startswith("content")]

    def ours(x: Tensor) -> Tensor:  # [T, H, W, C] -> [T, D]
        return model.embed(model.encode(x[None]))[0]

    def differences(x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x[:1]), x.diff(dim=0)]).mean(dim=(1, 2))

    embeddings = {
        "motion_embedding": ours,
        "its motion channels": lambda x: ours(x)[:, motion],
        "mean of features": lambda x: x.mean(dim=(1, 2)),
        "mean of PCA": lambda x: pca(x.flatten(1, 2)[None])[2][0],
        "moments over time": lambda x: moments_over_time(x.mean(dim=(1, 2))),
        "mean of differences": differences,
    }
    test = split(stills, pattern, 0)[1]
    still_features = [load_feature(path)[0].float() for path in stills]
    cameras = [load_checked(path)["camera"] for path in stills]
    features = [load_feature(path)[0].float() for path in clips]
    contents = [x[1:].mean(dim=(1, 2)) for x in features]
    rows = {}
    for name, embed in embeddings.items():
        rows[name] = camera_probe([embed(x) for x in still_features], cameras, [path in test for path in stills])
        rows[name]["content R2"] = probe([embed(x) for x in features], contents)

    flows = [load_checked(path).get("flow") if path.suffix != ".npy" else None for path in clips]
    if all(flow is not None for flow in flows):
        flow = torch.cat([flow[1:].float().mean(dim=(1, 2)) for flow in flows]).flatten()
        seen = torch.cat([ours(x)[1:, motion[:2]] for x in features]).flatten()
        rows["motion_embedding"]["flow"] = torch.nn.functional.cosine_similarity(seen, flow, dim=0).item()
    return rows


def relation_errors(x: Tensor, latent: Tensor) -> dict[str, float]:
    """The mean absolute change of the cosines between tokens of a clip [1, T, ..., C], by kind of pair."""
    length, count = x.shape[1], x[0, ..., 0].numel()
    tokens = [part.flatten(0, -2) for part in (x, latent)]
    moves = torch.cat([torch.zeros_like(x[0, :1]), x[0].diff(dim=0)]).norm(dim=-1).flatten()
    fastest = moves.argsort(descending=True)[: max(2, count // 10)]
    some = torch.linspace(0, count - 1, min(TOKENS, count)).long()
    moving = fastest[torch.linspace(0, len(fastest) - 1, min(TOKENS // 2, len(fastest))).long()]
    step = some // (count // length)
    same = step[:, None] == step

    def change(chosen: Tensor) -> Tensor:  # [K, K]
        return (token_relations(tokens[0][chosen]) - token_relations(tokens[1][chosen])).abs()

    changes = change(some)
    others = same & ~torch.eye(len(some), dtype=torch.bool)
    return {
        "relations": changes.mean().item(),
        "in a step": changes[others].mean().item(),
        "between steps": changes[~same].mean().item(),
        "of moving": change(moving).mean().item(),
    }


@torch.inference_mode()
def evaluate(code: Code, paths: list[Path], motion_weight: float) -> dict[str, float]:
    """One row of the table."""
    errors, relations, totals = FeatureErrors(), [], []
    embeddings, lengths, contents = [], [], []
    for path in paths:
        x = load(path)
        latent, reconstruction, embedding = code(x)
        delta = x.diff(dim=1)
        errors.add(x, reconstruction)
        error = reconstruction - x
        totals.append((error.square().mean() + motion_weight * error.diff(dim=1).square().mean()).item())
        relations.append(relation_errors(x, latent))
        embeddings.append(embedding[0])
        lengths.append(delta.norm(dim=-1).flatten(2).mean(dim=2)[0, :, None].clamp_min(1e-9).log())  # [T - 1, 1]
        contents.append(x[0, 1:].flatten(1, -2).mean(dim=1))  # [T - 1, C]
    figures = errors.figures()
    return {
        "reconstruction": figures["reconstruction_error"],
        "motion": figures["motion_error"],
        "total": sum(totals) / len(totals),
        **{name: sum(row[name] for row in relations) / len(relations) for name in relations[0]},
        "motion R2": probe(embeddings, lengths),
        "content R2": probe(embeddings, contents),
    }


def print_table(rows: dict[str, dict[str, float]], title: str, digits: int = 3) -> None:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    print(f"\n| {title} | " + " | ".join(columns) + " |\n|" + " --- |" * (len(columns) + 1))
    for name, row in rows.items():
        cells = (f"{row[column]:.{digits}f}" if column in row else "" for column in columns)
        print(f"| {name} | " + " | ".join(cells) + " |")


def mean_token(paths: list[Path]) -> Tensor:
    return sum(load(path).double().flatten(0, -2).mean(dim=0) for path in paths).float() / len(paths)


def codes_to_compare(
    model: MotionFeatureAutoencoder, paths: list[Path], args: argparse.Namespace, equally_long: bool
) -> dict[str, Code]:
    """The rows of the table, by name; `paths`: what to measure them on."""
    latent_dim, weight = model.config["latent_dim"], args.motion_weight
    mean = mean_token(paths)
    codes = {
        "this autoencoder": our_code(model),
        "without its networks": our_code(without(model, "encoder network", "decoder network")),
    }
    for name, pca_weight in {"PCA": 0.0, "motion-weighted PCA": weight}.items():
        codes[name] = pca_code(paths, mean, latent_dim, pca_weight, False)
        codes[f"{name}, mean kept"] = pca_code(paths, mean, latent_dim, pca_weight, True)
    if equally_long:
        length = load(paths[0]).shape[1]
        codes["linear space-time code"] = space_time_code(paths, mean, length, latent_dim, weight)
    if args.ablation:
        codes |= ablation(model, paths, weight)
    for front_weight in FRONT if args.front else ():
        code = linear_code(paths, model.config, front_weight, args.smooth_weight)
        codes[f"weight {front_weight:g}"] = our_code(code)
    return codes


# ---------------------------------------------------------------------------------------------------------------------
# How far down, and does it serve as a target? (--ratios, --student)
# ---------------------------------------------------------------------------------------------------------------------


def codes_of_size(
    paths: list[Path], mean: Tensor, latent_dim: int, models: Path, flags: list[str]
) -> dict[str, tuple[Code, Callable[[Tensor], Tensor]]]:
    """What is compared at one size, and the encoder of each alone: PCA, and epoch 0 and the last epoch of train.py."""
    epochs = train(paths, [f"--latent_dim={latent_dim}", "--resume", *flags], models / f"latent_{latent_dim}")
    if epochs[0].name != "motion_ae_epoch0.pt" or len(epochs) < 2:
        raise UserError(f"{epochs[0].parent} lacks epoch 0 or those after it; train with --epochs 1 or more")
    pca = pca_code(paths, mean, latent_dim, 0.0, True)
    codes = {"PCA": (pca, lambda x: pca(x)[0])}
    for name, path in {"closed form": epochs[0], "trained": epochs[-1]}.items():
        model = MotionFeatureAutoencoder.from_checkpoint(path)
        codes[name] = our_code(model), model.encode
    return codes


def read_frames(path: Path, videos: Path) -> Tensor:
    """The frames that a feature file [T, H, W, C] was made of, the first of each step: uint8 [T, 3, *PICTURE].

    They are spread evenly over the clip. Where the file does not say how many they were, they are two a step.
    """
    feature, about = load_feature(path, mmap=True)
    video, indices = videos / about.get("video", ""), about.get("frame_indices")
    if feature.ndim != 4 or not video.is_file():
        raise UserError(f"{path}: --student needs features [T, H, W, C], and their `video` in {videos}")
    count = len(indices) if indices else 2 * len(feature)
    job = Job(str(video), [(about.get("start"), about.get("end"))])
    ((window, frames),) = filter(None, decode_windows(job, Sampling(count, (PICTURE,)), "pyav"))
    if count % len(feature) or (indices and tuple(indices) != window.frame_indices):
        raise UserError(f"{path}: --student needs features of frames that are spread evenly over the clip")
    pictures = torch.from_numpy(frames[PICTURE][:: count // len(feature)])
    return pictures.round().clamp(0, 255).byte().permute(0, 3, 1, 2).contiguous()


class Student(nn.Module):
    """A small video network of 0.9 million weights, which halves time as generators of video do.

    uint8 [B, T, 3, *PICTURE] -> [B, T / 2 (rounded up), *grid, 64].
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.frames = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=4, padding=2), nn.GELU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU()
        )
        self.clips = nn.Sequential(
            *(nn.Conv3d(64, 128, 3, stride=(2, 1, 1), padding=1), nn.GELU()),
            *(nn.Conv3d(128, 128, 3, padding=1), nn.GELU(), nn.Conv3d(128, 64, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        maps = self.frames(x.flatten(0, 1) / 128 - 1)  # [B T, 64, 10, 15]
        maps = self.clips(maps.unflatten(0, x.shape[:2]).transpose(1, 2))  # [B, 64, T / 2, 10, 15]
        return F.interpolate(maps, (maps.shape[2], *self.grid), mode="trilinear").movedim(1, -1)


def relation_change(a: Tensor, b: Tensor) -> Tensor:
    """The mean absolute difference of the cosines between the tokens of a clip: a [B, K, C], b [B, K, D]."""
    return (token_relations(a) - token_relations(b)).abs().mean()


def train_student(frames: list[Tensor], targets: list[Tensor], steps: int, seed: int) -> Student:
    """A student of the relations between the tokens of `targets` [T, H, W, D], trained on `frames`.

    All chance is the seed's and the same for all targets.
    """
    chance = torch.Generator().manual_seed(seed)  # other students are trained at the same time
    student = Student(tuple(targets[0].shape[1:3]))
    for weights in student.parameters():
        if weights.ndim > 1:
            nn.init.kaiming_uniform_(weights, generator=chance)
        else:
            nn.init.zeros_(weights)
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, STUDENT_RATE, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randperm(len(frames), generator=chance)[:STUDENT_CLIPS].tolist()
        spare = max(0, len(frames[0]) - STUDENT_STEPS)
        starts = torch.randint(spare + 1, (len(chosen),), generator=chance).tolist()
        x = torch.stack([frames[i][at : at + STUDENT_STEPS] for i, at in zip(chosen, starts, strict=True)])
        y = torch.stack([targets[i][at : at + STUDENT_STEPS : 2] for i, at in zip(chosen, starts, strict=True)])
        y = y.float().flatten(1, 3)  # [B, K, D]
        tokens = torch.randperm(y.shape[1], generator=chance)[:STUDENT_TOKENS]
        loss = relation_change(student(x).flatten(1, 3)[:, tokens], y[:, tokens])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return student


@torch.inference_mode()
def student_error(student: nn.Module, frames: list[Tensor], features: list[Tensor]) -> float:
    """The mean absolute difference of the student's cosines between tokens and those of `features` [T, H, W, C], over
    all that a student sees at a time: each clip from its start, without the steps that are left over."""
    errors = []
    for x, y in zip(frames, features, strict=True):
        size = min(len(x), STUDENT_STEPS)
        x, y = (part[: len(x) // size * size].unflatten(0, (-1, size)) for part in (x, y))
        errors.append(relation_change(student(x).flatten(1, 3), y[:, ::2].float().flatten(1, 3)).item())
    return sum(errors) / len(errors)


def student_table(
    targets: dict[str, list[Tensor]], frames: list[Tensor], held_out: tuple[list[Tensor], list[Tensor]], args: Any
) -> dict[str, dict[str, float]]:
    """The error of students of each of the `targets`, the first of which are the features, and its ratio to theirs:
    means over seeds and standard deviations. `held_out`: frames and features."""

    def error_of(seed: int, name: str) -> float:
        start = time.perf_counter()
        student = train_student(frames, targets[name], args.student_steps, seed)
        error = student_error(student, *held_out)
        print(f"seed {seed}, {name}: {error:.4f} | {time.perf_counter() - start:.0f} s", flush=True)
        return error

    torch.set_num_threads(1)  # for each of the threads
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        by_seed = [[pool.submit(error_of, seed, name) for name in targets] for seed in range(args.student_seeds)]
    errors = torch.tensor([[job.result() for job in jobs] for jobs in by_seed])  # [seeds, targets]
    ratios = errors / errors[:, :1]
    figures = zip(targets, errors.T, ratios.T, strict=True)
    return {
        name: {
            "error": error.mean().item(),
            "its spread": error.std().item(),
            "over the features'": ratio.mean().item(),
            "the ratio's spread": ratio.std().item(),
        }
        for name, error, ratio in figures
    }


def compare_sizes(
    train_paths: list[Path], held_out: list[Path], models: Path, args: argparse.Namespace, flags: list[str]
) -> None:
    """The tables of --ratios and --student."""
    if args.student:
        features = [[load_feature(path, mmap=True)[0] for path in paths] for paths in (train_paths, held_out)]
        frames = [[read_frames(path, args.student) for path in paths] for paths in (train_paths, held_out)]
        if len({x.shape for part in features for x in part}) > 1:
            raise UserError("--student needs features of one shape")
    channels, mean = load(train_paths[0]).shape[-1], mean_token(train_paths)
    codes = {}
    for ratio in args.ratios or STUDENT_RATIOS:
        sizes = codes_of_size(train_paths, mean, channels // ratio, models, flags)
        codes |= {f"C/{ratio}, {name}": code for name, code in sizes.items()}
    if args.ratios:
        rows = {name: evaluate(code, held_out, args.motion_weight) for name, (code, _) in codes.items()}
        rows = {name: {column: row[column] for column in SIZE_COLUMNS} for name, row in rows.items()}
        print_table(rows, "latent")
        add_figures(args.json, sizes=rows)
    if args.student:
        targets = {"features": features[0]}
        with torch.inference_mode():
            for name, (_, encode) in codes.items():
                targets[name] = [encode(load(path))[0].half() for path in train_paths]
        rows = student_table(targets, frames[0], (frames[1], features[1]), args)
        print_table(rows, "target", digits=4)
        add_figures(args.json, student=rows)


def add_figures(path: Path | None, **tables: dict[str, dict[str, float]]) -> None:
    """Write tables into a JSON file, which keeps its others."""
    if path:
        others = json.loads(path.read_text()) if path.exists() else {}
        with whole_file(path) as file:
            file.write(json.dumps(others | tables, indent=1).encode() + b"\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("feature_dir", type=Path)
    parser.add_argument("--held_out", help="regular expression of the `video` (or file name) of the files to hold out")
    parser.add_argument("--checkpoint", type=Path, help="a model trained on the other files, in place of training one")
    parser.add_argument("--latent_dim", type=int, help="default: a quarter of the features' channels")
    parser.add_argument("--motion_weight", type=float, default=1.0)
    parser.add_argument("--camera", type=Path, help="folder of features of stills under a camera of known motion")
    parser.add_argument("--smooth_weight", type=float, default=0.05)
    parser.add_argument("--ablation", action="store_true", help="what each part is worth")
    parser.add_argument("--front", type=Path, metavar="PICTURE", help="the linear code at several motion weights")
    parser.add_argument(
        "--ratios", type=number(int, 1), nargs="+", help="how many channels there are to one of the latent"
    )
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="where the models of --ratios are kept")
    parser.add_argument("--student", type=Path, metavar="VIDEOS", help="folder of the videos of the features")
    parser.add_argument("--student_steps", type=number(int, 1), default=720, help="training steps of a student")
    parser.add_argument("--student_seeds", type=number(int, 2), default=3, help="students of each target")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the tables are kept")
    parser.add_argument("--seed", type=int, default=0)
    args, flags = parser.parse_known_args()  # the others are train.py's

    train_paths, held_out = split(find_features(args.feature_dir), args.held_out, args.seed)
    if not train_paths or len(held_out) < 2:
        raise UserError(f"{len(train_paths)} files to train on, {len(held_out)} held out; change --held_out")
    lengths = {load_feature(path, mmap=True)[0].shape[0] for path in train_paths + held_out}
    input_dim = load(train_paths[0]).shape[-1]
    settings = {"input_dim": input_dim, "seed": args.seed}
    settings |= {"motion_weight": args.motion_weight, "smooth_weight": args.smooth_weight}
    flags += ["--use_token", *(f"--{name}={value}" for name, value in settings.items())]
    with tempfile.TemporaryDirectory() as folder:
        if args.ratios or args.student:
            compare_sizes(train_paths, held_out, args.models or Path(folder), args, flags)
            return 0
        start = time.perf_counter()
        latent_dim = args.latent_dim or input_dim // 4
        path = args.checkpoint or train(train_paths, [f"--latent_dim={latent_dim}", *flags], Path(folder))[-1]
        model = MotionFeatureAutoencoder.from_checkpoint(path)
    seconds = time.perf_counter() - start

    codes = codes_to_compare(model, train_paths, args, len(lengths) == 1)
    rows = {name: evaluate(code, held_out, args.motion_weight) for name, code in codes.items()}
    for name in ("PCA", "motion-weighted PCA"):
        kept = rows.pop(f"{name}, mean kept")
        rows[name] |= {column: min(rows[name][column], kept[column]) for column in RELATIONS}
    reference = rows["motion-weighted PCA"]["total"]
    for row in rows.values():
        row["total"] /= reference

    sizes = f"{input_dim} -> {model.config['latent_dim']} channels"
    print(f"\n{len(train_paths)} files trained on, {len(held_out)} held out; {sizes}; training: {seconds:.0f} s")
    print_table(rows, "code")
    if args.camera:
        stills = find_features(args.camera)
        print_table(camera_table(model, codes["PCA"], stills, held_out, args.held_out), "embedding", digits=2)
    if args.front:
        draw_front(rows, args.front)
    return 0


if __name__ == "__main__":
    run_script(main)
