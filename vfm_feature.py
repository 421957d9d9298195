"""Turn a folder of videos into features of video foundation models (VFMs).

In:  a folder of videos and, optionally, a CSV of captions.
Out: `<output_root>/<model>/<video's stem>.pt`, or `<stem>_000.pt`, `<stem>_001.pt`, ... for its parts or windows. Each
     file is a dict with `feature` [T, H, W, C] (with --pool [T, 1, 1, C]), `caption`, `video`, `model`, `weights`,
     `license`, `settings`, and what the model saw: `frame_indices`, `fps`, `start`, `end`, `windows`.
     --output_format safetensors writes .safetensors instead. --preview adds a picture beside each file, `<stem>.png`.
     `<output_root>/vfm_dimensions.txt`; if videos failed, `<output_root>/<model>/failed_videos.txt`.
     With --motion_checkpoint the features stay in memory: `<output_root>/<model>_motion/` gets the files that encode.py
     would make of them, and `encode_report.csv`.

    python vfm_feature.py --video_dir clips --csv_path clips.csv --output_root features
    python vfm_feature.py --video_dir clips --models VideoMAEv2 DINOv2 --allow_skip_missing
    python vfm_feature.py --video_dir films --window 2 --fps 8         # a file for every two seconds
    python vfm_feature.py --video_dir clips --models DINOv2 --motion_checkpoint checkpoints/motion_ae_best.pt
    python vfm_feature.py --video_dir clips --random_weights          # a dry run: no weights needed
    torchrun --nproc_per_node=4 vfm_feature.py --video_dir clips      # four GPUs share the videos

The features are VideoREPA's alignment targets (https://github.com/aHapBean/VideoREPA): the last block's output without
the final norm for VideoMAEv2, VideoMAE and V-JEPA 2, the normalised patch tokens for DINOv2. A run that was stopped
continues when started again: features that were already made from the same video with the same settings are skipped.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import errno
import functools
import io
import json
import math
import multiprocessing
import os
import queue
import re
import resource
import signal
import sys
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from itertools import combinations, groupby, islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import torch
from av.container import InputContainer
from av.video.reformatter import ColorPrimaries
from av.video.stream import VideoStream
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from encode import MOVEMENT, encode_clip, is_preview, print_summary, write_encode_report, write_preview
from losses import METRICS
from model import (
    ArgumentParser,
    MotionFeatureAutoencoder,
    UserError,
    check_file,
    check_names,
    file_fingerprint,
    find_files,
    find_latents,
    load_checked,
    make_folder,
    number,
    provenance,
    ranks,
    run_script,
    save_atomically,
    say,
    weights_hash,
)

REPOSITORY = Path(__file__).resolve().parent
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".wmv")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# ---------------------------------------------------------------------------------------------------------------------
# The video foundation models
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VFM:
    """What is known about a video foundation model before its weights are read. The defaults are VideoMAE's.

    A video model (`tubelet_size` above 1) is a `VideoViT`. An image model comes from timm and sees each frame alone.
    """

    hub: tuple[str, str] | None = None  # repository and file name of the published weights
    license: str = "unknown"
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    patch_size: int = 16
    tubelet_size: int = 2  # frames in a token; 1: an image model
    position_encoding: str = "sinusoid"  # a fixed table; "rotary", "rotary 2.1": in the attention of V-JEPA 2, 2.1
    trained_grid: tuple[int, int, int] = (8, 14, 14)  # size of the fixed table in tokens: time, height, width
    final_norm: bool = False  # whether the features have passed through a final norm
    timm: str = ""  # its name in timm, or `local-dir:` and a folder
    folder: Path | None = None  # of its weights, used instead of the hub
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    entries: tuple[str, ...] = ("module", "model", "encoder")  # keys in a file; the first one present holds the weights
    unused: tuple[str, ...] = ()  # patterns of published weights that are ignored, besides `UNUSED`

    @property
    def size_flags(self) -> tuple[str, str]:
        """The flags that set the input's height and width."""
        kind = "dinov2" if self.tubelet_size == 1 else "videomae"
        return f"{kind}_resize_h", f"{kind}_resize_w"


VIT_S = {"embed_dim": 384, "num_heads": 6}
VIT_L = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
VIT_H = {"embed_dim": 1280, "depth": 32, "num_heads": 16}
VIT_g = {"embed_dim": 1408, "depth": 40, "mlp_ratio": 48 / 11, "num_heads": 22}
VIT_G = {"embed_dim": 1664, "depth": 48, "mlp_ratio": 64 / 13, "num_heads": 26}
VIDEOMAE_g = {**VIT_g, "num_heads": 16, "patch_size": 14, "trained_grid": (8, 16, 16)}
VIDEOMAE_ZOO = "https://github.com/MCG-NJU/VideoMAE/blob/main/MODEL_ZOO.md"
# V-JEPA's `unused`: weights that its authors' code does not use for videos either
V_JEPA_2 = {"position_encoding": "rotary", "unused": (r"pos_embed$",)}
FOR_IMAGES = (r"patch_embed_img\.", r"img_mod_embed$", r"pos_embed$", r"norms_block\.")
V_JEPA_2_1 = {"license": "mit", "position_encoding": "rotary 2.1", "unused": FOR_IMAGES}
V_JEPA_SITE = "https://github.com/facebookresearch/vjepa2"  # 2.1 is on no hub
# which of the two encoders in a V-JEPA 2.1 file the authors load (`src/hub/backbones.py`)
EMA, TARGET = {"entries": ("ema_encoder",)}, {"entries": ("target_encoder",)}

VIDEO_MODELS = {
    "VideoMAEv2": VFM(("OpenGVLab/VideoMAE2", "distill/vit_b_k710_dl_from_giant.pth"), "apache-2.0"),
    "VideoMAE": VFM(("MCG-NJU/videomae-base", "model.safetensors"), "cc-by-nc-4.0"),
    "VideoMAE-L": VFM(("MCG-NJU/videomae-large", "model.safetensors"), "cc-by-nc-4.0", **VIT_L),
    "VideoMAE-H": VFM((VIDEOMAE_ZOO, "the pre-trained ViT-H"), "cc-by-nc-4.0", **VIT_H),
    "VideoMAEv2-S": VFM(("OpenGVLab/VideoMAE2", "distill/vit_s_k710_dl_from_giant.pth"), "apache-2.0", **VIT_S),
    "VideoMAEv2-g": VFM(("OpenGVLab/VideoMAE2", "mae-g/vit_g_hybrid_pt_1200e.pth"), "apache-2.0", **VIDEOMAE_g),
    "VJEPA2": VFM(("facebook/vjepa2-vitl-fpc64-256", "model.safetensors"), "mit", **V_JEPA_2, **VIT_L),
    "VJEPA2-h": VFM(("facebook/vjepa2-vith-fpc64-256", "model.safetensors"), "apache-2.0", **V_JEPA_2, **VIT_H),
    "VJEPA2-g": VFM(("facebook/vjepa2-vitg-fpc64-256", "model.safetensors"), "apache-2.0", **V_JEPA_2, **VIT_g),
    "VJEPA2.1-B": VFM((V_JEPA_SITE, "vjepa2_1_vitb_dist_vitG_384.pt"), **V_JEPA_2_1, **EMA),
    "VJEPA2.1-L": VFM((V_JEPA_SITE, "vjepa2_1_vitl_dist_vitG_384.pt"), **V_JEPA_2_1, **EMA, **VIT_L),
    "VJEPA2.1-g": VFM((V_JEPA_SITE, "vjepa2_1_vitg_384.pt"), **V_JEPA_2_1, **TARGET, **VIT_g),
    "VJEPA2.1-G": VFM((V_JEPA_SITE, "vjepa2_1_vitG_384.pt"), **V_JEPA_2_1, **TARGET, **VIT_G),
}
IMAGE_MODELS = {  # timm's names; timm knows the rest
    "DINOv2": "vit_base_patch14_dinov2.lvd142m",
    "DINOv2-S": "vit_small_patch14_dinov2.lvd142m",
    "DINOv2-L": "vit_large_patch14_dinov2.lvd142m",
    "DINOv2-g": "vit_giant_patch14_dinov2.lvd142m",
    "DINOv2-S-reg": "vit_small_patch14_reg4_dinov2.lvd142m",
    "DINOv2-B-reg": "vit_base_patch14_reg4_dinov2.lvd142m",
    "DINOv2-L-reg": "vit_large_patch14_reg4_dinov2.lvd142m",
    "DINOv2-g-reg": "vit_giant_patch14_reg4_dinov2.lvd142m",
    "DINOv3-S": "vit_small_patch16_dinov3.lvd1689m",
    "DINOv3-S+": "vit_small_plus_patch16_dinov3.lvd1689m",
    "DINOv3-B": "vit_base_patch16_dinov3.lvd1689m",
    "DINOv3-L": "vit_large_patch16_dinov3.lvd1689m",
    "DINOv3-H+": "vit_huge_plus_patch16_dinov3.lvd1689m",
    "PE-Spatial-T": "vit_pe_spatial_tiny_patch16_512.fb",
    "PE-Spatial-S": "vit_pe_spatial_small_patch16_512.fb",
    "PE-Spatial-B": "vit_pe_spatial_base_patch16_512.fb",
    "PE-Spatial-L": "vit_pe_spatial_large_patch14_448.fb",
    "SigLIP2-B": "vit_base_patch16_siglip_512.v2_webli",
    "SigLIP2-L": "vit_large_patch16_siglip_512.v2_webli",
    "SigLIP2-So400m": "vit_so400m_patch16_siglip_512.v2_webli",
}
MODELS = [*VIDEO_MODELS, *IMAGE_MODELS]
DEFAULT_MODELS = ["VideoMAEv2", "VideoMAE", "DINOv2", "VJEPA2"]


def model_name(text: str) -> str:
    """An argparse type: a name in `MODELS`, in upper or lower case, or `timm:...` or `hf:...`, see `find_vfm`."""
    name = {name.lower(): name for name in MODELS}.get(text.lower(), text)
    if name in MODELS or re.match("(timm|hf):.", name):
        return name
    raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(MODELS)}, timm:NAME, hf:REPO)")


def find_vfm(name: str) -> VFM:
    """The model of that name: one in `MODELS`, `timm:NAME` or `hf:REPO`. NAME and REPO may also be folders.

    Raises `UserError` if features cannot be taken from the model, `ImportError` if a package is missing,
    `FileNotFoundError` if the model's configuration is missing.
    """
    kind, _, rest = name.partition(":")
    if name in VIDEO_MODELS:
        return VIDEO_MODELS[name]
    return find_transformers(rest) if kind == "hf" else find_timm(IMAGE_MODELS.get(name, rest))


def find_timm(name: str, **arguments: Any) -> VFM:
    """timm's model `name`, or the model in a folder that timm saved. `arguments`: for `timm.create_model`."""
    import timm

    folder = Path(name) if Path(name).is_dir() else None
    source = f"local-dir:{folder}" if folder else name
    try:
        with torch.device("meta"):  # no initial values are drawn
            model = timm.create_model(source, num_classes=0, **arguments)
        about, last = model.pretrained_cfg, model.feature_info[-1]
    except Exception as error:  # an unknown name or tag, a folder that timm did not save, a model without blocks
        hint = "timm.list_models() names its models, and a folder must be one that timm saved"
        raise UserError(f"--models timm:{name}: {first_line(error)}; {hint}") from error
    hub = (about["hf_hub_id"], about.get("hf_hub_filename") or "model.safetensors") if about.get("hf_hub_id") else None
    return VFM(
        hub=hub,
        license=about.get("license") or "unknown",
        embed_dim=last["num_chs"],
        depth=len(model.feature_info),
        patch_size=last["reduction"],
        tubelet_size=1,
        final_norm=not isinstance(getattr(model, "norm", nn.Identity()), nn.Identity),
        timm=source,
        folder=folder,
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
    )


