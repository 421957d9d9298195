"""What becomes of broken input: python tests/bench_faults.py [--seed N] [--mutations N]

Makes a corpus of videos with FFmpeg (codecs, depths, colours, cut by copying, hidden frames, mirrors, interlaced, cut
short, bit rot, no videos at all), decodes each as vfm_feature.py does, and compares it with what went in, or with what
FFmpeg's own command shows: every video must be right or recorded with a reason. Then mutates feature and checkpoint
files and loads them: each loads or raises the loader's own error. Prints counts, and the exceptions to these rules.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import model  # noqa: E402
import vfm_feature as vfm  # noqa: E402

NUM_FRAMES, HEIGHT, WIDTH = 40, 120, 160
TOLERANCE = 5  # levels, on average over a frame: lossy coding and subsampled colours cost less, one frame off more
H264 = ["-c:v", "libx264", "-crf", "10"]
HEVC = ["-c:v", "libx265", "-crf", "10", "-x265-params", "log-level=none"]
VP9 = ["-c:v", "libvpx-vp9", "-b:v", "4M"]
AV1 = ["-c:v", "libsvtav1", "-crf", "10"]
OPEN = "open-gop=1:keyint=10:min-keyint=10:scenecut=0"


def colours(matrix: str, primaries: str, transfer: str, colour_range: str = "tv") -> list[str]:
    """Convert the pixels to these colours, and say so in the file."""
    convert = f"scale=out_color_matrix={matrix.removesuffix('nc')}:out_range={colour_range}"
    tags = f"setparams=colorspace={matrix}:color_primaries={primaries}:color_trc={transfer}:range={colour_range}"
    return ["-vf", f"{convert},{tags}"]


BT601 = colours("smpte170m", "smpte170m", "smpte170m")
BT709 = colours("bt709", "bt709", "bt709")
PQ = colours("bt2020nc", "bt2020", "smpte2084")
HLG = colours("bt2020nc", "bt2020", "arib-std-b67")
P3 = colours("bt709", "smpte432", "bt709")
WHOLE = {  # file name -> FFmpeg's options
    "h264.mp4": [*H264, "-pix_fmt", "yuv420p"],
    "h264_444.mp4": [*H264, "-pix_fmt", "yuv444p"],
    "h264_422.mov": [*H264, "-pix_fmt", "yuv422p"],
    "h264_10bit.mp4": [*H264, "-pix_fmt", "yuv420p10le"],
    "h264_b_frames.mkv": [*H264, "-pix_fmt", "yuv420p", "-bf", "3", "-g", "12"],
    "h264_faststart.mp4": [*H264, "-pix_fmt", "yuv420p", "-movflags", "faststart"],
    "h264_fragments.mp4": [*H264, "-pix_fmt", "yuv420p", "-movflags", "frag_keyframe+empty_moov", "-g", "10"],
    "h264_stream.mpg": [*H264, "-pix_fmt", "yuv420p", "-f", "mpegts"],
    "h264_full_range.mp4": [*H264, "-pix_fmt", "yuvj420p"],
    "h264_bt601.mp4": [*H264, "-pix_fmt", "yuv420p", *BT601],
    "h264_bt709.mp4": [*H264, "-pix_fmt", "yuv420p", *BT709],
    "h264_bt709_full.mp4": [*H264, "-pix_fmt", "yuv420p", *colours("bt709", "bt709", "bt709", "pc")],
    "h264_10bit_bt709.mp4": [*H264, "-pix_fmt", "yuv420p10le", *BT709],
    "h264_pq.mp4": [*H264, "-pix_fmt", "yuv420p10le", *PQ],
    "h264_slow_then_fast.mp4": [
        *(*H264, "-pix_fmt", "yuv420p", "-fps_mode", "passthrough"),
        *("-vf", "setpts=if(lt(N\\,20)\\,N\\,20+(N-20)*7)/20/TB"),
    ],
    "h264.m4v": [*H264, "-pix_fmt", "yuv420p"],
    "hevc.mp4": [*HEVC, "-pix_fmt", "yuv420p"],
    "hevc_10bit.mkv": [*HEVC, "-pix_fmt", "yuv420p10le"],
    "hevc_444.mp4": [*HEVC, "-pix_fmt", "yuv444p"],
    "hevc_444_bt709.mp4": [*HEVC, "-pix_fmt", "yuv444p", *BT709],
    "hevc_pq.mp4": [*HEVC, "-pix_fmt", "yuv420p10le", *PQ],
    "hevc_p3.mp4": [*HEVC, "-pix_fmt", "yuv420p10le", *P3],
    "hevc_hlg.mov": [*HEVC, "-pix_fmt", "yuv420p10le", *HLG],
    "vp8.webm": ["-c:v", "libvpx", "-b:v", "4M"],
    "vp9.webm": VP9,
    "vp9_444.mkv": [*VP9, "-pix_fmt", "yuv444p"],
    "vp9_10bit.webm": [*VP9, "-pix_fmt", "yuv420p10le"],
    "vp9_full_range.webm": [*VP9, "-pix_fmt", "yuv420p", *colours("smpte170m", "smpte170m", "smpte170m", "pc")],
    "vp9_hlg.webm": [*VP9, "-pix_fmt", "yuv420p10le", *HLG],
    "av1.mp4": AV1,
    "av1.webm": AV1,
    "av1_10bit.mp4": [*AV1, "-pix_fmt", "yuv420p10le"],
    "av1_pq.mp4": [*AV1, "-pix_fmt", "yuv420p10le", *PQ],
    "mpeg4.avi": ["-c:v", "mpeg4", "-q:v", "2"],
    "mpeg4.mp4": ["-c:v", "mpeg4", "-q:v", "2"],
    "mjpeg.avi": ["-c:v", "mjpeg", "-q:v", "2"],
    "mjpeg.mov": ["-c:v", "mjpeg", "-q:v", "2"],
    "mpeg2.mpg": ["-c:v", "mpeg2video", "-q:v", "2"],
    "wmv2.wmv": ["-c:v", "wmv2", "-q:v", "2"],
    "prores.mov": ["-c:v", "prores_ks"],
    # several keyframes, open groups of pictures, frames that are not shown
    "h264_keys.avi": [*H264, "-pix_fmt", "yuv420p", "-g", "10"],
    "h264_keys.mp4": [*H264, "-pix_fmt", "yuv420p", "-g", "10", "-x264-params", "open-gop=1:bframes=3"],
    "h264_baseline.mp4": [*H264, "-pix_fmt", "yuv420p", "-profile:v", "baseline", "-x264-params", f"{OPEN}:ref=4"],
    "h264_open.mp4": [*H264, "-pix_fmt", "yuv420p", "-x264-params", f"{OPEN}:bframes=3"],
    "h264_refresh.mp4": [*H264, "-pix_fmt", "yuv420p", "-x264-params", "intra-refresh=1:keyint=10:bframes=0"],
    "hevc_open.mp4": ["-c:v", "libx265", "-crf", "10", "-x265-params", f"log-level=none:{OPEN}:bframes=3"],
    "vp8_hidden.webm": ["-c:v", "libvpx", "-b:v", "4M", "-auto-alt-ref", "1", "-lag-in-frames", "16"],
    "vp9_hidden.webm": [*VP9, "-g", "10", "-auto-alt-ref", "1", "-lag-in-frames", "16"],
    "hevc_keys.mkv": [*HEVC, "-pix_fmt", "yuv420p", "-g", "10"],
    "h264_keys.mpg": [*H264, "-pix_fmt", "yuv420p", "-g", "10", "-f", "mpegts"],
    "hevc_keys.mpg": [*HEVC, "-pix_fmt", "yuv420p", "-g", "10", "-f", "mpegts"],
    "hevc_keys.mp4": [*HEVC, "-pix_fmt", "yuv420p", "-g", "10"],
    "vp9_keys.webm": [*VP9, "-g", "10"],
    "av1_keys.mp4": [*AV1, "-g", "10"],
    "mpeg4_b_frames.mp4": ["-c:v", "mpeg4", "-q:v", "2", "-g", "10", "-bf", "2"],
    "mpeg4_b_frames.avi": ["-c:v", "mpeg4", "-q:v", "2", "-g", "10", "-bf", "2"],
    "mpeg2_interlaced.mpg": ["-vf", "setfield=tff", "-c:v", "mpeg2video", "-q:v", "2", "-flags", "+ildct+ilme"],
    "h264_interlaced.mkv": [*H264, "-pix_fmt", "yuv420p", "-x264-params", "tff=1"],
    "mpeg2_b_frames.mkv": ["-c:v", "mpeg2video", "-q:v", "2", "-g", "10", "-bf", "2"],
}
CUT_IN = ["-ss", "0.9"]
COPIED = {  # file name -> options before its source, the source, and options behind it: the streams are copied
    **{f"rotated_{degrees}.mp4": (["-display_rotation", str(degrees)], "h264.mp4", []) for degrees in (90, 180, 270)},
    "mirrored.mp4": (["-display_hflip"], "h264.mp4", []),
    "upside_down.mp4": (["-display_vflip"], "h264.mp4", []),
    "turned_and_mirrored.mov": (["-display_rotation", "90", "-display_hflip"], "h264.mp4", []),
    "copied.mp4": (CUT_IN, "h264_keys.mp4", []),
    "copied_end.mp4": (CUT_IN, "h264_keys.mp4", ["-t", "0.5"]),
    "copied_baseline.mp4": (CUT_IN, "h264_baseline.mp4", []),
    "copied_open.mp4": (CUT_IN, "h264_open.mp4", []),
    "copied_open.mkv": (CUT_IN, "h264_open.mp4", []),
    "copied_refresh.mkv": (CUT_IN, "h264_refresh.mp4", []),
    "copied_hevc.mov": (CUT_IN, "hevc_open.mp4", []),
    "copied_hevc.mkv": (CUT_IN, "hevc_open.mp4", []),
    "copied_vp9.mp4": (CUT_IN, "vp9_hidden.webm", []),
    "copied_mpeg2.mpg": (CUT_IN, "mpeg2_b_frames.mkv", []),
    "negative.mkv": (CUT_IN, "h264_keys.mp4", ["-avoid_negative_ts", "disabled"]),
    "negative_hevc.mkv": (CUT_IN, "hevc_open.mp4", ["-avoid_negative_ts", "disabled"]),
    "keyless.mkv": (CUT_IN, "h264_keys.mpg", ["-copyinkf"]),
    "keyless_hevc.mp4": (CUT_IN, "hevc_keys.mpg", ["-copyinkf"]),
    "from_avi.mp4": (["-fflags", "+genpts"], "h264_keys.avi", []),
    "from_avi_mpeg4.mp4": ([], "mpeg4_b_frames.avi", []),
    "hidden_packets.webm": ([], "vp9_hidden.webm", ["-bsf:v", "vp9_superframe_split"]),
    "late.mp4": (["-itsoffset", "2"], "h264_b_frames.mkv", []),
}
ODD_SIZES = ((119, 157), (121, 96), (64, 200))  # 96 columns are what decord garbles
CUT = [
    "h264.mp4",
    "h264_faststart.mp4",
    "h264_fragments.mp4",
    "h264_b_frames.mkv",
    "vp9.webm",
    "mpeg4.avi",
    "mjpeg.avi",
]
ROTTEN = ["h264.mp4", "h264_b_frames.mkv", "hevc.mp4", "mpeg4.avi", "mjpeg.avi", "vp8.webm", "vp9.webm", "av1.mp4"]


def ffmpeg(*arguments: str | Path, frames: np.ndarray | None = None) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", *map(str, arguments)]
    quiet = {**os.environ, "SVT_LOG": "1"}
    subprocess.run(command, input=None if frames is None else frames.tobytes(), check=True, env=quiet)


def encode(frames: np.ndarray, path: Path, options: list[str]) -> None:
    height, width = frames.shape[1:3]
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "25", "-i", "-"]
    ffmpeg(*raw, *options, path, frames=np.ascontiguousarray(frames))


def draw(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 [NUM_FRAMES, height, width, 3]: smooth, so that coding costs little, with another blue in each frame."""
    y, x = np.mgrid[:height, :width]
    blue = np.linspace(20, 240, NUM_FRAMES)
    red, green = 40 + 120 * x / width, 60 + 100 * y / height
    return np.stack([np.stack([red, green, np.full_like(red, b)], axis=-1) for b in blue]).astype(np.uint8)


