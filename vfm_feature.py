"""Turn a folder of videos into features of video foundation models (VFMs).

In:  a folder of videos and, if there is one, a CSV of captions.
Out: `<output_root>/<model>/<video's stem>.pt`, or `<stem>_000.pt`, `<stem>_001.pt`, ... of its parts or windows: a dict
     with `feature` [T, H, W, C], `caption`, `video`, `model`, `weights`, `settings`, and what the model saw:
     `frame_indices`, `fps`, `start`, `end`, `windows`; with --preview also `thumbnails`, small frames, and pictures
     beside it; `<output_root>/vfm_dimensions.txt`; where videos failed, `<output_root>/<model>/failed_videos.txt`.

    python vfm_feature.py --video_dir clips --csv_path clips.csv --output_root features
    python vfm_feature.py --video_dir clips --models VideoMAEv2 DINOv2 --allow_skip_missing
    python vfm_feature.py --video_dir films --window 2 --fps 8         # a file for every two seconds
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
import math
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
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from av.container import InputContainer
from av.video.reformatter import ColorPrimaries
from av.video.stream import VideoStream
from pebble import ProcessExpired, ProcessPool
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from model import (
    ArgumentParser,
    UserError,
    check_file,
    check_preview_packages,
    file_fingerprint,
    gather,
    has_preview,
    join_ranks,
    load_checked,
    num_ranks,
    number,
    open_device,
    rank,
    remove_leftovers,
    reuse_memory,
    run_script,
    save_atomically,
    say,
    thumbnails,
    weights_hash,
    whole_file,
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
    """Clips -> features: RGB [B, T, H, W, 3] -> float32 [B, T/t, H/p, W/p, C].

    `clips` have levels of 0 to 255, in uint8 or a floating-point dtype. They are on `vit`'s device, of the frames and
    size that it was built for. `chunk`: frames in one forward pass of an image model. `precision`: of the matrix
    products; the residual stream and the norms stay in float32.
    """
    mean = torch.tensor(IMAGENET_MEAN, device=clips.device)
    std = torch.tensor(IMAGENET_STD, device=clips.device)
    batch, frames, height, width, _ = clips.shape
    pixels = (clips.float() / 255 - mean) / std
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


def list_videos(folder: Path, recursive: bool = False) -> list[Path]:
    """The videos of `folder`, relative to it, sorted; hidden files are left out, and hidden folders if `recursive`.

    Raises `UserError` if there is none, or if two of them would write the same file.
    """
    if not folder.is_dir():
        raise UserError(f"--video_dir {folder}: no such folder")
    by_stem: dict[Path, Path] = {}
    for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
        video = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in video.parts)
        if path.suffix.lower() in VIDEO_SUFFIXES and not is_hidden and path.is_file():
            output = video.parent / video.stem
            other = by_stem.setdefault(output, video)
            if other is not video:
                raise UserError(f"{other} and {video} would both write {output}.pt; rename one")
    if not by_stem:
        hint = "" if recursive else "; --recursive searches subfolders"
        raise UserError(f"--video_dir {folder}: no videos in it ({' '.join(VIDEO_SUFFIXES)}{hint})")
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


def match_rows(names: Iterable[str], videos: list[Path]) -> dict[Path, list[int]]:
    """Which rows name which video, by its path, file name or stem.

    A row may say more or less of the path than `videos`, which are relative to one folder; a file name or stem alone
    counts only where no other folder has it too.
    """
    depth = max(len(video.parts) for video in videos)
    by_name: dict[str, list[int]] = {}
    by_stem: dict[str, list[int]] = {}
    for row, text in enumerate(names):
        parts = text.strip().replace("\\", "/").split("/")[-depth:]
        for first in range(len(parts)):
            name = "/".join(parts[first:])
            by_name.setdefault(name, []).append(row)
            stem = os.path.splitext(name)[0] if name.lower().endswith(VIDEO_SUFFIXES) else name
            by_stem.setdefault(stem, []).append(row)
    folders: dict[str, set[Path]] = {}
    for video in videos:
        folders.setdefault(video.name, set()).add(video.parent)
        folders.setdefault(video.stem, set()).add(video.parent)
    rows = {}
    for video in videos:
        stem = (video.parent / video.stem).as_posix()
        found = by_name.get(video.as_posix(), []) + by_name.get(stem, []) or by_stem.get(stem)
        if not found and len(folders[video.name]) == 1:
            found = by_name.get(video.name)
        if not found and len(folders[video.stem]) == 1:
            found = by_stem.get(video.stem)
        if found:
            rows[video] = found
    return rows


class Part(NamedTuple):
    """What a CSV says of a video, or of one of its parts."""

    caption: str | None = ""  # None: no CSV was read
    suffix: str = ""  # of the output's stem: _000, _001, ... where the CSV has parts
    start: float | None = None  # seconds; None: the video's beginning
    end: float | None = None  # None: its end


def read_seconds(text: str, where: str) -> float | None:
    """A cell of the columns start and end; empty: None. Raises `UserError`."""
    try:
        seconds = float(text) if text.strip() else None
    except ValueError:
        seconds = math.nan
    if seconds is not None and not 0 <= seconds < math.inf:
        raise UserError(f"{where} is {text!r}; give seconds from the video's first frame, or nothing")
    return seconds


def read_parts(table: pd.DataFrame, video: Path, rows: list[int], csv_path: Path) -> list[Part]:
    """The parts of a video that the `rows` of a table with the columns start or end say, in their order.

    Raises `UserError` where a cell is no time, or a part ends before it starts.
    """
    parts = []
    for index, row in enumerate(rows):
        start, end = (
            read_seconds(table[column][row], f"--csv_path {csv_path}: {column} of {video}") if column in table else None
            for column in ("start", "end")
        )
        if end is not None and end <= (start or 0):
            raise UserError(
                f"--csv_path {csv_path}: a part of {video} ends at {end:g} s, but starts at {start or 0:g} s"
            )
        parts.append(Part(table["caption"][row], f"_{index:03d}", start, end))
    return parts or [Part(suffix="_000")]


def read_captions(csv_path: Path, videos: list[Path]) -> dict[Path, list[Part]]:
    """What a CSV file says of `videos`: their captions, empty for videos that it does not name, and their parts.

    The column that names most of the videos, whatever its title, says whose caption a row is. If no column names any,
    row i belongs to the video whose stem is i in four digits. Without the columns `start` and `end` the first row of a
    video counts; with one of them each row is a part. Raises `UserError` where the file cannot be read, has no column
    `caption`, and what `read_parts` refuses.
    """
    table = read_table(csv_path)
    if "caption" not in table:
        found = ", ".join(map(repr, table.columns))[:300] or "nothing"
        raise UserError(f"--csv_path {csv_path}: no column named caption; it has {found}")
    naming = [column for column in table.columns if column not in ("caption", "start", "end")]
    matches = {column: match_rows(table[column], videos) for column in naming}
    best = max(matches, key=lambda column: len(matches[column]), default=None)
    if best is not None and matches[best]:
        rows_of = matches[best]
        found = f"column {best!r} of {csv_path} names {len(rows_of)} of {len(videos)} videos"
    else:
        rows_of = match_rows((f"{row:04d}" for row in range(len(table))), videos)
        found = f"no column of {csv_path} names the videos; row 0 belongs to 0000, row 1 to 0001, and so on"
    if "start" in table or "end" in table:
        parts = {video: read_parts(table, video, rows_of.get(video, []), csv_path) for video in videos}
        found += f"; its columns start and end cut them into {sum(map(len, parts.values()))} clips"
    else:
        captions = table["caption"].tolist()
        parts = {video: [Part(captions[rows_of[video][0]] if video in rows_of else "")] for video in videos}
    say(f"captions: {found}")
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Decoding, in processes of its own
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """Which frames decoders take of each clip, and how they bring them to the models' sizes."""

    num_frames: int
    sizes: tuple[tuple[int, int], ...]  # (height, width)
    way: str = "spread"  # or "stride": see `frame_indices`
    fps: float | None = None  # instead: frames a second
    window: float | None = None  # seconds: cut clips into windows that start every `hop` seconds
    hop: float | None = None
    fit: str = "squash"  # a key of `FITS`


