"""How fast train.py is, as ratios in one run: python tests/bench_training.py FEATURE_DIR

Trains on the features given, as they are; run it on an idle machine. `--only ROW...` prints some of the rows. The last
row needs a GPU and takes random features of DINOv2's size.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from bench_extraction import family, proportional_size, show
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from model import load_feature  # noqa: E402


def settings(feature_dir: Path, *flags: str) -> argparse.Namespace:
    """train.py's flags for the features in `feature_dir`, compressed to a quarter."""
    channels = load_feature(next(path for path in sorted(feature_dir.iterdir()) if path.suffix == ".pt"))[0].shape[-1]
    sizes = ["--input_dim", str(channels), "--latent_dim", str(channels // 4)]
    return train.parse_args(["--feature_dir", str(feature_dir), *sizes, "--use_token", *flags])


class Loop:
    """train.py's model, optimizer and loader of training clips, for `epochs` epochs."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.args, self.clips = args, train.Clips(*train.look_at_files(args.feature_dir, args.input_dim))
        order = train.EqualShapeBatches(self.clips, args.batch_size, args.seed)
        self.loader = train.make_loader(self.clips, order, args)
        self.model = train.start_model(args, self.clips, None)
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def batches(self) -> Iterable[Tensor]:
        return train.training_batches(self.loader, self.args.device)

    def run(self, clips: Iterable[Tensor], count: int) -> float:
        """Tokens per second of an epoch of `count` batches."""
        tokens = 0

        def counted() -> Iterable[Tensor]:
            nonlocal tokens
            for x in clips:
                tokens += x[..., 0].numel()
                yield x

        start = time.perf_counter()
        train.train_epoch(self.model, train.Training(self.model), self.optimizer, counted(), [1e-4] * count, self.args)
        return tokens / (time.perf_counter() - start)


def row_loop(feature_dir: Path) -> None:
    """The loop, which reads each file again in each epoch, against the same batches at hand."""
    loop = Loop(settings(feature_dir, "--device", "cpu"))
    at_hand = list(loop.batches())
    loop.run(at_hand[:2], 2)  # warms up
    alone = loop.run(at_hand, len(at_hand))
    read = loop.run(loop.batches(), len(at_hand))
    show(f"tokens/s of the loop / batches at hand ({alone:.0f})", read / alone, ">= 0.85")


def run_train(args: argparse.Namespace, *flags: str) -> tuple[dict, float]:
    """The last checkpoint of a run of two epochs as a user starts it, and its peak memory in GB (Linux)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), "--feature_dir", str(args.feature_dir), "--use_token"]
        command += ["--input_dim", str(args.input_dim), "--latent_dim", str(args.latent_dim), "--epochs", "2"]
        process = subprocess.Popen(
            [*command, "--save_dir", folder, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, sum(proportional_size(pid) for pid in family(process.pid)))
            time.sleep(0.2)
        return torch.load(Path(folder) / "motion_ae_epoch2.pt", weights_only=True), peak / 1e6


def row_precision(feature_dir: Path) -> None:
    args = settings(feature_dir)
    full, memory = run_train(args)
    low, _ = run_train(args, "--precision", "bfloat16")
    seconds = [sum(row["seconds"] for row in checkpoint["history"]) for checkpoint in (full, low)]
    show("float32 / bfloat16: seconds of an epoch, measuring included", seconds[0] / seconds[1], ">= 1.4")
    ratio = low["history"][-1]["val_loss"] / full["history"][-1]["val_loss"]
    show("bfloat16 / float32: held-out loss at the end", ratio, "0.99 to 1.01")
    show("peak memory, GB", memory, "")


def row_gpu(feature_dir: Path) -> None:
    """Clips per second against a plain loop: float32, attention written out, one whole clip at a time."""
    folder = Path(tempfile.mkdtemp())
    try:
        for index in range(32):
            torch.save(torch.randn(48, 30, 45, 768, dtype=torch.float16), folder / f"{index}.pt")
        args = settings(folder, "--device", "cuda", "--precision", "bfloat16")
        loop = Loop(args)
        count = len(loop.loader)
        loop.run(loop.batches(), count)
        start = time.perf_counter()
        loop.run(loop.batches(), count)
        ours = len(loop.clips) / (time.perf_counter() - start)

        loop.args = settings(folder, "--device", "cuda")
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            start = time.perf_counter()
            for path in sorted(folder.iterdir())[:8]:
                loop.run([load_feature(path)[0][None].to("cuda").float()], 1)
            theirs = 8 / (time.perf_counter() - start)
        show(f"GPU, DINOv2's size: clips/s / those of a plain loop ({theirs:.1f})", ours / theirs, ">= 3")
    finally:
        shutil.rmtree(folder)


ROWS = {name.removeprefix("row_"): row for name, row in list(globals().items()) if name.startswith("row_")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("feature_dir", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    args = parser.parse_args()
    for name in args.only:
        if name != "gpu" or torch.cuda.is_available():
            ROWS[name](args.feature_dir)


if __name__ == "__main__":
    main()
