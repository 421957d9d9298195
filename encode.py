"""Compress features to latents with a trained motion autoencoder.

In: a checkpoint of train.py, and one feature file (.pt, .pth, .npy) or a folder of them.
Out: a dict that `torch.load` reads (or a .npz for numpy) of `latent` [T, N, D] or [T, H, W, D], `motion_embedding`
     [T, D], `compression_ratio`, how well the latent decodes, and the input's `caption`, `video` and `model` where it
     had them. A folder's files are mirrored, and `encode_report.csv` has a row for each.

    python encode.py --checkpoint checkpoints/motion_ae_epoch10.pt --input features/0000.pt --output latents/0000.pt
    python encode.py --checkpoint checkpoints/motion_ae_epoch10.pt --input features --output latents
    python encode.py --checkpoint checkpoints/motion_ae_epoch10.pt --input features --output latents --output_format npz
    torchrun --nproc_per_node=4 encode.py --checkpoint ... --input features --output latents   # shared by four GPUs

A run over a folder that was stopped goes on where it was: outputs that exist already, made of the same feature with
the same weights, are skipped. A single file is always written.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as DecodeTimeoutError
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from pebble import ProcessPool

from losses import FeatureErrors
from model import (
    FEATURE_SUFFIXES,
    ArgumentParser,
    MotionFeatureAutoencoder,
    UserError,
    check_numbers,
    check_preview_packages,
    find_features,
    from_first_rank,
    has_preview,
    join_ranks,
    load_feature,
    number,
    open_decoders,
    open_device,
    preview_steps,
    rank,
    remove_leftovers,
    run_script,
    save_atomically,
    say,
    weights_hash,
    whole_file,
    write_preview,
)

EMBED_STEPS = 48  # time steps that are looked at together where a clip may be larger than the memory
AHEAD = 2  # files that are read before their turn, and that wait to be written
FIGURES = ("reconstruction_error", "motion_error", "cosine")

Outcomes = dict[str, dict[str, float] | str]  # a feature file -> its FIGURES, or why it failed


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a motion_ae_epoch*.pt of train.py")
    parser.add_argument("--input", type=Path, required=True, help="a feature file, or a folder, searched recursively")
    parser.add_argument(
        "--output", type=Path, required=True, help="the file to write (.npz: for numpy); a folder, if --input is one"
    )
    parser.add_argument("--output_format", choices=["pt", "npz"], default="pt", help="of the files of a folder")
    parser.add_argument("--save_reconstruction", action="store_true", help="keep the reconstructed feature too")
    parser.add_argument("--overwrite", action="store_true", help="make outputs of a folder again that are finished")
    parser.add_argument("--preview", action="store_true", help="draw each clip: <stem>.mp4 and .png beside the output")
    parser.add_argument("--video_dir", type=Path, help="folder of the videos, for the frames in the previews")
    parser.add_argument(
        "--decode_timeout", type=number(int, 1), default=120, help="seconds after which a preview goes without frames"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1...",
    )
    model = parser.add_argument_group(
        "model", "The checkpoint records these; a value given here must agree. Defaults are train.py's."
    )
    absent = argparse.SUPPRESS  # a flag that is not given leaves no trace, so that the checkpoint decides
    model.add_argument("--input_dim", type=int, default=absent, help="channels C of the features (default: 768)")
    model.add_argument("--model_dim", type=int, default=absent, help="width of encoder and decoder (default: 384)")
    model.add_argument("--latent_dim", type=int, default=absent, help="channels of the latent (default: 192)")
    model.add_argument("--num_heads", type=int, default=absent, help="attention heads (default: 8)")
    model.add_argument("--num_layers", type=int, default=absent, help="transformer layers, each way (default: 2)")
    model.add_argument("--dropout", type=float, default=absent, help="dropout while training (default: 0.1)")
    model.add_argument(
        "--use_token", action="store_true", default=absent, help="the encoder sees [x, delta_x] (default: False)"
    )
    return parser.parse_args()


def check_flags(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Raise `UserError` for a model flag given by hand that is not what the checkpoint records."""
    for name, recorded in config.items():
        given = getattr(args, name, recorded)
        if given != recorded:
            raise UserError(
                f"--{name} {given} contradicts {args.checkpoint}, which was trained with {recorded}; leave --{name} out"
            )


