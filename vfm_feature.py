"""Turn a folder of videos into features of video foundation models (VFMs).

In:  a folder of videos and, if there is one, a CSV of captions.
Out: `<output_root>/<model>/<video's stem>.pt`, a dict with `feature` [T, H, W, C], `caption`, `video`, `model`,
     `weights` and `settings`; `<output_root>/vfm_dimensions.txt`; where videos failed, `failed_videos.txt` beside them.

    python vfm_feature.py --video_dir clips --csv_path clips.csv --output_root features
    python vfm_feature.py --video_dir clips --models VideoMAEv2 DINOv2 --allow_skip_missing
    python vfm_feature.py --video_dir clips --random_weights          # a dry run: no weights needed
    torchrun --nproc_per_node=4 vfm_feature.py --video_dir clips      # four GPUs share the videos

The features are VideoREPA's alignment targets (https://github.com/aHapBean/VideoREPA): the last block's output without
the final norm for VideoMAEv2, VideoMAE and V-JEPA 2, the normalised patch tokens for DINOv2. A run that was stopped
goes on where it was: features that exist already, made with the same settings, are skipped.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import functools
import multiprocessing
import os
import re
import resource
import signal
import sys
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as DecodeTimeoutError
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TextIO

import av
import numpy as np
import torch
import torch.distributed as dist
from av.container import InputContainer
from av.video.reformatter import ColorPrimaries, ColorTrc
from av.video.stream import VideoStream
from pebble import ProcessExpired, ProcessFuture, ProcessPool
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from model import (
    ArgumentParser,
    UserError,
    check_preview_packages,
    from_first_rank,
    has_preview,
    join_ranks,
    number,
    open_device,
    rank,
    remove_leftovers,
    reuse_memory,
    run_script,
    save_atomically,
    say,
    weights_hash,
    whole_file,
    write_preview,
)

REPOSITORY = Path(__file__).resolve().parent
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".wmv")
# Columns of a caption CSV that name the video, the first one present is used.
VIDEO_COLUMNS = (
    *("video", "video_name", "video_path", "video_file", "file", "file_name", "filename", "file_path", "filepath"),
    *("path", "name", "video_id", "videoid", "clip"),
)
LONGEST_LINE = 2**20  # characters of a caption CSV
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# ---------------------------------------------------------------------------------------------------------------------
# The four video foundation models
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VFM:
    """What tells one video foundation model from another. All are pre-norm ViTs; the defaults are VideoMAE's."""

    hub: tuple[str, str]  # repository and file of the published weights
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    patch_size: int = 16
    tubelet_size: int = 2  # frames in a token; 1: an image model, which sees every frame by itself
    positions: str = "sinusoid"  # a fixed table; "learned": a table in the weights; "rotary": in every attention
    flags: str = "videomae"  # <flags>_resize_h and <flags>_resize_w set the input size


VFMS = {
    "VideoMAEv2": VFM(hub=("OpenGVLab/VideoMAE2", "distill/vit_b_k710_dl_from_giant.pth")),
    "VideoMAE": VFM(hub=("MCG-NJU/videomae-base", "model.safetensors")),
    "DINOv2": VFM(
        hub=("timm/vit_base_patch14_dinov2.lvd142m", "model.safetensors"),
        patch_size=14,
        tubelet_size=1,
        positions="learned",
        flags="dinov2",
    ),
    "VJEPA2": VFM(
        hub=("facebook/vjepa2-vitl-fpc64-256", "model.safetensors"),
        embed_dim=1024,
        depth=24,
        num_heads=16,
        positions="rotary",
    ),
}


class TubeletEmbed(nn.Module):
    """Patch embedding of a video: [B, 3, T, H, W] -> [B, (T/t)(H/p)(W/p), C], tubelets of t frames and p x p pixels.

    The weight has the layout of the Conv3d that the models are published with. Tubelets do not overlap, so the
    convolution is one matrix product, which every device runs at full speed.
    """

    def __init__(self, embed_dim: int, patch_size: int, tubelet_size: int, device: torch.device | str | None = None):
        super().__init__()
        kernel = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(3, embed_dim, kernel_size=kernel, stride=kernel, device=device)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        t, p, _ = self.proj.kernel_size
        x = video.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(2, (-1, t))  # [B, 3, T/t, t, H/p, p, W/p, p]
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # [B, T/t, H/p, W/p, 3*t*p*p]
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias).flatten(1, 3)


