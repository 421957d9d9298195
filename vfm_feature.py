"""Turn a folder of videos into features of video foundation models (VFMs).

In:  a folder of videos and, if there is one, a CSV of captions.
Out: `<output_root>/<model>/<video's stem>.pt`, a dict with `feature` [T, H, W, C], `caption`, `video`, `model`,
     `weights` and `settings`, with --preview also `thumbnails`, small frames, and pictures beside it;
     `<output_root>/vfm_dimensions.txt`; where videos failed, `<output_root>/<model>/failed_videos.txt`.
     With --motion_checkpoint the feature stays in memory: `<output_root>/<model>_motion/` gets what encode.py would
     make of it, and `encode_report.csv`.

    python vfm_feature.py --video_dir clips --csv_path clips.csv --output_root features
    python vfm_feature.py --video_dir clips --models VideoMAEv2 DINOv2 --allow_skip_missing
    python vfm_feature.py --video_dir clips --models DINOv2 --motion_checkpoint checkpoints/motion_ae_best.pt
    python vfm_feature.py --video_dir clips --random_weights          # a dry run: no weights needed
    torchrun --nproc_per_node=4 vfm_feature.py --video_dir clips      # four GPUs share the videos

The features are VideoREPA's alignment targets (https://github.com/aHapBean/VideoREPA): the last block's output without
the final norm for VideoMAEv2, VideoMAE and V-JEPA 2, the normalised patch tokens for DINOv2. A run that was stopped
continues when started again: features that exist already, made from the same video with the same settings, are skipped.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import functools
import io
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as DecodeTimeoutError
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from av.container import InputContainer
from av.video.reformatter import ColorPrimaries
from av.video.stream import VideoStream
from pebble import ProcessExpired, ProcessFuture, ProcessPool
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from losses import FeatureErrors
from model import (
    METRICS,
    MOVEMENT,
    ArgumentParser,
    MotionFeatureAutoencoder,
    UserError,
    check_file,
    check_preview_packages,
    encode_clip,
    file_fingerprint,
    gather,
    has_preview,
    join_ranks,
    load_checked,
    num_ranks,
    number,
    open_device,
    print_summary,
    rank,
    remove_leftovers,
    reuse_memory,
    run_script,
    save_atomically,
    say,
    thumbnails,
    weights_hash,
    whole_file,
    write_encode_report,
    write_preview,
)

REPOSITORY = Path(__file__).resolve().parent
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".wmv")
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
    position_encoding: str = "sinusoid"  # a fixed table; "learned": a table in the weights; "rotary": in each attention
    size_flags: str = "videomae"  # <size_flags>_resize_h and <size_flags>_resize_w set the input size
    unused: tuple[str, ...] = ()  # patterns of published weights that it does without, beside `UNUSED`


VFMS = {
    "VideoMAEv2": VFM(hub=("OpenGVLab/VideoMAE2", "distill/vit_b_k710_dl_from_giant.pth")),
    "VideoMAE": VFM(hub=("MCG-NJU/videomae-base", "model.safetensors")),
    "DINOv2": VFM(
        hub=("timm/vit_base_patch14_dinov2.lvd142m", "model.safetensors"),
        patch_size=14,
        tubelet_size=1,
        position_encoding="learned",
        size_flags="dinov2",
    ),
    "VJEPA2": VFM(
        hub=("facebook/vjepa2-vitl-fpc64-256", "model.safetensors"),
        embed_dim=1024,
        depth=24,
        num_heads=16,
        position_encoding="rotary",
        unused=(r"pos_embed$",),  # the authors' own code does not use it either
    ),
}

# Patterns of published weights that the features do not depend on, in timm's names. Any other weight that a model has
# no place for is an error: a DINOv2 trained with register tokens, for example, gives other features without them.
UNUSED = (
    *(r"(\w+_)?head\.", r"classifier\.", r"decoder\.", r"encoder_to_decoder\.", r"predictor\.", r"mask_token$"),
    r"(fc_|layer)?norm\.",  # a final norm, where the features are taken before it
    r"position_embeddings$",  # of VideoMAE's decoder
)


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

    A third of the channels (rounded down to an even number) belongs to each axis, the rest stays as it is. As in
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
        quarter_turn = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)  # [B, heads, N, D]
        return (x * self.cos + quarter_turn * self.sin).to(x.dtype)


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
    table = table.transpose(0, 1)[None]  # [1, C, 8, H, W]
    table = F.interpolate(table, size=grid, mode="trilinear", align_corners=False)  # [1, C, T, H, W]
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


def build_vit(
    vfm: VFM, num_frames: int, size: tuple[int, int], weights: dict[str, torch.Tensor] | None = None
) -> nn.Module:
    """timm's `VisionTransformer` for clips of `num_frames` frames of `size` = (height, width), in eval mode on the CPU.

    `weights`: a state dict in timm's names, from `read_weights`; without it they are random, the same every time.
    Raises what `load_weights` raises.
    """
    from timm.models.vision_transformer import VisionTransformer  # takes seconds; --help and decoders do without it

    is_video = vfm.tubelet_size > 1
    grid = (num_frames // vfm.tubelet_size, size[0] // vfm.patch_size, size[1] // vfm.patch_size)
    device = "cpu" if weights is None else "meta"  # with weights to load, no initial values are drawn
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
            pos_embed="learn" if vfm.position_encoding == "learned" else "none",
            init_values=None if is_video else 1e-5,  # DINOv2's blocks have LayerScale
            final_norm=not is_video,
            device=device,
        )
        if is_video:
            vit.patch_embed = TubeletEmbed(vfm.embed_dim, vfm.patch_size, vfm.tubelet_size, device)
    if weights is not None:
        load_weights(vit, vfm, weights, grid[1:])
    if vfm.position_encoding == "sinusoid":
        vit.pos_embed = nn.Parameter(sinusoid_positions(grid, vfm.embed_dim))
    if vfm.position_encoding == "rotary":
        rotary = RotaryPositions(grid, vfm.embed_dim // vfm.num_heads)
        for block in vit.blocks:  # timm's attention sends queries and keys through these two before it compares them
            block.attn.q_norm = block.attn.k_norm = rotary
    return vit.eval().requires_grad_(False)


def load_weights(vit: nn.Module, vfm: VFM, weights: dict[str, torch.Tensor], grid: tuple[int, int]) -> None:
    """Put `weights` into `vit`, in float32.

    Raises `ValueError` that names weights that are missing, of another shape, or neither in the model nor `UNUSED`.
    """
    expected = {name: list(parameter.shape) for name, parameter in vit.state_dict().items()}
    if "pos_embed" in expected:
        expected["pos_embed"][1] = 1 + 37 * 37  # the published table, before it is resized
    problems = [f"{name} is missing" for name in expected if name not in weights]
    for name, value in weights.items():
        if name not in expected:
            if not any(re.match(pattern, name) for pattern in (*UNUSED, *vfm.unused)):
                problems.append(f"{name} has no place in it")
        elif list(value.shape) != expected[name]:
            problems.append(f"{name} is {list(value.shape)} instead of {expected[name]}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"{', '.join(problems[:4])}{more}")
    state = {name: weights[name].float() for name in expected}
    if "pos_embed" in state:
        state["pos_embed"] = resize_learned_positions(state["pos_embed"], grid)
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
    (r"\.attn\.q_bias$", ".attn.query.bias"),
    (r"\.attn\.v_bias$", ".attn.value.bias"),
]


def download_weights(name: str) -> Path:
    """The hub's file of model `name`. Raises `FileNotFoundError` when the hub cannot be reached."""
    from huggingface_hub import hf_hub_download

    repository, file = VFMS[name].hub
    try:
        return Path(hf_hub_download(repository, file, local_files_only=not hub_answers()))
    except Exception as error:  # its own errors, those of its HTTP library, and the system's
        default = DEFAULT_PATHS.get(f"{name.lower()}_ckpt")
        looked = f"no file at {default}, and " if default else ""
        raise FileNotFoundError(
            f"{looked}{file} of {repository} cannot be downloaded from the hub ({type(error).__name__}); "
            f"download it elsewhere and pass it with --{name.lower()}_ckpt"
        ) from error


