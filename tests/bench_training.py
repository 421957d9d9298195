"""How fast training, encoding and reading are: python tests/bench_training.py FEATURE_DIR

Of the features given, as they are, compressed to a quarter; run it on an idle machine. `--only ROW...` prints some of
the rows. Where there is a GPU, models run there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from bench_extraction import family, proportional_size, show
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from encode import encode_clip  # noqa: E402
from model import load_checked, load_feature, save_atomically  # noqa: E402


def seconds(function: Callable[[], object], times: int = 5) -> float:
    """Of the fastest of so many calls."""
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        spent.append(time.perf_counter() - start)
    return min(spent)


def settings(feature_dir: Path) -> tuple[argparse.Namespace, train.Clips]:
    """train.py's flags for the features in `feature_dir`, and its clips."""
    files = train.look_at_files(feature_dir, None)
    channels = files[0].channels
    sizes = ["--input_dim", str(channels), "--latent_dim", str(channels // 4)]
    args = train.parse_args(["--feature_dir", str(feature_dir), "--use_token", *sizes])
    return args, train.Clips(files)


def row_loop(feature_dir: Path) -> None:
    """An epoch, which reads each file again, against the same batches at hand."""
    args, clips = settings(feature_dir)
    parts = clips.batches(args.batch_size, args.seed, epoch=1)
    model = train.start_model(args, clips, None)
    optimizer = torch.optim.AdamW(model.network.parameters())

    def epoch(batches: Iterable[Tensor], count: int) -> None:
        train.train_epoch(model, model.network, optimizer, batches, [1e-4] * count, args)

    at_hand = list(clips.read_batches(parts, args.num_workers, args.device))
    epoch(at_hand[:2], 2)  # warms up
    alone = seconds(lambda: epoch(at_hand, len(at_hand)), 1)
    read = seconds(lambda: epoch(clips.read_batches(parts, args.num_workers, args.device), len(at_hand)), 1)
    show(f"an epoch of batches at hand ({alone:.1f} s) / of files", alone / read, ">= 0.85")


def run_train(feature_dir: Path, *flags: str) -> tuple[dict, float, float]:
    """The last checkpoint of a run as a user starts it, its seconds and its peak memory in GB (Linux)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), "--feature_dir", str(feature_dir), "--use_token"]
        start, peak = time.perf_counter(), 0
        process = subprocess.Popen([*command, "--save_dir", folder, *flags], stdout=subprocess.DEVNULL)
        while process.poll() is None:
            peak = max(peak, sum(proportional_size(pid) for pid in family(process.pid)))
            time.sleep(0.2)
        if process.returncode:  # train.py has said why
            raise SystemExit(process.returncode)
        return load_checked(Path(folder) / "motion_ae_last.pt"), time.perf_counter() - start, peak / 1e6


def row_defaults(feature_dir: Path) -> None:
    _, spent, memory = run_train(feature_dir)
    show("train.py at its defaults: minutes", spent / 60, "<= 4 for 42 clips, 2 cores")
    show("its peak memory, GB", memory, "")


def row_precision(feature_dir: Path) -> None:
    full, low = (run_train(feature_dir, "--epochs=2", f"--precision={name}")[0] for name in ("float32", "bfloat16"))
    spent = [sum(row["seconds"] for row in checkpoint["history"][1:]) for checkpoint in (full, low)]
    show("float32 / bfloat16: seconds of an epoch, measuring included", spent[0] / spent[1], "")
    ratio = low["history"][-1]["val_loss"] / full["history"][-1]["val_loss"]
    show("bfloat16 / float32: held-out loss at the end", ratio, "0.99 to 1.01")


@torch.inference_mode()
def row_encode(feature_dir: Path) -> None:
    """encode.py's work on the first clip, on one core, with networks that run and with a model at rest."""
    args, clips = settings(feature_dir)
    model, clip = train.start_model(args, clips, None), clips.read(0).float()
    torch.set_num_threads(1)
    spent = {}
    for model.network.at_rest in (False, True):
        spent[model.network.at_rest] = seconds(lambda: model.encode(clip[None]))
    product = seconds(lambda: clip @ model.code.basis)
    show(f"encoding {list(clip.shape)} with the network: seconds", spent[False], "<= 1.0 for [24, 10, 15, 768]")
    show("the same at epoch 0, whose network is not run", spent[True], "")
    show("the latter / one product with the basis", spent[True] / product, "")
    whole = seconds(lambda: encode_clip(model, clip), 2)
    show("with its errors and motion embedding, at epoch 0: seconds", whole, "")


def row_formats(feature_dir: Path) -> None:
    """The same features as .pt and as .safetensors, from the system's cache."""
    paths = train.find_features(feature_dir)[:60]
    with tempfile.TemporaryDirectory() as folder:
        copies: dict[str, list[Path]] = {".pt": [], ".safetensors": []}
        for path in paths:
            feature, metadata = load_feature(path)
            for suffix, files in copies.items():
                files.append(Path(folder) / f"{len(files)}{suffix}")
                save_atomically({"feature": feature, **metadata}, files[-1])
        whole, part, size = {}, {}, {}
        for suffix, files in copies.items():
            whole[suffix] = seconds(lambda files=files: [load_feature(path) for path in files]) / len(files)
            part[suffix] = seconds(
                lambda files=files: [load_feature(path, mmap=True, check=False)[0][:2].sum() for path in files]
            ) / len(files)
            size[suffix] = sum(path.stat().st_size for path in files) / len(files)
    show(".pt: megabytes a file", size[".pt"] / 1e6, "")
    show(".safetensors / .pt: size", size[".safetensors"] / size[".pt"], "")
    show(".pt: milliseconds to read and check a file", whole[".pt"] * 1e3, "")
    show(".safetensors: the same, without a checksum", whole[".safetensors"] * 1e3, "")
    show(".pt: milliseconds to read two time steps", part[".pt"] * 1e3, "")
    show(".safetensors: the same", part[".safetensors"] * 1e3, "")


ROWS = {name.removeprefix("row_"): row for name, row in list(globals().items()) if name.startswith("row_")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("feature_dir", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    args = parser.parse_args()
    for name in args.only:
        ROWS[name](args.feature_dir)


if __name__ == "__main__":
    main()
