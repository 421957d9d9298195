"""How fast vfm_feature.py is, as ratios to the plain way and to the machine's limit: python tests/bench_extraction.py

Draws its own 1080p clips (H.264, 150 frames) and uses random weights, neither of which changes the time. Run it on an
idle machine; on 2 cores it takes about 25 minutes. `--only ROW...` prints some of the rows. The last one needs a GPU.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing.pool
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import av
import cv2
import numpy as np
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from made_up import decode_clip  # noqa: E402

import vfm_feature as vfm  # noqa: E402
from model import ranks  # noqa: E402

HEIGHT, WIDTH, NUM_AVAILABLE = 1080, 1920, 150


def draw_hd_clip(path: Path) -> None:
    """A smooth texture that slides under the camera."""
    coarse = np.random.default_rng(0).integers(0, 255, (135, 240, 3), dtype=np.uint8)
    texture = cv2.resize(coarse, (WIDTH + 300, HEIGHT + 50), interpolation=cv2.INTER_CUBIC)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "fast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(NUM_AVAILABLE):
            frame = np.ascontiguousarray(texture[i // 3 : i // 3 + HEIGHT, 2 * i : 2 * i + WIDTH])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def folder_of(clip: Path, count: int) -> Path:
    """`count` files of the same clip; the page cache holds it, so that no disk is measured."""
    folder = clip.parent / f"clips_{count}"
    folder.mkdir(exist_ok=True)
    for i in range(count):
        target = folder / f"{i:04d}.mp4"
        if not target.exists():
            os.link(clip, target)
    return folder


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def ratio(above: Callable[[], float], below: Callable[[], float], repeats: int = 5) -> float:
    """The median of above() / below(), measured in turn: a machine's speed changes from minute to minute."""
    above(), below()  # warms up
    return median(above() / below() for _ in range(repeats))


def gemm_peak() -> float:
    """FLOP/s of a large float32 matrix product."""
    a, b = torch.randn(4096, 4096), torch.randn(4096, 4096)
    return 6 * 2 * 4096**3 / seconds(lambda: [a @ b for _ in range(6)])


def model_and_clip(name: str, num_frames: int = 48, device: str = "cpu") -> tuple[torch.nn.Module, torch.Tensor]:
    """The model with random weights, and one clip of its input size, uint8 [1, T, H, W, 3]."""
    size = (420, 630) if name == "DINOv2" else (160, 240)
    vit = vfm.build_vit(vfm.find_vfm(name), num_frames, size).to(device)
    return vit, torch.randint(0, 255, (1, num_frames, *size, 3), dtype=torch.uint8, device=device)


