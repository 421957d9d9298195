"""How the autoencoder stands against PCA on features of your own, and how long that takes.

In: a folder of features, as for train.py. The files whose `video` matches --held_out (by default a random fifth, fixed
by --seed) are kept out of training. If files come from several sources, hold out whole sources, or all codes look
better than they are.
Out: tables of errors on the held-out files, for latents of C / 4 channels or of the ratios in --ratios. Rows:
motion-weighted PCA, low-pass PCA (see train.py's `PrincipalComponents`), the closed form (linear code on PCA's basis),
epoch 0 of train.py (linear code on the turned basis), the trained model (its best epoch) and the last epoch. Columns:
- reconstruction, motion: `FeatureErrors` over all held-out clips; total: the weighted sum of the mean squared errors,
  relative to PCA's
- relations, of moving: the mean absolute change, from features to latent, of the cosine between two tokens of a clip;
  over 512 tokens, and over 512 of the tenth of the tokens that moves most (columns of train.py's `measure`)
- noise 0.1, noise 0.3: reconstruction and motion error when noise is added to the latent, with this share of each
  channel's standard deviation; our decoder is told the noise level
- camera right, down, turn, zoom, with --camera: R2 on the held-out stills of the first folder, of the embedding's
  channels of these names (a small latent has fewer), and of the same channels made from PCA's latent.

--camera FOLDER ... adds a table for the motion embedding per folder of features [T, H, W, C] of stills under a known
camera motion. `camera` [T, 4] in these files is the camera's motion since the previous step: right, down (cells), turn
(radians), zoom (log). Columns:
- right, down, turn, zoom, log speed (of the speed in cells): R2 of a ridge regression from the embedding at t and its
  change, fitted on the stills that --held_out does not match and tested on the others. In the row "named channels": R2
  of the embedding's channels of these names, without a regression
- sign of each: the share of correct signs, at steps that move by more than half the root mean square
- content, change: R2, leaving one held-out clip out, for the mean of x over space and for the mean size of its change
- flow: the cosine between the channels picture right, down and the mean of `flow` [T, H, W, 2] (cells)
- background right, down: the correlation of camera right, down with `background` [T, 4] (cells) of held-out clips, at
  the steps where `agree` [T] is above 0.5; at rest: the root mean square of camera right, down in the clips whose
  background moves by less than 0.01 cells a step.
Rows besides ours: the mean over space of features, of PCA, of differences, and three moments over five steps of the
features' mean over space (as in SemanticMoments).

--student VIDEOS makes a different table instead: can a latent replace features as a training target? Small networks
(students) see videos and learn the relations between the tokens of a target: the features, or each code's latents at
--ratios (default: 4 16 32). A student's error is the mean absolute difference between its cosines and those of held-out
features. A seed fixes initial weights, clips and tokens for all targets, so the ratio to the error of the features'
student varies less than the errors. VIDEOS holds the files that the features' `video` names.

--models FOLDER keeps the checkpoints, and resumes from those it holds. --json FILE adds the tables to that file.
--ablation adds the errors of the closed form without each of its parts; --front PICTURE plots its errors at several
motion weights; --sheet FEATURE VIDEO draws the README's picture beside FEATURE, with a title from FEATURE's entries.
All other flags are passed to train.py.

    python tests/bench_autoencoder.py ../dataset/vfm_features_motion_top100/VideoMAEv2
    python tests/bench_autoencoder.py features --held_out "^main" --ratios 4 8 16 32 --camera stills --json figures.json
    python tests/bench_autoencoder.py features --held_out "^main" --student videos --models runs --json figures.json
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from encode import encode_clip, write_preview  # noqa: E402
from losses import COMPARED, FeatureErrors, compare, token_relations  # noqa: E402
from model import (  # noqa: E402  (the scripts are not an installed package)
    FRAME_MOTION,
    MotionFeatureAutoencoder,
    UserError,
    describe_motion_embedding,
    load_checked,
    load_feature,
    motion_channels,
    number,
    run_script,
    save_atomically,
)
from train import (  # noqa: E402
    LOW_PASS,
    Clips,
    FeatureFile,
    PrincipalComponents,
    fit_code,
    look_at_files,
    measure,
    measure_spread,
    sample_latents,
    split_files,
)
from vfm_feature import Clip, Sampling, decode_windows  # noqa: E402

FRONT = (1.0, 3.0, 10.0, 30.0)  # motion weights
NOISE = (0.1, 0.3)  # standard deviation, as a share of each channel's
PICTURE = (80, 120)  # height and width of the frames that students see
STUDENT_RATIOS = (4, 16, 32)
STUDENT_STEPS, STUDENT_TOKENS = 6, 300  # per clip: steps seen at a time, tokens whose relations are learned
STUDENT_CLIPS, STUDENT_RATE = 3, 1e-3  # clips in a training step; peak learning rate
Row = dict[str, float]


# ---------------------------------------------------------------------------------------------------------------------
# Codes of several sizes
# ---------------------------------------------------------------------------------------------------------------------


def split(files: list[FeatureFile], pattern: str | None, seed: int) -> tuple[list[FeatureFile], list[FeatureFile]]:
    """Training and held-out files."""
    if pattern is None:
        return split_files(files, 0.2, seed)
    held_out = [file for file in files if re.search(pattern, Path(file.video).name)]
    return [file for file in files if file not in held_out], held_out


def train(files: list[FeatureFile], flags: list[str], save_dir: Path) -> list[Path]:
    """Run train.py on `files`. Returns the checkpoints of its epochs, in order."""
    with tempfile.TemporaryDirectory() as folder:
        for index, file in enumerate(files):
            (Path(folder) / f"{index:06d}{file.path.suffix}").symlink_to(file.path.resolve())
        command = [sys.executable, str(ROOT / "train.py"), "--feature_dir", folder, "--save_dir", str(save_dir)]
        subprocess.run([*command, *flags], check=True)
    epochs = sorted(save_dir.glob("motion_ae_epoch*.pt"), key=lambda path: int(re.findall(r"\d+", path.name)[-1]))
    if epochs[0].name != "motion_ae_epoch0.pt" or len(epochs) < 2:
        raise UserError(f"{save_dir} lacks epoch 0 or those after it; train with --epochs 1 or more, all of them kept")
    return epochs


@torch.no_grad()
def noise_errors(
    model: MotionFeatureAutoencoder, pca: PrincipalComponents, sample: list[Tensor], clips: Iterable[Tensor]
) -> dict[str, Row]:
    """Reconstruction and motion errors of the trained model and of PCA with noise on the latent, as a generator that
    predicts latents makes it: `NOISE` times each channel's spread. The model's decoder is told the noise level.
    `sample`: the clips on which the spread of PCA's latent is measured."""
    chance = torch.Generator().manual_seed(0)
    errors = {noise: {name: FeatureErrors() for name in ("trained", "PCA")} for noise in NOISE}
    pca_spread = torch.cat([pca.encode(x[None]).flatten(0, -2) for x in sample]).std(dim=0)
    for x in clips:
        latent, theirs = model.encode(x), pca.encode(x)
        for noise, found in errors.items():
            normal = torch.randn(latent.shape, generator=chance) * noise
            found["trained"].add(x, model.decode(latent + normal * model.latent_var.sqrt(), noise))
            found["PCA"].add(x, pca.decode(theirs + normal * pca_spread))
    return {
        name: {
            f"noise {noise}: {kind}": found[name].figures()[f"{kind}_error"]
            for noise, found in errors.items()
            for kind in ("reconstruction", "motion")
        }
        for name in ("trained", "PCA")
    }