def find_transformers(name: str) -> VFM:
    """The VideoMAE or V-JEPA 2 model in a repository or folder in the format of transformers."""
    from transformers import AutoConfig

    own = Path(name) if Path(name).is_dir() else None
    folder = own or download(f"there is no folder {name}, and it", name, ["*.json"], "its folder: hf:FOLDER")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        preprocessors = [json.loads(path.read_bytes()) for path in sorted(folder.glob("*preprocessor_config.json"))]
    except Exception as error:  # no configuration, an unknown kind of model, or one that needs its own code
        raise UserError(f"--models hf:{name}: {first_line(error)}") from error
    kind = config.model_type
    if kind == "vjepa2":
        shape = {"mlp_ratio": config.mlp_ratio, "position_encoding": "rotary"}
    elif kind == "videomae":
        side = config.image_size // config.patch_size
        shape = {"trained_grid": (config.num_frames // config.tubelet_size, side, side)}
        shape["mlp_ratio"] = config.intermediate_size / config.hidden_size
    else:
        raise UserError(
            f"--models hf:{name}: of transformers' models only VideoMAE and V-JEPA 2 are taken, not {kind}; image "
            f"models are timm's: timm:NAME, or one of {', '.join(IMAGE_MODELS)}"
        )
    if config.hidden_act != "gelu":
        raise UserError(f"--models hf:{name}: a {kind} with {config.hidden_act} for gelu is not known")
    pixels = {"do_normalize": True} | (preprocessors[0] if preprocessors else {})
    if not pixels["do_normalize"] or not {"image_mean", "image_std"} <= pixels.keys():
        hint = "put the preprocessor_config.json beside it that says image_mean and image_std"
        raise UserError(f"--models hf:{name}: {folder} does not say how pixels are normalised; {hint}")
    return VFM(
        hub=(name, "model.safetensors"),
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        patch_size=config.patch_size,
        tubelet_size=config.tubelet_size,
        folder=own,
        mean=tuple(pixels["image_mean"]),
        std=tuple(pixels["image_std"]),
        **shape,
    )


def describe_models() -> str:
    """A table of `MODELS`: a header, then one line per model. Raises `ImportError` without timm.

    `grid`: tokens in time, height and width for 48 frames at the default input size.
    """
    rows = [("name", "C", "patch", "tubelet", "grid", "final norm", "licence", "weights")]
    for name in MODELS:
        # one block: the table does not depend on their number, and building all takes half a second per model
        vfm = VIDEO_MODELS.get(name) or find_timm(IMAGE_MODELS[name], depth=1)
        height, width = (DEFAULT_SIZES[flag] / vfm.patch_size for flag in vfm.size_flags)
        grid = f"{DEFAULT_FRAMES // vfm.tubelet_size} x {height:.0f} x {width:.0f}"
        sizes = map(str, (vfm.embed_dim, vfm.patch_size, vfm.tubelet_size))
        norm = "yes" if vfm.final_norm else "no"
        rows.append((name, *sizes, grid, norm, vfm.license, f"{vfm.hub[1]} of {vfm.hub[0]}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# Weights: from the authors' files or from the hub
# ---------------------------------------------------------------------------------------------------------------------

# Weight names of video models, as their authors or transformers write them -> timm's. Applied in this order.
RENAMES = {
    r"\bencoder\.layer\.": "blocks.",
    r"^((module|backbone|videomae|encoder)\.)+": "",
    r"^embeddings\.patch_embeddings\.proj(ection)?\.": "patch_embed.proj.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
    r"(\.attention)+\.": ".attn.",
    r"\.attn\.q_bias": ".attn.query.bias",
    r"\.attn\.v_bias": ".attn.value.bias",
}
# Patterns of published weights that the features do not depend on, in timm's names. Any other weight that has no place
# in the model is an error. For example, a DINOv2 trained with register tokens gives different features without them.
UNUSED = (
    r"(\w+_)?head(_\w+)?\.|classifier\.|fc\.|pooler\.",
    r"decoder\.|encoder_to_decoder\.|predictor\.|mask_token$|position_embeddings$",  # the last one: VideoMAE's decoder
    r"(fc_|layer)?norm\.",  # a final norm, where the features are taken before it
)


def first_line(error: Exception) -> str:
    """The error's type and the first line of its text."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def download(what: str, repository: str, patterns: Sequence[str], hint: str) -> Path:
    """A folder with the files of the hub's `repository` that match `patterns`, from the cache if they are in it.

    Raises a `FileNotFoundError` that says why `what` cannot be downloaded, how to fix that, and what to pass (`hint`).
    """
    from huggingface_hub import constants, snapshot_download

    try:
        folder = Path(snapshot_download(repository, allow_patterns=patterns))
        if any(file for pattern in patterns for file in folder.glob(pattern)):
            return folder
        reason = "the repository, or what the cache has of it, does not hold it"
    except Exception as error:  # of huggingface_hub, of its HTTP library, or of the system
        reason = first_line(error)
    raise FileNotFoundError(
        f"{what} cannot be downloaded from {constants.ENDPOINT} ({reason}): pass {hint}; or "
        f"{'unset HF_HUB_OFFLINE, ' * constants.HF_HUB_OFFLINE}set HF_ENDPOINT to a mirror or, if it is gated or "
        "private, accept its terms on its page and set HF_TOKEN or run `hf auth login`"
    )


def download_weights(name: str, vfm: VFM) -> Path:
    """The file or folder of model `name`'s published weights. Raises `FileNotFoundError` if it cannot be obtained."""
    if vfm.folder:
        return vfm.folder
    flag, hint = f"{name.lower()}_ckpt", f"it by --weights {name}=FILE, or try the rest with --random_weights"
    if not vfm.hub:
        raise FileNotFoundError(f"timm knows no published weights; pass {hint}")
    repository, file = vfm.hub
    if "://" in repository:
        raise FileNotFoundError(f"{file} of {repository} is in no hub; download it as they say there and pass {hint}")
    looked = f"no file at {DEFAULT_PATHS[flag]}, and " if flag in DEFAULT_PATHS else ""
    return download(f"{looked}{file} of {repository}", repository, [file], hint) / file


INDEX = "model.safetensors.index.json"  # in a folder whose weights are split into several files


def read_weights(path: Path, vfm: VFM) -> dict[str, torch.Tensor]:
    """The state dict in a published file (.pth, .pt, .bin, .safetensors) or folder, with its published names. A folder
    holds a model.safetensors, or an index and the files that it lists.

    No code from the file runs: only tensors, plain values and `argparse.Namespace` (in VideoMAE's file) are loaded.
    Raises `UserError` for anything else, and `FileNotFoundError` for a folder without weights.
    """
    if path.is_dir():
        if (path / INDEX).exists():
            return read_indexed(path / INDEX, vfm)
        path = path / "model.safetensors"
        if not path.exists():
            raise FileNotFoundError(f"there is no {path.name} in {path.parent}")
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = load_checked(path, mmap=True)  # V-JEPA 2's file holds five times as much as is needed
    state = state if isinstance(state, dict) else {}
    state = next((state[entry] for entry in vfm.entries if isinstance(state.get(entry), dict)), state)
    weights = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not weights:
        raise UserError(f"{path} holds no weights; use the file that the authors publish")
    return weights


def read_indexed(index: Path, vfm: VFM) -> dict[str, torch.Tensor]:
    """The weights that an index lists, from the files that it lists: files of an older set may lie beside them."""
    if (whole := index.with_name("model.safetensors")).exists():
        raise UserError(f"{index.parent} holds {whole.name} and {index.name}; remove what is not the model's")
    try:
        places = json.loads(index.read_bytes())["weight_map"]  # name -> file
        parts = {file: read_weights(index.with_name(Path(file).name), vfm) for file in {*places.values()}}
        return {name: parts[file][name] for name, file in places.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{index} does not fit its files ({first_line(error)}); download them again") from None


def check_weight(name: str, value: torch.Tensor) -> None:
    """Raise a `ValueError` that names the weight if its values cannot be the trained ones.

    Vectors may be constant, such as biases of zero and gains of one, and so may tables of biases.
    """
    if value.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        dtype = str(value.dtype).removeprefix("torch.")
        raise ValueError(f"{name} holds {dtype}: it is quantised; give the unquantised weights")
    smallest, largest = (bound.item() for bound in value.aminmax())  # NaN if any value is NaN
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise ValueError(f"{name} holds NaN or infinity")
    if smallest == largest and value.squeeze().ndim > 1 and "bias" not in name:
        raise ValueError(f"{name} is {smallest:g} everywhere: the file is damaged")


def to_timm_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a video model's weights. Separate query, key and value weights, and their biases, become one `qkv`.

    Raises what `check_weight` raises.
    """
    state = {}
    for name, value in weights.items():
        for theirs, ours in RENAMES.items():
            name = re.sub(theirs, ours, name)
        state[name] = value
    for query in [name for name in state if ".attn.query." in name]:
        key, value, joint = (query.replace(".query.", f".{part}.") for part in ("key", "value", "qkv"))
        if query.endswith("bias"):
            state.setdefault(key, torch.zeros_like(state[query]))  # VideoMAE has no key bias
        if key in state and value in state:
            for name in (query, key, value):  # once joined, damage in only one of them would not show
                check_weight(name, state[name])
            state[joint] = torch.cat([state.pop(query), state.pop(key), state.pop(value)])
    return state


def to_timm_layout(weights: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """An image model's state dict, as its authors publish it -> one for timm's `model`, by timm's own conversion.

    Weights that timm does not know stay as they are, and `load_weights` reports them. Raises `ValueError` for non-zero
    biases that timm's model does not have, and if timm cannot convert the file.
    """
    expected = model.state_dict().keys()
    if weights.keys() >= expected:
        return weights
    zeros = [name for name in weights if name.endswith("attn.qkv.bias") and name not in expected]
    if any(weights[name].any() for name in zeros):
        raise ValueError(f"{zeros[0]} is not zero")
    # DINOv3's authors publish biases of zero that timm's model does not have
    weights = {name: value for name, value in weights.items() if name not in zeros}
    try:
        return sys.modules[type(model).__module__].checkpoint_filter_fn(weights, model)
    except Exception as error:  # timm expects certain files, and may raise any error on others
        raise ValueError(f"timm cannot convert it ({first_line(error)})") from error


def load_weights(vit: nn.Module, vfm: VFM, weights: dict[str, torch.Tensor]) -> str:
    """Load `weights` into `vit` in float32, and return the hash of the weights that `vit` uses.

    Raises a `ValueError` that names the weights that are missing, have another shape, are neither in the model nor
    listed as unused (`UNUSED`, `vfm.unused`), or are rejected by `check_weight`.
    """
    expected = {name: list(value.shape) for name, value in vit.state_dict().items()}
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
    for name in expected:
        check_weight(name, weights[name])
    state = {name: weights[name].float() for name in expected}
    vit.load_state_dict(state, assign=True)
    return weights_hash(state)


# ---------------------------------------------------------------------------------------------------------------------
# Networks: frames in, features out
# ---------------------------------------------------------------------------------------------------------------------


class RotaryPositions(nn.Module):
    """V-JEPA 2's rotary positions: rotates queries or keys [B, heads, N, D] by their tokens' time, height and width.

    A third of the channels (rounded down to an even number) belongs to each axis; the rest are not rotated. As in
    facebookresearch/vjepa2 `src/models/utils/modules.py`: neighbouring channels are rotated as pairs, but the
    frequencies are ordered as if each channel of the first half were paired with one of the second. The published
    weights were trained this way, so it is kept. V-JEPA 2.1 (`app/vjepa_2_1`) orders the frequencies for neighbours and
    stretches every height and width to the 16 positions of its training. The tables are made once for all layers.
    """

    def __init__(self, grid: tuple[int, int, int], head_dim: int, is_2_1: bool):
        super().__init__()
        axis_dim = head_dim // 3 // 2 * 2
        frequencies = 1.0 / 10000 ** (torch.arange(axis_dim // 2) / (axis_dim / 2))
        frequencies = frequencies.repeat_interleave(2) if is_2_1 else frequencies.repeat(2)  # [axis_dim]
        axes = [torch.arange(size, dtype=torch.float32) for size in grid]
        if is_2_1:
            axes[1:] = [axis * (15 / max(len(axis) - 1, 1)) for axis in axes[1:]]
        angles = [positions[..., None] * frequencies for positions in torch.meshgrid(*axes, indexing="ij")]
        angles = F.pad(torch.cat(angles, dim=-1), (0, head_dim - 3 * axis_dim)).flatten(0, 2)  # [N, D]
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.register_buffer("cos", angles.cos(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quarter_turn = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)  # [B, heads, N, D]
        return (x * self.cos + quarter_turn * self.sin).to(x.dtype)


def sinusoid_positions(grid: tuple[int, int, int], embed_dim: int, trained_grid: tuple[int, int, int]) -> torch.Tensor:
    """VideoMAE's fixed position table [1, T*H*W, C] for a grid of T x H x W tokens.

    The table of the training grid is resized with bicubic interpolation in space, then trilinear in time, as in
    VideoREPA's `VideoMAEv2.py`. Sines and cosines are computed in float64, as there.
    """
    position = np.arange(np.prod(trained_grid))[:, None]
    angle = position / 10000 ** (2 * (np.arange(embed_dim) // 2) / embed_dim)
    table = np.where(np.arange(embed_dim) % 2 == 0, np.sin(angle), np.cos(angle))
    table = torch.from_numpy(table).float().view(*trained_grid, embed_dim).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=grid[1:], mode="bicubic", align_corners=False)  # [t, C, H, W]
    table = table.transpose(0, 1)[None]  # [1, C, t, H, W]
    table = F.interpolate(table, size=grid, mode="trilinear", align_corners=False)  # [1, C, T, H, W]
    return table.flatten(2).transpose(1, 2).contiguous()


class VideoViT(nn.Module):
    """The encoder of VideoMAE and V-JEPA 2: a pre-norm ViT over tubelets, made of timm's blocks, with no final norm."""

    def __init__(self, vfm: VFM):
        # imported here: it takes seconds, and --help and the decoders do not need it
        from timm.models.vision_transformer import Block, init_weights_vit_timm

        super().__init__()
        kernel = (vfm.tubelet_size, vfm.patch_size, vfm.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, vfm.embed_dim, kernel, stride=kernel)})
        block = functools.partial(Block, qkv_bias=True, norm_layer=functools.partial(nn.LayerNorm, eps=1e-6))
        shape = (vfm.embed_dim, vfm.num_heads, vfm.mlp_ratio)
        self.blocks = nn.ModuleList(block(*shape) for _ in range(vfm.depth))
        if vfm.position_encoding == "rotary 2.1":
            self.video_mod_embed = nn.Parameter(torch.zeros(1, 1, vfm.embed_dim))  # marks the input as a video
        self.apply(init_weights_vit_timm)

    def set_positions(self, vfm: VFM, grid: tuple[int, int, int]) -> None:
        if vfm.position_encoding == "sinusoid":
            self.pos_embed = nn.Parameter(sinusoid_positions(grid, vfm.embed_dim, vfm.trained_grid))
            return
        is_2_1 = vfm.position_encoding == "rotary 2.1"
        self.pos_embed = self.video_mod_embed if is_2_1 else None
        rotary = RotaryPositions(grid, vfm.embed_dim // vfm.num_heads, is_2_1)
        for block in self.blocks:  # timm's attention passes queries and keys through these two before their product
            block.attn.q_norm = block.attn.k_norm = rotary

    def embed(self, video: torch.Tensor) -> torch.Tensor:
        """[B, 3, T, H, W] -> [B, (T/t)(H/p)(W/p), C], tubelets of t frames and p x p pixels.

        The weight has the layout of the Conv3d that the models are published with. Tubelets do not overlap, so the
        convolution is one matrix product, which every device runs at full speed.
        """
        proj = self.patch_embed["proj"]
        t, p, _ = proj.kernel_size
        x = video.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(2, (-1, t))  # [B, 3, T/t, t, H/p, p, W/p, p]
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # [B, T/t, H/p, W/p, 3*t*p*p]
        return F.linear(x, proj.weight.flatten(1), proj.bias).flatten(1, 3)

    def forward(self, video: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
        """[B, 3, T, H, W] -> the outputs of the blocks `layers` (from 1), side by side: [B, N, C * len(layers)]."""
        x = self.embed(video)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        outputs = {}
        for layer, block in enumerate(self.blocks[: max(layers)], 1):
            x = block(x)
            if layer in layers:
                outputs[layer] = x
        return torch.cat([outputs[layer] for layer in layers], dim=-1)


class TimmModel(nn.Module):
    """A timm model. Its final norm, if it has one, is applied to the output of every requested block."""

    def __init__(self, vfm: VFM):
        import timm

        super().__init__()
        self.model = timm.create_model(vfm.timm, num_classes=0)
        if any(buffer.is_meta for buffer in self.model.buffers()):  # such as rotary positions, which are in no file
            with torch.device("cpu"):
                self.model = timm.create_model(vfm.timm, num_classes=0)

    def set_positions(self, vfm: VFM, grid: tuple[int, int, int]) -> None:
        """Adapt the model, loaded at its training size, to `grid`, and make it compute what its authors' code does."""
        name, table = self.model.pretrained_cfg["architecture"], getattr(self.model, "pos_embed", None)
        if "vit_pe_" in name:  # timm stretches every grid to the training grid; the authors do not (their `rope.py`)
            self.model.rope.ref_feat_shape = None
        if "_siglip_" in name:  # timm's smaller ones use the exact GELU; the authors use flax's approximation in all
            for block in self.model.blocks:
                block.mlp.act = nn.GELU(approximate="tanh")
        if hasattr(self.model, "set_input_size"):
            self.model.set_input_size(img_size=tuple(length * vfm.patch_size for length in grid[1:]))
        if "patch14_dinov2" in name or "vit_pe_" in name:
            self.model.pos_embed = nn.Parameter(resize_learned_positions(table, grid[1:], name))

    def forward(self, images: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
        """[B, 3, H, W] -> [B, N, C * len(layers)], prefix tokens left out."""
        indices = sorted(layer - 1 for layer in layers)
        maps = self.model.forward_intermediates(
            images, indices=indices, norm=True, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )  # one [B, C, h, w] per block
        maps = dict(zip(indices, maps, strict=True))
        return torch.cat([maps[layer - 1] for layer in layers], dim=1).flatten(2).transpose(1, 2)


def resize_learned_positions(table: torch.Tensor, grid: tuple[int, int], name: str) -> torch.Tensor:
    """A position table [1, 1 + side*side, C] -> [1, 1 + H*W, C], for models that timm resizes unlike their authors.

    DINOv2 without registers: bicubic by the factor (size + 0.1) / side, without antialiasing (facebookresearch/dinov2
    `interpolate_pos_encoding`). PE: bilinear (facebookresearch/perception_models `_sample_abs_posemb`). timm's own
    method, bicubic with antialiasing, is right for DINOv2 with registers. It also serves for SigLIP 2, whose authors
    resize square grids only (google-research/big_vision `resample_posemb`).
    """
    side = int((table.shape[1] - 1) ** 0.5)
    if grid == (side, side):
        return table
    patches = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if "dinov2" in name:
        scale = tuple((size + 0.1) / side for size in grid)
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        patches = F.interpolate(patches, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def build_vit(
    vfm: VFM, num_frames: int, size: tuple[int, int], weights: dict[str, torch.Tensor] | None = None
) -> nn.Module:
    """The model for clips of `num_frames` frames of `size` = (height, width), in eval mode on the CPU.

    Its forward takes videos [B, 3, T, H, W], or images [B, 3, H, W], and `layers`, block numbers counted from 1. It
    returns the outputs of these blocks for each token, [B, N, C * len(layers)]. `weights`: a state dict from
    `read_weights`, with its published names; without it the weights are random, the same every time. The attribute
    `weights_hash` says which weights the model has. Raises `ValueError` for damaged weights and those of another model,
    see `to_timm_names`, `to_timm_layout` and `load_weights`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.device("cpu" if weights is None else "meta"):  # with weights to load, no initial values are drawn
            vit = TimmModel(vfm) if vfm.timm else VideoViT(vfm)
        if weights is None:
            vit.weights_hash = "random"
        elif vfm.timm:
            vit.weights_hash = load_weights(vit.model, vfm, to_timm_layout(weights, vit.model))
        else:
            vit.weights_hash = load_weights(vit, vfm, to_timm_names(weights))
        vit.set_positions(vfm, (num_frames // vfm.tubelet_size, *(side // vfm.patch_size for side in size)))
    return vit.eval().requires_grad_(False)


@torch.inference_mode()
def extract_features(
    vit: nn.Module,
    vfm: VFM,
    clips: torch.Tensor,
    chunk: int = 128,
    precision: torch.dtype = torch.float32,
    layers: Sequence[int] | None = None,
) -> torch.Tensor:
    """Clips -> features: RGB [B, T, H, W, 3] -> float32 [B, T/t, H/p, W/p, C * len(layers)].

    `clips`: values from 0 to 255, in uint8 or a floating-point dtype, on `vit`'s device, with the number of frames and
    the size that `vit` was built for. `chunk`: frames in one forward pass of an image model. `precision`: of the matrix
    products; the residual stream and the norms stay in float32. `layers`: blocks, counted from 1, whose outputs are
    concatenated along C; the last block by default.
    """
    mean = torch.tensor(vfm.mean, device=clips.device)
    std = torch.tensor(vfm.std, device=clips.device)
    layers = layers or [vfm.depth]
    batch, frames, height, width, _ = clips.shape
    pixels = (clips.float() / 255 - mean) / std
    with torch.autocast(clips.device.type, dtype=precision, enabled=precision != torch.float32):
        if vfm.tubelet_size > 1:
            tokens = vit(pixels.permute(0, 4, 1, 2, 3), layers)
        else:
            images = pixels.flatten(0, 1).permute(0, 3, 1, 2).split(chunk)
            tokens = torch.cat([vit(image, layers) for image in images])  # [B*T, N, C]
    tokens = tokens.float()
    grid = (frames // vfm.tubelet_size, height // vfm.patch_size, width // vfm.patch_size)
    return tokens.reshape(batch, *grid, vfm.embed_dim * len(layers))


# ---------------------------------------------------------------------------------------------------------------------
# Videos and captions
# ---------------------------------------------------------------------------------------------------------------------


def list_videos(folder: Path, recursive: bool = False) -> list[Path]:
    """The videos of `folder`, relative to it, sorted; hidden files and folders are left out.

    Raises `UserError` if there is none, and what `check_names` raises.
    """
    if not folder.is_dir():
        raise UserError(f"--video_dir {folder}: no such folder; give the one that holds your clips")
    videos = [path.relative_to(folder) for path in find_files(folder, VIDEO_SUFFIXES, recursive)]
    if not videos:
        hint = "" if recursive else "; --recursive searches subfolders"
        raise UserError(f"--video_dir {folder}: no videos in it ({' '.join(VIDEO_SUFFIXES)}{hint})")
    return check_names(videos)


@dataclass(frozen=True)
class Clip:
    """A video, or a part of one. Each model makes one feature file from it, or with --window one file per window."""

    video: Path  # relative to --video_dir
    caption: str | None = None  # None: no CSV names the video
    suffix: str = ""  # of the output's stem: _000, _001, ... if the CSV cuts videos into parts
    start: float | None = None  # seconds; None: the video's beginning
    end: float | None = None  # None: its end
    fingerprint: str = ""  # of the video; empty: the video cannot be read


CAPTION_COLUMNS = ("caption", "start", "end")  # every other column may name the videos
AROUND_NAMES = " \t\r\n\"'`“”‘’"  # blanks and quotes around a name are ignored


def read_rows(csv_path: Path) -> tuple[list[str], list[list[str]]]:
    """The header of a CSV file, in lower case, and its rows, each with as many fields as the header.

    Raises `UserError` for text that is not UTF-8, quotes that are not closed, a carriage return within a row, rows that
    are longer or shorter than the header, a header without `caption`, and a repeated `caption`, `start` or `end`.
    """
    try:
        text = csv_path.read_bytes().decode("utf-8-sig").lstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        hint = "; save it as CSV UTF-8" * isinstance(error, UnicodeDecodeError)
        raise UserError(f"cannot be read as text in UTF-8 ({error}){hint}") from error
    csv.field_size_limit(2**31 - 1)  # the longest caption in characters; 2**17 by default
    rows: list[list[str]] = []
    try:
        for fields in csv.reader(io.StringIO(text, newline="\n"), strict=True):
            if not rows or len(fields or [""]) == len(rows[0]):
                rows.append(fields or [""])  # a blank line is an empty caption in a table of one column
            elif fields:
                raise csv.Error(f"{len(fields)} fields where the header has {len(rows[0])}")
    except csv.Error as error:
        reason = "a carriage return outside quotes" if "new-line character" in str(error) else error
        hint = "put commas between columns, and quotes around captions that hold commas or line breaks"
        raise UserError(f"row {len(rows) + 1}: {reason}; {hint}") from None
    header = [name.strip(AROUND_NAMES).lower() for name in rows[0]] if rows else []
    if "caption" not in header:
        told = ", ".join(map(repr, header))[:300] or "nothing"
        raise UserError(f"no column named caption; it has {told}; name one so, and put commas between columns")
    for name in CAPTION_COLUMNS:
        if header.count(name) > 1:
            raise UserError(f"{header.count(name)} columns are named {name}; rename all but one")
    return header, rows[1:]


def stem_keys(stem: str) -> list[str | int]:
    """The stem and, if it is a whole number, its value too: spreadsheets turn 0012 into 12 or 12.0."""
    number = re.fullmatch(r"([0-9]{1,18})(\.0*)?", stem)
    return [stem, int(number[1])] if number else [stem]


# How a cell names videos (3: file name, 2: stem, 1: number, 0: not at all); the videos; the cell's path, no suffix.
Match = tuple[int, list[Path], str]


def find_videos(cell: str, named: dict[tuple, list[Path]]) -> Match:
    """The videos that `cell` names. A key of `named`: any number of a video's last folders, and one of its `stem_keys`.

    A stem beats a number. Then the most folders win, then a video whose whole path is given, then a matching suffix.
    """
    *folders, name = cell.strip(AROUND_NAMES).replace("\\", "/").split("/")
    folders = [part for part in folders if part not in ("", ".")]
    stem, suffix = os.path.splitext(name)
    keys = [stem] if suffix.lower() in VIDEO_SUFFIXES else stem_keys(name)
    for said in ((*folders[first:], key) for key in keys for first in range(len(folders) + 1)):
        if videos := named.get(said):
            videos = [video for video in videos if len(video.parts) <= len(said)] or videos
            videos = [video for video in videos if video.name == name] or videos
            level = 3 if videos[0].name == name else 2 if said[-1] == keys[0] else 1
            return level, videos, "/".join([*folders, keys[0]])
    return 0, [], ""


def match_rows(header: list[str], rows: list[list[str]], videos: list[Path], folder: Path) -> tuple[list[Match], str]:
    """For each row the video that it names, if any; and a sentence that says how the videos are named.

    The best column decides: file names beat stems, stems beat numbers, then the most videos win. In a table of only
    `CAPTION_COLUMNS` a row's number, 0000, 0001, ..., names the video. Raises `UserError` for a cell that names several
    videos, for columns that contradict each other, and if no video (with row numbers: not every video) is named.
    """
    named = defaultdict(list)
    for video in videos:
        path = (folder.absolute().name, *video.parts[:-1])  # a cell may give the name of `folder` too
        for said in ((*path[first:], key) for key in stem_keys(video.stem) for first in range(len(path) + 1)):
            named[said].append(video)
    names = [(column, name) for column, name in enumerate(header) if name not in CAPTION_COLUMNS]
    columns = [(f"column {name!r}", [row[column] for row in rows]) for column, name in names]
    columns = columns or [("the number of the row, 0000, 0001, ...,", [f"{row:04d}" for row in range(len(rows))])]
    found = [(label, cells, [find_videos(cell, named) for cell in cells]) for label, cells in columns]

    def merit(column: tuple[str, list[str], list[Match]]) -> tuple[int, int]:
        clear = [(level, videos[0]) for level, videos, _ in column[2] if len(videos) == 1]
        return max((level for level, _ in clear), default=0), len({video for _, video in clear})

    label, cells, matches = best = max(found, key=merit)
    level, num_named = merit(best)
    for row, (_, several, _) in enumerate(matches):
        if len(several) > 1:
            hint = f"which can be {several[0]} or {several[1]}; write the path"
            raise UserError(f"row {row + 2}: {label} has {cells[row]!r}, {hint}")
    if rows and num_named < (1 if names else len(videos)):
        missing = min({*videos}.difference(*(ours for _, ours, _ in matches)))
        hint = "give each row its video's file name"
        raise UserError(f"nothing names {missing}: {label} has {cells[0][:40]!r}; {hint}")
    for other_label, other_cells, others in (column for column in found if merit(column)[0] == level):
        for row, ((_, ours, _), (_, theirs, _)) in enumerate(zip(matches, others, strict=True)):
            if theirs and not {*ours} & {*theirs}:
                raise UserError(
                    f"{label} and {other_label} contradict each other: row {row + 2} has {cells[row]!r} and "
                    f"{other_cells[row]!r}; remove the one that does not name the video"
                )
    return matches, f"{label} names {num_named} of {len(videos)} videos"


def read_clip(row: dict[str, str], video: Path, suffix: str) -> Clip:
    """The clip that a row describes: a video or a part of it. Raises `UserError` if `start` or `end` is not a time in
    seconds, or the end is not after the start."""
    start, end = (row.get(column, "").strip() for column in ("start", "end"))
    try:
        is_span = 0 <= float(start or 0) < float(end or "inf")
    except ValueError:
        is_span = False
    if not is_span:
        hint = "give seconds from the video's first frame, or nothing"
        raise UserError(f"{video} is to start at {start!r} and to end at {end!r}; {hint}")
    return Clip(video, row.get("caption"), suffix, float(start) if start else None, float(end) if end else None)


def read_captions(csv_path: Path, videos: list[Path], folder: Path = Path()) -> list[Clip]:
    """The clips of the `videos` in a folder, as a CSV file describes them. Videos that it does not name lack a caption.

    Rows that give a video's own path beat rows that give other paths. Without the columns `start` and `end` only the
    first row of a video counts; with one of them each row is a part. Raises `UserError` if rows with different paths
    match a video and none is its own path, and what `read_rows`, `match_rows` and `read_clip` raise.
    """
    header, rows = read_rows(csv_path)
    matches, found = match_rows(header, rows, videos, folder)
    rows_of: dict[Path, list[tuple[str, dict[str, str]]]] = defaultdict(list)
    for row, (_, named, path) in zip(rows, matches, strict=True):
        for video in named:
            rows_of[video].append((path, dict(zip(header, row, strict=True))))
    has_parts = "start" in header or "end" in header
    clips, num_rows = [], 0
    for video in videos:
        own_path = (folder.absolute() / video).with_suffix("").as_posix()
        own = [row for path, row in rows_of[video] if own_path.endswith(f"/{path}")]
        if not own and len(paths := sorted({path for path, _ in rows_of[video]})) > 1:
            raise UserError(f"{video} can be {paths[0]} or {paths[1]}; keep the rows of one")
        own = own or [row for _, row in rows_of[video]]
        num_rows += len(own)
        for index, row in enumerate((own if has_parts else own[:1]) or [{}]):
            clips.append(read_clip(row, video, f"_{index:03d}" if has_parts else ""))
    if num_rows < len(rows):
        found += f"; {len(rows) - num_rows} of its {len(rows)} rows belong to no video"
    if has_parts:
        found += f"; start and end cut them into {len(clips)} clips, _000, _001 and so on of each"
    elif repeated := num_rows - sum(map(bool, rows_of.values())):
        example = next(video for video in videos if len(rows_of[video]) > 1)
        found += f"; {repeated} rows name a video again, such as {example}, and its first counts"
    say(f"captions: {csv_path}: {found}")
    return clips


# ---------------------------------------------------------------------------------------------------------------------
# Frames: which of a clip, at what size
# ---------------------------------------------------------------------------------------------------------------------

VIDEOREPA_SIZE = (480, 720)

# {size: RGB [num_frames, height, width, 3]}, uint8, or float16 in VideoREPA's recipe
Frames = dict[tuple[int, int], np.ndarray]


@dataclass(frozen=True)
class Sampling:
    """Which frames the decoders take from each clip, and how they resize them for the models."""

    num_frames: int
    sizes: tuple[tuple[int, int], ...]  # (height, width)
    sampling: str = "spread"  # or "stride": see `frame_indices`
    fps: float | None = None  # instead of `sampling`: frames per second
    window: float | None = None  # seconds: cut clips into windows that start every `hop` seconds
    hop: float | None = None
    fit: str = "squash"  # a key of `FITS`


def frame_indices(num_available: int, num_frames: int, sampling: str = "spread") -> np.ndarray:
    """`num_frames` of the indices 0 .. num_available - 1; when there are too few frames, some repeat.

    "spread": evenly from the first to the last. "stride": from the first on, at the largest integer stride, as in
    VideoREPA's `finetune/datasets/utils.py`; if there are too few, the last one repeats.
    """
    if sampling == "stride":
        return np.minimum(np.arange(num_frames) * max(num_available // num_frames, 1), num_available - 1)
    return np.linspace(0, num_available - 1, num_frames).round().astype(int)


def resize_frame(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [height, width, 3]: squashed to `size`, bicubic with antialiasing.

    Works on bytes: the result is exact up to rounding, and many times faster than on a float copy.
    """
    if frame.shape[:2] == size:
        return frame
    image = torch.from_numpy(frame)[None].permute(0, 3, 1, 2)  # [1, 3, H, W], channels last in memory
    image = F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False)
    return image[0].permute(1, 2, 0).numpy()


def crop_centre(frame: np.ndarray, size: tuple[int, int], aspect: float = 1.0) -> np.ndarray:
    """[H, W, 3] -> the largest centre crop that is displayed at the aspect ratio of `size`, rounded as in VideoREPA.

    `aspect`: the pixel aspect ratio, the displayed width of a pixel over its height.
    """
    height, width, _ = frame.shape
    ratio = size[0] / size[1] * aspect
    if height / width > ratio:
        cut_height, cut_width = max(1, int(width * ratio)), width
    else:
        cut_height, cut_width = height, max(1, int(height / ratio))
    top, left = round((height - cut_height) / 2), round((width - cut_width) / 2)
    return frame[top : top + cut_height, left : left + cut_width]


def fit_like_videorepa(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] -> float16 [height, width, 3], values from 0 to 255, or beyond where bicubic overshoots.

    As in VideoREPA's trainer: a centre crop at the aspect ratio of CogVideoX's 480 x 720, resized to 480 x 720
    (`finetune/datasets/data_transform.py`), then to the model's size (`compute_loss` of its `lora_trainer.py`).
    """
    image = torch.from_numpy(crop_centre(frame, VIDEOREPA_SIZE)).permute(2, 0, 1)[None].float()  # [1, 3, H, W]
    image = F.interpolate(image, VIDEOREPA_SIZE, mode="bilinear", align_corners=True, antialias=True)
    image = F.interpolate(image, size, mode="bicubic", align_corners=False)
    return image[0].permute(1, 2, 0).half().numpy()


# (frame, size, pixel aspect ratio) -> frame. "squash" and "videorepa" ignore the pixel aspect ratio.
FITS = {
    "squash": lambda frame, size, aspect: resize_frame(frame, size),
    "crop": lambda frame, size, aspect: resize_frame(crop_centre(frame, size, aspect), size),
    "videorepa": lambda frame, size, aspect: fit_like_videorepa(frame, size),
}


# ---------------------------------------------------------------------------------------------------------------------
# Decoding, in separate processes
# ---------------------------------------------------------------------------------------------------------------------

TIME_TOLERANCE = 1e-3  # seconds: containers such as Matroska round times to milliseconds


@dataclass(frozen=True)
class Window:
    """What one feature file is made from: a clip, or one of the windows that the clip is cut into.

    Windows of the same frames are equal, even if `count` differs: decoding may find fewer windows than packets promise.
    """

    clip: Clip
    index: int  # which of the clip's windows
    count: int = field(compare=False)  # how many windows the clip has
    start: float  # seconds from the video's first frame
    end: float = field(compare=False)
    frame_indices: tuple[int, ...]  # among all frames that the video shows; empty if it shows none in this span
    stop: int = field(compare=False)  # index of the first frame after the window
    fps: float  # the video's average frame rate
    aspect: float = field(default=1.0, compare=False)  # width over height of the picture as players display it


@contextmanager
def open_track(path: str) -> Iterator[tuple[InputContainer, VideoStream, list]]:
    """A video's container, the video track that FFmpeg picks as best, and the errors it logs: (level, source, text).

    Raises `ValueError` for a video that cannot be read, `UserError` for a path that `check_file` rejects.
    """
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # a message may equal the last one of the previous video
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
            with suppress(OSError):
                check_file(Path(path))  # says more about broken links, and about pointers in place of files
            said = "; ".join([error.strerror, *(text.strip() for *_, text in messages[-2:])])
            raise ValueError(f"cannot be read: {said}") from None


def read_packets(path: str) -> tuple[list[int | None], float, float]:
    """What a video's packets say about its frames: the times of the shown frames in ticks (sorted, if all are known),
    the seconds per tick, and the average rate in frames per second. Decodes nothing.

    There is one time for each frame, unless some packets hold no frame. Raises `ValueError` if the video is empty,
    encrypted or cut short, as far as its container can tell.
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
        if stream.frames:  # may count dropped frames (AVI) and frames past an edit list's end, so time must agree
            spacing = (max(times) - min(times)) / max(1, len(times) - 1) if times else 0
            duration = max(stream.duration or 0, stream.frames)  # equal in AVI, but guessed if its index is cut off
            missing = min(missing, duration / (spacing or 1) - len(times))
        elif not any(source == container.format.name for _, source, _ in messages):
            missing = 0  # the demuxer saw no fault; the container's duration can be that of a longer audio track
        if missing > 0.5:
            raise ValueError(f"cut short: {len(times)} of {promised} frames are there")
        # read while the container is open: closing it frees both
        tick, rate = float(stream.time_base), float(stream.average_rate or stream.guessed_rate or 25)
    if not shown:
        raise ValueError("no frames")
    return shown if None in shown else sorted(shown), tick, rate


def plan_windows(
    clips: Sequence[Clip], ticks: list[int | None], tick: float, rate: float, sampling: Sampling
) -> list[Window]:
    """The windows of a video's clips, in the order in which decoding completes them. `ticks`, `tick` and `rate`: see
    `read_packets`.

    A frame belongs to a window if its time since the first frame is in [start, end). If the times do not rise, they are
    computed from the average rate. Only whole windows count, but a clip shorter than one is a window of its own.
    """
    rises = None not in ticks and (np.diff(ticks) > 0).all()
    times = (np.array(ticks) - ticks[0]) * tick if rises else np.arange(len(ticks)) / rate
    video_end = times[-1] + 1 / rate
    windows = []
    for clip in clips:
        start, end = clip.start or 0.0, min(clip.end or video_end, video_end)
        length, hop = sampling.window or video_end, sampling.hop or video_end
        count = 1 + max(0, math.floor((end - start - length + TIME_TOLERANCE) / hop)) if sampling.window else 1
        for index in range(count):
            begin = float(start + index * hop)
            until = float(min(begin + length, end))
            first, stop = np.searchsorted(times, [begin - TIME_TOLERANCE, until - TIME_TOLERANCE]).tolist()
            if until == video_end:
                stop = len(times)
            if first >= stop:
                indices, stop = np.array([], int), len(times)  # only the video's end shows that there is no frame
            elif sampling.fps:  # the frame that is shown at each sampled moment
                moments = begin + np.arange(sampling.num_frames) / sampling.fps + TIME_TOLERANCE
                indices = (np.searchsorted(times, moments, side="right") - 1).clip(first, stop - 1)
            else:
                indices = first + frame_indices(stop - first, sampling.num_frames, sampling.sampling)
            windows.append(Window(clip, index, count, begin, until, tuple(indices.tolist()), stop, rate))
    return sorted(windows, key=lambda window: window.stop)


# A frame as decoders yield it, in display order: its time in the container's ticks, or None; and a function, called for
# the frames that are used, that returns uint8 RGB [H, W, 3] and the pixel aspect ratio (width over height).
ShownFrame = tuple[int | None, Callable[[], tuple[np.ndarray, float]]]


@functools.cache
def make_converter(width: int, height: int, pixel_format: str, *colours: int) -> av.filter.Graph:
    """FFmpeg's own conversion to RGB, for frames that share all these values. Building it takes longer than one use."""
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=width, height=height, format=pixel_format, time_base=Fraction(1, 25))
    graph.link_nodes(source, graph.add("scale"), graph.add("format", "rgb24"), graph.add("buffersink")).configure()
    return graph


def to_rgb(frame: av.VideoFrame, aspect: float) -> tuple[np.ndarray, float]:
    """uint8 RGB [H, W, 3], as the `ffmpeg` command converts the frame, and its pixel aspect ratio (width over height).

    Uses the frame's own colour matrix and range and nothing else, then rotates and mirrors by its display matrix.
    `aspect`: the pixel aspect ratio before the rotation.
    """
    graph = make_converter(frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
    graph.vpush(frame)
    rgb = graph.vpull().to_ndarray()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return rgb, aspect
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # (x, y) is shown at (a x + c y, b x + d y)
    if abs(b) > abs(a):
        rgb, a, d, aspect = rgb.transpose(1, 0, 2), c, b, 1 / aspect
    return np.ascontiguousarray(rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]), aspect


def read_with_pyav(path: str) -> Iterator[ShownFrame]:
    """Raises `ValueError` if FFmpeg's decoder finds damage.

    Its log counts only while all packets are keyframes: after others it also reports references that were cut away and
    that no shown frame needs. If a video begins without a keyframe, errors before its first shown frame do not count.
    """
    make_converter.cache_clear()  # a converter that failed may hold a frame of another video
    num_packets, num_shown, starts_whole, all_keyframes = 0, 0, False, True
    with open_track(path) as (container, stream, messages):
        codec, ratio = stream.codec_context, stream.sample_aspect_ratio
        is_fixed = ratio != codec.sample_aspect_ratio  # the container's pixel aspect ratio beats the codec's
        aspects: dict[int | None, float] = {}  # by the packet's time: the codec's ratio can change mid-video
        for packet in container.demux(stream):
            messages.clear()
            frames, faults = [], []
            if packet.size:  # the last packet is empty and flushes the decoder
                all_keyframes &= packet.is_keyframe
                starts_whole |= not num_packets and packet.is_keyframe
                num_packets += not packet.is_discard
            try:
                frames = packet.decode()
            except av.error.FFmpegError as error:
                faults = [error.strerror]
            aspects[packet.pts] = aspect = float((ratio if is_fixed else codec.sample_aspect_ratio) or 1)
            if all_keyframes:
                faults += [text.strip() for _, source, text in messages if source == codec.codec.name]
            for frame in frames:
                if frame.is_corrupt:
                    faults.append("a corrupt frame")
                if faults:
                    break
                yield frame.pts, functools.partial(to_rgb, frame, aspects.pop(frame.pts, aspect))
                num_shown += 1
            if faults and (frames or num_shown or starts_whole):
                raise ValueError(f"damaged: {num_shown} frames are whole, then: {faults[0]}")


def read_with_decord(path: str) -> Iterator[ShownFrame]:
    import decord

    decord.logging.set_level(decord.logging.ERROR)
    # fault_tol: otherwise decord silently replaces a frame that it cannot find with a neighbour
    reader = decord.VideoReader(path, num_threads=1, fault_tol=1e-9)
    for _ in range(len(reader)):
        rgb = torch.from_dlpack(reader.next().to_dlpack()).numpy()  # without a copy
        if rgb.shape[-1] != 3:  # dmlc/decord issue 336: garbled frames of some narrow videos
            raise RuntimeError(f"a frame of shape {list(rgb.shape)} instead of [height, width, 3]")
        yield None, lambda rgb=rgb: (rgb, 1.0)


def read_with_opencv(path: str) -> Iterator[ShownFrame]:
    import cv2

    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)  # otherwise a name with % stands for numbered images
    while capture.grab():
        yield None, lambda: (cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB), 1.0)


# Tried in this order. A video that hangs or crashes PyAV is passed to the others if they can be trusted with it.
BACKENDS = {"pyav": read_with_pyav, "decord": read_with_decord, "opencv": read_with_opencv}


def check_plain(path: str, num_frames: int, backend: str) -> None:
    """Raise `RuntimeError` for videos that decord or OpenCV may read wrongly.

    They report no times, so windows are right only if the decoder finds as many frames as the container has.
    """
    with open_track(path) as (container, stream, _):
        is_odd = len(container.streams.video) > 1 or stream.sample_aspect_ratio not in (None, 1)
        frame = next(container.decode(stream))
        is_odd |= "DISPLAYMATRIX" in frame.side_data or frame.interlaced_frame
        is_odd |= frame.color_primaries >= ColorPrimaries.BT2020  # wide gamut; HDR has such primaries too
    if is_odd:
        raise RuntimeError("only for one track of square pixels, not HDR, wide gamut, display matrices or interlaced")
    num_shown = sum(1 for _ in BACKENDS[backend](path))
    if num_shown != num_frames:
        raise RuntimeError(f"{num_shown} frames, where the container has {num_frames}")


def stack_frames(window: Window, frames: list[Frames], sampling: Sampling) -> Frames | str:
    """A window's `frames`, stacked into one array per size; or the reason why there are none."""
    if window.start >= window.end:
        return f"the video ends before, at {window.end:g} s"
    if not frames:
        return f"no frame is shown from {window.start:g} to {window.end:g} s"
    return {size: np.stack([frame[size] for frame in frames]) for size in sampling.sizes}


def decode_windows(
    path: str, clips: Sequence[Clip], sampling: Sampling, backend: str = "pyav"
) -> Iterator[tuple[Window, Frames | str] | None]:
    """Decode a video. Yield each window of its clips once it is complete, with its frames or the reason why it has
    none. Now and then yield None: still at work.

    The video is read once, from its start to the end of its last window, if the decoded frames match its packets in
    number and, where windows depend on times, in time. If not, the first pass goes on to the end to find the true times
    of all frames; then the windows are planned anew and the video is read again. Raises `ValueError` or `UserError` if
    the video is at fault, any other error if the decoder is.
    """
    path = os.path.abspath(path)  # FFmpeg would take a bare name such as pipe:0 for a protocol
    if not path.isascii() and path != os.fsencode(path).decode(errors="replace"):
        raise ValueError("its name is not in UTF-8; rename it")
    planned_times, tick, rate = read_packets(path)
    if backend != "pyav":
        check_plain(path, len(planned_times), backend)
    compare_times = backend == "pyav" and (sampling.fps or sampling.window or any(c.start or c.end for c in clips))
    done, as_planned, shape = set(), False, 1.0
    while not as_planned:
        windows = plan_windows(clips, planned_times, tick, rate, sampling)
        waiting: deque[tuple[Window, list[Frames]]] = deque((window, []) for window in windows if window not in done)
        wanted: dict[int, list[list[Frames]]] = defaultdict(list)  # frame index -> the lists that take it, resized
        for window, frames in waiting:
            for index in window.frame_indices:
                wanted[index].append(frames)
        times, as_planned = [], True
        for index, (ticks, convert) in enumerate(BACKENDS[backend](path)):
            times.append(ticks)
            as_planned &= index < len(planned_times) and (not compare_times or ticks == planned_times[index])
            if index % 1000 == 999:
                yield None
            while as_planned and waiting and waiting[0][0].stop <= index:
                window, frames = waiting.popleft()
                done.add(window)
                yield replace(window, aspect=shape), stack_frames(window, frames, sampling)
            if not waiting:
                return
            if as_planned and index in wanted:
                rgb, aspect = convert()
                shape = rgb.shape[1] / rgb.shape[0] * aspect
                resized = {size: FITS[sampling.fit](rgb, size, aspect) for size in sampling.sizes}
                for frames in wanted.pop(index):
                    frames.append(resized)
        if not times:
            raise ValueError("no frames: none can be decoded")
        as_planned &= len(times) == len(planned_times)
        planned_times = times
    for window, frames in waiting:
        yield replace(window, aspect=shape), stack_frames(window, frames, sampling)


def start_decoder() -> None:
    """Set up a decoding process: it uses one core, limits its memory, and will end with its parent, even while it runs
    native code.

    A broken header can ask for any amount of memory; 4 GiB are enough for 8K frames.
    """
    torch.set_num_threads(1)
    os.nice(10)  # the model's threads go first: they wait for one another, so slowing one slows all
    if sys.platform == "linux":
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        own, unlimited = mapped + 4 * 2**30, resource.RLIM_INFINITY
        limits = [own if limit == unlimited else min(own, limit) for limit in resource.getrlimit(resource.RLIMIT_AS)]
        resource.setrlimit(resource.RLIMIT_AS, limits)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def decode_jobs(connection: Connection, sampling: Sampling) -> None:
    """The loop of a decoding process. It sends "" when it is ready for a video, then what `decode_windows` yields.

    If windows are missing and the video is at fault, it sends (None, reason). If the decoder is at fault, it sends the
    reason as a string and ends, so that the next decoder gets a fresh process.
    """
    start_decoder()
    with suppress(EOFError, ConnectionError):  # its parent is gone
        while True:
            connection.send("")
            path, clips, backend = connection.recv()
            try:
                for item in decode_windows(path, clips, sampling, backend):
                    connection.send(item)
            except ConnectionError:
                raise
            except Exception as error:  # decoders raise errors of their own kinds
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                is_the_video_s = isinstance(error, ValueError | UserError)
                connection.send((None, reason) if is_the_video_s else reason)
                if not is_the_video_s:
                    return


# A video to decode: its path, its clips, which of their windows were delivered, and why earlier decoders failed.
Task = tuple[str, list[Clip], set[Window], list[str]]


def start_process(sampling: Sampling) -> tuple[BaseProcess, Connection]:
    """Start a process of `decode_jobs`. On Linux a server that has imported what it needs forks it: imports take
    seconds, and a fork of this process would copy its threads' locks. Raises `OSError` if no process can be started."""
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload(["torch", "av", "pandas"])
    connection, theirs = context.Pipe()
    process = context.Process(target=decode_jobs, args=(theirs, sampling), daemon=True)
    process.start()
    theirs.close()
    return process, connection


def run_decoder(
    todo: deque[Task], sampling: Sampling, timeout: float, stopped: Connection
) -> Iterator[tuple[list[Clip], Window | None, Frames | str]]:
    """Let one process decode the videos in `todo`, until none is left or it fails on one. That video is left to the
    next decoder, in a fresh process. Yields a video's clips, a window, and its frames or why it has none; or, with None
    for the window, why the remaining windows are missing.

    Raises `OSError` or `EOFError` if no process starts, and once the other end of `stopped` is closed.
    """
    process, connection = start_process(sampling)

    def hear(timeout: float | None) -> Any:
        """The next message, see `decode_jobs`; or that the process died, or sent nothing for `timeout` seconds."""
        ready = wait([connection, stopped], timeout)
        if stopped in ready:
            raise EOFError("stopped")
        if not ready:
            return f"no end after {timeout:g} s (--decode_timeout)"
        with suppress(EOFError, OSError):  # it died, perhaps in the middle of a message
            return connection.recv()
        process.join(5)
        return f"the process died ({process.exitcode})"

    try:
        said = hear(None)
        if said:
            raise EOFError(said)
        while said == "":
            try:
                path, clips, delivered, failures = todo.popleft()
            except IndexError:
                return
            backend = [*BACKENDS][len(failures)]
            with suppress(ConnectionError):  # it has just died, and `hear` will say so
                connection.send((path, clips, backend))
            while not isinstance(said := hear(timeout), str):
                if said and said[0] not in delivered:  # else: still at work, or an earlier decoder delivered it
                    delivered.add(said[0])
                    yield clips, *said
        failures.append(f"{backend}: {said}")
        if len(failures) < len(BACKENDS):
            todo.appendleft((path, clips, delivered, failures))
        else:
            yield clips, None, "; ".join(failures)
    finally:
        process.kill()
        process.join(5)  # not forever: a process that waits for a dead network disk cannot be killed
        connection.close()


def decode_ahead(
    clips: Iterable[Clip], folder: Path, sampling: Sampling, num_workers: int, timeout: float
) -> Iterator[tuple[Clip, Window | None, Frames | str]]:
    """Decode videos in `folder` in processes, each video once for all of its clips, which are adjacent in `clips`.

    Yields every window of the clips with its frames, or why it has none; with None for the window, why the remaining
    windows of the clip are missing. Threads, one per process, collect the results, up to two each ahead of the caller.
    A video on which a decoder dies, or sends nothing for `timeout` seconds, is passed to the next one of `BACKENDS`.
    Raises `UserError` if no process starts.
    """
    videos = groupby(clips, lambda clip: clip.video)
    todo: deque[Task] = deque((str(folder / video), [*own], set(), []) for video, own in videos)
    left: dict[Clip, int] = {}  # windows still to come
    found: queue.SimpleQueue = queue.SimpleQueue()
    room = threading.Semaphore(2 * num_workers)
    stopped, stop = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        while todo:
            for item in run_decoder(todo, sampling, timeout, stopped):
                found.put(item)
                room.acquire()

    resource_tracker.ensure_running()  # if a thread started it, Ctrl-C would be unblocked there
    block_ctrl_c = (signal.SIG_BLOCK, [signal.SIGINT])  # Ctrl-C is for the main thread; processes inherit the block
    with ThreadPoolExecutor(num_workers, initializer=signal.pthread_sigmask, initargs=block_ctrl_c) as threads:
        workers = [threads.submit(work) for _ in range(min(num_workers, len(todo)))]
        for worker in workers:
            worker.add_done_callback(found.put)
        try:
            for _ in workers:
                while isinstance(item := found.get(), tuple):
                    room.release()
                    own, window, frames = item
                    if window:
                        left[window.clip] = left.get(window.clip, window.count) - 1
                        yield window.clip, window, frames
                    else:
                        yield from ((clip, None, frames) for clip in own if left.get(clip, 1))
                item.result()
        except (OSError, EOFError) as error:
            hint = "free memory, end other processes, lower --num_workers, or set TMPDIR to a folder of a shorter name"
            raise UserError(f"videos cannot be decoded: no process starts ({error}); {hint}") from error
        finally:
            stop.close()
            room.release(num_workers)  # each thread may be waiting with one item


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------

# Relative to the repository, not to the working directory. VideoREPA is in the repository or beside it.
DEFAULT_PATHS = {
    "video_dir": Path("../dataset/motion_top100"),
    "csv_path": Path("../dataset/motion_top100.csv"),
    "output_root": Path("../dataset/vfm_features_motion_top100"),
    "videomaev2_ckpt": Path("VideoREPA/ckpt/VideoMAEv2/vit_b_k710_dl_from_giant.pth"),
    "videomae_ckpt": Path(
        "VideoREPA/ckpt/VideoMAE/k400_videomae_pretrain_base_patch16_224_frame_16x4_tube_mask_ratio_0_9_e1600.pth"
    ),
}
# Where a size is not given, its default is rounded to a multiple of the model's patch.
DEFAULT_FRAMES = 48
DEFAULT_SIZES = {"videomae_resize_h": 160, "videomae_resize_w": 240, "dinov2_resize_h": 420, "dinov2_resize_w": 630}
RECIPES = {"videorepa": {"num_frames": 49, "sampling": "stride", "fit": "videorepa"}}


def model_and_path(text: str) -> tuple[str, Path]:
    """An argparse type: MODEL=FILE."""
    name, equals, path = text.partition("=")
    if not equals or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not MODEL=FILE")
    return model_name(name), Path(path)


def default_num_workers() -> int:
    """Half of this rank's share of the cores, at most 8: the models need the rest, and a disk cannot feed more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // 2 // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. `csv_path` is None: no captions. `num_frames` or an input size is None: the models decide it later.
    `weights`: model name -> the file that was given, or found in its default place. `settings`: the flags that features
    depend on, as their files record them; features also depend on the model's weights and input size."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    values: dict[str, Any] = {}
    deciding: list[str] = []

    def add(flag: str, default: Any, text: str, decides: bool = False, **options: Any) -> None:
        deciding.extend([flag] * decides)
        values[flag] = REPOSITORY / default if isinstance(default, Path) else default
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(f"--{flag}", help=text + shown, **options)

    count, share, switch = number(int, 1), number(float, 0.001), {"action": "store_true"}
    group = parser.add_argument_group("videos, captions and what is written")
    add("video_dir", DEFAULT_PATHS["video_dir"], "folder of videos", type=Path)
    text = "captions: a CSV with a column named caption; the default goes with the default of video_dir"
    add("csv_path", DEFAULT_PATHS["csv_path"], text, type=Path)
    add("output_root", DEFAULT_PATHS["output_root"], "features go to <output_root>/<model>/<stem>.pt", type=Path)
    add("recursive", False, "search subfolders of video_dir too; outputs mirror them", **switch)
    add("overwrite", False, "make features again that exist already", **switch)
    add("preview", False, "draw each clip and its features: <stem>.png beside its file", **switch)
    add("output_format", "pt", "of the files", choices=["pt", "safetensors"])
    dtypes = ["float32", "float16", "bfloat16"]
    add("save_dtype", "float32", "of the saved features, or latents", decides=True, choices=dtypes)

    group = parser.add_argument_group("models and weights")
    text = f"some of {', '.join(MODELS)}; timm:NAME or hf:REPO for others, or a folder in place of NAME or REPO"
    add("models", DEFAULT_MODELS, text, nargs="+", type=model_name, metavar="MODEL")
    add("list_models", False, "print what is known of each model, and end", **switch)
    text = "published weights of any model, if not the hub's"
    add("weights", None, text, nargs="+", type=model_and_path, metavar="MODEL=FILE")
    for name in DEFAULT_MODELS:
        flag = f"{name.lower()}_ckpt"
        add(flag, DEFAULT_PATHS.get(flag), f"published weights of {name}, if not the hub's", type=Path)
    add("allow_skip_missing", False, "go on without models whose weights or packages are missing", **switch)
    add("random_weights", False, "a dry run without weights: the features mean nothing", **switch)
    text = "blocks, from 1, whose outputs are stacked along C; without it the last of each model"
    add("layers", None, text, decides=True, nargs="+", type=count, metavar="N")
    add("pool", False, "save the mean over the grid: features [T, 1, 1, C]", decides=True, **switch)
    text = "of train.py: write latents to <output_root>/<model>_motion instead of features; for one model"
    add("motion_checkpoint", None, text, type=Path)

    group = parser.add_argument_group("frames")
    text = f"sampled per clip (default: {DEFAULT_FRAMES}); with fps and window as many as a window holds"
    add("num_frames", None, text, type=count)
    add("sampling", "spread", "evenly, or at the largest whole stride", decides=True, choices=["spread", "stride"])
    add("fps", None, "instead: frames sampled per second of the clip", decides=True, type=share)
    add("window", None, "cut each clip into windows of so many seconds, a file each", decides=True, type=share)
    add("hop", None, "seconds from the start of a window to the next (default: window)", decides=True, type=share)
    add("fit", "squash", "to the input size: whole, or the centre", decides=True, choices=["squash", "crop"])
    add("recipe", None, "frames and sizes exactly as VideoREPA's trainer takes them", choices=[*RECIPES])
    for flag, size in DEFAULT_SIZES.items():
        side = "height" if flag.endswith("h") else "width"
        kind = "video" if flag.startswith("videomae") else "image"
        add(flag, None, f"input {side} of {kind} models (default: {size})", type=count)

    group = parser.add_argument_group("speed and memory")
    add("device", "cuda" if torch.cuda.is_available() else "cpu", "where the models run")
    add("batch_size", 1, "clips per forward pass", type=count)
    add("dinov2_chunk", 128, "frames per forward pass of an image model", type=count)
    add("precision", "float32", "of the models' matrix products", decides=True, choices=["float32", "bfloat16"])
    add("num_workers", default_num_workers(), "processes that decode", type=count)
    add("decode_timeout", 300, "seconds that a decoder may take for a video", type=count)

    given = vars(parser.parse_args(argv))
    check_flags(given)
    args = argparse.Namespace(**values | RECIPES.get(given.get("recipe"), {}) | given)
    fill_in(args, given)
    args.settings = argparse.Namespace(**{flag: getattr(args, flag) or None for flag in deciding})
    return args


def check_flags(given: dict[str, Any]) -> None:
    """Raise `UserError` for flags that contradict each other."""
    models, layers = [*dict.fromkeys(given.get("models", DEFAULT_MODELS))], given.get("layers", [])
    if "fps" in given and "sampling" in given:
        raise UserError("argument --fps: not allowed with argument --sampling; leave one of them out")
    if "hop" in given and "window" not in given:
        raise UserError(f"--hop {given['hop']:g} is the distance of windows; give --window too")
    for flag in ("num_frames", "sampling", "fps", "fit", *DEFAULT_SIZES):
        if "recipe" in given and flag in given:
            raise UserError(f"--recipe {given['recipe']} sets --{flag}; leave one of them out")
    if "motion_checkpoint" in given and len(models) > 1:
        hint = "say with --models which one it was trained on"
        raise UserError(f"--motion_checkpoint encodes the features of one model; {hint}")
    if len(set(layers)) < len(layers):
        raise UserError(f"--layers {' '.join(map(str, layers))}: give each block once")
    for one, other in combinations(models, 2):
        if folder_name(one) == folder_name(other):
            raise UserError(f"--models: {one} and {other} would both write into {folder_name(one)}")
    for name, path in given.get("weights", []):
        if name not in models:
            raise UserError(f"--weights {name}: not one of --models")
        if f"{name.lower()}_ckpt" in given:
            raise UserError(f"--weights {name}={path} and --{name.lower()}_ckpt are one; leave one of them out")
        if not path.is_file():
            raise UserError(f"--weights {name}={path}: no such file")


def fill_in(args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Set the flags that were not `given` and that depend on other flags, or on which default files exist.

    Raises `UserError` if a file that was given does not exist.
    """
    args.models = [*dict.fromkeys(args.models)]
    args.hop = args.hop or args.window
    has_default_videos = args.video_dir.resolve() == (REPOSITORY / DEFAULT_PATHS["video_dir"]).resolve()
    args.csv_path = find_file("csv_path", given, [REPOSITORY] if has_default_videos else [])
    args.weights = dict(args.weights or [])
    for name in DEFAULT_MODELS:
        if name in args.models and name not in args.weights and not args.random_weights:
            path = find_file(f"{name.lower()}_ckpt", given, [REPOSITORY, REPOSITORY.parent])
            args.weights |= {name: path} if path else {}


def find_file(flag: str, given: dict[str, Any], folders: list[Path]) -> Path | None:
    """The given file, or the first default one in `folders`. Raises `UserError` if a given file does not exist."""
    if flag in given and not given[flag].is_file():
        raise UserError(f"--{flag} {given[flag]}: no such file")
    places = [folder / DEFAULT_PATHS[flag] for folder in folders if flag in DEFAULT_PATHS]
    return given.get(flag) or next((place for place in places if place.is_file()), None)


def folder_name(name: str) -> str:
    """The output folder's name for model `name`: `timm_a_b` for `timm:a/b`."""
    return re.sub(r"[^\w.-]+", "_", name)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class ModelRun:
    """One model's part of a run, and its results."""

    name: str
    vfm: VFM
    size: tuple[int, int]  # height and width of its input
    settings: dict[str, Any]  # all that its features depend on, except the clip; `weights` once they are loaded
    folder: Path
    suffix: str  # of its files
    autoencoder: MotionFeatureAutoencoder | None = None  # encodes the features; its latents are written instead
    vit: nn.Module | None = None  # None until it is loaded
    rows: list[dict[str, Any]] = field(default_factory=list)  # one per file or failure: see `succeed`, `fail`

    @property
    def kind(self) -> str:
        """The key of the main entry in its files."""
        return "feature" if self.autoencoder is None else "latent"

    @property
    def provenance(self) -> dict[str, Any]:
        """What its files record about the model."""
        given = {name: self.settings[name] for name in ("layers", "pool") if self.settings[name]}
        return {"model": self.name, "weights": self.settings["weights"], "license": self.vfm.license, **given}

    def path(self, clip: Clip, window: int) -> Path:
        number = f"_{window:03d}" if self.settings["window"] else ""
        return self.folder / f"{clip.video.with_suffix('')}{clip.suffix}{number}{self.suffix}"

    def clip_settings(self, clip: Clip) -> dict[str, Any]:
        """The settings that the clip's file records; a finished file is skipped if its settings are the same."""
        about = {"start": clip.start, "end": clip.end, "video": clip.video.as_posix()}
        return {**self.settings, **about, "video_fingerprint": clip.fingerprint}

    def succeed(self, clip: Clip, path: Path, data: dict, outcome: str) -> None:
        """Record what the reports say about the file `path` with entries `data`. `outcome`: "written" or "skipped"."""
        figures = {name: data[name] for name in METRICS + MOVEMENT} if self.autoencoder is not None else {}
        repeats = len(data["frame_indices"]) - len(set(data["frame_indices"]))  # frames that repeat another
        is_cut = clip.end is not None and not self.settings["window"] and clip.end - data["end"] > 1.5 / data["fps"]
        fps = self.settings["fps"]
        is_unseen = bool(fps) and data["end"] - data["start"] > (self.settings["num_frames"] + 0.5) / fps
        row = {"clip": clip, "file": path.relative_to(self.folder).as_posix(), "outcome": outcome, "failure": ""}
        about = {"repeats": repeats, "cut": is_cut, "unseen": is_unseen, "rate": data["fps"]}
        self.rows.append({**row, **about, "shape": list(data[self.kind].shape), **figures})

    def fail(self, clip: Clip, window: Window | None, reason: str) -> None:
        """Record why a clip, or with --window one of its windows, has no file."""
        span = window if window and self.settings["window"] else clip
        bounds = {"from": span.start, "to": span.end}
        told = [f"{word} {bound:g} s" for word, bound in bounds.items() if bound is not None]
        file = " ".join([clip.video.as_posix(), *told])
        self.rows.append({"clip": clip, "file": file, "outcome": "failed", "failure": reason})


def list_clips(args: argparse.Namespace) -> list[Clip]:
    """The clips of the videos, with their captions."""
    videos = list_videos(args.video_dir, args.recursive)
    if args.csv_path is None:
        say("warning: no captions: --csv_path names a CSV file that has them")
        clips = [Clip(video) for video in videos]
    else:
        try:
            clips = read_captions(args.csv_path, videos, args.video_dir)
        except UserError as error:
            raise UserError(f"--csv_path {args.csv_path}: {error}") from None
        if without := sum(not clip.caption for clip in clips):
            say(f"warning: {without} of {len(clips)} clips have no caption in {args.csv_path}")
    fingerprints = dict.fromkeys(videos, "")
    for video in tqdm(videos, "looking at videos", leave=False, delay=1):
        with suppress(UserError, OSError):  # decoding will say why
            fingerprints[video] = file_fingerprint(args.video_dir / video)
    return [replace(clip, fingerprint=fingerprints[clip.video]) for clip in clips]


def try_each(
    names: Iterable[str], attempt: Callable[[str], Any], left_out: dict[str, str], args: argparse.Namespace
) -> dict[str, Any]:
    """Call `attempt` for each model: its results by name. Models that lack a package or file are added to `left_out`.

    Rank 0 goes first, and the others find what it downloads. A model that one rank cannot run is run by none. A warning
    gives each reason. Raises `UserError` instead without `--allow_skip_missing`.
    """
    made, lacking = {}, {}
    with ranks.first_then_others():
        for name in names:
            try:
                made[name] = attempt(name)
            except (ImportError, FileNotFoundError) as error:
                package, hint = getattr(error, "name", None), "install envs/environment.vfm_feature.yaml"
                reason = f"the package {package} is missing; {hint}" if package else error
                lacking[name] = f"{name}: {reason}" + (f" (rank {ranks.index})" if ranks.index else "")
    everyone = ranks.gather(lacking)
    lacking = {name: reason for others in reversed(everyone) for name, reason in others.items()}
    with ranks.first_then_others():
        if lacking and not args.allow_skip_missing:
            raise UserError("\n  ".join(lacking.values()) + ", or skip such models with --allow_skip_missing")
        for reason in lacking.values():
            say(f"warning: {reason}")
    left_out |= lacking
    return {name: value for name, value in made.items() if name not in lacking}


def find_models(args: argparse.Namespace, left_out: dict[str, str]) -> dict[str, ModelRun]:
    """The models by name, before they are loaded. Sets `args.num_frames` if it was not given.

    Raises `UserError` where the flags or the autoencoder do not fit the models.
    """
    vfms = try_each(args.models, find_vfm, left_out, args)
    if args.num_frames is None and args.fps and args.window:
        step = math.lcm(*(vfm.tubelet_size for vfm in vfms.values()))
        tokens = math.floor(args.fps * args.window / step + 1e-3)  # in floats 100 * 0.29 < 29, and 7 * 6.85714 < 48
        args.num_frames = max(1, tokens) * step
        say(f"{args.num_frames} frames of each window: {args.window:g} s at {args.fps:g} frames a second")
    args.num_frames = args.num_frames or DEFAULT_FRAMES
    with ranks.first_then_others():
        return {name: plan_run(name, vfm, args) for name, vfm in vfms.items()}


def plan_run(name: str, vfm: VFM, args: argparse.Namespace) -> ModelRun:
    """The run of model `name`. Sizes that were not given are rounded to multiples of its patch. Latents and features go
    into different folders. Raises `UserError` where the flags or the autoencoder do not fit the model."""
    # in VideoREPA's recipe video models do not see the first frame
    num_frames = args.num_frames - 1 if args.recipe and vfm.tubelet_size > 1 else args.num_frames
    usual, taken = [], []
    for flag, value in {"num_frames": num_frames, **{flag: getattr(args, flag) for flag in vfm.size_flags}}.items():
        step = vfm.tubelet_size if flag == "num_frames" else vfm.patch_size
        usual.append(value or DEFAULT_SIZES[flag])
        taken.append(max(step, round(usual[-1] / step) * step))
        if value not in (None, taken[-1]):
            raise UserError(f"--{flag} {value}: {name} needs a multiple of {step}; try --{flag} {taken[-1]}")
    if max(args.layers or [1]) > vfm.depth:
        raise UserError(f"--layers {max(args.layers)}: {name} has {vfm.depth} blocks")
    autoencoder = args.motion_checkpoint and MotionFeatureAutoencoder.from_checkpoint(args.motion_checkpoint)
    channels = vfm.embed_dim * len(args.layers or [1])
    if autoencoder is not None and autoencoder.config["input_dim"] != channels:
        raise UserError(
            f"--motion_checkpoint {args.motion_checkpoint} was trained on features of C = "
            f"{autoencoder.config['input_dim']}, but {name}'s have {channels}; give a checkpoint that was trained on "
            "these, or another model with --models"
        )
    if taken != usual:
        patch = f"its patch of {vfm.patch_size}"
        say(f"{name}: input size {tuple(taken[1:])}, as {tuple(usual[1:])} does not divide by {patch}")
    settings = dict(zip(("num_frames", "height", "width"), taken, strict=True)) | vars(args.settings)
    if args.layers == [vfm.depth]:  # the last block, which is used without --layers too
        settings["layers"] = None
    folder = args.output_root / folder_name(name)
    if autoencoder is not None:
        settings["motion_autoencoder"] = autoencoder.identity()
        folder = folder.with_name(f"{folder.name}_motion")
    return ModelRun(name, vfm, tuple(taken[1:]), settings, folder, f".{args.output_format}", autoencoder)


def find_weights(run: ModelRun, args: argparse.Namespace) -> Path | None:
    """The path of a model's weights; None for random ones. Raises `FileNotFoundError` if they cannot be obtained."""
    return None if args.random_weights else args.weights.get(run.name) or download_weights(run.name, run.vfm)


def load_model(run: ModelRun, path: Path | None, args: argparse.Namespace) -> ModelRun:
    """Load a model onto the device. `path`: what `find_weights` found. Raises `ImportError` if a package is missing,
    `FileNotFoundError` if a folder holds no weights, and `UserError` for weights that are not the model's, an input
    size at which it gives no tokens, and an autoencoder of another model's features."""
    weights = None if path is None else read_weights(path, run.vfm)
    try:
        vit = build_vit(run.vfm, run.settings["num_frames"], run.size, weights)
    except ValueError as error:
        raise UserError(f"{path}: not the weights of {run.name}: {error}") from error
    if ":" in run.name and run.vfm.tubelet_size == 1:
        try:
            extract_features(vit, run.vfm, torch.zeros(1, 1, *run.size, 3), layers=args.layers)
        except Exception as error:  # libraries have many ways to say "not this size"
            cause = f"for each patch of {run.size[0]} x {run.size[1]} pixels: {first_line(error)}"
            raise UserError(f"{run.name} gives no token {cause}; try another size, or another model") from error
    if path:
        say(f"{run.name}: weights {vit.weights_hash} from {path}, licence {run.vfm.license}")
    run.vit, run.settings["weights"] = vit.to(args.device), vit.weights_hash
    if run.autoencoder is not None:
        run.autoencoder.to(args.device).check_provenance(provenance(run.provenance))
    return run


def read_finished(
    run: ModelRun, clip: Clip, window: int, args: argparse.Namespace
) -> tuple[dict | None, dict[str, tuple[Any, Any]]]:
    """What the file of an earlier or parallel run holds, with its tensors left on disk, and {}. If it was made with
    other settings: None, and each changed setting's old and new value. If it is absent or unreadable: None and {}."""
    try:
        saved = None if args.overwrite else load_checked(run.path(clip, window), mmap=True, check=False)
    except (UserError, OSError):  # absent, or damaged: then it is made again
        saved = None
    made_with, wanted = saved.get("settings") if isinstance(saved, dict) else None, run.clip_settings(clip)
    if not isinstance(made_with, dict) or not isinstance(saved.get(run.kind), torch.Tensor):
        return None, {}
    pairs = {name: (made_with.get(name), wanted.get(name)) for name in {**wanted, **made_with}}
    changes = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    return None if changes else saved, changes


def keep_finished(run: ModelRun, clip: Clip, window: int, saved: dict) -> None:
    """Record a finished file as skipped, and update its caption if a CSV names the video."""
    path = run.path(clip, window)
    is_renewed = clip.caption not in (None, saved.get("caption"))
    if is_renewed:
        save_atomically({**saved, "caption": clip.caption}, path)
    run.succeed(clip, path, saved, "skipped")
    run.rows[-1]["renewed"] = is_renewed


def plan(runs: list[ModelRun], clips: list[Clip], args: argparse.Namespace) -> dict[Clip, list[str]]:
    """The clips to be done, each with the names of the models that still need it. Finished files are kept; a warning
    counts the clips that were made with other settings.

    A clip's first file records how many windows the clip has. If any file is missing, all are checked while decoding.
    """
    todo: dict[Clip, list[str]] = {}
    replaced: Counter[tuple[str, ...]] = Counter()
    for clip in tqdm(clips, "looking for finished features", leave=False, delay=1):
        for run in runs:
            first, changes = read_finished(run, clip, 0, args)
            if changes.get("weights", ("", ""))[1] == "random":
                hint = "give the dry run another --output_root, or --overwrite to lose what is there"
                raise UserError(f"{run.path(clip, 0)} was made with weights; {hint}")
            told = []
            for name, (was, now) in changes.items():
                if was != "random":
                    of_clip = f"another {name.removesuffix('_fingerprint')}"
                    told.append(f"{name} {was} -> {now}" if name in run.settings else of_clip)
            if told:
                replaced[run.name, ", ".join(dict.fromkeys(told))] += 1
            others = range(1, first["windows"]) if first else ()
            files = [first, *(read_finished(run, clip, window, args)[0] for window in others)]
            if None in files:
                todo.setdefault(clip, []).append(run.name)
                continue
            for window, saved in enumerate(files):
                keep_finished(run, clip, window, saved)
    for (name, told), count in replaced.items():
        say(f"warning: {name}: {count} clips that were made with other settings are made again: {told}")
    return todo


def forward(run: ModelRun, clips: list[np.ndarray], args: argparse.Namespace) -> torch.Tensor:
    """Clips uint8 or float16 [T, H, W, 3] -> features float32 [len(clips), T/t, H/p, W/p, C], on the device; with
    --pool [len(clips), T/t, 1, 1, C].

    In VideoREPA's recipe an image model's 1 + 48 frames become 1 + 12 time steps, like the latents of CogVideoX.
    """
    batch = torch.from_numpy(np.stack(clips))
    if args.device.type == "cuda":
        batch = batch.pin_memory()  # otherwise the copy waits for the previous forward pass
    batch = batch.to(args.device, non_blocking=True)
    precision = getattr(torch, args.precision)
    features = extract_features(run.vit, run.vfm, batch, args.dinov2_chunk, precision, args.layers)
    if args.recipe and run.vfm.tubelet_size == 1:
        fours = features[:, 1:].unflatten(1, (-1, 4)).mean(dim=2)  # [B, 12, H/p, W/p, C]
        features = torch.cat([features[:, :1], fours], dim=1)
    return features.mean(dim=(2, 3), keepdim=True) if args.pool else features


def save_feature(
    run: ModelRun, clip: Clip, window: Window, feature: torch.Tensor, frames: np.ndarray, preview: bool
) -> None:
    """Write a window's preview and its file, with the feature [T, H, W, C] or its latent. `run` records success or the
    reason for failure. Raises `OSError`, but a file name that the disk does not accept is only this clip's failure."""
    path, dtype = run.path(clip, window.index), run.settings["save_dtype"]
    try:
        data = {"feature": feature} if run.autoencoder is None else encode_clip(run.autoencoder, feature)
        # cloned: a view into the batch would be saved with the whole batch
        data[run.kind] = data[run.kind].to(getattr(torch, dtype)).cpu().clone()
        if not torch.isfinite(data[run.kind]).all():
            raise UserError(f"{run.name} gave NaN or infinity in {dtype}")
        data |= {"caption": clip.caption or "", "video": clip.video.as_posix(), **run.provenance}
        data |= {"settings": run.clip_settings(clip), "frame_indices": list(window.frame_indices[-len(frames) :])}
        data |= {"fps": window.fps, "start": window.start, "end": window.end, "windows": window.count}
        if preview:
            pictures = frames.round().clip(0, 255).astype(np.uint8)
            write_preview(path, feature.cpu(), data.get("latent"), pictures, data)
        elif is_preview(path.with_suffix(".png")):  # the preview of the file that is replaced
            path.with_suffix(".png").unlink()
        save_atomically(data, path)
    except UserError as error:
        run.fail(clip, window, str(error))
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ):
            raise
        run.fail(clip, window, f"no file can be named {path.stem}: {error.strerror}; rename the video")
    else:
        run.succeed(clip, path, data, "written")


def extract(runs: list[ModelRun], todo: dict[Clip, list[str]], args: argparse.Namespace) -> None:
    """Run every model on the clips that it still needs, and record failures.

    Decoding runs ahead in processes. Writing runs one batch behind in a thread, so that the GPU does not wait for it.
    """
    tell = functools.cache(say)  # each message once
    flags = {entry.name: getattr(args, entry.name) for entry in fields(Sampling) if entry.name != "sizes"}
    sampling = Sampling(sizes=tuple(sorted({run.size for run in runs})), **flags)
    with (
        tqdm(total=len(todo), unit="clip", disable=ranks.index > 0 or not todo) as bar,
        ThreadPoolExecutor(max_workers=1) as writer,
        closing(decode_ahead(todo, args.video_dir, sampling, args.num_workers, args.decode_timeout)) as decoded,
    ):
        writes: list[Future] = []
        while batch := list(islice(decoded, args.batch_size)):
            earlier_writes, writes = writes, []
            for run in runs:
                good = []
                for clip, window, frames in batch:
                    if run.name not in todo[clip]:
                        continue
                    if isinstance(frames, str):
                        run.fail(clip, window, frames)
                    elif saved := read_finished(run, clip, window.index, args)[0]:
                        keep_finished(run, clip, window.index, saved)
                    else:
                        good.append((clip, window, frames[run.size][-run.settings["num_frames"] :]))
                        height, width = run.size
                        if args.fit == "squash" and not 1 / 1.1 < window.aspect * height / width < 1.1:
                            tell(f"{run.name}: clips not shaped {width} : {height} are squashed; --fit crop keeps it")
                if good:
                    features = forward(run, [frames for *_, frames in good], args)
                    for (clip, window, frames), feature in zip(good, features, strict=True):
                        writes.append(writer.submit(save_feature, run, clip, window, feature, frames, args.preview))
            for _, window, _ in batch:
                bar.total += window.count - 1 if window and window.index == 0 else 0
                bar.update(1)
            for write in earlier_writes:
                write.result()
        for write in writes:
            write.result()


def write_reports(runs: list[ModelRun], output_root: Path) -> None:
    """Write `vfm_dimensions.txt`, and each model's `failed_videos.txt` and `encode_report.csv`."""
    dimensions = ""
    for run in runs:
        failures = [(row["file"], row["failure"]) for row in run.rows if row["failure"]]
        lines = ["\t".join(" ".join(text.split()) for text in failure) + "\n" for failure in sorted(failures)]
        if lines:
            save_atomically("".join(lines), run.folder / "failed_videos.txt")
        else:
            (run.folder / "failed_videos.txt").unlink(missing_ok=True)
        if run.autoencoder is not None:
            write_encode_report(run.rows, run.folder, run.autoencoder)
        if shapes := [row["shape"] for row in run.rows if not row["failure"]]:
            dimensions += f"{run.name}: {run.kind} shape {shapes[0]}, C = {shapes[0][-1]}\n"
    if dimensions:
        save_atomically(dimensions, output_root / "vfm_dimensions.txt")


def shown(path: Path) -> str:
    """`path` as it is, or relative to the working directory, whichever is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


def print_results(runs: list[ModelRun], left_out: Iterable[str], num_clips: int, preview: bool) -> None:
    """Print the results of each model: a table, then what the files themselves do not show, then the failures."""
    table = {}
    for run in runs:
        made = [row for row in run.rows if not row["failure"]]
        files = find_latents(run.folder)
        table[run.name] = {
            **{key: sum(row["outcome"] == key for row in run.rows) for key in ("written", "skipped", "failed")},
            run.kind: str(made[0]["shape"] if made else "-"),
            "dtype": run.settings["save_dtype"],
            "MB": round(sum(path.stat().st_size for path in files) / 1e6, 1),
            "folder": shown(run.folder),
        }
        if others := len({*files} - {run.folder / row["file"] for row in made}):
            say(f"{shown(run.folder)} also holds {others} files of other clips, windows, settings or formats")
    if table:
        print(f"\n{pd.DataFrame.from_dict(table, orient='index').to_string()}")
    for run in runs:
        repeating = [row for row in run.rows if row.get("repeats")]
        if repeating:
            worst = max(repeating, key=lambda row: row["repeats"])
            count, step = run.settings["num_frames"], run.vfm.tubelet_size
            fewer = max(step, (count - worst["repeats"]) // step * step)
            example = f"{worst['repeats']} of the {count} of {worst['file']}"
            if run.settings["fit"] != "videorepa":
                is_fast = (run.settings["fps"] or 0) > worst["rate"]
                example += f"; {'a lower --fps' if is_fast else f'--num_frames {fewer}'} avoids it"
            print(f"{run.name}: {len(repeating)} clips show fewer frames than asked, and some repeat: {example}")
        if cut := [row["file"] for row in run.rows if row.get("cut")]:
            print(f"{run.name}: {len(cut)} parts were to end after their videos, and end with them, such as {cut[0]}")
        if unseen := [row["file"] for row in run.rows if row.get("unseen")]:
            seen = f"{run.settings['num_frames'] / run.settings['fps']:g}"
            hint = f"--window {seen} makes files of the rest too"
            print(f"{run.name}: of {len(unseen)} clips only the first {seen} s are seen, such as {unseen[0]}; {hint}")
        if renewed := sum(row.get("renewed", False) for row in run.rows):
            print(f"{run.name}: {renewed} of the skipped files have another caption now")
        if run.autoencoder is not None:
            print_summary(run.rows, run.autoencoder)
        if preview and any(row["outcome"] == "skipped" for row in run.rows):
            print(f"{run.name}: --preview drew what was written now; --overwrite makes and draws the skipped files too")
        if unsettled := num_clips - len({row["clip"] for row in run.rows}):
            print(f"{run.name}: {unsettled} of {num_clips} clips have no result yet; the same command goes on")
    for reason in left_out:
        print(f"not run: {reason}")
    if any(run.settings["weights"] == "random" for run in runs):
        print("--random_weights: a dry run; these features mean NOTHING")
    for run in runs:
        if failed := sum(row["outcome"] == "failed" for row in run.rows):
            print(f"{run.name}: {failed} failed; {shown(run.folder / 'failed_videos.txt')} says why")


def main() -> int:
    ranks.join()
    args = ranks.from_first(parse_args)
    if args.list_models:
        print(describe_models())
        return 0
    with ranks.first_then_others():
        args.device = ranks.open_device(args.device)
    left_out: dict[str, str] = {}  # models, and why
    models = find_models(args, left_out)
    clips = ranks.from_first(lambda: list_clips(args))  # machines may see different files on a network disk
    with ranks.first_then_others():
        for run in models.values():
            make_folder(run.folder, "--output_root")
    if args.random_weights:
        say("warning: --random_weights: a dry run; the features will mean NOTHING")
    # all weights are looked for before the first model is loaded, which can take minutes
    paths = try_each(models, lambda name: find_weights(models[name], args), left_out, args)
    runs = [*try_each(paths, lambda name: load_model(models[name], paths[name], args), left_out, args).values()]
    todo = ranks.from_first(lambda: plan(runs, clips, args))
    videos = {*[*dict.fromkeys(clip.video for clip in todo)][ranks.index :: ranks.count]}  # each is decoded by one rank
    try:
        extract(runs, {clip: names for clip, names in todo.items() if clip.video in videos}, args)
        for run in runs:
            run.rows = [row for rows in ranks.gather(run.rows) for row in rows]
    finally:
        if ranks.index == 0 and (runs or left_out):
            write_reports(runs, args.output_root)
            print_results(runs, left_out.values(), len(clips), args.preview)
    is_fruitful = any(row["outcome"] != "failed" for run in runs for row in run.rows)
    return 0 if is_fruitful or ranks.index > 0 else 1


if __name__ == "__main__":
    run_script(main)