@functools.cache
def hub_answers() -> bool:
    """Whether the hub can be reached; asked once, because the hub's client tries for half a minute for each model."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # of the same kinds
        return False
    return True


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a published file (.pth, .pt, .bin, .safetensors), in timm's names.

    No code runs: tensors, plain values and `argparse.Namespace`, which VideoMAE's file holds, are all that is loaded.
    Raises `UserError` for anything else.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        check_file(path)
        try:
            state = load_file(path)
        except Exception as error:  # a broken file can raise anything
            raise UserError(f"{path} is damaged ({type(error).__name__}); download it again") from None
    else:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = load_checked(path, mmap=True)  # V-JEPA 2's file holds five times as much as is needed
    for key in ("module", "model", "encoder"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} holds no weights; use the file that the authors publish")
    return to_timm_names({str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)})


def to_timm_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a state dict by `RENAMES`; separate queries, keys and values, and their biases, become one `qkv`."""
    for pattern, replacement in RENAMES:
        state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
    for query in [name for name in state if ".attn.query." in name]:
        key, value, joint = (query.replace(".query.", f".{part}.") for part in ("key", "value", "qkv"))
        if query.endswith("bias"):
            state.setdefault(key, torch.zeros_like(state[query]))  # VideoMAE has no key bias
        if key in state and value in state:
            state[joint] = torch.cat([state.pop(query), state.pop(key), state.pop(value)])
    return state


# ---------------------------------------------------------------------------------------------------------------------
# Videos and captions
# ---------------------------------------------------------------------------------------------------------------------