def frame_indices(num_available: int, num_frames: int, way: str = "spread") -> np.ndarray:
    """`num_frames` of the indices 0 .. num_available - 1; when there are too few frames, some repeat.

    "spread": evenly from the first to the last. "stride": at the largest whole stride from the first, as VideoREPA's
    `finetune/datasets/utils.py` does; the last one repeats.
    """
    if way == "stride":
        return np.minimum(np.arange(num_frames) * max(num_available // num_frames, 1), num_available - 1)
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


def crop_centre(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W, 3] -> its largest centred part at the aspect ratio of `size`, by VideoREPA's rounding."""
    height, width, _ = frame.shape
    ratio = size[0] / size[1]
    if height / width > ratio:
        cut_height, cut_width = max(1, int(width * ratio)), width
    else:
        cut_height, cut_width = height, max(1, int(height / ratio))
    top, left = round((height - cut_height) / 2), round((width - cut_width) / 2)
    return frame[top : top + cut_height, left : left + cut_width]


def crop_frame(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [height, width, 3]: the centre at the aspect ratio of `size`, then `resize_frame`."""
    return resize_frame(crop_centre(frame, size), size)


def fit_like_videorepa(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] -> float16 [height, width, 3], levels from 0 to 255 and, where bicubic overshoots, beyond.

    As VideoREPA's trainer does it: the centre at the aspect ratio of CogVideoX's 480 x 720, resized to that
    (`finetune/datasets/data_transform.py`), then to the model's size (`compute_loss` of its `lora_trainer.py`).
    """
    image = torch.from_numpy(crop_centre(frame, VIDEOREPA_SIZE)).permute(2, 0, 1)[None].float()  # [1, 3, H, W]
    image = F.interpolate(image, VIDEOREPA_SIZE, mode="bilinear", align_corners=True, antialias=True)
    image = F.interpolate(image, size, mode="bicubic", align_corners=False)
    return image[0].permute(1, 2, 0).half().numpy()


VIDEOREPA_SIZE = (480, 720)
FITS = {"squash": resize_frame, "crop": crop_frame, "videorepa": fit_like_videorepa}


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


class Packets(NamedTuple):
    """What a video's container says of its frames."""

    times: list[int | None]  # of the frames that are shown, in the order in which they are shown, in ticks
    tick: float  # seconds
    rate: float  # frames a second, on average


def read_packets(path: str) -> Packets:
    """The packets of a video that are shown: as many as it has frames, unless some packets hold none. Decodes nothing.

    Raises `ValueError` if the video is empty, encrypted or cut short, as far as its container can tell.
    """
    with open_track(path) as (container, stream, messages):
        shown, times = [], []
        for packet in container.demux(stream):
            if packet.size:
                if packet.has_sidedata("encryption_info") or "enc_key_id" in stream.metadata:
                    raise ValueError("encrypted")
                if not packet.is_discard:
                    shown.append(packet.pts)
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
        rate = float(stream.average_rate or stream.guessed_rate or 25)
    if not shown:
        raise ValueError("no frames")
    return Packets(shown if None in shown else sorted(shown), float(stream.time_base), rate)


def presentation_times(packets: Packets) -> np.ndarray:
    """When each frame is shown, in seconds from the first; by the average rate where they do not rise."""
    ticks = packets.times
    if None in ticks or any(later <= earlier for earlier, later in pairwise(ticks)):
        return np.arange(len(ticks)) / packets.rate
    return (np.array(ticks) - ticks[0]) * packets.tick


@dataclass(frozen=True)
class Job:
    """A video that is decoded once for all of its clips."""

    number: int
    path: str
    # start and end of each clip in seconds (None: the video's), and which of its windows are wanted (None: all)
    clips: tuple[tuple[float | None, float | None, frozenset[int] | None], ...] = ((None, None, None),)
    failures: tuple[str, ...] = ()  # of decoders that hung or died on it
    delivered: frozenset[Window] = frozenset()


@dataclass(frozen=True)
class Window:
    """What one feature file is made of: a clip, or the windows that it is cut into."""

    clip: int  # which of its job's
    index: int  # which of that clip's windows
    count: int  # how many windows that clip has
    start: float  # seconds from the video's first frame
    end: float
    frame_indices: tuple[int, ...]  # of the frames that the video shows; empty if it shows none in this time
    stop: int  # the first frame behind the window
    fps: float  # the video's average rate


def plan_windows(job: Job, packets: Packets, sampling: Sampling) -> list[Window]:
    """The windows of a job's clips that are wanted, in the order in which decoding completes them.

    A frame belongs to a window if its time is in [start, end). Only whole windows count, but a clip shorter than one
    is a window of its own.
    """
    times = presentation_times(packets)
    video_end = times[-1] + 1 / packets.rate
    windows = []
    for clip, (start, end, wanted) in enumerate(job.clips):
        start, end, count = start or 0.0, min(end or video_end, video_end), 1
        if sampling.window:
            count = max(1, 1 + math.floor((end - start - sampling.window + TIME_TOLERANCE) / sampling.hop))
        for index in range(count) if wanted is None else sorted(wanted & set(range(count))):
            begin, until = start, end
            if sampling.window:
                begin = start + index * sampling.hop
                until = min(begin + sampling.window, end)
            first, stop = np.searchsorted(times, [begin - TIME_TOLERANCE, until - TIME_TOLERANCE])
            if until == video_end:
                stop = len(times)
            indices = np.array([], int)
            if sampling.fps and first < stop:  # of each moment the frame that is shown then
                moments = begin + np.arange(sampling.num_frames) / sampling.fps + TIME_TOLERANCE
                indices = (np.searchsorted(times, moments, side="right") - 1).clip(first, stop - 1)
            elif first < stop:
                indices = first + frame_indices(stop - first, sampling.num_frames, sampling.way)
            stop = stop if len(indices) else len(times)  # only the video's end tells that there is none
            span = float(begin), float(until)
            windows.append(Window(clip, index, count, *span, tuple(indices.tolist()), int(stop), packets.rate))
    return sorted(windows, key=lambda window: window.stop)


TIME_TOLERANCE = 1e-3  # seconds: containers such as Matroska round times to milliseconds


class ShownFrame(NamedTuple):
    """A frame as a decoder yields it, in the order in which the video shows them."""

    to_rgb: Callable[[], np.ndarray]  # uint8 [H, W, 3]: only the frames that are wanted are converted
    time: int | None = None  # in the container's ticks
    is_whole: bool = True  # no damage was found up to here


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


def read_with_pyav(path: str) -> Iterator[ShownFrame]:
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
                is_whole = not errors and num_whole == num_shown
                yield ShownFrame(functools.partial(to_rgb, frame, converter), frame.pts, is_whole)
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


def read_with_decord(path: str) -> Iterator[ShownFrame]:
    import decord

    check_plain(path)
    decord.logging.set_level(decord.logging.ERROR)
    # fault_tol: otherwise decord silently replaces a frame that it cannot find by a neighbour
    reader = decord.VideoReader(path, num_threads=1, fault_tol=1e-9)
    for _ in range(len(reader)):
        frame = torch.from_dlpack(reader.next().to_dlpack()).numpy()  # without a copy
        if frame.shape[-1] != 3:  # dmlc/decord issue 336: garbled frames of some narrow videos
            raise RuntimeError(f"a frame of shape {list(frame.shape)} instead of [height, width, 3]")
        yield ShownFrame(lambda frame=frame: frame)


def read_with_opencv(path: str) -> Iterator[ShownFrame]:
    import cv2

    check_plain(path)
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)  # else a name with % stands for numbered images
    while capture.grab():
        yield ShownFrame(lambda: cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))


BACKENDS = {"pyav": read_with_pyav, "decord": read_with_decord, "opencv": read_with_opencv}  # tried in this order


# {size: RGB [num_frames, height, width, 3]}, uint8, or float16 in VideoREPA's recipe
Clips = dict[tuple[int, int], np.ndarray]


class Decoded(NamedTuple):
    """What a decoder has of a job: a window and its frames, or why it has none; without a window, why the rest of the
    job failed, or why a decoder gave up and the next one goes on; nothing of these: it is still at work."""

    job: int
    window: Window | None = None
    frames: Clips | str | None = None
    failure: str | None = None  # of one decoder
    is_last: bool = False  # of the job


class OpenWindows:
    """The windows that a pass over a video has yet to deliver, and the resized frames that they share."""

    def __init__(self, job: Job, windows: Iterable[Window], sampling: Sampling):
        self.job, self.sampling = job, sampling
        self.waiting = deque(windows)
        self.uses = Counter(index for window in self.waiting for index in set(window.frame_indices))
        self.kept: dict[int, dict[tuple[int, int], np.ndarray]] = {}  # by index and size

    def add(self, index: int, frame: ShownFrame) -> None:
        if index in self.uses:
            rgb, fit = frame.to_rgb(), FITS[self.sampling.fit]
            self.kept[index] = {size: fit(rgb, size) for size in self.sampling.sizes}

    def take(self, window: Window) -> Clips | str:
        """Its frames, or why it has none."""
        if not window.frame_indices:
            if window.start >= window.end:
                return f"the video ends before, at {window.end:g} s"
            return f"no frame is shown from {window.start:g} to {window.end:g} s"
        clips = {
            size: np.stack([self.kept[index][size] for index in window.frame_indices]) for size in self.sampling.sizes
        }
        for index in set(window.frame_indices):
            self.uses[index] -= 1
            if not self.uses[index]:
                del self.kept[index]
        return clips

    def deliver(self, num_shown: int, delivered: set[Window]) -> Iterator[Decoded]:
        """Those that are complete after `num_shown` frames; adds them to `delivered`."""
        while self.waiting and self.waiting[0].stop <= num_shown:
            window = self.waiting.popleft()
            delivered.add(window)
            yield Decoded(self.job.number, window, self.take(window), is_last=not self.waiting)


def decode_windows(job: Job, sampling: Sampling, backend: str, delivered: set[Window]) -> Iterator[Decoded]:
    """Decode a video, and yield its windows as they are complete; those in `delivered`, to which it adds, are left out.

    The video is read from its start to the end of its last window, once, unless it shows other frames than its packets
    say: their number counts, and their times where any clip depends on these. Then the rest of the first pass finds the
    true ones. Raises `ValueError` if the video is to blame, anything else if the decoder is.
    """
    path = os.path.abspath(job.path)  # without a folder FFmpeg would take a name such as pipe:0 for a protocol
    if not path.isascii() and path != os.fsencode(path).decode(errors="replace"):
        raise ValueError("its name is not in UTF-8; rename it")
    packets = read_packets(path)
    if backend != "pyav":  # the others do not tell times; without the right number of frames no window is right
        num_shown = sum(1 for _ in BACKENDS[backend](path))
        if num_shown != len(packets.times):
            raise RuntimeError(f"{num_shown} frames, where the container has {len(packets.times)}")
    has_parts = bool(sampling.window) or any(start or end for start, end, _ in job.clips)
    times_count = backend == "pyav" and (has_parts or sampling.fps)
    while True:
        planned = plan_windows(job, packets, sampling)
        windows = OpenWindows(job, [window for window in planned if window not in delivered], sampling)
        times: list[int | None] = []
        as_planned = True
        for index, frame in enumerate(BACKENDS[backend](path)):
            times.append(frame.time)
            is_right = index < len(packets.times) and (not times_count or frame.time == packets.times[index])
            as_planned = as_planned and is_right and frame.is_whole
            if has_parts and index % 1000 == 999:  # a long way to the next window is no reason to give up
                yield Decoded(job.number)
            if as_planned:
                yield from windows.deliver(index, delivered)
                if not windows.waiting:
                    return
                windows.add(index, frame)
        if as_planned and len(times) == len(packets.times):
            yield from windows.deliver(len(times), delivered)
            return
        if not times:
            raise ValueError("no frames: none can be decoded")
        packets = packets._replace(times=times)


def decode_jobs(jobs: Iterable[Job], sampling: Sampling) -> Iterator[Decoded]:
    """Decode videos one after the other. Where a decoder fails, the next one goes on, unless the video is to blame."""
    for job in jobs:
        failures, delivered = list(job.failures), set(job.delivered)
        for backend in list(BACKENDS)[len(failures) :]:
            try:
                yield from decode_windows(job, sampling, backend, delivered)
                break
            except ValueError as error:
                yield Decoded(job.number, frames=" ".join(str(error).split()), is_last=True)
                break
            except Exception as error:  # decoders raise their own kinds
                failures.append(f"{backend}: {' '.join(str(error).split()) or type(error).__name__}"[:300])
                yield Decoded(job.number, failure=failures[-1])
        else:
            yield Decoded(job.number, frames="; ".join(failures), is_last=True)


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


stream: Iterator[Decoded]  # of this process


def start_stream(jobs: list[Job], sampling: Sampling) -> None:
    """What the process of a `Decoder` does first."""
    global stream
    start_decoder()
    stream = decode_jobs(jobs, sampling)


def decode_next() -> Decoded | None:
    """The next of this process's `stream`; None: there is no more."""
    return next(stream, None)


class Decoder:
    """A process that decodes videos one after the other, ahead of its caller; a new one where it hangs or dies."""

    def __init__(
        self, jobs: list[Job], sampling: Sampling, timeout: float, context: multiprocessing.context.BaseContext
    ):
        self.jobs = {job.number: job for job in jobs}  # not finished, in order
        self.sampling, self.timeout, self.context = sampling, timeout, context
        self.start()

    def start(self) -> None:
        self.pool = ProcessPool(1, 0, start_stream, [list(self.jobs.values()), self.sampling], self.context)
        # one to take, one in the making
        self.coming = deque(self.pool.schedule(decode_next, timeout=self.timeout) for _ in range(2))

    def stop(self) -> None:
        self.pool.stop()  # else the end of the program would wait for what is being decoded
        self.pool.join()

    def take(self) -> Decoded | None:
        """What comes next; None after all."""
        if not self.jobs:
            return None
        try:
            item = self.coming.popleft().result()
            self.coming.append(self.pool.schedule(decode_next, timeout=self.timeout))
        except (DecodeTimeoutError, ProcessExpired) as error:
            job = next(iter(self.jobs.values()))
            reason = f"no end after {self.timeout:g} s (--decode_timeout)"
            if isinstance(error, ProcessExpired):
                reason = f"the process died ({error.exitcode})"
            failure = f"{list(BACKENDS)[len(job.failures)]}: {reason}"
            self.stop()
            self.jobs[job.number] = replace(job, failures=(*job.failures, failure))
            self.start()
            return Decoded(job.number)
        job = self.jobs.get(item.job)
        if job is None or item.window in job.delivered:  # the process died between two tasks and began anew
            return Decoded(item.job)
        if item.failure:
            self.jobs[item.job] = replace(job, failures=(*job.failures, item.failure))
        if item.window:
            self.jobs[item.job] = replace(job, delivered=job.delivered | {item.window})
        if item.is_last:
            del self.jobs[item.job]
        return item


def decode_ahead(jobs: Iterable[Job], sampling: Sampling, num_workers: int, timeout: float) -> Iterator[Decoded]:
    """Decode videos in processes, ahead of the caller. Yields every window of each, or why it, or the job, failed.

    The processes share the jobs, and the caller takes from them in turn. A decoder that fails, dies, or yields nothing
    for `timeout` seconds costs only its process. Then the next decoder goes on, unless the video is to blame.
    """
    context = multiprocessing.get_context("forkserver")  # a fork of this process would copy its threads' locks
    context.set_forkserver_preload(["torch", "av", "pandas"])  # imported once, not by each worker
    jobs = list(jobs)
    decoders = deque(
        Decoder(jobs[first::num_workers], sampling, timeout, context) for first in range(min(num_workers, len(jobs)))
    )
    try:
        while decoders:
            item = decoders[0].take()
            if item is None:
                decoders.popleft().stop()
                continue
            decoders.rotate(-1)
            if item.frames is not None:
                yield item
    finally:
        for decoder in decoders:
            decoder.stop()


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
    add("--recursive", action="store_true", help="search subfolders of --video_dir too; outputs mirror them")
    add("--num_frames", type=number(int, 1), default=48, help="frames sampled per clip")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument(
        "--sampling", choices=["spread", "stride"], default="spread", help="evenly, or at the largest whole stride"
    )
    ways.add_argument("--fps", type=number(float, 0.001), help="instead: frames sampled per second of the clip")
    add("--window", type=number(float, 0.001), help="cut each clip into windows of so many seconds, a file each")
    add("--hop", type=number(float, 0.001), help="seconds from the start of a window to the next; without it --window")
    add("--fit", choices=["squash", "crop"], default="squash", help="to the input size: whole, or the centre")
    add("--recipe", choices=["videorepa"], help="frames and sizes exactly as VideoREPA's trainer takes them")
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
    add("--save_dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of the saved features")
    add("--overwrite", action="store_true", help="make features again that are finished")
    add("--preview", action="store_true", help="draw each clip and its features: <stem>.mp4 and .png beside the .pt")
    add("--num_workers", type=number(int, 1), default=default_num_workers(), help="processes that decode")
    add("--decode_timeout", type=number(int, 1), default=300, help="seconds that a decoder may take for a video")
    args = parser.parse_args(argv)
    args.models = list(dict.fromkeys(args.models))
    if args.hop and not args.window:
        raise UserError(f"--hop {args.hop:g} is the distance of windows; give --window too")
    args.hop = args.hop or args.window
    if args.recipe:
        given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(SET_BY_RECIPE)))
        for flag in SET_BY_RECIPE:
            if getattr(given, flag) is not None:
                raise UserError(f"--recipe {args.recipe} sets --{flag}; leave one of them out")
        args.num_frames, args.sampling, args.fit = 49, "stride", args.recipe
    for name in args.models:
        input_size(name, args)
    resolve_paths(args)
    return args