def check_preview(args: argparse.Namespace) -> None:
    """Raise `UserError` where --preview or --video_dir cannot do what they are for."""
    if args.video_dir and not args.preview:
        raise UserError("--video_dir is where the frames of previews come from; add --preview")
    if args.video_dir and not args.video_dir.is_dir():
        raise UserError(f"--video_dir {args.video_dir}: no such folder")
    if args.preview:
        check_preview_packages()
        if not args.video_dir:
            say("--preview without --video_dir: features and latents without frames")


def plan(source: Path, target: Path, output_format: str) -> dict[Path, Path]:
    """Feature file -> file to write. A folder is mirrored, each file's suffix becoming that of `output_format`.

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
        return {source: target}
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {target} is a file, but --input is a folder; give a folder")
    writers: dict[Path, Path] = {}
    for path in find_features(source):
        if target.resolve() in path.resolve().parents:  # latents of an earlier run are no features
            continue
        output = target / path.relative_to(source).with_suffix(f".{output_format}")
        if output in writers:
            raise UserError(f"{writers[output]} and {path} would both write {output}; rename one")
        writers[output] = path
    if not writers:
        raise UserError(f"--input {source} holds no features beside those in --output {target}")
    return {path: output for output, path in writers.items()}


# ---------------------------------------------------------------------------------------------------------------------
# One file
# ---------------------------------------------------------------------------------------------------------------------


def open_feature(path: Path, input_dim: int) -> tuple[Tensor, dict[str, str]]:
    """`load_feature` of a clip that may be larger than the memory: mapped, and read once, to see that it is finite and
    to have it in the system's cache."""
    feature, metadata = load_feature(path, input_dim, mmap=True)
    check_numbers(feature, path)
    return feature, metadata


def compare(
    model: MotionFeatureAutoencoder, feature: Tensor, latent: Tensor, reconstruction: Tensor | None
) -> dict[str, float]:
    """`FIGURES`: how well the latent of a clip decodes to the feature [T, N, C]; fills `reconstruction`, if given."""
    errors = FeatureErrors()
    for positions, decoded in model.decode_long(latent):
        if reconstruction is not None:
            reconstruction[:, positions] = decoded.cpu()
        errors.add(feature[None, :, positions].to(decoded), decoded[None])  # [1, T, n, C]
    return errors.figures()


def encode_file(
    model: MotionFeatureAutoencoder, feature: Tensor, metadata: dict[str, str], save_reconstruction: bool
) -> dict[str, Any]:
    """The output dict of one feature, on the CPU."""
    latent = model.encode_long(feature)
    embedding = [  # each part with the step before, from which its first motion is measured
        model.embed(latent[None, max(start - 1, 0) : start + EMBED_STEPS].to(model.code.mean))[0, min(start, 1) :]
        for start in range(0, len(latent), EMBED_STEPS)
    ]
    reconstruction = torch.empty(feature.shape) if save_reconstruction else None
    figures = compare(
        model, feature.flatten(1, -2), latent, reconstruction.flatten(1, -2) if save_reconstruction else None
    )
    result = {
        "latent": latent,
        "motion_embedding": torch.cat(embedding).cpu(),
        "compression_ratio": model.compression_ratio,
        **metadata,
        **figures,
    }
    return result | ({"reconstruction": reconstruction} if save_reconstruction else {})