def list_videos(folder: Path) -> list[Path]:
    """The videos of `folder`, sorted by name, hidden files left out.

    Raises `UserError` if there is none, or if two of them would write the same file.
    """
    if not folder.is_dir():
        raise UserError(f"--video_dir {folder}: no such folder")
    by_stem: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".") and path.is_file():
            other = by_stem.setdefault(path.stem, path)
            if other is not path:
                raise UserError(f"{other.name} and {path.name} would both write {path.stem}.pt; rename one")
    if not by_stem:
        suffixes = " ".join(VIDEO_SUFFIXES)
        raise UserError(f"--video_dir {folder}: no videos in it ({suffixes}; subfolders are not searched)")
    return list(by_stem.values())


def read_table(csv_path: Path) -> pd.DataFrame:
    """A CSV file with a header; every field is a string. The names of the columns are in lower case.

    Raises `UserError` where the text is not UTF-8, quotes are not closed, or a row has more fields than the header.
    """
    try:
        text = csv_path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--csv_path {csv_path}: cannot be read as text in UTF-8 ({error})") from error
    csv.field_size_limit(2**31 - 1)  # characters in one caption; 2**17 by default
    rows: list[list[str]] = []
    try:
        for fields in csv.reader(io.StringIO(text, newline=""), strict=True):
            if rows and len(fields) > len(rows[0]):
                raise csv.Error(f"{len(fields)} fields where the header has {len(rows[0])}")
            rows.append(fields)
    except csv.Error as error:
        raise UserError(
            f"--csv_path {csv_path}: row {len(rows) + 1}: {error}; quote captions that hold commas"
        ) from None
    if not rows:
        return pd.DataFrame()
    header = [name.strip().lower() for name in rows[0]]
    rows = [fields for fields in rows[1:] if fields or len(header) == 1]  # in one column a blank line is a caption
    table = pd.DataFrame([fields + [""] * (len(header) - len(fields)) for fields in rows], columns=header, dtype=str)
    return table.loc[:, ~table.columns.duplicated()]


def match_rows(names: Iterable[str], videos: list[Path]) -> dict[Path, int]:
    """Which row names which video, by its file name, path or stem. If several do, the first."""
    by_name: dict[str, int] = {}
    by_stem: dict[str, int] = {}
    for row, text in enumerate(names):
        name = text.strip().replace("\\", "/").split("/")[-1]
        by_name.setdefault(name, row)
        by_stem.setdefault(os.path.splitext(name)[0] if name.lower().endswith(VIDEO_SUFFIXES) else name, row)
    rows = {video: by_name.get(video.name, by_stem.get(video.stem)) for video in videos}
    return {video: row for video, row in rows.items() if row is not None}


def read_captions(csv_path: Path, videos: list[Path]) -> dict[Path, str]:
    """The captions of `videos` in the column `caption` of a CSV file; empty for videos that it does not name.

    The column that names most of the videos, whatever its title, says whose caption a row is. If no column names any,
    row i belongs to the video whose stem is i in four digits. Raises `UserError` where the file cannot be read or has
    no column `caption`.
    """
    table = read_table(csv_path)
    if "caption" not in table:
        found = ", ".join(map(repr, table.columns))[:300] or "nothing"
        raise UserError(f"--csv_path {csv_path}: no column named caption; it has {found}")
    matches = {column: match_rows(table[column], videos) for column in table.columns.drop("caption")}
    best = max(matches, key=lambda column: len(matches[column]), default=None)
    if best is not None and matches[best]:
        row_of = matches[best]
        say(f"captions: column {best!r} of {csv_path} names {len(row_of)} of {len(videos)} videos")
    else:
        row_of = match_rows((f"{row:04d}" for row in range(len(table))), videos)
        say(f"captions: no column of {csv_path} names the videos; row 0 belongs to 0000, row 1 to 0001, and so on")
    captions = table["caption"].tolist()
    return {video: captions[row_of[video]] if video in row_of else "" for video in videos}


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
    """A video's container, its best track in FFmpeg's opinion, and what FFmpeg logs as errors, (level, source, text).

    Raises `ValueError` for a video that cannot be read.
    """
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # a message can equal the last one of the video before
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
    """How many packets of a video are shown: as many as it has frames, unless some packets hold none. Decodes nothing.

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
        if stream.frames:  # can include dropped frames (AVI) and those behind an edit list's end, so time must agree
            spacing = (max(times) - min(times)) / max(1, len(times) - 1) if times else 0
            duration = max(stream.duration or 0, stream.frames)  # the same in AVI; a guess where its index is cut off
            missing = min(missing, duration / (spacing or 1) - len(times))
        elif not any(source == container.format.name for _, source, _ in messages):
            missing = 0  # the container's reader saw no fault; its duration can be that of a longer sound track
        if missing > 0.5:
            raise ValueError(f"cut short: {len(times)} of {promised} frames are there")
    if not num_shown:
        raise ValueError("no frames")
    return num_shown


# A decoder yields every frame that the video shows, in order, as a function that returns uint8 RGB [H, W, 3]: only the
# frames that are wanted are converted.
Frames = Iterator[Callable[[], np.ndarray]]


def make_converter(width: int, height: int, pixel_format: str, *colours: int) -> av.filter.Graph:
    """FFmpeg's own conversion to RGB, for frames that are alike in all of these. Making one takes longer than a use."""
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=width, height=height, format=pixel_format, time_base=Fraction(1, 25))
    graph.link_nodes(source, graph.add("scale"), graph.add("format", "rgb24"), graph.add("buffersink")).configure()
    return graph