class RotaryPositions(nn.Module):
    """V-JEPA 2's rotary positions: turns queries or keys [B, heads, N, D] by their tokens' time, height and width.

    A third of the channels (rounded down to an even number) belongs to each axis, the rest is left alone. As in
    facebookresearch/vjepa2 `src/models/utils/modules.py`: neighbouring channels are rotated together, but the
    frequencies are laid out for the two halves of the channels. The published weights were trained with that, so it is
    kept. The tables are made once and shared by all layers.
    """

    def __init__(self, grid: tuple[int, int, int], head_dim: int):
        super().__init__()
        axis_dim = head_dim // 3 // 2 * 2
        frequencies = 1.0 / 10000 ** (torch.arange(axis_dim // 2) / (axis_dim / 2))
        angles = torch.zeros(*grid, head_dim)
        for axis, size in enumerate(grid):
            angle = torch.arange(size)[:, None] * frequencies.repeat(2)  # [size, axis_dim]
            shape = [size if i == axis else 1 for i in range(3)]
            angles[..., axis * axis_dim : (axis + 1) * axis_dim] = angle.view(*shape, axis_dim)
        self.register_buffer("sin", angles.flatten(0, 2).sin(), persistent=False)  # [N, D]
        self.register_buffer("cos", angles.flatten(0, 2).cos(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from timm.layers.pos_embed_sincos import apply_rot_embed

        return apply_rot_embed(x, self.sin, self.cos)


def sinusoid_positions(grid: tuple[int, int, int], embed_dim: int) -> torch.Tensor:
    """VideoMAE's fixed position table [1, T*H*W, C] for a grid of T x H x W tokens.

    The table of 8 x 14 x 14 positions that the model was trained with, resized bicubic in space, then trilinear in
    time, as VideoREPA's `VideoMAEv2.py` does. Computed in float64, like theirs.
    """
    position = np.arange(8 * 14 * 14)[:, None]
    angle = position / 10000 ** (2 * (np.arange(embed_dim) // 2) / embed_dim)
    table = np.where(np.arange(embed_dim) % 2 == 0, np.sin(angle), np.cos(angle))
    table = torch.from_numpy(table).float().view(8, 14, 14, embed_dim).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=grid[1:], mode="bicubic", align_corners=False)  # [8, C, H, W]
    table = F.interpolate(
        table.transpose(0, 1)[None], size=grid, mode="trilinear", align_corners=False
    )  # [1, C, T, H, W]
    return table.flatten(2).transpose(1, 2).contiguous()


def resize_learned_positions(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """DINOv2's position table [1, 1 + 37*37, C] -> [1, 1 + H*W, C], the way its authors resize it at inference.

    Bicubic by the factor (size + 0.1) / 37, without antialiasing: facebookresearch/dinov2 `interpolate_pos_encoding`.
    """
    side = int((table.shape[1] - 1) ** 0.5)
    if grid == (side, side):
        return table
    patches = table[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = tuple((size + 0.1) / side for size in grid)
    patches = F.interpolate(patches, scale_factor=scale, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1].float(), patches.flatten(2).transpose(1, 2)], dim=1)


class WeightsDoNotFit(UserError):
    """Weights that the model needs are missing or of another shape; the text names them."""


def build_vit(
    vfm: VFM, num_frames: int, size: tuple[int, int], weights: dict[str, torch.Tensor] | None = None
) -> nn.Module:
    """timm's `VisionTransformer` for clips of `num_frames` frames of `size` = (height, width), in eval mode on the CPU.

    `weights`: a state dict in timm's names (`read_weights` makes it); without it the weights are random, the same every
    time. Raises `WeightsDoNotFit`; weights that the model does not have, such as heads and decoders, are ignored.
    """
    from timm.models.vision_transformer import VisionTransformer

    is_video = vfm.tubelet_size > 1
    grid = (num_frames // vfm.tubelet_size, size[0] // vfm.patch_size, size[1] // vfm.patch_size)
    # Without weights to come, memory is not worth filling; with them, random values are not worth drawing.
    device = "cpu" if weights is None else "meta"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = VisionTransformer(
            img_size=size,
            patch_size=vfm.patch_size,
            embed_dim=vfm.embed_dim,
            depth=vfm.depth,
            num_heads=vfm.num_heads,
            num_classes=0,
            global_pool="",
            class_token=not is_video,
            pos_embed="learn" if vfm.positions == "learned" else "none",
            init_values=None if is_video else 1e-5,  # DINOv2's blocks have LayerScale
            final_norm=not is_video,
            device=device,
        )
        if is_video:
            vit.patch_embed = TubeletEmbed(vfm.embed_dim, vfm.patch_size, vfm.tubelet_size, device)
    if weights is not None:
        load_weights(vit, weights, grid[1:])
    if vfm.positions == "sinusoid":
        vit.pos_embed = nn.Parameter(sinusoid_positions(grid, vfm.embed_dim), requires_grad=False)
    if vfm.positions == "rotary":
        rotary = RotaryPositions(grid, vfm.embed_dim // vfm.num_heads)
        for block in vit.blocks:  # timm's attention sends queries and keys through these two before it compares them
            block.attn.q_norm = block.attn.k_norm = rotary
    return vit.eval().requires_grad_(False)


def load_weights(vit: nn.Module, weights: dict[str, torch.Tensor], grid: tuple[int, int]) -> None:
    """Put `weights` into `vit`, in float32."""
    expected = {name: list(parameter.shape) for name, parameter in vit.state_dict().items()}
    if "pos_embed" in expected:
        expected["pos_embed"][1] = 1 + 37 * 37  # the published table, before it is resized
    missing = [name for name in expected if name not in weights]
    misshapen = [
        f"{name} is {list(weights[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in weights and list(weights[name].shape) != shape
    ]
    if missing or misshapen:
        problems = [f"{name} is missing" for name in missing] + misshapen
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise WeightsDoNotFit(f"{', '.join(problems[:4])}{more}")
    state = {name: weights[name].float() for name in expected}
    if "pos_embed" in state:
        state["pos_embed"] = resize_learned_positions(state["pos_embed"], grid)
        vit.pos_embed = nn.Parameter(state["pos_embed"])
    vit.load_state_dict(state, assign=True)


@torch.inference_mode()
def extract_features(
    vit: nn.Module, vfm: VFM, clips: torch.Tensor, chunk: int = 128, precision: torch.dtype = torch.float32
) -> torch.Tensor:
    """Clips -> features: uint8 RGB [B, T, H, W, 3] -> float32 [B, T/t, H/p, W/p, C].

    `clips` are on `vit`'s device, of the frames and size that it was built for. `chunk`: frames in one forward pass of
    an image model. `precision`: of the matrix products; the residual stream and the norms stay in float32.
    """
    mean = torch.tensor(IMAGENET_MEAN, device=clips.device)
    std = torch.tensor(IMAGENET_STD, device=clips.device)
    batch, frames, height, width, _ = clips.shape
    pixels = (clips / 255 - mean) / std
    with torch.autocast(clips.device.type, dtype=precision, enabled=precision != torch.float32):
        if vfm.tubelet_size > 1:
            tokens = vit.forward_features(pixels.permute(0, 4, 1, 2, 3))
        else:
            images = pixels.flatten(0, 1).permute(0, 3, 1, 2).split(chunk)
            tokens = torch.cat([vit.forward_features(image)[:, 1:] for image in images])  # [B*T, N, C], no class token
    tokens = tokens.float()
    return tokens.reshape(
        batch, frames // vfm.tubelet_size, height // vfm.patch_size, width // vfm.patch_size, vfm.embed_dim
    )


# ---------------------------------------------------------------------------------------------------------------------
# Weights: from the authors' files or from the hub, in timm's names
# ---------------------------------------------------------------------------------------------------------------------

# The authors' files and the hub's (transformers' names) -> timm's names. Applied in this order.
RENAMES = [
    (r"^(?:module\.|backbone\.|videomae\.|encoder\.(?!layer\.))+", ""),
    (r"^embeddings\.patch_embeddings\.proj(?:ection)?\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.attention\.(?:attention\.)?", ".attn."),
]


class MissingModel(UserError):
    """A model whose weights or packages are not here; `--allow_skip_missing` goes on without it."""


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a published file (.pth, .pt, .bin, .safetensors), in timm's names.

    Tensors and the `argparse.Namespace` that VideoMAE's authors left in theirs are all that is read: no code runs.
    Raises `UserError` for anything else.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                # mmap: V-JEPA 2's file holds five times as much as is needed; files of old torch cannot do it
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a broken file can raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: cannot be read as weights ({reason}); is the download complete?") from error
    for key in ("module", "model", "encoder"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no weights; bring the file that the authors publish")
    return to_timm_names({str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)})


def to_timm_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a state dict by `RENAMES`; separate queries, keys and values, and their biases, become one `qkv`."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in RENAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    for key in [key for key in renamed if key.endswith(".attn.query.weight")]:
        attention = key.removesuffix("query.weight")
        for kind in ("weight", "bias"):
            parts = [renamed.get(f"{attention}{part}.{kind}") for part in ("query", "key", "value")]
            if all(part is not None for part in parts):
                renamed[f"{attention}qkv.{kind}"] = torch.cat(parts)
    for key in [key for key in renamed if key.endswith(".attn.q_bias")]:
        attention = key.removesuffix("q_bias")
        q_bias, v_bias = renamed[key], renamed.get(f"{attention}v_bias")
        if v_bias is not None:  # VideoMAE has no key bias
            renamed[f"{attention}qkv.bias"] = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    return renamed


def find_weights(name: str, given: Path | None, default: Path | None) -> Path:
    """Where the weights of model `name` are: the path given by hand, the default path if it exists, else from the hub.

    A relative default lies in the repository or beside it. Raises `UserError` when a path given by hand is absent, and
    `MissingModel` when the hub cannot be reached.
    """
    flag = f"--{name.lower()}_ckpt"
    if given is not None:
        if not given.is_file():
            raise UserError(f"{flag} {given}: no such file")
        return given
    for folder in (REPOSITORY, REPOSITORY.parent) if default else ():
        if (folder / default).is_file():
            return folder / default
    repository, file = VFMS[name].hub
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, local_files_only=not hub_answers()))
    except Exception as error:  # the hub's client raises its own errors, those of its HTTP library, and the system's
        looked = f"no file at {default}, and " if default else ""
        raise MissingModel(
            f"{name}: {looked}{file} of {repository} cannot be had from the hub ({type(error).__name__}); "
            f"download it elsewhere and pass it with {flag}"
        ) from error


@functools.cache
def hub_answers() -> bool:
    """Whether the hub can be reached. Its client asks six times over half a minute, and again for each model."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # as above
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Videos and captions
# ---------------------------------------------------------------------------------------------------------------------


def list_videos(folder: Path) -> list[Path]:
    """The videos of `folder`, sorted by name, hidden files left out.

    Raises `UserError` if there is none, or if two of them would write the same file.
    """
    if not folder.is_dir():
        raise UserError(f"--video_dir {folder}: no such folder")
    videos = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not videos:
        raise UserError(
            f"--video_dir {folder}: no videos in it ({' '.join(VIDEO_SUFFIXES)}; subfolders are not searched)"
        )
    by_stem: dict[str, Path] = {}
    for path in videos:
        if path.stem in by_stem:
            raise UserError(f"{by_stem[path.stem].name} and {path.name} would both write {path.stem}.pt; rename one")
        by_stem[path.stem] = path
    return videos


def read_captions(csv_path: Path, videos: Iterable[Path]) -> Callable[[Path], str]:
    """The captions of `videos` in a CSV file, as a function from a video's path to its caption, which may be empty.

    A column named as one of `VIDEO_COLUMNS` holds the video's file name, path or stem; without such a column row i
    belongs to the stem `%04d` of i. Of several rows for a video the first counts. Memory holds one row at a time, so
    the file may be that of a whole data set. Raises `UserError` when it cannot be read or has no `caption` column.
    """
    wanted = {name for video in videos for name in (video.name, video.stem)}
    by_name: dict[str, str] = {}
    by_stem: dict[str, str] = {}
    try:
        with open(csv_path, encoding="utf-8-sig", newline="") as file:
            rows = filter(None, csv.reader(bounded_lines(file), strict=True))  # a blank line is no row
            header = next(rows, [])
            columns = {name.strip().lower(): place for place, name in reversed(list(enumerate(header)))}
            if "caption" not in columns:
                found = ", ".join(map(repr, header))[:300] or "nothing"
                raise UserError(f"--csv_path {csv_path}: no column named caption; it has {found}")
            named_by = next((columns[name] for name in VIDEO_COLUMNS if name in columns), None)
            progress = tqdm(rows, csv_path.name, unit="row", leave=False, delay=1, disable=rank() > 0)
            for index, row in enumerate(progress):
                if any(row[len(header) :]):
                    raise ValueError(f"row {index + 1} is longer than the header; quote captions that hold commas")
                row += [""] * (len(header) - len(row))
                name = f"{index:04d}" if named_by is None else row[named_by].strip().replace("\\", "/").split("/")[-1]
                stem = os.path.splitext(name)[0] if name.lower().endswith(VIDEO_SUFFIXES) else name
                for key, captions in ((name, by_name), (stem, by_stem)):
                    if key in wanted:
                        captions.setdefault(key, row[columns["caption"]])
    except (OSError, ValueError, csv.Error) as error:  # a wrong encoding is a ValueError too
        raise UserError(f"--csv_path {csv_path}: cannot be read as a CSV in UTF-8 ({error})") from error
    return lambda video: by_name.get(video.name, by_stem.get(video.stem, ""))


def bounded_lines(file: TextIO) -> Iterator[str]:
    """The lines of a text file, of which a single one could otherwise fill the memory."""
    while line := file.readline(LONGEST_LINE):
        if len(line) == LONGEST_LINE:
            raise ValueError(f"a line is longer than {LONGEST_LINE} characters")
        yield line


# ---------------------------------------------------------------------------------------------------------------------
# Decoding, in processes of its own
# ---------------------------------------------------------------------------------------------------------------------


def frame_indices(num_available: int, num_frames: int) -> np.ndarray:
    """`num_frames` indices spread evenly over 0 .. num_available - 1; when there are too few frames, some repeat."""
    return np.linspace(0, num_available - 1, num_frames).round().astype(int)


def resize_frame(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [height, width, 3]: squashed to `size`, bicubic with antialiasing.

    On bytes, because that is exact to a rounding and many times faster than on a float copy.
    """
    if frame.shape[:2] == size:
        return frame
    image = torch.from_numpy(frame)[None].permute(0, 3, 1, 2)  # [1, 3, H, W], by its strides channels last
    image = F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False)
    return image[0].permute(1, 2, 0).numpy()


@contextmanager
def open_track(path: str) -> Iterator[tuple[InputContainer, VideoStream, list]]:
    """A video's container, the track that FFmpeg takes for the best, and the errors that FFmpeg logs: (level, source,
    text). Raises `ValueError` for a video that cannot be read."""
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # else a message that also ended the video before would be lost
    with av.logging.Capture(local=False) as messages:
        try:
            with av.open(path, metadata_errors="replace") as container:
                stream = container.streams.best("video")
                if stream is None:
                    raise ValueError("no video track")
                if stream.codec_context is None:
                    raise ValueError("a codec that FFmpeg cannot decode")
                stream.codec_context.thread_count = 1
                yield container, stream, messages
        except av.error.FFmpegError as error:
            said = "; ".join([error.strerror, *(text.strip() for *_, text in messages[-2:])])
            raise ValueError(f"cannot be read: {said}") from None


def count_packets(path: str) -> int:
    """How many packets of a video are shown: its number of frames, unless some hold none. Decodes nothing.

    Raises `ValueError` if the video is empty, encrypted or cut short, as far as its container can tell.
    """
    with open_track(path) as (container, stream, messages):
        num_shown, times = 0, []
        for packet in container.demux(stream):
            if packet.size:
                if packet.has_sidedata("encryption_info") or "enc_key_id" in stream.metadata:
                    raise ValueError("encrypted")
                num_shown += not packet.is_discard
                times.append(packet.dts or 0)
        promised = stream.frames or round((container.duration or 0) / av.time_base * float(stream.average_rate or 0))
        missing = promised - len(times)
        if stream.frames:  # AVI counts dropped frames, an edit list can leave out the last ones: time tells
            spacing = (max(times) - min(times)) / max(1, len(times) - 1) if times else 0
            duration = max(stream.duration or 0, stream.frames)  # in AVI, which may have lost its index, the same
            missing = min(missing, duration / (spacing or 1) - len(times))
        elif not any(source == container.format.name for _, source, _ in messages):
            missing = 0  # a sound track may be longer
        if missing > 0.5:
            raise ValueError(f"cut short: {len(times)} of {promised} frames are there")
    if not num_shown:
        raise ValueError("no frames")
    return num_shown


# What a decoder gives are all frames that a video shows, in order, each as a function that makes uint8 RGB [H, W, 3] of
# it, so that only the frames that are wanted are converted.
Frames = Iterator[Callable[[], np.ndarray]]


def to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """uint8 RGB [H, W, 3] as FFmpeg's command makes it: converted by the frame's own matrix and range and nothing else,
    turned and mirrored by its display matrix."""
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25))
    graph.link_nodes(source, graph.add("scale"), graph.add("format", "rgb24"), graph.add("buffersink")).configure()
    graph.vpush(frame)
    rgb = graph.vpull().to_ndarray()
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # there is side data that PyAV does not know, as in MV-HEVC
        return np.ascontiguousarray(np.rot90(rgb, frame.rotation // 90))
    if matrix is None:
        return rgb
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # (x, y) is shown at (a x + c y, b x + d y)
    if abs(b) > abs(a):
        rgb, a, d = rgb.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def read_with_pyav(path: str) -> Frames:
    """Raises `ValueError` after the last frame if FFmpeg's decoder found damage.

    Its log counts only as long as every packet is a keyframe: elsewhere it also tells of references that a cut left
    behind, of which the frames that are shown have no need. Nor does a video without a first keyframe count as damaged.
    """
    errors, num_packets, num_shown, num_whole = [], 0, 0, 0
    starts_whole, all_keyframes = False, True
    with open_track(path) as (container, stream, messages):
        for packet in container.demux(stream):
            messages.clear()
            frames = []
            if packet.size:  # the last one only tells the decoder that nothing follows
                all_keyframes &= packet.is_keyframe
                starts_whole |= not num_packets and packet.is_keyframe
                num_packets += not packet.is_discard
            try:
                frames = packet.decode()
            except av.error.FFmpegError as error:
                errors.append(error.strerror)
            if all_keyframes:
                errors += [text.strip() for _, source, text in messages if source == stream.codec_context.codec.name]
            for frame in frames:
                num_shown += 1
                num_whole += not frame.is_corrupt
                yield functools.partial(to_rgb, frame)
            if not num_shown and not starts_whole:
                errors.clear()
    if errors or num_whole < num_shown:
        reason = errors[0] if errors else "corrupt frames"
        raise ValueError(f"damaged: {num_whole} of {num_packets} frames are whole ({reason})")


def check_plain(path: str) -> None:
    """Raise where decord or OpenCV may take another track, leave out a turn or mirror, map colours, or show black."""
    with open_track(path) as (container, stream, _):
        frame = next(container.decode(stream))
        is_hdr = frame.color_trc in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
        is_wide = frame.color_primaries in (ColorPrimaries.BT2020, ColorPrimaries.SMPTE431, ColorPrimaries.SMPTE432)
        is_turned = "DISPLAYMATRIX" in frame.side_data
        if is_hdr or is_wide or is_turned or frame.interlaced_frame or len(container.streams.video) > 1:
            raise RuntimeError("not for HDR, wide gamut, display matrices, interlaced video or several tracks")


def read_with_decord(path: str) -> Frames:
    import decord

    check_plain(path)
    decord.logging.set_level(decord.logging.ERROR)
    # fault_tol: decord would put a neighbour in the place of a frame that it cannot find, and say nothing
    reader = decord.VideoReader(path, num_threads=1, fault_tol=1e-9)
    for _ in range(len(reader)):
        frame = torch.from_dlpack(reader.next().to_dlpack()).numpy()  # without a copy
        if frame.shape[-1] != 3:  # dmlc/decord issue 336: some narrow videos, the bytes are not those of the frame
            raise RuntimeError(f"a frame of shape {list(frame.shape)} instead of [height, width, 3]")
        yield lambda frame=frame: frame


def read_with_opencv(path: str) -> Frames:
    import cv2

    check_plain(path)
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)  # not as images whose names are numbered
    while capture.grab():
        yield lambda: cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB)


BACKENDS = {"pyav": read_with_pyav, "decord": read_with_decord, "opencv": read_with_opencv}  # tried in this order


def decode_clip(
    path: str, num_frames: int, sizes: Iterable[tuple[int, int]], backend: str
) -> dict[tuple[int, int], np.ndarray]:
    """Sample `num_frames` frames of a video and resize them: {size: uint8 RGB [num_frames, height, width, 3]}.

    The video is read from its start to its end; a second time if it shows another number of frames than its packets
    let expect. Raises `ValueError` if the video is to blame, anything else if the decoder is.
    """
    path = os.path.abspath(path)  # the name pipe:0 would be a protocol to FFmpeg if no folder came before it
    if not path.isascii() and path != os.fsencode(path).decode(errors="replace"):
        raise ValueError("its name is not in UTF-8; rename it")
    num_available = count_packets(path)
    while True:
        indices, position = np.unique(frame_indices(num_available, num_frames), return_inverse=True)
        clips: dict[tuple[int, int], list[np.ndarray]] = {size: [] for size in sizes}
        num_shown = 0
        for num_shown, frame in enumerate(BACKENDS[backend](path), start=1):
            if num_shown - 1 in indices:
                rgb = frame()
                for size, clip in clips.items():
                    clip.append(resize_frame(rgb, size))
        if num_shown == num_available:
            return {size: np.stack(clip)[position] for size, clip in clips.items()}
        if backend != "pyav":
            raise RuntimeError(f"{num_shown} frames, where the container has {num_available}")
        if not num_shown:
            raise ValueError("no frames: none can be decoded")
        num_available = num_shown


def start_decoder() -> None:
    """What a decoding process does first: leave Ctrl-C to the parent, take one core, limit what it does to others.

    A broken header can ask for any amount of memory: 4 GiB are enough for frames of 8K. And a decoder that hangs in
    native code would outlive a parent that is killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    reuse_memory()
    os.nice(10)  # a core that the model's threads share gives them the time they ask for: they wait for one another
    if sys.platform == "linux":
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 4 * 2**30,) * 2)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def decode_ahead(
    videos: Iterable[Path], num_frames: int, sizes: list[tuple[int, int]], num_workers: int, timeout: float
) -> Iterator[tuple[Path, dict[tuple[int, int], np.ndarray] | str]]:
    """Decode videos in processes, a few ahead of the caller. Yields (video, clips by size) or (video, why it failed).

    A decoder that dies, takes longer than `timeout` seconds or fails costs its process and nothing else; the next one
    has its turn then, unless the video is to blame.
    """
    # A fork of this process would copy its threads' locks.
    context = multiprocessing.get_context("forkserver")
    with ProcessPool(max_workers=num_workers, initializer=start_decoder, context=context) as pool:

        def schedule(video: Path, backend: str) -> ProcessFuture:
            return pool.schedule(decode_clip, args=(str(video), num_frames, sizes, backend), timeout=timeout)

        def result(video: Path, future: ProcessFuture) -> dict[tuple[int, int], np.ndarray] | str:
            reasons = []
            for backend in BACKENDS:
                try:
                    return (schedule(video, backend) if reasons else future).result()
                except DecodeTimeoutError:
                    reasons.append(f"{backend}: no end after {timeout:g} s (--decode_timeout)")
                except ProcessExpired as error:
                    reasons.append(f"{backend}: the process died ({error.exitcode})")
                except ValueError as error:
                    return " ".join(str(error).split())
                except Exception as error:  # decoders raise their own kinds
                    reasons.append(f"{backend}: {' '.join(str(error).split()) or type(error).__name__}"[:300])
            return "; ".join(reasons)

        waiting = deque()
        videos = iter(videos)
        try:
            while True:
                while len(waiting) < num_workers + 1 and (video := next(videos, None)) is not None:
                    waiting.append((video, schedule(video, next(iter(BACKENDS)))))
                if not waiting:
                    return
                video, future = waiting.popleft()
                yield video, result(video, future)
        finally:
            pool.stop()  # without it, a caller who leaves early would wait for the clips that were begun


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One model's part of a run: what it makes features with, and what came of it."""

    name: str
    vit: nn.Module | None
    settings: dict[str, int | str]  # a finished feature is kept if it was made with these
    folder: Path
    todo: dict[Path, int] = field(default_factory=dict)  # video -> its size in bytes
    batch: list[tuple[Path, np.ndarray]] = field(default_factory=list)  # clips that wait for a full batch
    count: Counter = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)  # video -> reason
    shape: list[int] | None = None

    @property
    def vfm(self) -> VFM:
        return VFMS[self.name]

    @property
    def size(self) -> tuple[int, int]:
        return self.settings["height"], self.settings["width"]


# Relative to the repository, wherever the shell is.
DEFAULT_VIDEO_DIR = Path("../dataset/motion_top100")
DEFAULT_CSV = Path("../dataset/motion_top100.csv")
DEFAULT_OUTPUT = Path("../dataset/vfm_features_motion_top100")
DEFAULT_WEIGHTS = {  # in the repository or beside it; without them the hub's
    "VideoMAEv2": Path("VideoREPA/ckpt/VideoMAEv2/vit_b_k710_dl_from_giant.pth"),
    "VideoMAE": Path(
        "VideoREPA/ckpt/VideoMAE/k400_videomae_pretrain_base_patch16_224_frame_16x4_tube_mask_ratio_0_9_e1600.pth"
    ),
}


def default_num_workers() -> int:
    """Half of the cores that this process may use, at most 8: the models want the rest, and a disk feeds no more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // 2))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--video_dir", type=Path, default=DEFAULT_VIDEO_DIR, help="folder of videos")
    add("--csv_path", type=Path, default=DEFAULT_CSV, help="captions: a CSV with a column named caption")
    add("--output_root", type=Path, default=DEFAULT_OUTPUT, help="features go to <output_root>/<model>/<stem>.pt")
    add("--models", nargs="+", choices=list(VFMS), default=list(VFMS), metavar="MODEL", help=f"of {', '.join(VFMS)}")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the models run")
    add("--num_frames", type=number(int, 1), default=48, help="frames sampled per video")
    add("--videomae_resize_h", type=number(int, 1), default=160, help="input height of VideoMAE, VideoMAEv2 and VJEPA2")
    add("--videomae_resize_w", type=number(int, 1), default=240, help="input width of VideoMAE, VideoMAEv2 and VJEPA2")
    add("--dinov2_resize_h", type=number(int, 1), default=420, help="input height of DINOv2")
    add("--dinov2_resize_w", type=number(int, 1), default=630, help="input width of DINOv2")
    add("--dinov2_chunk", type=number(int, 1), default=128, help="frames per DINOv2 forward pass")
    for name in VFMS:
        add(f"--{name.lower()}_ckpt", type=Path, default=DEFAULT_WEIGHTS.get(name), help=f"published weights of {name}")
    add("--allow_skip_missing", action="store_true", help="go on without models whose weights or packages are missing")
    add("--random_weights", action="store_true", help="a dry run without weights: the features mean nothing")
    add("--batch_size", type=number(int, 1), default=1, help="clips per forward pass")
    add("--precision", choices=["float32", "bfloat16"], default="float32", help="of the models' matrix products")
    add("--save_dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of the saved features")
    add("--overwrite", action="store_true", help="make features again that are finished")
    add("--preview", action="store_true", help="draw each clip and its features: <stem>.mp4 and .png beside the .pt")
    add("--num_workers", type=number(int, 1), default=default_num_workers(), help="processes that decode")
    add("--decode_timeout", type=number(int, 1), default=120, help="seconds after which a video counts as undecodable")
    args = parser.parse_args(argv)
    args.models = list(dict.fromkeys(args.models))
    return args


def input_size(name: str, args: argparse.Namespace) -> tuple[int, int]:
    """The (height, width) that model `name` takes; raises `UserError` where its patches or tubelets do not fit."""
    vfm = VFMS[name]
    flags = [f"{vfm.flags}_resize_h", f"{vfm.flags}_resize_w"]
    for flag, step in [("num_frames", vfm.tubelet_size), *((flag, vfm.patch_size) for flag in flags)]:
        value = getattr(args, flag)
        if value % step:
            nearest = max(step, round(value / step) * step)
            raise UserError(f"--{flag} {value}: {name} needs a multiple of {step}; try --{flag} {nearest}")
    return getattr(args, flags[0]), getattr(args, flags[1])


def find_captions(csv_path: Path, videos: list[Path]) -> Callable[[Path], str]:
    """As `read_captions`; the default CSV may be absent, then no video has a caption."""
    if csv_path is not DEFAULT_CSV:
        if not csv_path.is_file():
            raise UserError(f"--csv_path {csv_path}: no such file")
        return read_captions(csv_path, videos)
    if (REPOSITORY / csv_path).is_file():
        return read_captions(REPOSITORY / csv_path, videos)
    say(f"warning: no captions: {csv_path} does not exist; --csv_path names another file")
    return lambda video: ""


def check_output(output_root: Path, models: list[str]) -> None:
    """Raise `UserError` where the models' folders can be neither made nor written, before time is spent on them."""
    for folder in (output_root / name for name in models):
        nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not nearest.is_dir():
            raise UserError(f"--output_root {output_root}: {nearest} is no folder; give another place")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"--output_root {output_root}: {nearest} cannot be written into; give another place")