# What --recipe decides.
SET_BY_RECIPE = ("num_frames", "sampling", "fps", "fit")
SET_BY_RECIPE += ("videomae_resize_h", "videomae_resize_w", "dinov2_resize_h", "dinov2_resize_w")


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


def frames_seen(name: str, args: argparse.Namespace) -> int:
    """How many of a clip's frames model `name` sees. VideoREPA's video models do without the first."""
    return args.num_frames - 1 if args.recipe and VFMS[name].tubelet_size > 1 else args.num_frames


def input_size(name: str, args: argparse.Namespace) -> tuple[int, int]:
    """The (height, width) of model `name`'s input. Raises `UserError` where patches or tubelets do not divide it."""
    vfm = VFMS[name]
    flags = [f"{vfm.size_flags}_resize_h", f"{vfm.size_flags}_resize_w"]
    values = {"num_frames": frames_seen(name, args), **{flag: getattr(args, flag) for flag in flags}}
    for flag, value in values.items():
        step = vfm.tubelet_size if flag == "num_frames" else vfm.patch_size
        if value % step:
            nearest = max(step, round(value / step) * step)
            raise UserError(f"--{flag} {value}: {name} needs a multiple of {step}; try --{flag} {nearest}")
    return getattr(args, flags[0]), getattr(args, flags[1])


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """What each model makes a feature file of, or with --window a file of each window."""

    video: Path
    name: str  # the video's path in --video_dir
    output: str  # the feature file's path in the model's folder, without .pt and the window's number
    part: Part
    fingerprint: str | None  # of the video; None: it cannot be read

    def describe(self, start: float | None, end: float | None) -> str:
        """The video's name, and of which part of it something is said."""
        bounds = [f"{word} {bound:g} s" for word, bound in (("from", start), ("to", end)) if bound is not None]
        return " ".join([self.name, *bounds])