def to_rgb(frame: av.VideoFrame, converter: Callable[..., av.filter.Graph]) -> np.ndarray:
    """uint8 RGB [H, W, 3] as FFmpeg's command shows it: converted by the frame's own matrix and range and nothing else,
    turned and mirrored by its display matrix. `converter`: `make_converter`, with a memory for this video."""
    graph = converter(frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
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

    Its log counts only while all packets are keyframes: after others it also reports references that a cut removed and
    that no shown frame needs. If a video begins without a keyframe, errors before its first shown frame do not count.
    """
    converter = functools.cache(make_converter)
    errors, num_packets, num_shown, num_whole = [], 0, 0, 0
    starts_whole, all_keyframes = False, True
    with open_track(path) as (container, stream, messages):
        for packet in container.demux(stream):
            messages.clear()
            frames = []
            if packet.size:  # the last, empty one tells the decoder to finish
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
                yield functools.partial(to_rgb, frame, converter)
            if not num_shown and not starts_whole:
                errors.clear()
    if errors or num_whole < num_shown:
        reason = errors[0] if errors else "corrupt frames"
        raise ValueError(f"damaged: {num_whole} of {num_packets} frames are whole ({reason})")


def check_plain(path: str) -> None:
    """Raise where decord or OpenCV may take another track, not turn or mirror, map colours, or show black."""
    with open_track(path) as (container, stream, _):
        frame = next(container.decode(stream))
        # HDR has wide primaries too
        is_wide = frame.color_primaries in (ColorPrimaries.BT2020, ColorPrimaries.SMPTE431, ColorPrimaries.SMPTE432)
        is_turned = "DISPLAYMATRIX" in frame.side_data
        if is_wide or is_turned or frame.interlaced_frame or len(container.streams.video) > 1:
            raise RuntimeError("not for HDR, wide gamut, display matrices, interlaced video or several tracks")


def read_with_decord(path: str) -> Frames:
    import decord

    check_plain(path)
    decord.logging.set_level(decord.logging.ERROR)
    # fault_tol: otherwise decord silently replaces a frame that it cannot find by a neighbour
    reader = decord.VideoReader(path, num_threads=1, fault_tol=1e-9)
    for _ in range(len(reader)):
        frame = torch.from_dlpack(reader.next().to_dlpack()).numpy()  # without a copy
        if frame.shape[-1] != 3:  # dmlc/decord issue 336: garbled frames of some narrow videos
            raise RuntimeError(f"a frame of shape {list(frame.shape)} instead of [height, width, 3]")
        yield lambda frame=frame: frame


def read_with_opencv(path: str) -> Frames:
    import cv2

    check_plain(path)
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)  # else a name with % stands for numbered images
    while capture.grab():
        yield lambda: cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB)


BACKENDS = {"pyav": read_with_pyav, "decord": read_with_decord, "opencv": read_with_opencv}  # tried in this order


def decode_clip(
    path: str, num_frames: int, sizes: Iterable[tuple[int, int]], backend: str
) -> dict[tuple[int, int], np.ndarray]:
    """Sample `num_frames` frames of a video and resize them: {size: uint8 RGB [num_frames, height, width, 3]}.

    The video is read from its start to its end, and a second time if it shows more or fewer frames than it has packets.
    Raises `ValueError` if the video is to blame, anything else if the decoder is.
    """
    path = os.path.abspath(path)  # without a folder FFmpeg would take a name such as pipe:0 for a protocol
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
    """What a decoding process does first: it leaves Ctrl-C to its parent, takes one core, and limits its memory.

    A broken header can ask for any amount of memory; 4 GiB are enough for frames of 8K. A decoder that hangs in native
    code would outlive a parent that is killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    reuse_memory()
    os.nice(10)  # the model's threads wait for one another, so that slowing one down slows all
    if sys.platform == "linux":
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 4 * 2**30,) * 2)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def decode_ahead(
    videos: Iterable[Path], num_frames: int, sizes: list[tuple[int, int]], num_workers: int, timeout: float
) -> Iterator[tuple[Path, dict[tuple[int, int], np.ndarray] | str]]:
    """Decode videos in processes, a few ahead of the caller. Yields (video, clips by size) or (video, why it failed).

    A decoder that fails, dies, or takes longer than `timeout` seconds costs only its process. Then the next decoder
    tries, unless the video is to blame.
    """
    context = multiprocessing.get_context("forkserver")  # a fork of this process would copy its threads' locks
    context.set_forkserver_preload(["torch", "av", "pandas"])  # imported once, not by each worker
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
            pool.stop()  # else a caller who leaves early would wait for the clips that are being decoded


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------