def start_run(name: str, args: argparse.Namespace, output_root: Path) -> Run:
    """Load model `name` onto the device. Raises `MissingModel` if its weights or packages are not here."""
    size = input_size(name, args)
    path, weights, made_by = None, None, "random"
    try:
        if not args.random_weights:
            given, default = getattr(args, f"{name.lower()}_ckpt"), DEFAULT_WEIGHTS.get(name)
            path = find_weights(name, None if given is default else given, default)
            weights = read_weights(path)
            made_by = weights_hash(weights)
        vit = build_vit(VFMS[name], args.num_frames, size, weights).to(args.device)
    except ImportError as error:
        raise MissingModel(
            f"{name}: the package {error.name} is missing; install envs/environment.vfm_feature.yaml"
        ) from error
    except WeightsDoNotFit as error:
        raise UserError(f"{path}: not the weights of {name}: {error}") from error
    say(f"{name}: weights from {path or 'a random generator'} ({made_by})")
    settings = {
        "num_frames": args.num_frames,
        "height": size[0],
        "width": size[1],
        "precision": args.precision,
        "save_dtype": args.save_dtype,
        "weights": made_by,
    }
    return Run(name, vit, settings, output_root / name)


def start_runs(names: list[str], args: argparse.Namespace, output_root: Path) -> tuple[list[Run], dict[str, str]]:
    """The models `names`, and, with `--allow_skip_missing`, the reasons why some are left out."""
    runs, left_out = [], {}
    for name in names:
        try:
            runs.append(start_run(name, args, output_root))
        except MissingModel as error:
            if not args.allow_skip_missing:
                raise UserError(f"{error}, or skip such models with --allow_skip_missing") from error
            left_out[name] = str(error)
            say(f"warning: {error}")
    return runs, left_out