@dataclass
class ModelRun:
    """One model's part of a run."""

    name: str
    vit: nn.Module
    settings: dict[str, int | float | str | None]  # all that its features depend on, except the clip
    folder: Path
    todo: dict[Clip, frozenset[int] | None] = field(default_factory=dict)  # clip -> its windows; None: all
    count: Counter = field(default_factory=Counter)  # of features written and skipped
    failed: dict[str, str] = field(default_factory=dict)  # what `Clip.describe` says -> reason
    shape: list[int] | None = None  # of a feature

    @property
    def size(self) -> tuple[int, int]:
        return self.settings["height"], self.settings["width"]

    def path(self, clip: Clip, window: int) -> Path:
        number = f"_{window:03d}" if self.settings["window"] else ""
        return self.folder / f"{clip.output}{number}.pt"

    def needs(self, clip: Clip, window: int) -> bool:
        return clip in self.todo and (self.todo[clip] is None or window in self.todo[clip])

    def clip_settings(self, clip: Clip) -> dict[str, int | float | str | None]:
        """What the file records; a finished feature is skipped if these are the same."""
        bounds = {"start": clip.part.start, "end": clip.part.end}
        return {**self.settings, **bounds, "video": clip.name, "video_fingerprint": clip.fingerprint}


def list_clips(args: argparse.Namespace) -> list[Clip]:
    """The clips of this rank's share of the videos, with their captions."""
    videos = list_videos(args.video_dir, args.recursive)
    parts: dict[Path, list[Part]] = {}
    if args.csv_path is None:
        say(f"warning: no captions: {DEFAULT_PATHS['csv_path']} does not exist; --csv_path names another file")
    else:
        parts = read_captions(args.csv_path, videos)
        without = sum(not part.caption for group in parts.values() for part in group)
        if without:
            total = sum(map(len, parts.values()))
            say(f"warning: {without} of {total} videos have no caption in {args.csv_path}")
    clips = []
    for video in tqdm(videos[rank() :: num_ranks()], "looking at videos", leave=False, delay=1, disable=rank() > 0):
        try:
            fingerprint = file_fingerprint(args.video_dir / video)
        except OSError:  # decoding will say why
            fingerprint = None
        for part in parts.get(video, [Part(caption=None)]):
            output = str(video.parent / f"{video.stem}{part.suffix}")
            clips.append(Clip(args.video_dir / video, video.as_posix(), output, part, fingerprint))
    return clips


