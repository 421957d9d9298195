"""Compress features to latents with a trained motion autoencoder.

In: a checkpoint of train.py, and one feature file (.pt, .pth, .npy) or a folder of them.
Out: a dict that `torch.load` reads, of `latent` [T, N, D] or [T, H, W, D], `motion_embedding` [T, D],
`compression_ratio`, and the input's `caption`, `video` and `model` where it had them. A folder's files are mirrored.

    python encode.py --checkpoint checkpoints/motion_ae_epoch10.pt --input features/0000.pt --output latents/0000.pt
    python encode.py --checkpoint checkpoints/motion_ae_epoch10.pt --input features --output latents
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from model import (
    FEATURE_SUFFIXES,
    ArgumentParser,
    MotionFeatureAutoencoder,
    UserError,
    find_features,
    load_feature,
    open_device,
    run_script,
    save_atomically,
)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a motion_ae_epoch*.pt of train.py")
    parser.add_argument("--input", type=Path, required=True, help="a feature file, or a folder, searched recursively")
    parser.add_argument("--output", type=Path, required=True, help="the file to write; a folder, if --input is one")
    parser.add_argument("--save_reconstruction", action="store_true", help="keep the reconstructed feature too")
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


def plan(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """(feature file, latent file) pairs. A folder is mirrored, each file's suffix becoming .pt.

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
        return [(source, target)]
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {target} is a file, but --input is a folder; give a folder")
    pairs = [(path, target / path.relative_to(source).with_suffix(".pt")) for path in find_features(source)]
    writers: dict[Path, Path] = {}
    for path, output in pairs:
        if output in writers:
            raise UserError(f"{writers[output]} and {path} would both write {output}; rename one")
        writers[output] = path
    return pairs


def encode_file(
    model: MotionFeatureAutoencoder, path: Path, device: torch.device, save_reconstruction: bool
) -> dict[str, Any]:
    """The output dict of one feature file, on the CPU."""
    feature, metadata = load_feature(path, model.config["input_dim"])
    x = feature.to(device).float()[None]  # [1, T, ..., C]
    latent = model.encode(x)
    result = {
        "latent": latent[0].cpu(),
        "motion_embedding": model.embed(latent)[0].cpu(),
        "compression_ratio": model.compression_ratio,
        **metadata,
    }
    if save_reconstruction:
        result["reconstruction"] = model.decode(latent)[0].cpu()
    return result


@torch.inference_mode()
def main() -> int:
    args = parse_args()
    device = open_device(args.device)
    model = MotionFeatureAutoencoder.from_checkpoint(args.checkpoint).to(device)
    check_flags(args, model.config)
    pairs = plan(args.input, args.output)

    failures: list[str] = []
    for path, output in tqdm(pairs, unit="file", disable=None if len(pairs) > 1 else True):
        try:
            result = encode_file(model, path, device, args.save_reconstruction)
        except UserError as error:
            if len(pairs) == 1:
                raise
            failures.append(str(error))
            continue
        try:
            save_atomically(result, output)
        except OSError as error:
            raise UserError(f"{output} cannot be written: {error.strerror or error}") from None
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    written = len(pairs) - len(failures)
    shape = f"latent {list(result['latent'].shape)}, " if len(pairs) == 1 else f"{written} of {len(pairs)} files, "
    print(f"{shape}compression_ratio {model.compression_ratio:g}, written to {args.output}")
    return 0 if written else 1


if __name__ == "__main__":
    run_script(main)