def group_models(args: argparse.Namespace) -> list[list[str]]:
    """Which models are loaded at the same time: all of them, so that each video is decoded once, or one by one.

    Together where the weights take at most a third of the device's memory, which leaves room for a forward pass.
    """
    bytes_needed = sum(4 * 12 * VFMS[name].depth * VFMS[name].embed_dim ** 2 for name in args.models)  # 12 C^2 a block
    if torch.device(args.device).type == "cuda":
        memory = torch.cuda.mem_get_info(args.device)[0]
    else:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks_here
    if len(args.models) == 1 or bytes_needed <= memory / 3:
        return [args.models]
    say(
        f"warning: models run in turn, each decoding every video: together their weights take "
        f"{bytes_needed / 1e9:.1f} GB, and {args.device} has {memory / 1e9:.1f} GB"
    )
    return [[name] for name in args.models]


def video_settings(run: Run, video: Path, video_bytes: int) -> dict[str, int | str]:
    """What a feature is made with. A video that was replaced by another of the same name shows in its bytes."""
    return {**run.settings, "video": video.name, "video_bytes": video_bytes}


def plan(
    run: Run, videos: list[Path], caption_of: Callable[[Path], str], overwrite: bool, with_preview: bool = False
) -> None:
    """Find out which videos `run` has to do. A finished feature whose caption has changed is saved with the new one."""
    remove_leftovers(run.folder)
    for video in tqdm(videos, desc=f"{run.name}: looking for finished features", unit="video", leave=False):
        try:
            video_bytes = video.stat().st_size
        except OSError as error:
            run.failed[video.name] = f"gone since the run began ({error.strerror})"
            continue
        path = run.folder / f"{video.stem}.pt"
        saved = None if overwrite else read_saved(path)
        if saved is None or saved.get("settings") != video_settings(run, video, video_bytes):
            run.todo[video] = video_bytes
            continue
        if with_preview and not has_preview(path):
            run.todo[video] = video_bytes
            continue
        run.count["skipped"] += 1
        run.shape = list(saved["feature"].shape)
        caption = caption_of(video)
        if caption and caption != saved.get("caption"):
            save_atomically({**saved, "caption": caption}, path)