def make_folders(args: argparse.Namespace, clips: list[Clip]) -> None:
    """Make the models' folders. Raises `UserError` where one cannot be made or written into."""
    for name in args.models:
        folder = args.output_root / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(
                f"--output_root {args.output_root}: {folder} is no folder that can be written into "
                f"({error.strerror}); give another folder"
            ) from error
        for subfolder in {(folder / clip.output).parent for clip in clips}:
            remove_leftovers(subfolder)


def load_model(name: str, args: argparse.Namespace) -> ModelRun:
    """Load a model onto the device. Raises `ImportError` or `FileNotFoundError` if a package or weights are missing."""
    size, num_frames = input_size(name, args), frames_seen(name, args)
    if args.random_weights:
        vit, made_by = build_vit(VFMS[name], num_frames, size), "random"
    else:
        path = getattr(args, f"{name.lower()}_ckpt") or download_weights(name)
        weights = read_weights(path)
        try:
            vit = build_vit(VFMS[name], num_frames, size, weights)
        except ValueError as error:
            raise UserError(f"{path}: not the weights of {name}: {error}") from error
        used = vit.state_dict().keys()
        made_by = weights_hash({key: value.float() for key, value in weights.items() if key in used})
        say(f"{name}: weights {made_by} from {path}")
    settings = {
        "num_frames": num_frames,
        "height": size[0],
        "width": size[1],
        "sampling": args.sampling,
        "fps": args.fps,
        "window": args.window,
        "hop": args.hop,
        "fit": args.fit,
        "precision": args.precision,
        "save_dtype": args.save_dtype,
        "weights": made_by,
    }
    return ModelRun(name, vit.to(args.device), settings, args.output_root / name)


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