# Relative to the repository, wherever the shell is. VideoREPA is in the repository or beside it.
DEFAULT_PATHS = {
    "video_dir": Path("../dataset/motion_top100"),
    "csv_path": Path("../dataset/motion_top100.csv"),
    "output_root": Path("../dataset/vfm_features_motion_top100"),
    "videomaev2_ckpt": Path("VideoREPA/ckpt/VideoMAEv2/vit_b_k710_dl_from_giant.pth"),
    "videomae_ckpt": Path(
        "VideoREPA/ckpt/VideoMAE/k400_videomae_pretrain_base_patch16_224_frame_16x4_tube_mask_ratio_0_9_e1600.pth"
    ),
}


def default_num_workers() -> int:
    """Half of the cores that this process may use, at most 8: the models need the rest, and a disk feeds no more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // 2))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. A `csv_path` of None means no captions, a checkpoint of None the hub's weights."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument

    def add_path(flag: str, text: str) -> None:
        shown = f" (default: {DEFAULT_PATHS[flag]})" if flag in DEFAULT_PATHS else ""
        add(f"--{flag}", type=Path, default=argparse.SUPPRESS, help=text + shown)

    add_path("video_dir", "folder of videos")
    add_path("csv_path", "captions: a CSV with a column named caption")
    add_path("output_root", "features go to <output_root>/<model>/<stem>.pt")
    add(
        "--models",
        nargs="+",
        choices=list(VFMS),
        default=list(VFMS),
        metavar="MODEL",
        help=f"some of {', '.join(VFMS)}",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the models run")
    add("--num_frames", type=number(int, 1), default=48, help="frames sampled per video")
    add("--videomae_resize_h", type=number(int, 1), default=160, help="input height of VideoMAE, VideoMAEv2 and VJEPA2")
    add("--videomae_resize_w", type=number(int, 1), default=240, help="input width of VideoMAE, VideoMAEv2 and VJEPA2")
    add("--dinov2_resize_h", type=number(int, 1), default=420, help="input height of DINOv2")
    add("--dinov2_resize_w", type=number(int, 1), default=630, help="input width of DINOv2")
    add("--dinov2_chunk", type=number(int, 1), default=128, help="frames per DINOv2 forward pass")
    for name in VFMS:
        add_path(f"{name.lower()}_ckpt", f"published weights of {name}, if not the hub's")
    add("--allow_skip_missing", action="store_true", help="go on without models whose weights or packages are missing")
    add("--random_weights", action="store_true", help="a dry run without weights: the features mean nothing")
    add("--batch_size", type=number(int, 1), default=1, help="clips per forward pass")
    add("--precision", choices=["float32", "bfloat16"], default="float32", help="of the models' matrix products")
    add(
        "--save_dtype",
        choices=["float32", "float16", "bfloat16"],
        default="float32",
        help="of the saved features, or latents",
    )
    add(
        "--motion_checkpoint",
        type=Path,
        help="of train.py: write latents to <output_root>/<model>_motion instead of features; for one model",
    )
    add("--overwrite", action="store_true", help="make features again that are finished")
    add("--preview", action="store_true", help="draw each clip and its features: <stem>.mp4 and .png beside the .pt")
    add("--num_workers", type=number(int, 1), default=default_num_workers(), help="processes that decode")
    add("--decode_timeout", type=number(int, 1), default=300, help="seconds that a decoder may take for a video")
    args = parser.parse_args(argv)
    args.models = list(dict.fromkeys(args.models))
    if args.motion_checkpoint and len(args.models) > 1:
        raise UserError(
            "--motion_checkpoint encodes the features of one model; say with --models which one it was trained on"
        )
    for name in args.models:
        input_size(name, args)
    resolve_paths(args)
    return args


def resolve_paths(args: argparse.Namespace) -> None:
    """Fill in the paths that were not given. Raises `UserError` where a file that was given does not exist."""
    for flag in ("video_dir", "output_root"):
        setattr(args, flag, getattr(args, flag, REPOSITORY / DEFAULT_PATHS[flag]))
    needed = ["csv_path", *([] if args.random_weights else [f"{name.lower()}_ckpt" for name in args.models])]
    for flag in needed:
        if hasattr(args, flag):
            if not getattr(args, flag).is_file():
                raise UserError(f"--{flag} {getattr(args, flag)}: no such file")
            continue
        folders = [REPOSITORY] if flag == "csv_path" else [REPOSITORY, REPOSITORY.parent]
        places = [folder / DEFAULT_PATHS[flag] for folder in folders if flag in DEFAULT_PATHS]
        setattr(args, flag, next((place for place in places if place.is_file()), None))


def input_size(name: str, args: argparse.Namespace) -> tuple[int, int]:
    """The (height, width) of model `name`'s input. Raises `UserError` where patches or tubelets do not divide it."""
    vfm = VFMS[name]
    flags = [f"{vfm.size_flags}_resize_h", f"{vfm.size_flags}_resize_w"]
    for flag, step in [("num_frames", vfm.tubelet_size), *((flag, vfm.patch_size) for flag in flags)]:
        value = getattr(args, flag)
        if value % step:
            nearest = max(step, round(value / step) * step)
            raise UserError(f"--{flag} {value}: {name} needs a multiple of {step}; try --{flag} {nearest}")
    return getattr(args, flags[0]), getattr(args, flags[1])


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """What each model makes one feature file of."""

    video: Path
    caption: str | None  # None: no CSV was read
    fingerprint: str | None  # of the video; None: it cannot be read