def read_saved(path: Path) -> dict | None:
    """What an earlier run wrote, the feature still on disk; None if there is nothing, or nothing that can be read."""
    try:
        saved = torch.load(path, weights_only=True, mmap=True)
    except Exception:  # a file of somebody else's can be anything; it is made again
        return None
    return saved if isinstance(saved, dict) and isinstance(saved.get("feature"), torch.Tensor) else None


def forward(run: Run, clips: list[np.ndarray], args: argparse.Namespace) -> torch.Tensor:
    """Clips uint8 [T, H, W, 3] -> float32 [len(clips), T/t, H/p, W/p, C] on the device, which may still be at it."""
    batch = torch.from_numpy(np.stack(clips))
    if torch.device(args.device).type == "cuda":
        batch = batch.pin_memory()  # else the copy waits for the forward pass before it
    try:
        batch = batch.to(args.device, non_blocking=True)
        return extract_features(run.vit, run.vfm, batch, args.dinov2_chunk, getattr(torch, args.precision))
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{run.name}: the device's memory is full; lower --batch_size, --dinov2_chunk or the input size, run fewer "
            "--models, or use --device cpu"
        ) from error


def save_feature(run: Run, video: Path, feature: torch.Tensor, caption: str, clip: np.ndarray | None = None) -> None:
    """Fetch a feature from the device and write its file, and its preview if there is a `clip` for it. What comes of it
    goes into `run`."""
    feature = feature.to(getattr(torch, run.settings["save_dtype"])).cpu()
    if not torch.isfinite(feature).all():
        run.failed[video.name] = f"{run.name} gave NaN or infinity in {run.settings['save_dtype']}"
        return
    settings = video_settings(run, video, run.todo[video])
    data = {
        "feature": feature,
        "caption": caption,
        "video": settings["video"],
        "model": run.name,
        "weights": settings["weights"],
        "settings": settings,
    }
    save_atomically(data, run.folder / f"{video.stem}.pt")
    if clip is not None:
        write_preview(run.folder / f"{video.stem}.pt", feature, frames=clip)
    run.shape = list(feature.shape)
    run.count["written"] += 1