def read_finished(run: ModelRun, clip: Clip, window: int) -> dict | None:
    """The feature file of an earlier run if it was made with the same settings; its tensors stay on disk."""
    try:
        saved = load_checked(run.path(clip, window), mmap=True)
    except UserError:  # absent, or it cannot be read: then it is made again
        return None
    same = isinstance(saved, dict) and saved.get("settings") == run.clip_settings(clip)
    return saved if same and isinstance(saved.get("feature"), torch.Tensor) else None


def is_finished(run: ModelRun, clip: Clip, window: int, saved: dict | None, preview: bool) -> bool:
    """Whether an earlier run's file can stay. A caption that changed is renewed in it, and a missing preview drawn."""
    if saved is None or (preview and "thumbnails" not in saved):
        return False
    path = run.path(clip, window)
    run.count["skipped"] += 1
    run.shape = list(saved["feature"].shape)
    if clip.part.caption is not None and clip.part.caption != saved.get("caption"):
        save_atomically({**saved, "caption": clip.part.caption}, path)
    if preview and not has_preview(path):
        write_preview(path, saved["feature"], frames=saved["thumbnails"])
    return True


def plan(runs: list[ModelRun], clips: list[Clip], args: argparse.Namespace) -> None:
    """Fill each run's `todo`. How many windows a clip has its first file tells; without it all are made."""
    for clip in tqdm(clips, "looking for finished features", leave=False, delay=1, disable=rank() > 0):
        for run in runs:
            first = None if args.overwrite else read_finished(run, clip, 0)
            if first is None:
                run.todo[clip] = None
                continue
            files = {index: read_finished(run, clip, index) for index in range(1, first["windows"])}
            missing = [
                index
                for index, saved in {0: first, **files}.items()
                if not is_finished(run, clip, index, saved, args.preview)
            ]
            if missing:
                run.todo[clip] = frozenset(missing)


