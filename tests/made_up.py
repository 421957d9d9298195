"""Made-up features, and the scripts run on them as a user runs them."""

import json
import re
import resource
import signal
import subprocess
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import vfm_feature

ROOT = Path(__file__).resolve().parents[1]
# vfm_feature.py without weights, on clips of two tubelets and six patches
SMALL = ["--random_weights", "--num_frames", "4", "--videomae_resize_h", "32", "--videomae_resize_w", "48"]
SMALL += ["--dinov2_resize_h", "28", "--dinov2_resize_w", "42", "--num_workers", "1"]
SIZES = ["--input_dim", "12", "--model_dim", "16", "--latent_dim", "6", "--num_heads", "2", "--num_layers", "1"]

TABLES = ("cls_token", "pos_embed", "register_tokens", "storage_tokens", "class_embedding", "positional_embedding")
TABLES += ("video_mod_embed", "img_mod_embed")


def filled(name, shape):
    """The rule by which the weights of the reference figures are filled: normal numbers seeded by the parameter's name.

    Matrices are scaled by their inputs' number, vectors by 0.1, the gains of norms and layer scales around 1, tokens
    and learned positions by 0.5.
    """
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name in TABLES:
        normal *= 0.5
    elif len(shape) > 1:
        normal /= np.float32(np.sqrt(np.prod(shape[1:])))
    elif name.endswith("gamma") or re.search(r"(norm|ln)[^.]*\.weight$", name):
        normal = 1 + np.float32(0.1) * normal
    else:
        normal *= np.float32(0.1)
    return torch.from_numpy(normal)