def extract(runs: list[Run], videos: list[Path], caption_of: Callable[[Path], str], args: argparse.Namespace) -> None:
    """Decode each of `videos` once and give it to every model that has to do it. A video that fails is recorded.

    Decoding runs ahead in its processes, and writing behind in a thread of its own, both by a bounded number of clips.
    """
    bars = {
        run.name: tqdm(total=len(run.todo), desc=run.name, unit="video", position=i, disable=rank() > 0)
        for i, run in enumerate(runs)
    }
    saving: deque[tuple[Run, Future]] = deque()

    def finish_saving(at_most: int) -> None:
        while len(saving) > at_most:
            run, future = saving.popleft()
            future.result()
            bars[run.name].update()

    def flush(run: Run) -> None:
        if not run.batch:
            return
        features = forward(run, [clip for _, clip in run.batch], args)
        for (video, clip), feature in zip(run.batch, features, strict=True):
            shown = clip if args.preview else None
            saving.append((run, writer.submit(save_feature, run, video, feature, caption_of(video), shown)))
        run.batch.clear()
        finish_saving(at_most=2 * args.batch_size)

    sizes = sorted({run.size for run in runs})
    with ThreadPoolExecutor(max_workers=1) as writer:
        try:
            for video, clips in decode_ahead(videos, args.num_frames, sizes, args.num_workers, args.decode_timeout):
                for run in (run for run in runs if video in run.todo):
                    if isinstance(clips, str):
                        run.failed[video.name] = clips
                        bars[run.name].update()
                        continue
                    run.batch.append((video, clips[run.size]))
                    if len(run.batch) == args.batch_size:
                        flush(run)
            for run in runs:
                flush(run)
            finish_saving(at_most=0)
        finally:
            for bar in bars.values():
                bar.close()


