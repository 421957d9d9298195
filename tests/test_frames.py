"""vfm_feature.py: which frames of a video, from which part of it, at what size."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from bench_faults import draw, encode, ffmpeg, judge, make_corpus
from draw_clips import draw_frame, write_video
from made_up import ROOT, SMALL, counts, decode_clip, pattern_clip

import vfm_feature as vfm
from model import UserError, find_features

VIDEOMAE = [*SMALL, "--models", "VideoMAE"]
WHOLE = [vfm.Clip(Path("of any name"))]  # a whole video


@pytest.fixture
def run_here(run_here):
    return functools.partial(run_here, "vfm_feature.py")


def gray_clip(path, num_frames, times=None, width=64):
    """A clip of 10 frames a second whose frame i has the gray level 4 * i; or frame i is shown at `times[i]` ms."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10, options={"q": "2"})
        stream.width, stream.height, stream.pix_fmt = width, 48, "yuvj420p"
        stream.codec_context.time_base = vfm.Fraction(1, 1000)
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, width, 3), 4 * index, np.uint8), format="rgb24")
            frame.pts, frame.time_base = (times[index] if times else 100 * index), vfm.Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def windows_of(path, num_frames=3, span=(None, None), **sampling):
    """The windows that decoding yields, checked against the levels of the frames that they name."""
    sampling = vfm.Sampling(num_frames, ((48, 64),), **sampling)
    found = []
    clip = vfm.Clip(path, start=span[0], end=span[1])
    for window, frames in filter(None, vfm.decode_windows(str(path), [clip], sampling)):
        if isinstance(frames, dict):
            levels = frames[48, 64].mean(axis=(1, 2, 3)) / 4
            assert np.abs(levels - window.frame_indices).max() < 0.5
        found.append(window)
    return found


def saved(path):
    return torch.load(path, weights_only=True)