class Codes:
    """The codes compared at one latent size, by name in `all`: PCA, low-pass PCA, the closed form, epoch 0, the
    trained model, the last epoch."""

    def __init__(
        self, files: list[FeatureFile], held_out: Clips, latent_dim: int, args: argparse.Namespace, flags: list[str]
    ) -> None:
        self.held_out, self.seed = held_out, args.seed
        self.weights = (1.0, args.motion_weight, args.smooth_weight, 0.0)
        self.sample = Clips(files).to_fit(args.seed, "cpu")
        epochs = train(files, [f"--latent_dim={latent_dim}", "--resume", *flags], args.models / f"latent_{latent_dim}")
        paths = {"epoch 0": epochs[0], "trained": epochs[0].with_name("motion_ae_best.pt"), "last epoch": epochs[-1]}
        models = {name: MotionFeatureAutoencoder.from_checkpoint(path) for name, path in paths.items()}
        self.seconds = sum(row["seconds"] for row in load_checked(epochs[-1])["history"])
        sizes = {"PCA": latent_dim, "low-pass PCA": min(LOW_PASS * latent_dim, args.input_dim)}
        code = models["epoch 0"].code
        self.all = {name: PrincipalComponents(code, self.sample, self.weights, size) for name, size in sizes.items()}
        self.all |= {"closed form": self.closed_form(models["epoch 0"].config, args.motion_weight), **models}
        self.pca_errors = self.errors(self.all["PCA"])

    def errors(self, code: Any) -> Row:
        return measure(code, self.held_out.to_measure(self.seed, "cpu"), self.weights)

    def row(self, code: Any) -> Row:
        errors = self.errors(code)
        total = compare(errors, self.pca_errors, self.weights)["total"]
        return {name: errors[column] for name, column in COMPARED.items()} | {"total": total}

    def rows(self) -> dict[str, Row]:
        rows = {name: self.row(code) for name, code in self.all.items()}
        clips = self.held_out.to_measure(self.seed, "cpu")
        for name, errors in noise_errors(self.all["trained"], self.all["PCA"], self.sample, clips).items():
            rows[name] |= errors
        return rows

    def closed_form(self, config: dict[str, Any], motion_weight: float) -> MotionFeatureAutoencoder:
        model = MotionFeatureAutoencoder(**config).eval()
        fit_code(model.code, self.sample, 1.0, motion_weight, self.weights[2])
        measure_spread(model, sample_latents(model, self.sample))
        return model

    def ablation(self) -> dict[str, MotionFeatureAutoencoder]:
        """The closed form without each of its parts."""
        whole = self.all["closed form"]
        block = whole.config["block"]
        models = {name: copy.deepcopy(whole) for name in ("mix", "extras", "smoothing")}
        unmixed, size = models["mix"].code, whole.code.mix.diagonal().square().mean().sqrt()
        unmixed.mix, unmixed.unmix = size * torch.eye(len(unmixed.mix)), torch.eye(len(unmixed.mix)) / size
        models["extras"].code.energy[..., whole.config["latent_dim"] :] = 0
        models["smoothing"].code.smoothing.zero_()
        for model in models.values():
            model.code.slots_of.clear()
        for name, size in {"blocks of space": (block[0], 1, 1), "blocks of time": (1, *block[1:])}.items():
            models[name] = self.closed_form(whole.config | {"block": size}, self.weights[1])
        return {f"closed form without {part}": model for part, model in models.items()}