# Several processes, started by torchrun, share the videos. They speak to each other twice: rank 0 says what is to be
# done, and at the end collects what was. Nobody waits in between; the first waits for the last however long it takes.


def share_out(runs: list[Run], videos: list[Path]) -> list[Path]:
    """This rank's part of the videos that any model has to do; all take rank 0's word for which these are."""
    todo = from_first_rank([run.todo for run in runs])
    mine = [video for video in videos if any(video in todo_of_run for todo_of_run in todo)]
    if dist.is_initialized():
        mine = mine[rank() :: dist.get_world_size()]
    for run, todo_of_run in zip(runs, todo, strict=True):
        run.todo = {video: todo_of_run[video] for video in mine if video in todo_of_run}
    return mine


def collect(runs: list[Run]) -> None:
    """Rank 0's `runs` know what came of all ranks' videos afterwards."""
    if not dist.is_initialized():
        return
    mine = [(run.count["written"], run.failed, run.shape) for run in runs]
    everyone = [None] * dist.get_world_size() if rank() == 0 else None
    dist.gather_object(mine, everyone)
    for others in everyone[1:] if everyone else ():
        for run, (written, failed, shape) in zip(runs, others, strict=True):
            run.count["written"] += written
            run.failed |= failed
            run.shape = run.shape or shape


