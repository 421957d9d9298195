"""Compress features to latents with a trained motion autoencoder.

In: a checkpoint of train.py, and one feature file (.pt, .pth, .npy) or a folder of them.
Out: a dict that `torch.load` reads (or a .npz for numpy) of `latent` [T, N, D] or [T, H, W, D], `motion_embedding`
     [T, D], `embedding_channels` (its channels' names), `compression_ratio` (D / C), `pca_dim` (how many channels lead
     with a principal component: all), how well the latent decodes, how the picture moves on average (`right`, `down`,
     `log speed`), and the input's `caption`, `video` and `model` where it had them. A folder's files are
     mirrored, and `encode_report.csv` has a row for each.

    python encode.py --checkpoint checkpoints/motion_ae_best.pt --input features/0000.pt --output latents/0000.pt
    python encode.py --checkpoint checkpoints/motion_ae_best.pt --input features --output latents
    python encode.py --checkpoint checkpoints/motion_ae_best.pt --input features --output latents --output_format npz
    torchrun --nproc_per_node=4 encode.py --checkpoint ... --input features --output latents   # shared by four GPUs

A run over a folder that was stopped goes on where it was: outputs that exist already, made of the same feature with
the same weights, are skipped. A single file is always written.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from losses import FeatureErrors
from model import (
    FEATURE_SUFFIXES,
    METRICS,
    MOVEMENT,
    ArgumentParser,
    MotionFeatureAutoencoder,
    UserError,
    add_model_flags,
    check_numbers,
    check_preview_packages,
    encode_clip,
    file_fingerprint,
    find_features,
    gather,
    has_preview,
    join_ranks,
    load_entries,
    load_feature,
    num_ranks,
    number,
    open_device,
    origin,
    print_summary,
    rank,
    remove_leftovers,
    run_script,
    save_atomically,
    whole_file,
    write_encode_report,
    write_preview,
)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="of train.py: motion_ae_best.pt or a motion_ae_epoch*.pt")
    add("--input", type=Path, required=True, help="a feature file, or a folder, searched recursively")
    add("--output", type=Path, required=True, help="the file to write (.npz: for numpy); a folder, if --input is one")
    add("--output_format", choices=["pt", "npz"], default="pt", help="of the files of a folder")
    add(
        "--grid",
        type=number(int, 1),
        nargs=2,
        metavar=("H", "W"),
        help="of features [T, H * W, C] that do not say theirs",
    )
    add("--save_reconstruction", action="store_true", help="keep the reconstructed feature too")
    add("--overwrite", action="store_true", help="make outputs of a folder again that are finished")
    add("--preview", action="store_true", help="draw each clip: <stem>.mp4 and .png beside the output")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1...")
    model = parser.add_argument_group("model", "The checkpoint records these; a value given here must agree.")
    add_model_flags(model, optional=True)
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
    """(feature file, file to write) pairs. A folder is mirrored, each file's suffix becoming that of `output_format`.

    Raises `UserError` where nothing is to be read, or two features would write one file.
    """
    if not source.exists():
        raise UserError(f"--input {source} does not exist")
    if target.exists() and target.samefile(source):
        raise UserError(f"--output {target} is the --input; the features would be lost, give another place")
    if not source.is_dir():
        if source.suffix.lower() not in FEATURE_SUFFIXES:
            raise UserError(f"--input {source} is not a {', '.join(FEATURE_SUFFIXES)} file")
        if target.is_dir():
            raise UserError(f"--output {target} is a folder; give the file to write, such as {target / 'latent.pt'}")
        if output_format == "npz" and target.suffix != ".npz":
            raise UserError(f"--output {target}: the suffix of a single file says its format; end it in .npz")
        return [(source, target)]
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {target} is a file, but --input is a folder; give a folder")
    features: dict[Path, Path] = {}  # output -> feature
    for path in find_features(source):
        if target.resolve() in path.resolve().parents:  # latents of an earlier run are no features
            continue
        output = target / path.relative_to(source).with_suffix(f".{output_format}")
        if output in features:
            raise UserError(f"{features[output]} and {path} would both write {output}; rename one")
        features[output] = path
    if not features:
        raise UserError(f"--input {source} holds no features beside those in --output {target}")
    return [(path, output) for output, path in features.items()]


def save(result: dict[str, Any], output: Path) -> None:
    """Write an output dict by its suffix, whole or not at all. In a .npz, strings and numbers are 0-d arrays."""
    if output.suffix == ".npz":
        with whole_file(output) as file:
            np.savez(file, **{name: np.asarray(value) for name, value in result.items()})
    else:
        save_atomically(result, output)


def finished_figures(output: Path, settings: str) -> dict[str, float] | None:
    """The `METRICS` and `MOVEMENT` of an output that an earlier run made with the same settings, or None."""
    try:
        saved = load_entries(output, [*METRICS, *MOVEMENT, "settings"])
        return {name: float(saved[name]) for name in METRICS + MOVEMENT} if saved["settings"] == settings else None
    except Exception:  # a file of somebody else's can be anything; it is made again
        return None


def encode_file(
    model: MotionFeatureAutoencoder, path: Path, output: Path, made_with: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Encode one file of a folder, unless it is finished, or a single file. Returns its row of the report.

    What is wrong with the feature is said in the row. Raises `OSError` where the output cannot be written.
    """
    in_folder = args.input.is_dir()
    row = {"file": str(path.relative_to(args.input)) if in_folder else path.name, "failure": ""}
    try:
        settings = json.dumps({**made_with, "feature": file_fingerprint(path)})
        may_skip = in_folder and not args.overwrite and (has_preview(output) or not args.preview)
        if may_skip and (figures := finished_figures(output, settings)):
            return row | figures | {"outcome": "skipped"}
        feature, metadata = load_feature(path, mmap=True)
        check_numbers(feature, path)
        frames = metadata.pop("thumbnails", None)
        if args.grid and feature.ndim == 3:
            if math.prod(args.grid) != feature.shape[1]:
                raise UserError(f"{path}: N is {feature.shape[1]}, but --grid is {args.grid[0]} x {args.grid[1]}")
            feature = feature.unflatten(1, args.grid)
        try:
            model.check_origin(origin(metadata))
            result = encode_clip(model, feature, FeatureErrors(), args.save_reconstruction)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    except (UserError, OSError) as error:
        return row | {"failure": str(error), "outcome": "failed"}
    kept = {name: value for name, value in metadata.items() if name not in result}
    save({**result, **kept, "settings": settings}, output)
    try:
        if args.preview:
            write_preview(output, feature, result["latent"], frames)
    except UserError as error:  # a video of that name is somebody else's
        return row | {"failure": str(error), "outcome": "failed"}
    return row | {name: result[name] for name in METRICS + MOVEMENT} | {"outcome": "written"}