def forward(run: ModelRun, clips: list[np.ndarray], args: argparse.Namespace) -> torch.Tensor:
    """Clips uint8 or float16 [T, H, W, 3] -> features [len(clips), T/t, H/p, W/p, C], in the dtype to save, on the
    device. In VideoREPA's recipe an image model's 1 + 48 frames become 1 + 12 steps, as the latents of CogVideoX."""
    batch = torch.from_numpy(np.stack(clips)[:, -run.settings["num_frames"] :])
    if args.device.type == "cuda":
        batch = batch.pin_memory()  # else the copy waits for the forward pass before it
    batch = batch.to(args.device, non_blocking=True)
    features = extract_features(run.vit, VFMS[run.name], batch, args.dinov2_chunk, getattr(torch, args.precision))
    if args.recipe and VFMS[run.name].tubelet_size == 1:
        fours = features[:, 1:].unflatten(1, (-1, 4)).mean(dim=2)  # [B, 12, H/p, W/p, C]
        features = torch.cat([features[:, :1], fours], dim=1)
    return features.to(getattr(torch, args.save_dtype))


def save_feature(
    run: ModelRun, clip: Clip, window: Window, feature: torch.Tensor, frames: np.ndarray, preview: bool
) -> None:
    """Write the feature file of a window, and its preview. `run` records the success, or why it failed."""
    feature = feature.cpu()
    if not torch.isfinite(feature).all():
        bounds = (window.start, window.end) if run.settings["window"] else (clip.part.start, clip.part.end)
        run.failed[clip.describe(*bounds)] = f"{run.name} gave NaN or infinity in {run.settings['save_dtype']}"
        return
    data = {
        "feature": feature,
        "caption": clip.part.caption or "",
        "video": clip.name,
        "model": run.name,
        "weights": run.settings["weights"],
        "settings": run.clip_settings(clip),
        "frame_indices": list(window.frame_indices[-run.settings["num_frames"] :]),
        "fps": window.fps,
        "start": window.start,
        "end": window.end,
        "windows": window.count,
    }
    path = run.path(clip, window.index)
    if preview:
        data["thumbnails"] = thumbnails(frames.round().clip(0, 255).astype(np.uint8))
    save_atomically(data, path)
    if preview:
        write_preview(path, feature, frames=data["thumbnails"])
    run.shape = list(feature.shape)
    run.count["written"] += 1