@dataclass
class ModelRun:
    """One model's part of a run."""

    name: str
    vit: nn.Module
    settings: dict[str, int | str]  # all that its features depend on, except the clip
    folder: Path
    todo: set[Clip] = field(default_factory=set)
    count: Counter = field(default_factory=Counter)  # of features written and skipped
    failed: dict[str, str] = field(default_factory=dict)  # video's name -> reason
    shape: list[int] | None = None  # of a feature, or latent
    autoencoder: MotionFeatureAutoencoder | None = None  # encodes the features; its latents are written instead
    rows: list[dict] = field(default_factory=list)  # of the latents' report

    @property
    def kind(self) -> str:
        """The name of its files' main entry."""
        return "feature" if self.autoencoder is None else "latent"

    @property
    def size(self) -> tuple[int, int]:
        return self.settings["height"], self.settings["width"]

    def path(self, clip: Clip) -> Path:
        return self.folder / f"{clip.video.stem}.pt"

    def clip_settings(self, clip: Clip) -> dict[str, int | str | None]:
        """What the file records; a finished feature is skipped if these are the same."""
        return {**self.settings, "video": clip.video.name, "video_fingerprint": clip.fingerprint}


def list_clips(args: argparse.Namespace) -> list[Clip]:
    """This rank's share of the clips, with their captions."""
    videos = list_videos(args.video_dir)
    captions: dict[Path, str] = {}
    if args.csv_path is None:
        say(f"warning: no captions: {DEFAULT_PATHS['csv_path']} does not exist; --csv_path names another file")
    else:
        captions = read_captions(args.csv_path, videos)
        without = sum(not caption for caption in captions.values())
        if without:
            say(f"warning: {without} of {len(videos)} videos have no caption in {args.csv_path}")
    clips = []
    for video in tqdm(videos[rank() :: num_ranks()], "looking at videos", leave=False, delay=1, disable=rank() > 0):
        try:
            fingerprint = file_fingerprint(video)
        except OSError:  # decoding will say why
            fingerprint = None
        clips.append(Clip(video, captions.get(video), fingerprint))
    return clips


def output_folder(name: str, args: argparse.Namespace) -> Path:
    """Where model `name` writes: latents not among the features that they are made of."""
    return args.output_root / (f"{name}_motion" if args.motion_checkpoint else name)


def make_folders(args: argparse.Namespace) -> None:
    """Make the models' folders. Raises `UserError` where one cannot be made or written into."""
    for name in args.models:
        folder = output_folder(name, args)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(
                f"--output_root {args.output_root}: {folder} is no folder that can be written into "
                f"({error.strerror}); give another folder"
            ) from error
        remove_leftovers(folder)


def load_model(name: str, args: argparse.Namespace) -> ModelRun:
    """Load a model onto the device. Raises `ImportError` or `FileNotFoundError` if a package or weights are missing."""
    size = input_size(name, args)
    if args.random_weights:
        vit, made_by = build_vit(VFMS[name], args.num_frames, size), "random"
    else:
        path = getattr(args, f"{name.lower()}_ckpt") or download_weights(name)
        weights = read_weights(path)
        try:
            vit = build_vit(VFMS[name], args.num_frames, size, weights)
        except ValueError as error:
            raise UserError(f"{path}: not the weights of {name}: {error}") from error
        used = vit.state_dict().keys()
        made_by = weights_hash({key: value.float() for key, value in weights.items() if key in used})
        say(f"{name}: weights {made_by} from {path}")
    settings = {
        "num_frames": args.num_frames,
        "height": size[0],
        "width": size[1],
        "precision": args.precision,
        "save_dtype": args.save_dtype,
        "weights": made_by,
    }
    return ModelRun(name, vit.to(args.device), settings, output_folder(name, args))


def load_autoencoder(args: argparse.Namespace) -> MotionFeatureAutoencoder:
    """The model of --motion_checkpoint. Raises `UserError` where it cannot be loaded or takes features of another C."""
    autoencoder = MotionFeatureAutoencoder.from_checkpoint(args.motion_checkpoint)
    [name] = args.models
    channels, wanted = VFMS[name].embed_dim, autoencoder.config["input_dim"]
    if channels != wanted:
        raise UserError(
            f"--motion_checkpoint {args.motion_checkpoint} was trained on features of C = {wanted}, but {name}'s have "
            f"{channels}; give a checkpoint that was trained on these, or another model with --models"
        )
    return autoencoder