def draw_front(rows: dict[str, Row], path: Path) -> None:
    """Plot motion error over reconstruction error, with a curve for the closed form at several motion weights."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    front = {name: row for name, row in rows.items() if name.startswith("weight ")}
    points = [(row["reconstruction"], row["motion"]) for row in front.values()]
    axes.plot(*zip(*points, strict=True), "o-", label="ours, by --motion_weight")
    for name, point in zip(front, points, strict=True):
        axes.annotate(name.removeprefix("weight "), point, (6, 4), textcoords="offset points", fontsize=8)
    for name in ("PCA", "low-pass PCA"):
        axes.plot(rows[name]["reconstruction"], rows[name]["motion"], "s", label=name)
    axes.set(xlabel="reconstruction error", ylabel="motion error", xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


def draw_sheet(model: MotionFeatureAutoencoder, path: Path, video: Path) -> None:
    """Draw the preview of a feature file, its latent and the frames of its video."""
    feature, about = load_feature(path)
    sampling = Sampling(2 * len(feature), ((320, 480),))
    ((_, frames),) = filter(None, decode_windows(str(video), [Clip(video)], sampling))
    result = encode_clip(model, feature.float())
    write_preview(path, feature.float(), result["latent"], frames[320, 480], about | result)


# ---------------------------------------------------------------------------------------------------------------------
# The embedding (--camera)
# ---------------------------------------------------------------------------------------------------------------------


def with_change(embedding: Tensor) -> Tensor:
    """[T, D] -> what the probes read, [T - 1, 2 D]: the embedding and its change since the step before."""
    return torch.cat([embedding[1:], embedding.diff(dim=0)], dim=1).double()


def ridge(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Fit a ridge regression from x [K, P] to y [K, Q]. Returns the function that predicts y."""
    mean, spread = x.mean(dim=0), x.std(dim=0).clamp_min(1e-9)
    x, penalty = (x - mean) / spread, 0.03 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(x.mT @ x + penalty, x.mT @ (y - y.mean(dim=0)))
    return lambda new: (new - mean) / spread @ weights + y.mean(dim=0)