def decode_todo(
    runs: list[ModelRun], clips: list[Clip], args: argparse.Namespace
) -> Iterator[tuple[Clip, Window | None, Clips | str]]:
    """All windows that any run needs, and their frames, or why there are none; without a window: of the rest of a clip.

    A video is decoded once for all of its clips.
    """
    left: dict[Clip, set[int] | None] = {}  # windows to come
    by_video: dict[Path, list[Clip]] = {}
    for clip in clips:
        wanted = [run.todo[clip] for run in runs if clip in run.todo]
        if wanted:
            left[clip] = None if None in wanted else set().union(*wanted)
            by_video.setdefault(clip.video, []).append(clip)
    jobs = []
    for video, group in by_video.items():
        parts = [(clip.part.start, clip.part.end, left[clip] and frozenset(left[clip])) for clip in group]
        jobs.append(Job(len(jobs), str(video), tuple(parts)))
    groups = list(by_video.values())
    sizes = tuple(sorted({run.size for run in runs}))
    sampling = Sampling(args.num_frames, sizes, args.sampling, args.fps, args.window, args.hop, args.fit)
    with (
        tqdm(total=sum(len(windows or [0]) for windows in left.values()), unit="clip", disable=rank() > 0) as bar,
        closing(decode_ahead(jobs, sampling, args.num_workers, args.decode_timeout)) as decoded,
    ):
        for item in decoded:
            if item.window is None:
                for clip in groups[item.job]:
                    if left[clip] is None or left[clip]:
                        yield clip, None, item.frames
                        bar.update(len(left[clip] or [0]))
                continue
            clip = groups[item.job][item.window.clip]
            if left[clip] is None:
                left[clip] = set(range(item.window.count))
                bar.total += item.window.count - 1
            left[clip].discard(item.window.index)
            yield clip, item.window, item.frames
            bar.update()


def extract(runs: list[ModelRun], clips: list[Clip], args: argparse.Namespace) -> None:
    """Run every model on the clips that it still needs, and record failures.

    Decoding runs ahead in processes. Writing runs one batch behind in a thread, so that a GPU need not wait for it.
    """
    with ThreadPoolExecutor(max_workers=1) as writer, closing(decode_todo(runs, clips, args)) as decoded:
        writes: list[Future] = []
        while batch := list(islice(decoded, args.batch_size)):
            earlier_writes, writes = writes, []
            for run in runs:
                good = []
                for clip, window, frames in batch:
                    if isinstance(frames, str) and clip in run.todo:
                        run.failed[clip.describe(clip.part.start, clip.part.end)] = frames
                    elif window and not isinstance(frames, str) and run.needs(clip, window.index):
                        good.append((clip, window, frames[run.size]))
                if good:
                    features = forward(run, [frames for *_, frames in good], args)
                    for (clip, window, frames), feature in zip(good, features, strict=True):
                        writes.append(writer.submit(save_feature, run, clip, window, feature, frames, args.preview))
            for write in earlier_writes:
                write.result()
        for write in writes:
            write.result()


def collect(runs: list[ModelRun]) -> None:
    """Add the other ranks' results to rank 0's."""
    for results in gather({run.name: (run.count, run.failed, run.shape) for run in runs})[1:]:
        for run in runs:
            count, failed, shape = results.get(run.name, (Counter(), {}, None))  # that rank can have left the model out
            run.count += count
            run.failed |= failed
            run.shape = run.shape or shape


def report(runs: list[ModelRun], left_out: list[str], output_root: Path) -> None:
    """Print the summary, and write `failed_videos.txt` of each model and `vfm_dimensions.txt`."""
    rows = {
        run.name: {
            "written": run.count["written"],
            "skipped": run.count["skipped"],
            "failed": len(run.failed),
            "feature": str(run.shape or "-"),
            "dtype": run.settings["save_dtype"],
            "MB": round(sum(path.stat().st_size for path in run.folder.rglob("*.pt")) / 1e6, 1),
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
    known = [run for run in runs if run.shape]
    if known:
        dimensions = "".join(f"{run.name}: feature shape {run.shape}, C = {run.shape[-1]}\n" for run in known)
        with whole_file(output_root / "vfm_dimensions.txt") as file:
            file.write(dimensions.encode())


def main() -> int:
    args = parse_args()
    join_ranks()
    args.device = open_device(args.device)
    if args.preview:
        check_preview_packages()
    clips = list_clips(args)
    make_folders(args, clips)
    if args.random_weights:
        say("warning: --random_weights: a dry run; the features will mean NOTHING")
    runs: list[ModelRun] = []
    left_out: list[str] = []
    try:
        runs, left_out = load_models(args)
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