def report(rows: list[dict[str, Any]], folder: Path) -> None:
    """Print what came of the files, and write `encode_report.csv`."""
    write_encode_report(rows, folder)
    for row in sorted(rows, key=lambda row: row["file"]):
        if row["outcome"] == "failed":
            print(f"failed: {row['failure']}", file=sys.stderr)
    count = Counter(row["outcome"] for row in rows)
    counts = ", ".join(f"{count[outcome]} {outcome}" for outcome in ("written", "skipped", "failed"))
    print(f"{counts}; file by file: {folder}/encode_report.csv")
    print_summary(rows)


@torch.inference_mode()
def main() -> int:
    args = parse_args()
    join_ranks()
    first = rank() == 0
    device = open_device(args.device)
    model = MotionFeatureAutoencoder.from_checkpoint(args.checkpoint)
    check_flags(args, model.config)
    if args.preview:
        check_preview_packages()
    made_with = {**model.identity(), "save_reconstruction": args.save_reconstruction, "grid": args.grid}
    model.to(device)

    jobs = plan(args.input, args.output, args.output_format)[rank() :: num_ranks()]
    for folder in {output.parent for _, output in jobs}:
        remove_leftovers(folder)
    rows: list[dict[str, Any]] = []
    try:
        for path, output in tqdm(jobs, unit="file", disable=None if len(jobs) > 1 and first else True):
            rows.append(encode_file(model, path, output, made_with, args))
        rows = [row for part in gather(rows) for row in part]
    finally:  # of a run that is stopped too
        if first and args.input.is_dir():
            report(rows, args.output)

    if first and not args.input.is_dir():
        if rows[0]["outcome"] == "failed":
            raise UserError(rows[0]["failure"])
        print(f"written to {args.output}, compression_ratio {model.compression_ratio:g}")
        print_summary(rows)
    return 0 if not first or any(row["outcome"] != "failed" for row in rows) else 1


if __name__ == "__main__":
    run_script(main)