def layer(name, shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def published_shapes(model, spec):
    """The encoder in the authors' names, with the parts that are of no use here; SigLIP 2's in timm's names."""
    dim, p = spec.embed_dim, spec.patch_size
    wide = 4304 if model == "SigLIP2-So400m" else int(dim * spec.mlp_ratio)
    if model.startswith("SigLIP"):
        import timm

        with torch.device("meta"):
            state = timm.create_model(spec.timm, num_classes=0).state_dict()
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        assert shapes["blocks.0.mlp.fc1.weight"] == (wide, dim)
        return shapes
    if model.startswith("PE"):
        shapes = {"class_embedding": (dim,), "positional_embedding": (1 + 32 * 32, dim), "conv1.weight": (dim, 3, p, p)}
        shapes |= layer("ln_pre", (dim,))
        for i in range(spec.depth):
            block = f"transformer.resblocks.{i}"
            shapes |= {f"{block}.attn.in_proj_weight": (3 * dim, dim), f"{block}.attn.in_proj_bias": (3 * dim,)}
            shapes |= layer(f"{block}.attn.out_proj", (dim, dim)) | layer(f"{block}.ln_1", (dim,))
            shapes |= layer(f"{block}.mlp.c_fc", (wide, dim)) | layer(f"{block}.mlp.c_proj", (dim, wide))
            shapes |= layer(f"{block}.ln_2", (dim,))
        return shapes
    is_dino, is_dino_3 = model.startswith("DINO"), model.startswith("DINOv3")
    shapes = layer("patch_embed.proj", (dim, 3, p, p) if is_dino else (dim, 3, 2, p, p))
    if is_dino:
        shapes |= layer("norm", (dim,)) | {"cls_token": (1, 1, dim), "mask_token": (1, dim)}
        shapes |= {} if is_dino_3 else {"pos_embed": (1, 1 + 37 * 37, dim)}
        shapes |= {"register_tokens": (1, 4, dim)} if model.endswith("reg") else {}
        shapes |= {"storage_tokens": (1, 4, dim), "rope_embed.periods": (16,)} if is_dino_3 else {}
    if model.startswith("VJEPA2.1"):
        shapes |= {"video_mod_embed": (1, 1, dim), "img_mod_embed": (1, 1, dim)} | layer("norms_block.3", (dim,))
        shapes |= layer("patch_embed_img.proj", (dim, 3, 1, p, p))
    for i in range(spec.depth):
        block = f"blocks.{i}"
        shapes |= layer(f"{block}.norm1", (dim,)) | layer(f"{block}.norm2", (dim,))
        shapes |= layer(f"{block}.attn.qkv", (3 * dim, dim)) | layer(f"{block}.attn.proj", (dim, dim))
        if model.startswith("DINOv2-g"):
            shapes |= layer(f"{block}.mlp.w12", (8192, dim)) | layer(f"{block}.mlp.w3", (dim, 4096))
        elif model.endswith("+"):
            shapes |= layer(f"{block}.mlp.w1", (wide, dim)) | layer(f"{block}.mlp.w2", (wide, dim))
            shapes |= layer(f"{block}.mlp.w3", (dim, wide))
        else:
            shapes |= layer(f"{block}.mlp.fc1", (wide, dim)) | layer(f"{block}.mlp.fc2", (dim, wide))
        if model.startswith("VideoMAE"):
            del shapes[f"{block}.attn.qkv.bias"]
            shapes |= {f"{block}.attn.q_bias": (dim,), f"{block}.attn.v_bias": (dim,)}
        if is_dino:
            shapes |= {f"{block}.ls1.gamma": (dim,), f"{block}.ls2.gamma": (dim,)}
        if is_dino_3:
            shapes |= {f"{block}.attn.qkv.bias_mask": (3 * dim,)}
    return shapes


def published_state(model, spec):
    state = {name: filled(name, shape) for name, shape in published_shapes(model, spec).items()}
    if model.startswith("DINOv3"):  # as published
        state |= {name: torch.zeros_like(value) for name, value in state.items() if name.endswith("qkv.bias")}
    return state


def pattern_clip(frames, height, width):
    """The clip of the reference figures: uint8 [1, frames, height, width, 3] by a formula."""
    t, y, x, c = np.ogrid[:frames, :height, :width, :3]
    return torch.from_numpy(((3 * t + 2 * y + x + 80 * c + (t * y * x) // 97) % 256).astype(np.uint8))[None]


def decode_clip(path, num_frames, sizes, backend="pyav", **sampling):
    """A whole video as one clip, decoded in this process: {(height, width): RGB [num_frames, height, width, 3]}.
    `sampling`: `sampling`, `fps`, `fit` of `Sampling`."""
    sampling = vfm_feature.Sampling(num_frames, tuple(sizes), **sampling)
    found = vfm_feature.decode_windows(str(path), [vfm_feature.Clip(Path(path))], sampling, backend)
    ((_, frames),) = filter(None, found)
    return frames


def timm_folder(folder, name, **arguments):
    """A folder as timm saves it, but without weights, of its model `name` made with `arguments`."""
    import timm

    about = {key: value for key, value in timm.get_pretrained_cfg(name).to_dict().items() if key != "hf_hub_id"}
    config = {"architecture": name.split(".")[0], "model_args": arguments, "pretrained_cfg": about}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def counts(result):
    """[written, skipped, failed] of VideoMAE or VideoMAEv2 in the table that vfm_feature.py ends with."""
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith(("VideoMAE ", "VideoMAEv2 ")))
    return [int(number) for number in line.split()[1:4]]


def hear_ctrl_c():
    """Called in a process before it starts: a runner in the background has its children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(script, *arguments, cwd=ROOT):
    """The script as a user runs it."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments), "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


@contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def make_features(folder, count=12, shape=(6, 2, 3, 12), seed=0):
    """Clips of a slowly moving low-rank signal with noise, in every suffix and dtype that is read."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(5, shape[-1], generator=generator)
    for index in range(count):
        walk = torch.randn(*shape[:-1], 5, generator=generator).cumsum(0) * 0.3
        walk = walk + torch.randn(1, *shape[1:-1], 5, generator=generator)
        x = walk @ basis + 0.1 * torch.randn(shape, generator=generator)
        if index % 4 == 3:
            np.save(folder / f"{index:04d}.npy", x.numpy())
        else:
            data = {
                "feature": x.half() if index % 2 else x,
                "caption": f"clip {index}",
                "video": f"{index}.mp4",
                "model": "VideoMAEv2",
            }
            torch.save(data, folder / f"{index:04d}.pt")
    return folder


def save(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        np.save(path, data) if path.suffix == ".npy" else torch.save(data, path)
    return path