def decode_frames(path: Path, count: int) -> np.ndarray:
    """`count` frames evenly spread over a video, upright and at most 480 pixels wide: uint8 RGB [count, h, w, 3].

    Raises what PyAV raises for a video that it cannot read, and `ValueError` for one of no frames.
    """
    import av

    with av.open(str(path)) as container:
        available = sum(packet.size > 0 for packet in container.demux(video=0))
    wanted = np.linspace(0, available - 1, count).round().astype(int)
    frames: list[np.ndarray] = []
    with av.open(str(path)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index == wanted[len(frames)]:
                width = min(frame.width, 480)
                height = max(1, round(frame.height * width / frame.width))
                picture = frame.to_ndarray(format="rgb24", width=width, height=height)
                frames += [np.rot90(picture, frame.rotation // 90)] * int((wanted == index).sum())
            if len(frames) == count:
                break
    if not frames:
        raise ValueError("it has no frames")
    return np.stack(frames + frames[-1:] * (count - len(frames)))  # a container may promise more frames than it has


def draw(
    feature: Tensor, result: dict[str, Any], output: Path, decoding: Future | None, args: argparse.Namespace
) -> None:
    """Write the preview of an output; without frames, and a word about it, where the video is not to be had. A run that
    is being stopped leaves it to the next one."""
    frames = None
    if decoding:
        try:
            frames = decoding.result()
        except CancelledError:
            return
        except Exception as error:  # decoders raise their own kinds
            late = isinstance(error, DecodeTimeoutError)
            reason = f"no end after {args.decode_timeout} s" if late else error
            say(f"warning: the preview of {output} has no frames: {result.get('video')}: {reason}")
    frame_channels = result["latent"].shape[-1] - max(1, result["latent"].shape[-1] // 8)
    write_preview(output, feature, result["latent"][..., :frame_channels], frames)


def settings_of(path: Path, made_with: dict[str, Any]) -> str:
    """What the output of a feature file is made of and with, in JSON. A file that was replaced shows in its time."""
    stat = path.stat()
    return json.dumps({**made_with, "feature_bytes": stat.st_size, "feature_mtime_ns": stat.st_mtime_ns})


def save(
    result: dict[str, Any], output: Path, feature: Tensor, decoding: Future | None, args: argparse.Namespace
) -> None:
    """Write an output dict by its suffix, whole or not at all, and its preview, if there is to be one.

    In a .npz, words and numbers are arrays of no axes.
    """
    try:
        if output.suffix == ".npz":
            with whole_file(output) as file:
                np.savez(file, **{name: np.asarray(value) for name, value in result.items()})
        else:
            save_atomically(result, output)
        if args.preview:
            draw(feature, result, output, decoding, args)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}") from None


def finished_figures(
    path: Path, output: Path, made_with: dict[str, Any], with_preview: bool
) -> dict[str, float] | None:
    """The `FIGURES` of an output that an earlier run made of the same feature with the same settings, or None."""
    try:
        if output.suffix == ".npz":
            with np.load(output, allow_pickle=False) as archive:
                saved = {name: archive[name].item() for name in (*FIGURES, "settings")}
        else:
            saved = torch.load(output, weights_only=True, mmap=True)
        same = saved["settings"] == settings_of(path, made_with) and (has_preview(output) or not with_preview)
        return {name: float(saved[name]) for name in FIGURES} if same else None
    except Exception:  # a file of somebody else's can be anything; it is made again
        return None


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def read_ahead(paths: list[Path], input_dim: int) -> Iterator[Future]:
    """`open_feature` of each path, `AHEAD` files before it is wanted."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: deque[Future] = deque()
        upcoming = iter(paths)
        while True:
            waiting += [pool.submit(open_feature, path, input_dim) for path in islice(upcoming, AHEAD - len(waiting))]
            if not waiting:
                return
            yield waiting.popleft()


def start_decoding(decoder: ProcessPool, feature: Tensor, metadata: dict[str, str], args: argparse.Namespace) -> Future:
    """`decode_frames` of a feature's video, as many as its preview shows."""
    video = args.video_dir / Path(metadata.get("video", "")).name  # the name alone: a feature may come from anywhere
    steps = len(preview_steps(len(feature)))
    return decoder.schedule(decode_frames, args=(video, steps), timeout=args.decode_timeout)


def encode_all(
    model: MotionFeatureAutoencoder,
    jobs: list[tuple[Path, Path]],
    made_with: dict[str, Any],
    outcomes: Outcomes,
    args: argparse.Namespace,
) -> None:
    """Encode (feature file, file to write) pairs. What comes of each goes into `outcomes` when it is on the disk."""
    writing: deque[tuple[Path, dict[str, float], Future, Future | None]] = deque()
    bar = tqdm(total=len(jobs), unit="file", disable=None if len(jobs) > 1 and rank() == 0 else True)

    def finish_writing(at_most: int) -> None:
        while len(writing) > at_most:
            path, figures, future, _ = writing[0]
            future.result()
            writing.popleft()
            outcomes[path] = figures
            bar.update()

    decoders = open_decoders(1) if args.video_dir else nullcontext()
    with bar, ThreadPoolExecutor(max_workers=1) as writer, decoders as decoder:
        try:
            ahead = read_ahead([path for path, _ in jobs], model.config["input_dim"])
            for (path, output), opened in zip(jobs, ahead, strict=True):
                try:
                    feature, metadata = opened.result()
                    settings = settings_of(path, made_with)
                except (UserError, OSError) as error:
                    outcomes[path] = str(error)
                    bar.update()
                    continue
                decoding = start_decoding(decoder, feature, metadata, args) if decoder else None
                result = encode_file(model, feature, metadata, args.save_reconstruction) | {"settings": settings}
                figures = {name: result[name] for name in FIGURES}
                future = writer.submit(save, result, output, feature, decoding, args)
                writing.append((path, figures, future, decoding))
                finish_writing(at_most=AHEAD)
            finish_writing(at_most=0)
        finally:
            for *_, decoding in writing:  # a run that is stopped does not wait for videos
                if decoding:
                    decoding.cancel()
            if decoder:
                decoder.stop()


def share_out(jobs: list[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """This rank's part of the jobs; all ranks take rank 0's word for which these are."""
    jobs = from_first_rank(jobs)
    return jobs[rank() :: dist.get_world_size()] if dist.is_initialized() else jobs


def collect(outcomes: Outcomes) -> Outcomes:
    """What came of all ranks' files, on rank 0."""
    if not dist.is_initialized():
        return outcomes
    everyone = [None] * dist.get_world_size() if rank() == 0 else None
    dist.gather_object(outcomes, everyone)
    return {path: outcome for part in everyone or [] for path, outcome in part.items()}


def write_report(outcomes: Outcomes, source: Path, path: Path) -> None:
    """A row a file: its name below `source`, its figures, or why it failed."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", *FIGURES, "failure"])
    for feature, outcome in sorted(outcomes.items()):
        failed = isinstance(outcome, str)
        figures = [f"{math.nan if failed else outcome[name]:.6g}" for name in FIGURES]
        table.writerow([feature.relative_to(source), *figures, outcome if failed else ""])
    with whole_file(path) as file:
        file.write(text.getvalue().encode(errors="backslashreplace"))


def print_figures(outcomes: Outcomes) -> None:
    """The figures' mean and worst over the files that were encoded."""
    print(f"{'':<16}{'mean':>8}{'worst':>8}")
    for name in FIGURES:
        known = {path: outcome[name] for path, outcome in outcomes.items() if not isinstance(outcome, str)}
        known = {path: value for path, value in known.items() if not math.isnan(value)}
        if known:
            worst = (min if name == "cosine" else max)(known, key=known.get)
            mean = sum(known.values()) / len(known)
            print(f"{name.removesuffix('_error'):<16}{mean:>8.3f}{known[worst]:>8.3f}  {worst.name}")
    print(LEGEND)


LEGEND = """What decoding the latents loses. reconstruction: squared error over the clip's variance (0: nothing is lost,
1: all but the clip's mean is); motion: the same of the changes from step to step (1: as a still
picture would); cosine: between a token and its reconstruction (1: the same direction)."""


def report_folder(outcomes: Outcomes, num_skipped: int, source: Path, target: Path) -> None:
    """Print what came of a folder's files and write `encode_report.csv`."""
    failures = [outcome for outcome in outcomes.values() if isinstance(outcome, str)]
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    write_report(outcomes, source, target / "encode_report.csv")
    written = len(outcomes) - num_skipped - len(failures)
    print(f"{written} written, {num_skipped} skipped, {len(failures)} failed; file by file: {target}/encode_report.csv")
    if len(failures) < len(outcomes):
        print_figures(outcomes)


@torch.inference_mode()
def main() -> int:
    args = parse_args()
    device = open_device(args.device)
    model = MotionFeatureAutoencoder.from_checkpoint(args.checkpoint)
    check_flags(args, model.config)
    check_preview(args)
    made_with = {
        "weights": weights_hash(model.state_dict()),
        **model.config,
        "save_reconstruction": args.save_reconstruction,
    }
    model.to(device)
    jobs = plan(args.input, args.output, args.output_format)

    join_ranks()
    finished: Outcomes = {}
    if rank() == 0:
        for folder in {output.parent for output in jobs.values()}:
            remove_leftovers(folder)
        if args.input.is_dir() and not args.overwrite:
            for path, output in tqdm(jobs.items(), unit="file", leave=False, disable=None):
                if figures := finished_figures(path, output, made_with, args.preview):
                    finished[path] = figures
    outcomes: Outcomes = {}
    try:
        encode_all(model, share_out([job for job in jobs.items() if job[0] not in finished]), made_with, outcomes, args)
        outcomes = collect(outcomes)
    finally:
        if rank() == 0 and args.input.is_dir():
            report_folder(finished | outcomes, len(finished), args.input, args.output)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank() == 0 and not args.input.is_dir():
        if isinstance(outcomes[args.input], str):
            raise UserError(outcomes[args.input])
        print(f"written to {args.output}, compression_ratio {model.compression_ratio:g}")
        print_figures(outcomes)
    succeeded = any(not isinstance(outcome, str) for outcome in (finished | outcomes).values())
    return 0 if succeeded or rank() > 0 else 1


if __name__ == "__main__":
    run_script(main)