def probe(embeddings: list[Tensor], targets: list[Tensor]) -> float:
    """Leave-one-clip-out R2 of ridge regression from [e[t], e[t] - e[t - 1]] to `targets`, [T - 1, Q] of each clip."""
    inputs = [with_change(e) for e in embeddings]
    residual = total = 0.0
    for index, (x_out, y_out) in enumerate(zip(inputs, targets, strict=True)):
        x = torch.cat([x for i, x in enumerate(inputs) if i != index])
        y = torch.cat([y for i, y in enumerate(targets) if i != index]).double()
        residual += (y_out - ridge(x, y)(x_out)).square().sum().item()
        total += (y_out - y.mean(dim=0)).square().sum().item()
    return 1 - residual / total


def moments_over_time(x: Tensor) -> Tensor:
    """x [T, C] -> [T, 3 C]: mean, standard deviation and cube root of the third moment over the five steps around t."""
    windows = torch.cat([x[:1]] * 2 + [x] + [x[-1:]] * 2).unfold(0, 5, 1)  # [T, C, 5]
    mean = windows.mean(dim=2)
    deviation = windows - mean[..., None]
    third = deviation.pow(3).mean(dim=2)
    return torch.cat([mean, deviation.square().mean(dim=2).sqrt(), third.sign() * third.abs().pow(1 / 3)], dim=1)


def camera_probe(embeddings: list[Tensor], cameras: list[Tensor], held_out: list[bool]) -> dict[str, float]:
    """How well a regression predicts the `cameras` [T, 4] of the held-out stills, fitted on the other stills."""
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


def camera_r2(motions: list[Tensor], names: list[str], cameras: list[Tensor]) -> Row:
    """R2 of the `cameras` [T, 4] as channels [T, D] with these `names` say them, as far as there are such channels."""
    channels = [names.index(name) for name in FRAME_MOTION[:4] if name in names]
    read = torch.cat([-motion[1:, channels] for motion in motions])  # the picture moves against the camera
    true = torch.cat([camera[1:, : len(channels)] for camera in cameras])
    unread = (read - true).square().sum(dim=0) / (true - true.mean(dim=0)).square().sum(dim=0)
    return dict(zip(("right", "down", "turn", "zoom"), (1 - unread).tolist(), strict=False))


@torch.inference_mode()
def read_camera(code: MotionFeatureAutoencoder | PrincipalComponents, stills: list[FeatureFile]) -> Row:
    """`camera_r2` of a model's embedding, or of `motion_channels` of PCA's latents, each channel divided by its
    spread."""
    features = [load_feature(file.path)[0][None].float() for file in stills]
    cameras = [load_checked(file.path)["camera"].float() for file in stills]
    if isinstance(code, MotionFeatureAutoencoder):
        motions = [code.embed(code.encode(x))[0] for x in features]
        return camera_r2(motions, describe_motion_embedding(code.config), cameras)
    maps = [code.encode(x) - code.mean(x.shape) for x in features]
    spread = torch.cat([x.flatten(0, -2) for x in maps]).std(dim=0)
    return camera_r2([motion_channels(x / spread)[0] for x in maps], list(FRAME_MOTION), cameras)