def report(runs: list[Run], left_out: dict[str, str], output_root: Path) -> None:
    """Print the summary, and write `failed_videos.txt` of each model and `vfm_dimensions.txt`."""
    print(f"\n{'model':<11}{'written':>8}{'skipped':>8}{'failed':>8}  {'feature':<20}{'dtype':<9}{'size':>10}  folder")
    for run in runs:
        counts = f"{run.count['written']:>8}{run.count['skipped']:>8}{len(run.failed):>8}"
        size = sum(path.stat().st_size for path in run.folder.glob("*.pt")) / 1e6
        shape = str(run.shape or "-")
        print(f"{run.name:<11}{counts}  {shape:<20}{run.settings['save_dtype']:<9}{size:>7.1f} MB  {run.folder}")
        if run.failed:
            print(f"{'':<11}why: {run.folder / 'failed_videos.txt'}")
    for reason in left_out.values():
        print(f"not run: {reason}")
    if any(run.settings["weights"] == "random" for run in runs):
        print(RANDOM_WARNING)

    for run in runs:
        failures = run.folder / "failed_videos.txt"
        if run.failed:
            one_line = (f"{' '.join(name.split())}\t{reason}\n" for name, reason in sorted(run.failed.items()))
            with whole_file(failures) as file:
                file.write("".join(one_line).encode(errors="backslashreplace"))  # names that are not in UTF-8
        else:
            failures.unlink(missing_ok=True)
    known = [run for run in runs if run.shape]
    dimensions = "".join(f"{run.name}: feature shape {run.shape}, C = {run.shape[-1]}\n" for run in known)
    if known:
        with whole_file(output_root / "vfm_dimensions.txt") as file:
            file.write(dimensions.encode())


RANDOM_WARNING = """
    *************************************************************************
    *  --random_weights: these features mean NOTHING. This was a dry run.   *
    *************************************************************************
"""


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    for name in args.models:
        input_size(name, args)
    args.device = str(open_device(args.device))
    if args.preview:
        check_preview_packages()
    video_dir = REPOSITORY / args.video_dir if args.video_dir is DEFAULT_VIDEO_DIR else args.video_dir
    output_root = REPOSITORY / args.output_root if args.output_root is DEFAULT_OUTPUT else args.output_root
    videos = list_videos(video_dir)
    check_output(output_root, args.models)
    caption_of = find_captions(args.csv_path, videos)
    without = sum(not caption_of(video) for video in videos)
    if without and args.csv_path is not DEFAULT_CSV:
        say(f"warning: {without} of {len(videos)} videos have no caption in {args.csv_path}")
    if args.random_weights:
        say("warning: --random_weights: a dry run; the features will mean NOTHING")

    join_ranks()
    all_runs, left_out = [], {}
    try:
        for names in group_models(args):
            runs, missing = start_runs(names, args, output_root)
            left_out |= missing
            all_runs += runs
            if len(runs) > 1:
                say(f"together, each video decoded once: {', '.join(run.name for run in runs)}")
            if rank() == 0:
                for run in runs:
                    plan(run, videos, caption_of, args.overwrite, args.preview)
            extract(runs, share_out(runs, videos), caption_of, args)
            collect(runs)
            for run in runs:
                run.vit = None  # its memory is the next group's
    finally:
        if rank() == 0 and (all_runs or left_out):
            report(all_runs, left_out, output_root)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0 if any(run.count["written"] or run.count["skipped"] for run in all_runs) or rank() > 0 else 1


if __name__ == "__main__":
    run_script(main)