def shown_by_ffmpeg(path: Path) -> np.ndarray:
    """The frames that FFmpeg's own command shows, uint8 [T, H, W, 3]."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-an", "-fps_mode", "passthrough"]
    command += ["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    data, frames = subprocess.run(command, check=True, capture_output=True).stdout, []
    while data:
        _, size, _, data = data.split(b"\n", 3)  # P6, width and height, 255, pixels
        width, height = map(int, size.split())
        frames.append(np.frombuffer(data[: width * height * 3], np.uint8).reshape(height, width, 3))
        data = data[width * height * 3 :]
    return np.stack(frames)


def make_corpus(folder: Path, seed: int, cuts: int = 10, rotten: int = 100) -> dict[str, np.ndarray | None]:
    """Write the corpus, with `cuts` of each video that is cut short and `rotten` with flipped bits. Returns what each
    file shows, uint8 [T, H, W, 3], or None where it is no video."""
    frames = draw()
    shows: dict[str, np.ndarray | None] = {}
    for name, options in WHOLE.items():
        encode(frames, folder / name, options)
        shows[name] = frames
    for name, (before, source, behind) in COPIED.items():
        ffmpeg(*before, "-i", folder / source, "-c", "copy", *behind, folder / name)
        shows[name] = shown_by_ffmpeg(folder / name)
    for height, width in ODD_SIZES:
        name = f"size_{height}x{width}.mp4"
        shows[name] = draw(height, width)
        encode(shows[name], folder / name, [*H264, "-pix_fmt", "yuv444p"])
    tracks = ["-i", folder / "size_64x200.mp4", "-i", folder / "hevc.mp4", "-map", "0", "-map", "1", "-c", "copy"]
    ffmpeg(*tracks, "-disposition:v:0", "0", "-disposition:v:1", "default", folder / "two_tracks.mp4")
    shows["two_tracks.mp4"] = frames
    encode(frames[:1], folder / "one_frame.mp4", [*H264, "-pix_fmt", "yuv420p"])
    shows["one_frame.mp4"] = frames[:1]

    generator = random.Random(seed)
    for index in range(cuts):
        for source in CUT:
            data = (folder / source).read_bytes()
            name = f"cut_{index}_{source}"
            (folder / name).write_bytes(data[: generator.randrange(1, len(data) - 1)])
            shows[name] = frames
    for index in range(rotten):
        source = generator.choice(ROTTEN)
        data = bytearray((folder / source).read_bytes())
        for _ in range(generator.choice([1, 4, 16])):
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        name = f"rot_{index:03d}_{source}"
        (folder / name).write_bytes(data)
        shows[name] = frames
    for name, data in {
        "empty.mp4": b"",
        "text.mp4": b"this is no video\n" * 500,
        "page.webm": b"<!DOCTYPE html><html><body>404</body></html>",
        "noise.mkv": generator.randbytes(20000),
        "header.avi": b"RIFF\xff\xff\xff\x7fAVI LIST",
        "zeros.mov": bytes(100000),
    }.items():
        (folder / name).write_bytes(data)
        shows[name] = None
    return shows


def judge(shows: np.ndarray | None, frames: dict | str) -> str:
    """`right`, `recorded`, or what is wrong."""
    if isinstance(frames, str):
        return "recorded"
    if shows is None:
        return "read, but it is no video"
    (clip,) = frames.values()
    expected = shows[vfm.frame_indices(len(shows), len(clip))]
    expected = np.stack([vfm.resize_frame(np.ascontiguousarray(frame), clip.shape[1:3]) for frame in expected])
    error = np.abs(clip.astype(int) - expected).mean(axis=(1, 2, 3)).max()
    return "right" if error <= TOLERANCE else f"wrong by {error:.0f} levels"


def decode_corpus(folder: Path, shows: dict[str, np.ndarray | None]) -> dict[str, Counter]:
    """Decode a corpus and tell what is wrong. Returns how many of each kind of video are right, recorded or wrong."""
    start = time.perf_counter()
    verdicts: dict[str, Counter] = {}
    clips = [vfm.Clip(Path(file)) for file in shows]
    sampling = vfm.Sampling(NUM_FRAMES, ((96, 128),))
    decoded = vfm.decode_ahead(clips, folder, sampling, 2, timeout=60)
    for clip, _, frames in tqdm(decoded, unit="video", total=len(clips)):
        path = clip.video
        kind = {"cut": "cut", "rot": "bit rot"}.get(path.name.split("_")[0], "whole")
        kind = "not a video" if shows[path.name] is None else kind
        verdict = judge(shows[path.name], frames)
        expected = {"whole": ("right",), "not a video": ("recorded",)}.get(kind, ("right", "recorded"))
        verdicts.setdefault(kind, Counter())[verdict if verdict in expected else "WRONG"] += 1
        if verdict not in expected:
            tqdm.write(f"  {path.name}: {verdict} {frames if isinstance(frames, str) else ''}")
    print(f"{len(shows)} videos in {time.perf_counter() - start:.0f} s")
    return verdicts


def mutated(data: bytes, generator: random.Random) -> bytes:
    """Some bytes changed, dropped, doubled, or the end cut off."""
    mutant = bytearray(data)
    for _ in range(generator.choice([1, 2, 8, 64])):
        place = generator.randrange(len(mutant))
        kind = generator.randrange(4)
        if kind == 0:
            mutant[place] = generator.randrange(256)
        elif kind == 1:
            del mutant[place : place + generator.randrange(1, 20)]
        elif kind == 2:
            mutant[place:place] = mutant[place : place + generator.randrange(1, 20)]
        elif generator.random() < 0.1:
            del mutant[max(1, place) :]
        if not mutant:
            return b"\0"
    return bytes(mutant)


def load_mutants(seed: int, count: int) -> dict[str, Counter]:
    """Mutated features, checkpoints and weights, through the functions that read them: how many load, are refused, or
    raise what they should not."""
    generator = random.Random(seed)
    feature = {"feature": torch.randn(3, 2, 2, 4), "caption": "a dog", "video": "a.mp4", "model": "VideoMAE"}
    flags = {"input_dim": 4, "model_dim": 8, "latent_dim": 2, "num_heads": 2, "num_layers": 1}
    net = model.MotionFeatureAutoencoder(**flags)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(feature, folder / "feature.pt")
        np.save(folder / "feature.npy", feature["feature"].numpy())
        torch.save({"model": net.state_dict(), "config": net.config, "epoch": 1}, folder / "checkpoint.pt")
        torch.save({"module": {"a.weight": torch.ones(3)}, "args": argparse.Namespace(lr=1)}, folder / "weights.pth")
        save_file({"encoder.a.weight": torch.ones(3), "b": torch.ones(2, 2)}, folder / "weights.safetensors")
        reading = {
            "feature.pt": model.load_feature,
            "feature.npy": model.load_feature,
            "checkpoint.pt": model.MotionFeatureAutoencoder.from_checkpoint,
            "weights.pth": functools.partial(vfm.read_weights, vfm=vfm.VFM()),
            "weights.safetensors": functools.partial(vfm.read_weights, vfm=vfm.VFM()),
        }
        outcome: dict[str, Counter] = {file: Counter() for file in reading}
        originals = {file: (folder / file).read_bytes() for file in reading}
        for index in tqdm(range(count), unit="file"):
            file = list(reading)[index % len(reading)]
            path = folder / f"mutant{Path(file).suffix}"
            path.write_bytes(mutated(originals[file], generator))
            try:
                reading[file](path)
                outcome[file]["loads"] += 1
            except model.UserError:
                outcome[file]["refused"] += 1
            except Exception as error:
                outcome[file]["WRONG"] += 1
                tqdm.write(f"  {file}: {type(error).__name__}: {error}"[:300])
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutations", type=int, default=12000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(decode_corpus(Path(name), make_corpus(Path(name), args.seed)))
    print(load_mutants(args.seed, args.mutations))


if __name__ == "__main__":
    main()
