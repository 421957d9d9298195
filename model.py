"""The motion autoencoder, and what the three scripts share: one-line errors, whole files, safe loading."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

FEATURE_SUFFIXES = (".pt", ".pth", ".npy")


# ---------------------------------------------------------------------------------------------------------------------
# What the scripts share
# ---------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can mend. Its text is the one line they read: what is wrong, and what to do about it."""


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose errors are one line, as all errors here, and whose help shows every default."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def run_script(main: Callable[[], int]) -> None:
    """Run a script's `main` and exit with its status; a `UserError` becomes one line on standard error and status 2."""
    name = Path(sys.argv[0]).name
    try:
        status = main()
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        status = 2
    except OSError as error:  # a full disk, a folder that vanished
        print(f"{name}: error: {error}; finished files are whole", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print(f"{name}: stopped by the user; finished files are whole", file=sys.stderr)
        status = 130
    sys.exit(status)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that is at `path` whole or not at all: written beside it, then renamed onto it.

    Raises `OSError` when the disk is full or the folder cannot be written; the half-written file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.stem[:50]}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the bytes do
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_atomically(data: dict[str, Any], path: Path) -> None:
    """`torch.save` into a `whole_file`."""
    with whole_file(path) as file:
        torch.save(data, file)


def find_features(folder: Path) -> list[Path]:
    """Every feature file below `folder`, sorted; hidden files and folders (half-written files among them) are left out.

    Raises `UserError` when `folder` is no folder or holds no feature file.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder that holds the features")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in FEATURE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not paths:
        raise UserError(f"{folder} holds no {', '.join(FEATURE_SUFFIXES)} file; run vfm_feature.py first")
    return paths


def load_checked(path: Path, mmap: bool = False) -> Any:
    """`torch.load` on the CPU that never runs code from the file. `mmap` leaves tensors on disk.

    Raises `UserError` when the file is absent, damaged, or holds more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # damaged files raise almost anything
        if mmap:  # files of torch < 1.6 cannot be mapped
            return load_checked(path)
        if "weights_only" in str(error):
            raise UserError(f"{path} holds objects that only unsafe loading could read; save plain tensors") from None
        raise UserError(f"{path} is damaged or no torch file ({type(error).__name__}); make it again") from None


def load_feature(path: Path, input_dim: int | None = None, mmap: bool = False) -> tuple[Tensor, dict[str, str]]:
    """One feature file and its `caption`, `video` and `model`, where it has them.

    The file holds a tensor, an array (.npy), or a dict, read by `feature`, else `features`, else its first key.

    Returns the feature [T, N, C] or [T, H, W, C] in the dtype that it was stored in. With `mmap` the numbers stay on
    disk, and are not looked at. Raises `UserError` that names the file: not readable, wrong rank, `C != input_dim`,
    not floating point, NaN or infinity.
    """
    metadata: dict[str, str] = {}
    if path.suffix.lower() == ".npy":
        try:
            data = np.load(path, mmap_mode="c" if mmap else None, allow_pickle=False)
            feature = torch.from_numpy(data if data.dtype.isnative else data.astype(data.dtype.newbyteorder("=")))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist") from None
        except Exception as error:  # damaged, an archive, Python objects, text
            raise UserError(
                f"{path} is damaged or no array of numbers ({type(error).__name__}); save it with numpy.save"
            ) from None
    else:
        feature = load_checked(path, mmap)
        if isinstance(feature, dict):
            metadata = {key: feature[key] for key in ("caption", "video", "model") if isinstance(feature.get(key), str)}
            key = next((key for key in ("feature", "features") if key in feature), next(iter(feature), None))
            feature = feature.get(key)
    if not isinstance(feature, Tensor) or feature.layout != torch.strided or feature.is_meta or feature.is_quantized:
        raise UserError(f"{path} holds no feature tensor; it holds {type(feature).__name__}")
    if feature.ndim not in (3, 4) or feature.numel() == 0:
        raise UserError(f"{path}: shape {list(feature.shape)}, but a feature is [T, N, C] or [T, H, W, C], not empty")
    if not feature.is_floating_point():
        raise UserError(f"{path}: dtype {feature.dtype}, but a feature is floating point")
    if input_dim is not None and feature.shape[-1] != input_dim:
        raise UserError(f"{path}: C is {feature.shape[-1]}, but --input_dim is {input_dim}; give --input_dim C")
    if not mmap and not feature.isfinite().all():
        raise UserError(f"{path} holds NaN or infinity; make it again in float32, or take it out")
    return feature.detach(), metadata