# ---------------------------------------------------------------------------------------------------------------------
# Which frames
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("available", [30, 49, 97, 110, 129])
def test_stride_takes_the_frames_of_videorepa_s_loader(available):
    theirs = list(range(available)) if available < 49 else list(range(0, available, available // 49))[:49]
    theirs += [available - 1] * (49 - len(theirs))
    assert vfm.frame_indices(available, 49, "stride").tolist() == theirs


@pytest.mark.parametrize(
    ("part", "fps", "expected"),
    [
        ((None, None), 5.0, [0, 2, 4, 6]),
        ((None, None), 20.0, [0, 0, 1, 1]),
        ((0.3, 0.6), 10.0, [3, 4, 5, 5]),  # the last repeats when the part is over
        ((0.25, None), 10.0, [3, 3, 4, 5]),  # frame 2 is shown at 0.25 s, but does not belong to the part
        ((1.5, None), 2.0, [15, 19, 19, 19]),
    ],
)
def test_frames_a_second(tmp_path, part, fps, expected):
    (window,) = windows_of(gray_clip(tmp_path / "a.mkv", 20), 4, part, fps=fps)
    assert list(window.frame_indices) == expected
    assert window.fps == pytest.approx(10)


def test_times_are_the_container_s(tmp_path):
    """Frames 0 to 9 are shown for 0.1 s each, the rest for 0.3 s."""
    times = [100 * i if i < 10 else 1000 + 300 * (i - 10) for i in range(20)]
    path = gray_clip(tmp_path / "a.mkv", 20, times)
    (window,) = windows_of(path, 4, (0.9, 2.0), fps=5.0)
    assert list(window.frame_indices) == [9, 10, 11, 11]  # at 0.9, 1.1, 1.3 and 1.5 s
    (window,) = windows_of(path, 5, (0.9, 2.0))
    assert list(window.frame_indices) == [9, 10, 11, 12, 13]


def test_times_that_do_not_rise_give_way_to_the_average_rate():
    sampling = vfm.Sampling(4, ((48, 64),), fps=20.0)
    for times, indices in {
        (0, 200, 200, 300): (0, 0, 1, 1),  # of frames at 0, 0.1, 0.2 and 0.3 s
        (0, None, 5, 6): (0, 0, 1, 1),
        (50, 100, 190, 200): (0, 1, 1, 3),  # at 0, 0.05, 0.14 and 0.15 s
    }.items():
        [window] = vfm.plan_windows(WHOLE, [*times], 0.001, 10.0, sampling)
        assert window.frame_indices == indices


@pytest.mark.parametrize(
    ("window", "hop", "expected"),
    [
        (0.5, 0.5, [(0.0, 0.5), (0.5, 1.0), (1.0, 1.5), (1.5, 2.0)]),
        (0.8, 0.8, [(0.0, 0.8), (0.8, 1.6)]),  # the rest is shorter than a window
        (1.0, 0.5, [(0.0, 1.0), (0.5, 1.5), (1.0, 2.0)]),
        (3.0, 3.0, [(0.0, 2.0)]),  # and here all there is
    ],
)
def test_windows(tmp_path, window, hop, expected):
    found = windows_of(gray_clip(tmp_path / "a.mkv", 20), window=window, hop=hop)
    assert [(window.start, window.end) for window in found] == [pytest.approx(span) for span in expected]
    assert {window.count for window in found} == {len(expected)}
    for window, (start, end) in zip(found, expected, strict=True):
        assert window.frame_indices[0] == round(10 * start)
        assert window.frame_indices[-1] == round(10 * end) - 1


def test_every_window_shows_the_frames_that_it_names(tmp_path):
    """In videos that hide frames, start without a keyframe, or whose packets tell other times than their frames."""
    shows = make_corpus(tmp_path, seed=1, cuts=0, rotten=0)
    sampling = vfm.Sampling(4, ((96, 128),), window=0.3, hop=0.2)
    lying = ("copied.mp4", "keyless.mkv", "hidden_packets.webm", "mpeg4.avi", "mpeg2_interlaced.mpg", "rotated_90.mp4")
    for name in lying:
        found = [*vfm.decode_windows(str(tmp_path / name), WHOLE, sampling)]
        assert [window.index for window, _ in found] == list(range(found[-1][0].count)) and len(found) > 1, name
        assert found[-1][0].frame_indices[-1] <= len(shows[name]) - 1
        for window, frames in found:
            part = shows[name][list(window.frame_indices)]  # four frames, of which all are sampled
            assert judge(part, frames) == "right", (name, window)


def test_damage_costs_the_clips_behind_it(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "5", "bf": "0", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(40):
            frame = np.ascontiguousarray(draw_frame(2, index / 39, 48, 64)[..., ::-1])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    middle = (data.index(b"mdat") + data.index(b"moov", data.index(b"mdat"))) // 2
    data[middle : middle + 60] = bytes(60)
    path.write_bytes(data)
    found, sampling = [], vfm.Sampling(3, ((48, 64),), window=0.5, hop=0.5)
    with pytest.raises(ValueError, match=r"^damaged: \d+ frames are whole, then: "):
        for window, _ in vfm.decode_windows(str(path), WHOLE, sampling):
            found.append(window.index)
    assert found == list(range(len(found))) and 2 <= len(found) <= 5


def test_packets_without_frames_do_not_make_windows_twice(tmp_path):
    """The last 5 of 40 packets are decoded, but not shown: what was delivered by the packets' word stands."""
    encode(draw(48, 64), tmp_path / "shown.mkv", ["-c:v", "libvpx", "-b:v", "1M"])
    with av.open(str(tmp_path / "shown.mkv")) as source, av.open(str(tmp_path / "hidden.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for index, packet in enumerate(source.demux(video=0)):
            if packet.size:
                data = bytearray(bytes(packet))
                data[0] &= 0xFF if index < 35 else 0xEF  # VP8's bit show_frame
                copy = av.Packet(bytes(data))
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                target.mux(copy)
    sampling = vfm.Sampling(5, ((48, 64),), window=0.2, hop=0.2)
    (tmp_path / "text.mkv").write_text("no video")
    clips = [vfm.Clip(Path(name)) for name in ("hidden.mkv", "text.mkv")]
    *found, (clip, window, reason) = vfm.decode_ahead(clips, tmp_path, sampling, 1, 60)
    assert [window.index for _, window, _ in found] == [0, 1, 2, 3, 4, 5, 6]
    assert all(judge(draw(48, 64)[list(window.frame_indices)], frames) == "right" for _, window, frames in found)
    assert clip == clips[1] and window is None and reason.startswith("cannot be read: ")


def test_a_decoder_that_ends_amid_windows_is_followed_by_the_next(tmp_path):
    """PyAV hangs, dies or fails at frame 10 of 30, by the video; decord goes on with the windows that are left."""
    (tmp_path / "sitecustomize.py").write_text(
        "import av, ctypes, os\n"
        "class Graph:\n"
        "    real = av.filter.Graph\n"
        "    def __init__(self): self.graph = self.real()\n"
        "    def __getattr__(self, name): return getattr(self.graph, name)\n"
        "    def add_buffer(self, width, **options):\n"
        "        self.width = width\n"
        "        return self.graph.add_buffer(width=width, **options)\n"
        "    def vpush(self, frame):\n"
        "        if frame.pts >= 1000:\n"
        "            if self.width == 32: ctypes.PyDLL(None).sleep(1000)\n"
        "            if self.width == 48: os.kill(os.getpid(), 11)\n"
        "            raise RuntimeError('no more')\n"
        "        self.graph.vpush(frame)\n"
        "av.filter.Graph = Graph\n"
    )
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys, vfm_feature as vfm\n"
        "if __name__ == '__main__':\n"
        "    clips = [vfm.Clip(pathlib.Path(video)) for video in sys.argv[1:]]\n"
        "    sampling = vfm.Sampling(5, ((48, 64),), window=0.5, hop=0.5)\n"
        "    for clip, window, frames in vfm.decode_ahead(clips, pathlib.Path(), sampling, 1, 3):\n"
        "        levels = frames[48, 64].mean(axis=(1, 2, 3)) / 4\n"
        "        print(clips.index(clip), window.index, *levels.round().astype(int))\n"
    )
    clips = [gray_clip(tmp_path / f"{width}.mkv", 30, width=width) for width in (32, 48, 64)]
    command = [sys.executable, script, *clips]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    found = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    assert sorted(found) == [
        (video, window, *range(5 * window, 5 * window + 5)) for video in range(3) for window in range(6)
    ]


def test_whichever_process_is_ready_is_served(tmp_path):
    """A pipe into which nobody writes hangs every decoder: the clips behind it do not wait, and no process stays."""
    os.mkfifo(tmp_path / "hangs.mkv")
    clips = [gray_clip(tmp_path / f"{index}.mkv", 4) for index in range(6)]
    hanging, *others = [vfm.Clip(Path(name)) for name in ("hangs.mkv", *(path.name for path in clips))]
    sampling = vfm.Sampling(4, ((48, 64),))
    with closing(vfm.decode_ahead([hanging, *others], tmp_path, sampling, 2, 1000)) as found:
        assert {next(found)[0] for _ in others} == {*others}
        assert len(multiprocessing.active_children()) >= 1
    assert multiprocessing.active_children() == []
    found = vfm.decode_ahead([hanging], tmp_path, sampling, 1, 1)
    reason = "no end after 1 s (--decode_timeout)"
    assert [*found] == [(hanging, None, f"pyav: {reason}; decord: {reason}; opencv: {reason}")]


DECODE_ONE = """
import multiprocessing, pathlib, resource, sys
import vfm_feature as vfm
if __name__ == '__main__':
    limit = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        clip = vfm.Clip(pathlib.Path(sys.argv[1]))
        for _, window, _ in vfm.decode_ahead([clip], pathlib.Path(), vfm.Sampling(4, ((48, 64),)), 1, 60):
            child = next(iter(multiprocessing.active_children()))
            print(window.frame_indices, resource.prlimit(child.pid, resource.RLIMIT_AS))
    except vfm.UserError as error:
        print(error)
"""


@pytest.mark.parametrize("case", ["long TMPDIR", "ulimit -v", "no process"])
def test_decoders_start_or_one_line_says_why(tmp_path, case):
    clip = gray_clip(tmp_path / "a.mkv", 4)
    (tmp_path / "script.py").write_text(DECODE_ONE)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    limit = 2**36
    if case == "long TMPDIR":
        environment["TMPDIR"] = str(tmp_path / ("x" * 115))
        Path(environment["TMPDIR"]).mkdir()
    elif case == "ulimit -v":
        limit = 2**32 + 2**31
    elif case == "no process":
        (tmp_path / "sitecustomize.py").write_text(
            "import os, sys\nif 'multiprocessing' in ' '.join(sys.orig_argv): os._exit(7)\n"
        )
    command = [sys.executable, tmp_path / "script.py", clip, str(limit)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    lines = result.stdout.splitlines()
    if case in ("no process", "long TMPDIR"):
        assert len(lines) == 1 and lines[0].startswith("videos cannot be decoded: no process starts ("), result
        assert "set TMPDIR to a folder of a shorter name" in lines[0] and "Traceback" not in result.stderr
        return
    assert len(lines) == 1 and "Traceback" not in result.stderr, result
    assert lines == [f"(0, 1, 2, 3) ({limit}, {limit})"]


# ---------------------------------------------------------------------------------------------------------------------
# At what size
# ---------------------------------------------------------------------------------------------------------------------


# The pixels that VideoREPA's own code (commit 8002687: the transform of its data set, then `compute_loss` up to the
# model) makes of `pattern_clip`, brought back to levels of 0 to 255.
RECIPE_PIXELS = {  # (height, width) of the clip, the model's size: their mean, and the pixel at [frame, y, x]
    ((288, 512), (160, 240)): (
        127.527,
        {
            (0, 0, 0): [41.197, 121.197, 201.197],
            (1, 80, 80): [237.325, 61.325, 141.325],
            (2, 159, 239): [238.807, 62.807, 142.807],
        },
    ),
    ((288, 512), (420, 630)): (
        127.53,
        {
            (0, 0, 0): [40.062, 120.062, 200.062],
            (1, 210, 210): [233.801, 57.801, 137.801],
            (2, 419, 629): [249.582, 73.582, 153.582],
        },
    ),
    ((480, 272), (160, 240)): (
        127.54,
        {
            (0, 0, 0): [44.193, 124.193, 204.193],
            (1, 80, 80): [29.852, 109.852, 189.852],
            (2, 159, 239): [209.892, 33.892, 113.892],
        },
    ),
    ((243, 321), (420, 630)): (
        127.611,
        {
            (0, 0, 0): [28.024, 108.024, 188.024],
            (1, 210, 210): [226.631, 50.631, 130.631],
            (2, 419, 629): [224.991, 48.991, 128.991],
        },
    ),
}


@pytest.mark.parametrize(("clip", "size"), RECIPE_PIXELS)
def test_the_recipe_s_pixels_are_videorepa_s(clip, size):
    mean, figures = RECIPE_PIXELS[clip, size]
    frames = pattern_clip(3, *clip)[0].numpy()
    ours = np.stack([vfm.fit_like_videorepa(frame, size) for frame in frames]).astype(np.float32)
    assert abs(ours.mean() - mean) < 0.01
    for place, expected in figures.items():
        assert np.abs(ours[place] - expected).max() < 0.1  # of which float16 may take 0.0625


def test_crop_takes_the_centre_and_squash_all(tmp_path):
    frame = draw_frame(0, 0.5, 90, 200)
    crop = vfm.FITS["crop"]
    assert np.array_equal(crop(frame, (60, 90), 1), vfm.resize_frame(frame[:, 32:167], (60, 90)))
    tall = np.ascontiguousarray(frame.transpose(1, 0, 2))
    assert np.array_equal(crop(tall, (60, 90), 1), vfm.resize_frame(tall[70:130], (60, 90)))
    write_video(tmp_path / "a.avi", [frame] * 2, "MJPG")
    whole, centre = (decode_clip(tmp_path / "a.avi", 2, [(60, 90)], fit=fit)[60, 90] for fit in ("squash", "crop"))
    rgb = frame[..., ::-1]
    assert np.abs(whole[0] - vfm.resize_frame(np.ascontiguousarray(rgb), (60, 90)).astype(int)).mean() < 3
    assert np.abs(centre[0] - crop(np.ascontiguousarray(rgb), (60, 90), 1).astype(int)).mean() < 3


def test_crop_takes_what_players_show_and_squash_what_is_stored(tmp_path):
    """Pixels twice as wide as high, or half, as the container or the codec says; before a turn, and amid a video."""
    y, x = np.mgrid[:48, :64]
    stored = np.stack([np.stack([2 * x + 40, 3 * y + 40, np.full_like(x, 4 * i)], -1) for i in range(40)])
    stored = stored.astype(np.uint8)
    h264 = ["-c:v", "libx264", "-crf", "5", "-pix_fmt", "yuv444p"]
    square, wide, tall, unknown = (["-vf", f"setsar={ratio}"] for ratio in ("1", "2", "1/2", "0"))
    for file, options in {
        "codec.mpg": [*h264, *wide, "-f", "mpegts"],
        "codec_tall.mpg": [*h264, *tall, "-f", "mpegts"],
        "container.mov": ["-c:v", "mjpeg", "-q:v", "2", "-pix_fmt", "yuvj444p", *wide],
        "unknown.mkv": [*h264, *unknown],
        "square.mpg": [*h264, *square, "-f", "mpegts"],
    }.items():
        encode(stored, tmp_path / file, options)
    ffmpeg("-i", tmp_path / "square.mpg", "-c", "copy", "-aspect", "8:3", tmp_path / "container.mkv")
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "codec.mpg", "-c", "copy", tmp_path / "turned.mp4")
    both = (tmp_path / "square.mpg").read_bytes() + (tmp_path / "codec.mpg").read_bytes()
    (tmp_path / "changes.mpg").write_bytes(both)

    halves = {1: np.s_[:, :], 2: np.s_[:, 16:48], 0.5: np.s_[12:36, :]}  # of stored frames, shown at 4 : 3
    for file, ratios in {
        "codec.mpg": [2],
        "codec_tall.mpg": [0.5],
        "container.mov": [2],
        "container.mkv": [2],
        "unknown.mkv": [1],
        "turned.mp4": [2],
        "changes.mpg": [1] * 40 + [2] * 40,
    }.items():
        count = 80 if file == "changes.mpg" else 40
        turns, size = (1, (64, 48)) if file == "turned.mp4" else (0, (48, 64))
        for fit in ("crop", "squash"):
            frames = decode_clip(tmp_path / file, count, [size], fit=fit)[size]
            for index, frame in enumerate(frames):
                part = halves[ratios[index % len(ratios)]] if fit == "crop" else np.s_[:, :]
                cut = np.rot90(stored[index % 40][part], turns)
                expected = vfm.resize_frame(np.ascontiguousarray(cut), size)
                assert np.abs(frame.astype(int) - expected).mean() < 4, (file, fit, index)
    with pytest.raises(RuntimeError, match="square pixels"):
        decode_clip(tmp_path / "codec.mpg", 4, [(48, 64)], "opencv")


def test_the_recipe_from_end_to_end(tmp_path, run_here):
    """48 of 49 frames for video models, 1 + 12 steps of the 49 for image models."""
    path = gray_clip(tmp_path / "clips" / "a.mkv", 60)
    command = ["--video_dir", tmp_path / "clips", "--output_root", tmp_path, "--random_weights", "--num_workers", 1]
    result = run_here(*command, "--models", "VideoMAEv2", "DINOv2", "--recipe", "videorepa", "--preview")
    assert result.returncode == 0, result.stderr
    video, image = saved(tmp_path / "VideoMAEv2" / "a.pt"), saved(tmp_path / "DINOv2" / "a.pt")
    assert video["feature"].shape == (24, 10, 15, 24) and video["frame_indices"] == list(range(1, 49))
    assert image["feature"].shape == (13, 30, 45, 24) and image["frame_indices"] == list(range(49))
    assert (video["settings"]["fit"], video["settings"]["num_frames"]) == ("videorepa", 48)
    clips = decode_clip(path, 49, [(160, 240), (420, 630)], sampling="stride", fit="videorepa")
    for model, size, data in (("VideoMAEv2", (160, 240), video), ("DINOv2", (420, 630), image)):
        frames = torch.from_numpy(clips[size])[-len(data["frame_indices"]) :][None]
        assert frames.dtype == torch.float16
        vit = vfm.build_vit(vfm.find_vfm(model), frames.shape[1], size)
        feature = vfm.extract_features(vit, vfm.find_vfm(model), frames)[0]
        if model == "DINOv2":
            feature = torch.stack([feature[0], *(feature[i : i + 4].mean(0) for i in range(1, 49, 4))])
        torch.testing.assert_close(data["feature"], feature, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def test_parts_of_a_csv(tmp_path, run_here):
    gray_clip(tmp_path / "clips" / "a.mkv", 20)
    gray_clip(tmp_path / "clips" / "b.mkv", 8)
    table = tmp_path / "parts.csv"
    rows = ["video,start,end,caption", "a,1,1.5,late", "a,,0.5,early", "a,0.4,,long", "a,5,6,behind the end"]
    table.write_text("\n".join(rows))
    command = ["--video_dir", tmp_path / "clips", "--csv_path", table, "--output_root", tmp_path, *VIDEOMAE]
    assert counts(run_here(*command)) == [4, 0, 1]
    out = tmp_path / "VideoMAE"
    failures = (out / "failed_videos.txt").read_text()
    assert failures == "a.mkv from 5 s to 6 s\tthe video ends before, at 2 s\n"
    assert [path.name for path in sorted(out.glob("*.pt"))] == ["a_000.pt", "a_001.pt", "a_002.pt", "b_000.pt"]
    expected = {
        "a_000": ("late", 1.0, 1.5, [10, 11, 13, 14]),
        "a_001": ("early", 0.0, 0.5, [0, 1, 3, 4]),
        "a_002": ("long", 0.4, 2.0, [4, 9, 14, 19]),
        "b_000": ("", 0.0, 0.8, [0, 2, 5, 7]),
    }
    for stem, (caption, start, end, indices) in expected.items():
        data = saved(out / f"{stem}.pt")
        assert (data["caption"], data["frame_indices"], data["fps"]) == (caption, indices, 10)
        assert (data["start"], data["end"]) == pytest.approx((start, end))
    table.write_text("\n".join(rows[:-1]).replace("0.4", "0.6").replace("early", "first"))
    assert counts(run_here(*command)) == [1, 3, 0]
    assert saved(out / "a_001.pt")["caption"] == "first" and saved(out / "a_002.pt")["frame_indices"][0] == 6
    assert not (out / "failed_videos.txt").exists()


def test_windows_are_made_once(tmp_path, run_here):
    gray_clip(tmp_path / "clips" / "a.mkv", 20)
    command = ["--video_dir", tmp_path / "clips", "--output_root", tmp_path, *VIDEOMAE, "--window", 0.5]
    out = tmp_path / "VideoMAE"
    assert counts(run_here(*command)) == [4, 0, 0]
    assert [path.name for path in sorted(out.glob("*.pt"))] == [f"a_{index:03d}.pt" for index in range(4)]
    second = saved(out / "a_001.pt")
    assert (second["start"], second["end"], second["windows"]) == (0.5, 1.0, 4)
    assert second["frame_indices"] == [5, 6, 8, 9] and second["video"] == "a.mkv"
    assert counts(run_here(*command)) == [0, 4, 0]
    (out / "a_002.pt").unlink()
    assert counts(run_here(*command)) == [1, 3, 0]
    assert counts(run_here(*command, "--hop", 0.25)) == [7, 0, 0]
    result = run_here(*command, "--hop", 0.25, "--fps", 5)
    assert counts(result) == [7, 0, 0] and "also holds" not in result.stderr
    result = run_here(*command[:-1], 1)
    assert counts(result) == [2, 0, 0] and "VideoMAE also holds 5 files of other clips" in result.stderr


def test_windows_of_a_run_that_was_killed(tmp_path, run_here):
    for name in ("a", "b"):
        gray_clip(tmp_path / "clips" / f"{name}.mkv", 60)
    arguments = ["--video_dir", tmp_path / "clips", "--output_root", tmp_path, *VIDEOMAE, "--window", 0.2]
    arguments += ["--num_workers", 2]
    command = [sys.executable, ROOT / "vfm_feature.py", *arguments, "--device", "cpu"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    out = tmp_path / "VideoMAE"
    while len(list(out.glob("*.pt"))) < 5:
        time.sleep(0.005)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in out.glob("*.pt"):  # made by large models: those of this process are small
        data = saved(path)
        assert data["feature"].shape == (2, 2, 3, 768)
    finished = {path: path.read_bytes() for path in out.glob("*.pt")}
    written, skipped, failed = counts(run_here(*arguments))
    assert (written + skipped, failed) == (60, 0) and skipped == len(finished)
    assert all(path.read_bytes() == content for path, content in finished.items())
    assert len(list(out.glob("[!.]*.pt"))) == 60


def test_a_folder_of_folders(tmp_path, run_here):
    for name in ("x/a", "y/a", "y/z/b", ".hidden/c", "d"):
        gray_clip(tmp_path / "clips" / f"{name}.mkv", 4)
    (tmp_path / "captions.csv").write_text(
        "path,caption\nsomewhere/x/a.mkv,one\ny/a,two\nold/b.mkv,three\nc.mkv,none\n"
    )
    command = ["--video_dir", tmp_path / "clips", "--csv_path", tmp_path / "captions.csv", "--output_root", tmp_path]
    assert counts(run_here(*command, *VIDEOMAE, "--recursive")) == [4, 0, 0]
    out = tmp_path / "VideoMAE"
    found = {path.relative_to(out).as_posix(): saved(path) for path in find_features(out)}
    assert {name: (data["video"], data["caption"]) for name, data in found.items()} == {
        "x/a.pt": ("x/a.mkv", "one"),
        "y/a.pt": ("y/a.mkv", "two"),
        "y/z/b.pt": ("y/z/b.mkv", "three"),
        "d.pt": ("d.mkv", ""),
    }
    assert counts(run_here(*command, *VIDEOMAE, "--recursive")) == [0, 4, 0]
    with pytest.raises(UserError, match=r"y/a\.avi and y/a\.mkv differ in their suffix alone"):
        (tmp_path / "clips" / "y" / "a.avi").touch()
        vfm.list_videos(tmp_path / "clips", recursive=True)
