"""Compress features to latents with a trained motion autoencoder.

In: a checkpoint of train.py, and one feature file (.pt, .pth, .npy, .safetensors) or a folder of them.
Out: for each feature file a dict for `torch.load` (or a .safetensors) with `latent` [T, N, D] or [T, H, W, D],
     `motion_embedding` [T, D], `embedding_channels` (the names of its channels), `compression_ratio` (D / C), decoding
     errors, mean camera motion (`right`, `down`, `log speed`), and the input's `caption`, `video` and `model`, if it
     has them. For a folder, --output mirrors it, `encode_report.csv` has a row for each file, and `stats.pt` has the
     `mean` and `var` [D] of the latent's channels over the training clips.

    python encode.py --checkpoint checkpoints/motion_ae_best.pt --input features/0000.pt --output latents/0000.pt
    python encode.py --checkpoint checkpoints/motion_ae_best.pt --input features --output latents
    python encode.py --checkpoint checkpoints/motion_ae_best.pt --input features/0000.pt --output 0000.safetensors
    torchrun --nproc_per_node=4 encode.py --checkpoint ... --input features --output latents   # shared by four GPUs

To continue a run over a folder that was stopped, start it again: outputs that already exist, made from the same
feature with the same weights, are skipped. A single file is always written.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from losses import METRICS, FeatureErrors
from model import (
    STATS_NAME,
    ArgumentParser,
    MotionFeatureAutoencoder,
    UserError,
    describe_motion_embedding,
    file_fingerprint,
    find_features,
    find_latents,
    group_by_reason,
    load_checked,
    load_feature,
    make_folder,
    motion_channels,
    number,
    principal_components,
    provenance,
    ranks,
    run_script,
    save_atomically,
)

# ---------------------------------------------------------------------------------------------------------------------
# One clip's result, and the report on all
# ---------------------------------------------------------------------------------------------------------------------

MOVEMENT = ["right", "down", "log speed"]  # camera channels of the motion embedding whose means are saved


def encode_clip(model: MotionFeatureAutoencoder, feature: Tensor, save_reconstruction: bool = False) -> dict[str, Any]:
    """A clip's feature [T, N, C] or [T, H, W, C], on any device -> the entries of its output: latent, motion embedding,
    names of its channels, compression ratio, `METRICS` and `MOVEMENT`; tensors in float32 on the CPU.

    Raises `UserError` if C is not the model's, or if the latent or the reconstruction is not finite.
    """
    latent = model.encode(feature[None])
    if not latent.isfinite().all():
        raise UserError(
            "the latent is not finite: nor are the features, or they are far from those that the checkpoint was "
            "trained on"
        )
    errors = FeatureErrors()
    reconstruction = torch.empty(feature.shape) if save_reconstruction else None
    for place, part in model.decoder.blocks(latent):
        errors.add(feature[None][place].to(part), part, goes_on=place[1].start > 0)
        if save_reconstruction:
            reconstruction[None][place] = part.cpu()
    metrics = errors.figures()
    if not math.isfinite(metrics["cosine"]):
        raise UserError("what its latent decodes to is not finite; the features are too large")
    names = describe_motion_embedding(model.config)
    embedding = model.embed(latent.to(model.code.mean.device))[0].cpu()  # [T, D]
    moves = dict.fromkeys(MOVEMENT, math.nan)
    if feature.ndim == 4 and feature[0, ..., 0].numel() > 1:  # features pooled over the grid show no motion
        camera = [name.removeprefix("camera ") for name in names]
        means = (embedding.sum(dim=0) / max(1, len(embedding) - 1)).tolist()  # over T - 1 steps: t = 0 holds zeros
        moves |= {name: mean for name, mean in zip(camera, means, strict=True) if name in moves}
    result = {
        "latent": latent[0].cpu(),
        "motion_embedding": embedding,
        "embedding_channels": names,
        "compression_ratio": model.compression_ratio,
        **metrics,
        **moves,
    }
    return result | ({"reconstruction": reconstruction} if save_reconstruction else {})


def print_summary(rows: list[dict[str, Any]], model: MotionFeatureAutoencoder) -> None:
    """Print mean, minimum and maximum of each metric and movement over all files that did not fail, with caveats."""
    table = pd.DataFrame([row for row in rows if row["outcome"] != "failed"], columns=[*METRICS, *MOVEMENT])
    known = table.dropna(axis=1, how="all")
    if not known.empty:
        print(known.agg(["mean", "min", "max"]).T.to_string(float_format="%.3f"))
    if not model.config["use_token"]:
        print("trained without --use_token, on changes alone: of the errors only motion_error has a meaning")
    if unknown := table["right"].isna().sum():
        print(f"no grid in {unknown} files: the embedding's motion channels are 0; of [T, H * W, C] give --grid H W")
    if still := table["motion_error"].isna().sum():
        print(f"no motion in {still} files: of one time step, or of steps that are all the same")


def write_encode_report(rows: list[dict[str, Any]], folder: Path, model: MotionFeatureAutoencoder) -> None:
    """Write two files into a folder of latents: `encode_report.csv`, with each file's `METRICS` and `MOVEMENT` or why
    it failed, and stats.pt, with `mean` and `var` [D] of the latent's channels over the model's training clips."""
    table = pd.DataFrame(rows, columns=["file", *METRICS, *MOVEMENT, "failure"]).sort_values("file")
    save_atomically(table.to_csv(index=False, float_format="%.6g", na_rep="nan"), folder / "encode_report.csv")
    save_atomically({"mean": model.latent_mean.cpu(), "var": model.latent_var.cpu()}, folder / STATS_NAME)


# ---------------------------------------------------------------------------------------------------------------------
# Previews
# ---------------------------------------------------------------------------------------------------------------------

MARGIN, GAP, TITLE = 70, 10, 25  # pixels: left of the pictures, between them, above each row
PICTURE, CURVES, LEGEND_WIDTH = 120 * 180, 110, 80  # pixels: area of a picture, height of a plot, room for its legend
COLOURS = ["tab:green", "tab:purple", "tab:blue", "tab:orange"]  # of the curves, from the lowest plot up
FONTS = ("DejaVu Sans", "Noto Sans CJK TC", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "PingFang TC")  # if installed
PREVIEW_MARK = "a preview of vfm_encoder"  # in the PNG's text metadata


def evenly(length: int, most: int) -> list[int]:
    """The indices of all `length` steps or, if there are more than `most`, of `most` evenly spread, first to last."""
    return torch.linspace(0, length - 1, min(length, most), dtype=torch.float64).round().int().tolist()


def noise_floor(x: Tensor) -> Tensor:
    """Differences below this are rounding errors, which a preview must not magnify."""
    return 1e-4 * x.square().mean().sqrt() + 1e-12


def leading_components(x: Tensor, steps: list[int]) -> tuple[Tensor, float]:
    """Features [T, H, W, C] -> their first three principal components at the time steps `steps`, [steps, H, W, 3], and
    the share of the variance that these explain. Basis and scale are those of the whole clip: [-0.5, 0.5] spans the 2nd
    to 98th percentile of each component. If nothing varies, all components are 0."""
    tokens = x.flatten(0, -2)
    sample = tokens[evenly(len(tokens), 4096)].float()
    mean = sample.mean(dim=0)
    covariance = (sample - mean).mT @ (sample - mean) / len(sample)
    basis = nn.functional.pad(principal_components(covariance)[:, :3], (0, max(0, 3 - x.shape[-1])))
    spread = (sample - mean) @ basis  # [K, 3]
    low, high = spread.quantile(0.02, dim=0), spread.quantile(0.98, dim=0)
    noise = noise_floor(sample)
    share = spread.square().mean(dim=0).sum() / covariance.trace().clamp_min(noise**2)
    shown = (x[steps].float() - mean) @ basis
    return (shown - (low + high) / 2) / (high - low).clamp_min(noise), share.item()


def spread_of(x: Tensor) -> Tensor:
    """The root mean square of features [T, ..., C] around their mean, over at most 240 steps."""
    some = x[evenly(len(x), 240)].float()
    return (some - some.flatten(0, -2).mean(dim=0)).square().mean().sqrt().maximum(noise_floor(some))


def relative_motion(x: Tensor) -> np.ndarray:
    """How much features [T, ..., C] change at each step after the first, [T - 1]: the root mean square of delta_x,
    divided by that of x around its mean so that features and latents can be compared."""
    scale = spread_of(x)
    return np.array([((b.float() - a.float()).square().mean().sqrt() / scale).item() for a, b in itertools.pairwise(x)])


def movement(x: Tensor) -> dict[str, np.ndarray]:
    """How far the picture moves right and down at each step after the first, [T - 1] each, in grid cells. Computed by
    `motion_channels` from at most 64 channels of features [T, H, W, C]; more are not needed."""
    x = x[..., :: math.ceil(x.shape[-1] / 64)]
    right, down, *_ = motion_channels(x[None] / spread_of(x))[0, 1:].cpu().numpy().T
    return {"right": right, "down": down}


def draw_curves(axes: Any, curves: dict[str, np.ndarray], steps: list[int], colours: Iterator[str]) -> None:
    """Draw curves [T - 1] by name into matplotlib's `axes`, from the second time step on, and mark `steps`."""
    values = np.concatenate([[0.0], *curves.values()])
    room = 0.1 * max(0.1, np.ptp(values))
    axes.set(xlim=(0, max(1, steps[-1])), ylim=(values.min() - room, values.max() + room))
    axes.locator_params(axis="x", integer=True)
    for name, curve in curves.items():
        axes.plot(range(1, len(curve) + 1), curve, linewidth=1.2, label=name, color=next(colours))
    for step in steps:
        axes.axvline(step, color="lightgrey", linewidth=0.8, zorder=0)
    axes.axhline(0, color="lightgrey", linewidth=0.8, zorder=0)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def draw_clip(
    title: str, pictures: dict[str, np.ndarray], plots: dict[str, dict[str, np.ndarray]], steps: list[int]
) -> bytes:
    """A PNG that shows some time steps of a clip.

    pictures: title -> uint8 [steps, h, w, 3], one row each, all drawn in the aspect ratio of the first. plots: label of
    the y-axis -> name -> curve [T - 1], drawn below the pictures.
    """
    # imported here: it takes most of a second, and --help, decoder processes and runs without previews do not need it
    from matplotlib.figure import Figure
    from matplotlib.font_manager import get_font_names

    _, height, width, _ = next(iter(pictures.values())).shape
    aspect = min(max(width / height, 1 / 8), 8.0)
    width, height = round((PICTURE * aspect) ** 0.5), round((PICTURE / aspect) ** 0.5)
    page_width = max(640, MARGIN + len(steps) * (width + GAP))
    page_height = 2 * TITLE + len(pictures) * (TITLE + height) + len(plots) * CURVES
    figure = Figure(figsize=(page_width / 100, page_height / 100), dpi=100)

    page = figure.add_axes((0, 0, 1, 1), xlim=(0, page_width), ylim=(page_height, 0), autoscale_on=False)  # in pixels
    page.set_axis_off()
    fonts = [font for font in FONTS if font in get_font_names()]
    title = textwrap.shorten(title, (page_width - MARGIN - GAP) // 7, placeholder=" ...")
    page.text(MARGIN, TITLE - 6, title, fontsize=10, parse_math=False, family=fonts)
    for row, (name, shown) in enumerate(pictures.items()):
        top = 2 * TITLE + row * (TITLE + height)
        for column, (step, picture) in enumerate(zip(steps, shown, strict=True)):
            left = MARGIN + column * (width + GAP)
            smoothing = "antialiased" if name == "frames" else "nearest"  # each token stays a sharp block
            page.imshow(picture, extent=(left, left + width, top + height, top), aspect="auto", interpolation=smoothing)
            if row == len(pictures) - 1:
                page.text(left + width, top + height + 12, f"step {step}", fontsize=8, ha="right")
        page.text(MARGIN, top - 5, name, fontsize=8)

    colours = iter(COLOURS)
    for below, (label, curves) in enumerate(reversed(plots.items())):
        corner = MARGIN / page_width, (1.5 * TITLE + below * CURVES) / page_height
        size = 1 - (MARGIN + LEGEND_WIDTH) / page_width, (CURVES - TITLE) / page_height
        axes = figure.add_axes((*corner, *size))
        draw_curves(axes, curves, steps, colours)
        axes.set_ylabel(label, fontsize=7)
        axes.yaxis.set_label_coords(0.37 * corner[0], corner[1] + size[1] / 2, figure.transFigure)  # left of wide ticks
        axes.tick_params(labelsize=7, labelbottom=below == 0)
        if below == 0:
            axes.set_xlabel("time step (grey: of the pictures above)", fontsize=7)
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a character of the caption; a box is drawn instead
        figure.savefig(png, format="png", metadata={"Source": PREVIEW_MARK})
    return png.getvalue()


def is_preview(picture: Path) -> bool:
    """Whether the file exists and was made by `write_preview`."""
    return picture.is_file() and PREVIEW_MARK.encode() in picture.read_bytes()[:1000]


def write_preview(
    path: Path,
    feature: Tensor,
    latent: Tensor | None = None,
    frames: np.ndarray | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Write `<stem>.png` beside the file `path`: what a clip's features look like, and how they move.

    feature, latent: [T, H, W, C] or [T, N, C]; N tokens are laid out as the grid nearest to a square. frames: uint8 RGB
    [F, h, w, 3], spread over the clip; all pictures take the frames' aspect ratio or, if None, the grid's. about:
    `video`, `model` and `caption`, for the title; `motion_embedding` and `embedding_channels`, for the camera's motion.

    The file is written whole or not at all. Raises `OSError` if it cannot be written, and `UserError` if there is a
    file of that name which is not a preview.
    """
    path = path.with_suffix(".png")
    if path.exists() and not is_preview(path):
        raise UserError(f"--preview would write over {path}, which it has not made; move that away")
    steps = evenly(len(feature), 6)
    about, pictures, changes, moves = about or {}, {}, {}, {}
    if frames is not None:
        pictures["frames"] = frames[[step * len(frames) // len(feature) for step in steps]]
    for name, x in {"features": feature, "latent": latent}.items():
        if x is None:
            continue
        changes[name] = relative_motion(x)
        if x.ndim == 3:
            rows = max(divisor for divisor in range(1, math.isqrt(x.shape[1]) + 1) if x.shape[1] % divisor == 0)
            x = x.unflatten(1, (rows, -1))
        components, share = leading_components(x, steps)
        is_dead = components.abs().max() <= 0.01
        told = "NOTHING VARIES" if is_dead else f"3 principal components, {share:.0%} of the variance"
        if name == "features":
            reference = components
        elif reference.abs().max() > 0.01:  # rotated towards the features' colours (orthogonal Procrustes)
            u, _, v = torch.linalg.svd(components.flatten(0, 2).mT @ reference.flatten(0, 2))
            components = components @ (u @ v)
        pictures[f"{name} {list(x.shape)}: {told}"] = ((components + 0.5).clamp(0, 1) * 255).byte().numpy()

    has_grid = feature.ndim == 4 and feature[0, ..., 0].numel() > 1
    if has_grid and "motion_embedding" in about:
        channels = dict(zip(about["embedding_channels"], about["motion_embedding"][1:].numpy().T, strict=True))
        moves = {name: channels[f"camera {name}"] for name in ("right", "down") if f"camera {name}" in channels}
        moved = "embedding"
    elif has_grid:
        moves, moved = movement(feature), "features"
    plots = {"change a step\n(1: the clip's spread)": changes}
    plots |= {f"camera, cells a step\n(by {moved})": moves} if moves else {}
    mark = "RANDOM WEIGHTS" if about.get("weights") == "random" else ""
    told = (about.get("video"), about.get("model"), mark, about.get("caption"))
    title = "  |  ".join(str(part) for part in told if part)
    save_atomically(draw_clip(title, pictures, plots, steps), path)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="of train.py: motion_ae_best.pt or a motion_ae_epoch*.pt")
    add("--input", type=Path, required=True, help="a feature file, or a folder, searched recursively")
    add("--output", type=Path, required=True, help="a .pt or .safetensors to write; a folder, if --input is one")
    add("--output_format", choices=["pt", "safetensors"], default="pt", help="of the files of a folder")
    size = {"type": number(int, 1), "nargs": 2, "metavar": ("H", "W")}
    add("--grid", **size, help="of features [T, H * W, C] that do not say theirs")
    add("--save_reconstruction", action="store_true", help="keep the reconstructed feature too")
    add("--overwrite", action="store_true", help="make outputs of a folder again that are finished")
    add("--preview", action="store_true", help="draw each clip that is encoded: <stem>.png beside the output")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1...")
    parser.add_model_flags("The checkpoint records these; a value given here must agree.")
    return parser.parse_args()


def check_flags(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Raise `UserError` for a model flag given by hand that is not what the checkpoint records."""
    for name, recorded in config.items():
        given = getattr(args, name, recorded)
        if given != recorded:
            raise UserError(
                f"--{name} {given} contradicts {args.checkpoint}, which was trained with {recorded}; leave --{name} out"
            )


def plan(source: Path, target: Path, output_format: str) -> list[tuple[Path, Path]]:
    """Pairs of (feature file, file to write). A folder is mirrored; each output has the suffix of `output_format`.

    Raises `UserError` if there is nothing to read, two features would be written to one file, or `target` is unusable.
    """
    if not source.exists():
        raise UserError(f"--input {source} does not exist")
    if target.exists() and target.samefile(source):
        raise UserError(f"--output {target} is the --input; the features would be lost, give another place")
    if not source.is_dir():
        if target.suffix not in (".pt", ".safetensors") or output_format not in ("pt", target.suffix[1:]):
            raise UserError(
                f"--output {target}: the suffix of a single file says its format; end it in .pt or .safetensors"
            )
        make_folder(target.parent, "--output")
        return [(source, target)]
    jobs = []
    for path in find_features(source):
        if path.parent.resolve().is_relative_to(target.resolve()):  # latents of an earlier run, not features
            continue
        output = target / path.relative_to(source).with_suffix(f".{output_format}")
        if STATS_NAME in (path.name, output.name):
            raise UserError(f"{path} is named as latents' statistics are; give a folder of features, or rename it")
        jobs.append((path, output))
    if not jobs:
        raise UserError(f"--input {source} holds no features beside those in --output {target}")
    make_folder(target, "--output")
    return jobs


def finished_figures(output: Path, settings: str) -> dict[str, float] | None:
    """The `METRICS` and `MOVEMENT` of an output that an earlier run made with the same settings, or None."""
    try:
        saved = load_checked(output, mmap=True, check=False)
        return {name: float(saved[name]) for name in METRICS + MOVEMENT} if saved["settings"] == settings else None
    except Exception:  # a file of another program can hold anything; it is made again
        return None


def encode_file(
    model: MotionFeatureAutoencoder, path: Path, output: Path, made_with: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Encode a single file, or one file of a folder unless its output is finished. Returns its row of the report.

    If the feature cannot be encoded, the row says why. Raises `OSError` if the output cannot be written.
    """
    in_folder = args.input.is_dir()
    row = {"file": str(path.relative_to(args.input)) if in_folder else path.name, "failure": ""}
    try:
        settings = json.dumps({**made_with, "feature": file_fingerprint(path)})
        may_skip = in_folder and not args.overwrite
        if may_skip and (figures := finished_figures(output, settings)):
            return row | figures | {"outcome": "skipped"}
        feature, metadata = load_feature(path, mmap=True)
        if args.grid and feature.ndim == 3:
            if math.prod(args.grid) != feature.shape[1]:
                raise UserError(f"{path}: N is {feature.shape[1]}, but --grid is {args.grid[0]} x {args.grid[1]}")
            feature = feature.unflatten(1, args.grid)
        model.check_provenance(provenance(metadata))
        result = encode_clip(model, feature, args.save_reconstruction)
        if args.preview:
            write_preview(output, feature, result["latent"], about={"video": path.name, **metadata, **result})
        elif is_preview(output.with_suffix(".png")):  # it shows the latent that is replaced
            output.with_suffix(".png").unlink()
    except (UserError, OSError) as error:
        told = str(error) if str(path) in str(error) else f"{path}: {error}"
        return row | {"failure": told, "outcome": "failed"}
    kept = {name: value for name, value in metadata.items() if name not in result}
    row |= {"outcome": "written", "replaced": may_skip and output.exists()}
    save_atomically({**result, **kept, "settings": settings}, output)
    return row | {name: result[name] for name in METRICS + MOVEMENT}


def report(rows: list[dict[str, Any]], planned: int, model: MotionFeatureAutoencoder, args: argparse.Namespace) -> None:
    """Write `encode_report.csv` and stats.pt of a folder, and print what was written, skipped and failed."""
    write_encode_report(rows, args.output, model)
    failures = {str(args.input / row["file"]): row["failure"] for row in rows if row["outcome"] == "failed"}
    for line in group_by_reason(failures):
        print(f"failed: {line}", file=sys.stderr)
    print_summary(rows, model)
    suffix = f".{args.output_format}"
    made = {(args.output / row["file"]).with_suffix(suffix) for row in rows if row["outcome"] != "failed"}
    if len(rows) == planned and (others := sorted({*find_latents(args.output)} - made)):
        told = f"{len(others)} files of other features, models or formats"
        print(f"{args.output} also holds {told}, such as {others[0].relative_to(args.output)}")
    if args.preview and any(row["outcome"] == "skipped" for row in rows):
        print("--preview drew what is new; --overwrite makes and draws the other files too")
    count = Counter(row["outcome"] for row in rows)
    counts = [f"{count[outcome]} {outcome}" for outcome in ("written", "skipped", "failed")]
    if len(rows) < planned:
        counts.append(f"{planned - len(rows)} of {planned} not reached")
    replaced = sum(row.get("replaced", False) for row in rows)
    told = f"; {replaced} in place of others, of another checkpoint, feature or flag, or damaged" if replaced else ""
    why = "; its column failure says why" if failures else ""
    print(f"{', '.join(counts)}{told}; file by file: {args.output / 'encode_report.csv'}{why}")


@torch.inference_mode()
def main() -> int:
    ranks.join()
    args = ranks.from_first(parse_args)
    with ranks.first_then_others():
        device = ranks.open_device(args.device)
        model = MotionFeatureAutoencoder.from_checkpoint(args.checkpoint).to(device)
        check_flags(args, model.config)
    made_with = {**model.identity(), "save_reconstruction": args.save_reconstruction, "grid": args.grid}

    jobs = ranks.from_first(lambda: plan(args.input, args.output, args.output_format))
    mine = jobs[ranks.index :: ranks.count]
    rows: list[dict[str, Any]] = []
    try:
        for path, output in tqdm(mine, unit="file", disable=None if len(jobs) > 1 and ranks.index == 0 else True):
            rows.append(encode_file(model, path, output, made_with, args))
        rows = [row for part in ranks.gather(rows) for row in part]
    finally:  # also if the run is stopped
        if ranks.index == 0 and args.input.is_dir():
            report(rows, len(jobs), model, args)

    if ranks.index == 0 and not args.input.is_dir():
        [row] = rows
        if row["outcome"] == "failed":
            raise UserError(row["failure"])
        figures = ", ".join(f"{name.removesuffix('_error')} {row[name]:.3f}" for name in METRICS)
        print(f"written to {args.output}, compression_ratio {model.compression_ratio:g}; {figures}")
    return 0 if any(row["outcome"] != "failed" for row in rows) else 1


if __name__ == "__main__":
    run_script(main)