@torch.inference_mode()
def camera_table(
    model: MotionFeatureAutoencoder, pca: PrincipalComponents, stills: Path, clips: list[FeatureFile], pattern: str
) -> dict[str, Row]:
    """The table of --camera. Files in `stills` have `camera`; held-out `clips` may have `flow` or `background`."""
    names = describe_motion_embedding(model.config)
    motion = [index for index, name in enumerate(names) if not name.startswith("content")]

    def ours(x: Tensor) -> Tensor:  # [T, H, W, C] -> [T, D]
        return model.embed(model.encode(x[None]))[0]

    def differences(x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x[:1]), x.diff(dim=0)]).mean(dim=(1, 2))

    embeddings = {
        "motion_embedding": ours,
        "mean of features": lambda x: x.mean(dim=(1, 2)),
        "mean of PCA": lambda x: pca.encode(x[None])[0].mean(dim=(1, 2)),
        "moments over time": lambda x: moments_over_time(x.mean(dim=(1, 2))),
        "mean of differences": differences,
    }
    still_files = look_at_files(stills, None)
    test = split(still_files, pattern, 0)[1]
    held_out = [file in test for file in still_files]
    still_features = [load_feature(file.path)[0].float() for file in still_files]
    cameras = [load_checked(file.path)["camera"].float() for file in still_files]
    features = [load_feature(file.path)[0].float() for file in clips]
    contents = [x[1:].mean(dim=(1, 2)) for x in features]
    changes = [x.diff(dim=0).norm(dim=-1).mean(dim=(1, 2))[:, None] for x in features]
    of_stills, of_clips = (
        {name: [embed(x) for x in xs] for name, embed in embeddings.items()} for xs in (still_features, features)
    )
    for embedded in (of_stills, of_clips):
        embedded["its motion channels"] = [embedding[:, motion] for embedding in embedded["motion_embedding"]]
    rows = {name: camera_probe(embedded, cameras, held_out) for name, embedded in of_stills.items()}
    for name, embedded in of_clips.items():
        rows[name] |= {"content": probe(embedded, contents), "change": probe(embedded, changes)}

    embedded, tested = of_stills["motion_embedding"], [index for index, out in enumerate(held_out) if out]
    rows["named channels"] = camera_r2([embedded[i] for i in tested], names, [cameras[i] for i in tested])
    files = [load_checked(file.path) for file in clips]
    rows["named channels"] |= motion_in_clips(of_clips["motion_embedding"], files, names)
    return rows


def motion_in_clips(embeddings: list[Tensor], files: list[dict[str, Any]], names: list[str]) -> Row:
    """The columns flow, background and at rest, if all `files` have the entries that each is compared with."""
    row = {}

    def channels(kind: str) -> list[Tensor]:  # right and down, [T - 1, 2] of each clip
        return [
            embedding[1:, [names.index(f"{kind} {side}") for side in ("right", "down")]] for embedding in embeddings
        ]

    if all("flow" in file for file in files):
        flow = torch.cat([file["flow"][1:].float().mean(dim=(1, 2)) for file in files])
        row["flow"] = F.cosine_similarity(torch.cat(channels("picture")).flatten(), flow.flatten(), dim=0).item()
    if all("background" in file for file in files):
        camera = channels("camera")
        background = [file["background"][1:, :2].float() for file in files]
        agree = [file["agree"][1:].float() > 0.5 for file in files]
        read, true = (
            torch.cat([x[steps] for x, steps in zip(parts, agree, strict=True)]) for parts in (camera, background)
        )
        for side, name in enumerate(("right", "down")):
            row[f"background {name}"] = torch.corrcoef(torch.stack([read[:, side], true[:, side]]))[0, 1].item()
        still = [
            x[a] for x, y, a in zip(camera, background, agree, strict=True) if a.any() and y[a].abs().mean() < 0.01
        ]
        if still:
            row["at rest"] = torch.cat(still).square().mean().sqrt().item()
    return row


# ---------------------------------------------------------------------------------------------------------------------
# Latents as training targets (--student)
# ---------------------------------------------------------------------------------------------------------------------