def encode_with(autoencoder: MotionFeatureAutoencoder, run: ModelRun, device: torch.device) -> None:
    """Have `run` write latents."""
    run.settings["motion_autoencoder"] = {"weights": weights_hash(autoencoder.state_dict()), **autoencoder.config}
    run.autoencoder = autoencoder.to(device)


def load_models(args: argparse.Namespace) -> tuple[list[ModelRun], list[str]]:
    """The models, and why some are left out, which `--allow_skip_missing` permits."""
    runs, left_out = [], []
    for name in args.models:
        try:
            runs.append(load_model(name, args))
        except (ImportError, FileNotFoundError) as error:
            reason = f"{name}: {error}"
            if isinstance(error, ImportError):
                reason = f"{name}: the package {error.name} is missing; install envs/environment.vfm_feature.yaml"
            if not args.allow_skip_missing:
                raise UserError(f"{reason}, or skip such models with --allow_skip_missing") from error
            left_out.append(reason)
            say(f"warning: {reason}")
    return runs, left_out


def read_finished(run: ModelRun, clip: Clip) -> dict | None:
    """The feature file of an earlier run if it was made with the same settings; its tensors stay on disk."""
    try:
        saved = load_checked(run.path(clip), mmap=True)
    except UserError:  # absent, or it cannot be read: then it is made again
        return None
    same = isinstance(saved, dict) and saved.get("settings") == run.clip_settings(clip)
    return saved if same and isinstance(saved.get(run.kind), torch.Tensor) else None


def record(run: ModelRun, clip: Clip, data: dict, outcome: str) -> None:
    """Count a file, whose entries are `data`, as "written" or "skipped"."""
    run.count[outcome] += 1
    run.shape = list(data[run.kind].shape)
    if run.autoencoder is not None:
        file = run.path(clip).relative_to(run.folder).as_posix()
        figures = {name: data[name] for name in METRICS + MOVEMENT}
        run.rows.append({"file": file, **figures, "failure": "", "outcome": outcome})


def plan(runs: list[ModelRun], clips: list[Clip], args: argparse.Namespace) -> None:
    """Fill each run's `todo`. In finished files captions that changed are renewed, and missing previews are drawn."""
    for clip in tqdm(clips, "looking for finished features", leave=False, delay=1, disable=rank() > 0):
        for run in runs:
            saved = None if args.overwrite else read_finished(run, clip)
            if saved is not None and clip.caption is not None and clip.caption != saved.get("caption"):
                save_atomically({**saved, "caption": clip.caption}, run.path(clip))
            undrawn = args.preview and not has_preview(run.path(clip))
            if saved is None or (undrawn and "thumbnails" not in saved):
                run.todo.add(clip)
                continue
            record(run, clip, saved, "skipped")
            if undrawn:
                write_preview(run.path(clip), saved["feature"], frames=saved["thumbnails"])


def forward(run: ModelRun, clips: list[np.ndarray], args: argparse.Namespace) -> torch.Tensor:
    """Clips uint8 [T, H, W, 3] -> features float32 [len(clips), T/t, H/p, W/p, C], on the device."""
    batch = torch.from_numpy(np.stack(clips))
    if args.device.type == "cuda":
        batch = batch.pin_memory()  # else the copy waits for the forward pass before it
    batch = batch.to(args.device, non_blocking=True)
    return extract_features(run.vit, VFMS[run.name], batch, args.dinov2_chunk, getattr(torch, args.precision))


def contents(run: ModelRun, feature: torch.Tensor) -> dict[str, Any]:
    """What the file of a clip holds of its feature [T, H, W, C]. Raises `UserError` for NaN or infinity."""
    made = {"feature": feature} if run.autoencoder is None else encode_clip(run.autoencoder, feature, FeatureErrors())
    dtype = run.settings["save_dtype"]
    made[run.kind] = made[run.kind].to(getattr(torch, dtype)).cpu().clone()  # a part of a batch is saved with the batch
    if not torch.isfinite(made[run.kind]).all():
        raise UserError(f"{run.name} gave NaN or infinity in {dtype}")
    return made


def save_feature(run: ModelRun, clip: Clip, feature: torch.Tensor, frames: np.ndarray, preview: bool) -> None:
    """Write the file of a clip, its feature [T, H, W, C] or the latent of that, and its preview. `run` records the
    success, or why it failed."""
    try:
        made = contents(run, feature)
    except UserError as error:
        run.failed[clip.video.name] = str(error)
        return
    data = {
        **made,
        "caption": clip.caption or "",
        "video": clip.video.name,
        "model": run.name,
        "weights": run.settings["weights"],
        "settings": run.clip_settings(clip),
    }
    pictures = thumbnails(frames) if preview else None
    if preview and run.kind == "feature":  # whose preview can be drawn again from its file
        data["thumbnails"] = pictures
    save_atomically(data, run.path(clip))
    if preview:
        write_preview(run.path(clip), feature.cpu(), data.get("latent"), pictures)
    record(run, clip, data, "written")