def flops(name: str, frames: int = 48) -> float:
    """Of one clip: 24 N C^2 for the matrices of a block and 4 N^2 C for its attention, over N tokens."""
    spec = vfm.find_vfm(name)
    tokens, passes = (30 * 45 + 1, frames) if name == "DINOv2" else (frames // 2 * 10 * 15, 1)
    return passes * spec.depth * (24 * tokens * spec.embed_dim**2 + 4 * tokens**2 * spec.embed_dim)


def extraction_seconds(folder: Path, models: list[str], num_frames: int, *flags: str) -> float:
    """Seconds of the run over a folder, loading of the models left out."""
    with tempfile.TemporaryDirectory() as out:
        command = ["--video_dir", str(folder), "--models", *models, "--num_frames", str(num_frames), *flags]
        args = vfm.parse_args([*command, "--random_weights", "--output_root", out])
        args.device = ranks.open_device(args.device)
        runs = [vfm.load_model(run, vfm.find_weights(run, args), args) for run in vfm.find_models(args, {}).values()]
        todo = vfm.plan(runs, vfm.list_clips(args), args)
        start = time.perf_counter()
        vfm.extract(runs, todo, args)
        return time.perf_counter() - start


def seconds_per_clip(clip: Path, few: int, many: int, *arguments) -> float:
    """What one more clip costs, the start of the decoding processes left out."""
    less = extraction_seconds(folder_of(clip, few), *arguments)
    return (extraction_seconds(folder_of(clip, many), *arguments) - less) / (many - few)


def row_end_to_end(clip: Path) -> None:
    for num_frames, few, many, goal in [(16, 2, 22, 1.15), (48, 1, 5, 1.08)]:
        vit, pixels = model_and_clip("VideoMAEv2", num_frames)
        forward = functools.partial(vfm.extract_features, vit, vfm.find_vfm("VideoMAEv2"), pixels)
        whole = functools.partial(seconds_per_clip, clip, few, many, ["VideoMAEv2"], num_frames)
        value = ratio(whole, lambda: seconds(lambda: [forward() for _ in range(3)]) / 3, 3)  # noqa: B023
        show(f"VideoMAEv2, {num_frames} frames: end to end / model alone", value, f"<= {goal}")


def read_plainly(clip: str) -> float:
    """Processor seconds of the way without thought: 48 frames to float at full size, then bicubic."""
    import decord

    torch.set_num_threads(1)
    start = time.process_time()
    frames = decord.VideoReader(clip, num_threads=1).get_batch(vfm.frame_indices(NUM_AVAILABLE, 48)).asnumpy()
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    F.interpolate(video, size=(160, 240), mode="bicubic", antialias=True)
    return time.process_time() - start


def decoding_seconds(clip: str, sizes: list[tuple[int, int]]) -> float:
    """Processor seconds of decoding and resizing 48 frames, as a decoding process does it."""
    return seconds(lambda: decode_clip(clip, 48, sizes), time.process_time)


def in_process(start: Callable[[], None] | None = None) -> multiprocessing.pool.Pool:
    return multiprocessing.get_context("spawn").Pool(1, start)


def row_decode(clip: Path) -> None:
    with in_process() as plain, in_process(vfm.start_decoder) as ours:
        value = ratio(
            lambda: plain.apply(read_plainly, (str(clip),)),
            lambda: ours.apply(decoding_seconds, (str(clip), [(160, 240)])),
        )
    show("decode and resize, 48 frames: plain way / ours, one thread", value, ">= 5")


def row_flops(clip: Path) -> None:
    for name in vfm.DEFAULT_MODELS:
        spec = vfm.find_vfm(name)
        frames = 8 if name == "DINOv2" else 48
        vit, pixels = model_and_clip(name, frames)
        value = ratio(
            lambda: flops(name, frames) / seconds(lambda: vfm.extract_features(vit, spec, pixels)),  # noqa: B023
            gemm_peak,
            3,
        )
        show(f"{name}: FLOP/s / those of a large matrix product ({gemm_peak() / 1e9:.0f} GFLOP/s)", value, ">= 0.85")


def row_ranks(clip: Path) -> None:
    def clips_per_second(ranks: int) -> float:
        """From the first feature on the disk to the last."""
        with tempfile.TemporaryDirectory() as out:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            command = [sys.executable, *launcher, str(ROOT / "vfm_feature.py"), "--video_dir", str(folder_of(clip, 8))]
            command += ["--models", "VideoMAEv2", "--random_weights", "--output_root", out]
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            times = sorted(path.stat().st_mtime for path in Path(out).rglob("*.pt"))
            return (len(times) - ranks) / (times[-1] - times[ranks - 1])

    value = clips_per_second(2) / clips_per_second(1)
    show("two ranks / one rank, one thread each: clips/s", value, ">= 1.8")


def row_memory(clip: Path) -> None:
    def peak_gigabytes(count: int) -> float:
        """Of the process and its children, shared pages counted once (Linux)."""
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, str(ROOT / "vfm_feature.py"), "--video_dir", str(folder_of(clip, count))]
            command += ["--models", "VideoMAE", "--num_frames", "16", "--random_weights", "--output_root", out]
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            peak = 0
            while process.poll() is None:
                peak = max(peak, sum(proportional_size(pid) for pid in family(process.pid)))
                time.sleep(0.2)
            return peak / 1e6

    few, many = peak_gigabytes(8), peak_gigabytes(64)
    show(f"peak memory, 64 clips ({many:.2f} GB) / 8 clips ({few:.2f} GB)", many / few, "<= 1.1")


def family(pid: int) -> list[int]:
    members, found = [pid], 0
    while found < len(members):
        for task in Path(f"/proc/{members[found]}/task").glob("*/children"):
            try:
                members += [int(child) for child in task.read_text().split()]
            except OSError:
                continue
        found += 1
    return members


def proportional_size(pid: int) -> int:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has just ended
        return 0
    return int(rollup.split("\nPss:")[1].split()[0]) if "\nPss:" in rollup else 0


def row_gpu(clip: Path) -> None:
    for name, spec in (("DINOv2", vfm.find_vfm("DINOv2")), ("VideoMAEv2", vfm.find_vfm("VideoMAEv2"))):
        vit, pixels = model_and_clip(name, device="cuda")
        forward = functools.partial(vfm.extract_features, vit, spec, pixels)
        value = ratio(
            lambda: seconds(lambda: [forward() for _ in range(10)]) / 10,  # noqa: B023
            lambda: seconds_per_clip(clip, 32, 128, [name], 48),  # noqa: B023
            3,
        )
        show(f"GPU, {name}: clips/s end to end / model alone", value, ">= 0.9")


ROWS = {name.removeprefix("row_"): row for name, row in list(globals().items()) if name.startswith("row_")}


def show(what: str, value: float, goal: str) -> None:
    print(f"{what:<72}{value:>8.2f}  {goal}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    wanted = parser.parse_args().only
    folder = Path(tempfile.mkdtemp())
    try:
        draw_hd_clip(folder / "hd.mp4")
        for name in wanted:
            if name == "gpu" and not torch.cuda.is_available():
                continue
            ROWS[name](folder / "hd.mp4")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