def read_frames(path: Path, videos: Path) -> Tensor:
    """The frames that a feature file [T, H, W, C] was made from, the first of each time step: uint8 [T, 3, *PICTURE].

    They must be spread evenly over the clip. If the file does not say how many they were, two per step are assumed.
    """
    feature, about = load_feature(path, mmap=True)
    video, indices = videos / about.get("video", ""), about.get("frame_indices")
    if feature.ndim != 4 or not video.is_file():
        raise UserError(f"{path}: --student needs features [T, H, W, C], and their `video` in {videos}")
    count = len(indices) if indices else 2 * len(feature)
    clip = Clip(video, start=about.get("start"), end=about.get("end"))
    ((window, frames),) = filter(None, decode_windows(str(video), [clip], Sampling(count, (PICTURE,))))
    if count % len(feature) or (indices and tuple(indices) != window.frame_indices):
        raise UserError(f"{path}: --student needs features of frames that are spread evenly over the clip")
    pictures = torch.from_numpy(frames[PICTURE][:: count // len(feature)])
    return pictures.round().clamp(0, 255).byte().permute(0, 3, 1, 2).contiguous()


class Student(nn.Module):
    """A small video network of 0.9 million weights, which halves the number of time steps, as video generators do.

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
    """The mean absolute difference between the token cosines of a [B, K, C] and those of b [B, K, D]."""
    return (token_relations(a) - token_relations(b)).abs().mean()


def train_student(frames: list[Tensor], targets: list[Tensor], steps: int, seed: int) -> Student:
    """Train a student on `frames` to learn the relations between the tokens of `targets` [T, H, W, D].

    All randomness depends on the seed alone, and is the same for all targets.
    """
    chance = torch.Generator().manual_seed(seed)  # its own: other students are trained at the same time
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
    """The mean absolute difference between the student's token cosines and those of `features` [T, H, W, C]. Each clip
    is cut from its start into parts as long as a student sees at a time; steps left over at the end are not used."""
    errors = []
    for x, y in zip(frames, features, strict=True):
        size = min(len(x), STUDENT_STEPS)
        x, y = (part[: len(x) // size * size].unflatten(0, (-1, size)) for part in (x, y))
        errors.append(relation_change(student(x).flatten(1, 3), y[:, ::2].float().flatten(1, 3)).item())
    return sum(errors) / len(errors)


def student_table(
    targets: dict[str, list[Tensor]], frames: list[Tensor], held_out: tuple[list[Tensor], list[Tensor]], args: Any
) -> dict[str, dict[str, float]]:
    """For each of `targets`, of which the first are the features: the error of its students, and its ratio to that of
    the features' students, as mean and standard deviation over seeds. `held_out`: frames and features."""

    def error_of(seed: int, name: str) -> float:
        start = time.perf_counter()
        student = train_student(frames, targets[name], args.student_steps, seed)
        error = student_error(student, *held_out)
        print(f"seed {seed}, {name}: {error:.4f} | {time.perf_counter() - start:.0f} s", flush=True)
        return error

    torch.set_num_threads(1)  # for each thread of the pool
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


def print_table(rows: dict[str, dict[str, float]], title: str, digits: int = 3) -> None:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    print(f"\n| {title} | " + " | ".join(columns) + " |\n|" + " --- |" * (len(columns) + 1))
    for name, row in rows.items():
        cells = (f"{row[column]:.{digits}f}" if column in row else "" for column in columns)
        print(f"| {name} | " + " | ".join(cells) + " |")


def add_figures(path: Path | None, **tables: dict[str, dict[str, float]]) -> None:
    """Add tables to a JSON file and keep its other tables."""
    if path:
        others = json.loads(path.read_text()) if path.exists() else {}
        save_atomically(json.dumps(others | tables, indent=1) + "\n", path)


def teach_students(
    codes: dict[int, Codes], train_files: list[FeatureFile], held_out: list[FeatureFile], args: argparse.Namespace
) -> dict[str, Row]:
    """The table of --student."""
    features, frames = [], []
    for files in (train_files, held_out):
        features.append([load_feature(file.path)[0] for file in files])
        frames.append([read_frames(file.path, args.student) for file in files])
    if len({x.shape for part in features for x in part}) > 1:
        raise UserError("--student needs features of one shape")
    targets = {"features": features[0]}
    with torch.inference_mode():
        for ratio, of_size in codes.items():
            for name, code in of_size.all.items():
                if name in ("PCA", "closed form", "trained"):
                    targets[f"C/{ratio}, {name}"] = [code.encode(x[None].float())[0].half() for x in features[0]]
    return student_table(targets, frames[0], (frames[1], features[1]), args)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("feature_dir", type=Path)
    add("--held_out", help="regular expression of the `video` (or file name) of the files to hold out")
    add(
        "--ratios", type=number(int, 1), nargs="+", help="how many channels there are to one of the latent (default: 4)"
    )
    add("--motion_weight", type=float, default=1.0)
    add("--smooth_weight", type=float, default=0.05)
    add("--camera", type=Path, nargs="+", help="folders of features of stills under a camera of known motion")
    add("--ablation", action="store_true", help="what each part of the closed form is worth")
    add("--front", type=Path, metavar="PICTURE", help="the closed form at several motion weights")
    add("--sheet", type=Path, nargs=2, metavar=("FEATURE", "VIDEO"), help="draw a feature, its latent and video")
    add("--models", type=Path, metavar="FOLDER", help="where what is trained is kept")
    add("--student", type=Path, metavar="VIDEOS", help="folder of the videos of the features")
    add("--student_steps", type=number(int, 1), default=720, help="training steps of a student")
    add("--student_seeds", type=number(int, 2), default=3, help="students of each target")
    add("--json", type=Path, metavar="FILE", help="where the tables are kept")
    add("--seed", type=int, default=0)
    args, flags = parser.parse_known_args()  # the others are train.py's

    files = look_at_files(args.feature_dir, None)
    args.input_dim = files[0].channels
    train_files, held_out = split(files, args.held_out, args.seed)
    if not train_files or len(held_out) < 2:
        raise UserError(f"{len(train_files)} files to train on, {len(held_out)} held out; change --held_out")
    settings = {name: getattr(args, name) for name in ("input_dim", "seed", "motion_weight", "smooth_weight")}
    flags += ["--use_token", *(f"--{name}={value}" for name, value in settings.items())]
    tables: dict[str, dict[str, Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        args.models = args.models or Path(folder)
        ratios = args.ratios or (STUDENT_RATIOS if args.student else (4,))
        if args.camera and args.input_dim // ratios[0] < 32:
            raise UserError("--camera needs a latent of 32 channels; give a smaller ratio first")
        clips = Clips(held_out)
        codes = {ratio: Codes(train_files, clips, args.input_dim // ratio, args, flags) for ratio in ratios}
    if args.student:
        tables["student"] = teach_students(codes, train_files, held_out, args)
    else:
        first = codes[ratios[0]]
        tables["sizes"] = {f"C/{ratio}, {name}": row for ratio in ratios for name, row in codes[ratio].rows().items()}
        if args.ablation:
            tables["ablation"] = {name: first.row(code) for name, code in first.ablation().items()}
        if args.front:
            config = first.all["closed form"].config
            fronts = {f"weight {w:g}": first.closed_form(config, w) for w in FRONT} | first.all
            draw_front({name: first.row(code) for name, code in fronts.items()}, args.front)
        if args.sheet:
            draw_sheet(first.all["trained"], *args.sheet)
        if args.camera:
            stills = split(look_at_files(args.camera[0], None), args.held_out, 0)[1]
            for ratio, name in itertools.product(ratios, ("PCA", "trained")):
                read = read_camera(codes[ratio].all[name], stills)
                tables["sizes"][f"C/{ratio}, {name}"] |= {f"camera {channel}": r2 for channel, r2 in read.items()}
        for folder in args.camera or ():
            model, pca = first.all["trained"], first.all["PCA"]
            tables[f"embedding, {folder.name}"] = camera_table(model, pca, folder, held_out, args.held_out)
    counts = {"trained on": len(train_files), "held out": len(held_out)}
    counts |= {f"seconds of training, C/{ratio}": code.seconds for ratio, code in codes.items()}
    print(f"\n{args.input_dim} channels; {counts}")
    for name, rows in tables.items():
        print_table(rows, name, digits=4 if name == "student" else 3)
    add_figures(args.json, clips={args.feature_dir.name: counts}, **tables)
    return 0


if __name__ == "__main__":
    run_script(main)