# ---------------------------------------------------------------------------------------------------------------------
# The motion autoencoder
# ---------------------------------------------------------------------------------------------------------------------


def frame_differences(x: Tensor) -> Tensor:
    """`delta[:, t] = x[:, t] - x[:, t - 1]` and `delta[:, 0] = 0`, for x [B, T, ...]; same shape."""
    return torch.cat([torch.zeros_like(x[:, :1]), x.diff(dim=1)], dim=1)


def time_positions(length: int, dim: int, like: Tensor) -> Tensor:
    """Sinusoidal positions [length, dim] ("Attention Is All You Need"): without them attention sees a bag of frames."""
    frequency = torch.exp(torch.arange(0, dim, 2, device=like.device) * (-np.log(10000.0) / dim))
    angle = torch.arange(length, device=like.device)[:, None] * frequency  # [length, ceil(dim / 2)]
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :dim].to(like.dtype)


class TemporalNetwork(nn.Module):
    """Temporal convolution, then temporal transformer: [S, T, in_dim] -> [S, T, out_dim], S independent sequences.

    The last layer starts at zero, so that a network on top of a linear path starts as that path.
    """

    def __init__(
        self, in_dim: int, model_dim: int, out_dim: int, num_heads: int, num_layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_dim, model_dim, kernel_size=3, padding=1, padding_mode="replicate")
        layer = nn.TransformerEncoderLayer(
            model_dim, num_heads, 4 * model_dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(model_dim), enable_nested_tensor=False)
        self.head = nn.Linear(model_dim, out_dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.gelu(self.conv(x.mT)).mT  # [S, T, in_dim] -> [S, T, model_dim]
        h = h + time_positions(h.shape[1], h.shape[2], h)
        return self.head(self.transformer(h))


def to_sequences(x: Tensor) -> Tensor:
    """[B, T, N, C] or [B, T, H, W, C] -> [B * N, T, C]: each spatial position is a sequence of its own."""
    return x.flatten(2, -2).transpose(1, 2).flatten(0, 1)


def from_sequences(sequences: Tensor, like: Tensor) -> Tensor:
    """[B * N, T, D] -> the layout of `like` ([B, T, N, ...] or [B, T, H, W, ...]) with D channels."""
    batch, length = like.shape[:2]
    return sequences.unflatten(0, (batch, -1)).transpose(1, 2).reshape(batch, length, *like.shape[2:-1], -1)


class MotionFeatureEncoder(nn.Module):
    """Features -> latent, over time for each spatial position.

    forward: x [B, T, N, C] or [B, T, H, W, C], any T >= 1 -> latent of the same layout with `latent_dim` channels.
    """

    def __init__(
        self,
        input_dim: int = 768,
        model_dim: int = 384,
        latent_dim: int = 192,
        num_heads: int = 8,
        num_layers: int = 2,
        dropout: float = 0.1,
        use_token: bool = False,
    ) -> None:
        super().__init__()
        self.use_token = use_token
        in_dim = 2 * input_dim if use_token else input_dim
        self.register_buffer("mean", torch.zeros(input_dim))
        self.register_buffer("scale", torch.ones(()))
        self.linear = nn.Linear(in_dim, latent_dim, bias=False)
        self.network = TemporalNetwork(in_dim, model_dim, latent_dim, num_heads, num_layers, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.scale
        delta = frame_differences(x)
        tokens = to_sequences(torch.cat([x, delta], dim=-1) if self.use_token else delta)  # [B * N, T, C or 2C]
        return from_sequences(self.linear(tokens) + self.network(tokens), like=x)


class MotionFeatureDecoder(nn.Module):
    """Latent -> features: latent [B, T, N, D] or [B, T, H, W, D] -> the same layout with `input_dim` channels."""

    def __init__(
        self,
        input_dim: int = 768,
        model_dim: int = 384,
        latent_dim: int = 192,
        num_heads: int = 8,
        num_layers: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(input_dim))
        self.register_buffer("scale", torch.ones(()))
        self.linear = nn.Linear(latent_dim, input_dim, bias=False)
        self.network = TemporalNetwork(latent_dim, model_dim, input_dim, num_heads, num_layers, dropout)

    def forward(self, latent: Tensor) -> Tensor:
        z = to_sequences(latent)
        return from_sequences(self.linear(z) + self.network(z), like=latent) * self.scale + self.mean


class MotionFeatureAutoencoder(nn.Module):
    """Compress features C -> latent_dim at every time step and position, and back.

    forward: x [B, T, N, C] or [B, T, H, W, C] -> dict of
    `latent` (the same layout, latent_dim channels), `reconstruction` (the shape of x),
    `motion_embedding` [B, T, latent_dim].

    With `use_token` the encoder sees `[x, delta_x]`; without it `delta_x` alone, so that what stands still is not in
    the latent.
    """

    def __init__(
        self,
        input_dim: int = 768,
        model_dim: int = 384,
        latent_dim: int = 192,
        num_heads: int = 8,
        num_layers: int = 2,
        dropout: float = 0.1,
        use_token: bool = False,
    ) -> None:
        super().__init__()
        if model_dim % num_heads:
            raise UserError(f"--model_dim {model_dim} does not divide by --num_heads {num_heads}; change one of them")
        if latent_dim > input_dim:
            raise UserError(f"--latent_dim {latent_dim} is above --input_dim {input_dim}: that would not compress")
        self.config = {
            "input_dim": input_dim,
            "model_dim": model_dim,
            "latent_dim": latent_dim,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "dropout": dropout,
            "use_token": use_token,
        }
        sizes = (input_dim, model_dim, latent_dim, num_heads, num_layers, dropout)
        self.encoder = MotionFeatureEncoder(*sizes, use_token)
        self.decoder = MotionFeatureDecoder(*sizes)

    @property
    def compression_ratio(self) -> float:
        return self.config["latent_dim"] / self.config["input_dim"]

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> MotionFeatureAutoencoder:
        """The model that train.py wrote to `path`, on the CPU, in eval mode, its parameters frozen.

        Raises `UserError` when the file is absent, unreadable or no checkpoint of train.py.
        """
        checkpoint = load_checked(Path(path))
        try:
            model = cls(**checkpoint["config"])
            model.load_state_dict(checkpoint["model"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            raise UserError(f"{path} is not a checkpoint of train.py; give one of its motion_ae_epoch*.pt") from None
        return model.eval().requires_grad_(False)

    def encode(self, x: Tensor) -> Tensor:
        """x [B, T, N, C] or [B, T, H, W, C] -> latent, differentiable in x."""
        return self.encoder(x)

    def decode(self, latent: Tensor) -> Tensor:
        """latent -> reconstruction of x."""
        return self.decoder(latent)

    def embed(self, latent: Tensor) -> Tensor:
        """latent -> motion embedding [B, T, latent_dim]."""
        return latent.flatten(2, -2).mean(dim=2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        latent = self.encode(x)
        return {"latent": latent, "reconstruction": self.decode(latent), "motion_embedding": self.embed(latent)}