def extract(runs: list[ModelRun], clips: list[Clip], args: argparse.Namespace) -> None:
    """Decode each video once, run every model that still needs it, and record failures.

    Decoding runs ahead in processes. Writing runs one batch behind in a thread, so that a GPU need not wait for it.
    """
    todo = [clip for clip in clips if any(clip in run.todo for run in runs)]
    if not todo:
        return
    videos, sizes = [clip.video for clip in todo], sorted({run.size for run in runs})
    with (
        tqdm(total=len(todo), unit="video", disable=rank() > 0) as bar,
        ThreadPoolExecutor(max_workers=1) as writer,
        closing(decode_ahead(videos, args.num_frames, sizes, args.num_workers, args.decode_timeout)) as decoded,
    ):
        decoded_clips = zip(todo, decoded, strict=True)
        writes: list[Future] = []
        while batch := [(clip, frames) for clip, (_, frames) in islice(decoded_clips, args.batch_size)]:
            earlier_writes, writes = writes, []
            for run in runs:
                needed = [(clip, frames) for clip, frames in batch if clip in run.todo]
                run.failed |= {clip.video.name: reason for clip, reason in needed if isinstance(reason, str)}
                good = [(clip, frames[run.size]) for clip, frames in needed if not isinstance(frames, str)]
                if good:
                    features = forward(run, [frames for _, frames in good], args)
                    for (clip, frames), feature in zip(good, features, strict=True):
                        writes.append(writer.submit(save_feature, run, clip, feature, frames, args.preview))
            for write in earlier_writes:
                write.result()
            bar.update(len(batch))
        for write in writes:
            write.result()


def collect(runs: list[ModelRun]) -> None:
    """Add the other ranks' results to rank 0's."""
    for results in gather({run.name: (run.count, run.failed, run.shape, run.rows) for run in runs})[1:]:
        for run in runs:
            if run.name not in results:  # that rank left the model out
                continue
            count, failed, shape, rows = results[run.name]
            run.count += count
            run.failed |= failed
            run.shape = run.shape or shape
            run.rows += rows


def report(runs: list[ModelRun], left_out: list[str], output_root: Path) -> None:
    """Print the summary; write `vfm_dimensions.txt` and each model's `failed_videos.txt` and `encode_report.csv`."""
    rows = {
        run.name: {
            "written": run.count["written"],
            "skipped": run.count["skipped"],
            "failed": len(run.failed),
            run.kind: str(run.shape or "-"),
            "dtype": run.settings["save_dtype"],
            "MB": round(sum(path.stat().st_size for path in run.folder.glob("*.pt")) / 1e6, 1),
            "folder": str(run.folder),
        }
        for run in runs
    }
    if rows:
        print(f"\n{pd.DataFrame.from_dict(rows, orient='index').to_string()}")
    for run in runs:
        if run.failed:
            print(f"{run.name}: {run.folder / 'failed_videos.txt'} says why videos failed")
    for reason in left_out:
        print(f"not run: {reason}")
    if any(run.settings["weights"] == "random" for run in runs):
        print("--random_weights: a dry run; these features mean NOTHING")

    for run in runs:
        failures = run.folder / "failed_videos.txt"
        if run.failed:
            lines = [f"{' '.join(name.split())}\t{reason}\n" for name, reason in sorted(run.failed.items())]
            with whole_file(failures) as file:
                file.write("".join(lines).encode(errors="backslashreplace"))  # names that are not in UTF-8
        else:
            failures.unlink(missing_ok=True)
        if run.autoencoder is not None:
            reasons = [{"file": name, "failure": reason} for name, reason in run.failed.items()]
            write_encode_report(run.rows + reasons, run.folder)
            print_summary(run.rows)
    known = [run for run in runs if run.shape]
    if known:
        dimensions = "".join(f"{run.name}: {run.kind} shape {run.shape}, C = {run.shape[-1]}\n" for run in known)
        with whole_file(output_root / "vfm_dimensions.txt") as file:
            file.write(dimensions.encode())


def main() -> int:
    args = parse_args()
    join_ranks()
    args.device = open_device(args.device)
    autoencoder = load_autoencoder(args) if args.motion_checkpoint else None
    if args.preview:
        check_preview_packages()
    clips = list_clips(args)
    make_folders(args)
    if args.random_weights:
        say("warning: --random_weights: a dry run; the features will mean NOTHING")
    runs: list[ModelRun] = []
    left_out: list[str] = []
    try:
        runs, left_out = load_models(args)
        if autoencoder is not None:
            for run in runs:
                encode_with(autoencoder, run, args.device)
        plan(runs, clips, args)
        extract(runs, clips, args)
        collect(runs)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the memory of {args.device} is full; lower --batch_size, --dinov2_chunk or the input size, run fewer "
            "--models at a time, or use --device cpu"
        ) from error
    finally:
        if rank() == 0 and (runs or left_out):
            report(runs, left_out, args.output_root)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0 if any(run.count["written"] or run.count["skipped"] for run in runs) or rank() > 0 else 1


if __name__ == "__main__":
    run_script(main)
