"""Previews: what they show, that they are whole, and that a video which cannot be read costs only its frames."""

import os
import shutil
import signal
import subprocess
import sys
import time

import av
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from draw_clips import write_video
from made_up import ROOT, hear_ctrl_c, make_features
from PIL import Image

from encode import decode_frames
from model import UserError, has_preview, write_preview


def read(path):
    """A preview, uint8 RGB: its sheet, and the frames of its video, which must be one that browsers play."""
    with av.open(str(path.with_suffix(".mp4"))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.width % 2 == stream.height % 2 == 0
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    return np.asarray(Image.open(path.with_suffix(".png")).convert("RGB")), frames


def moving_square(length=8, height=6, width=9, channels=16):
    """Features of a square of 3 x 3 tokens that moves to the right over a still ground."""
    x = torch.zeros(length, height, width, channels)
    square = torch.randn(channels, generator=torch.Generator().manual_seed(0)) * 3
    for step in range(length):
        x[step, 2:5, step * (width - 3) // (length - 1) :][:, :3] = square
    return x


def boxes(picture, colour, tolerance=24):
    """(top, bottom, left, right) of what has that colour."""
    there = np.abs(picture.astype(int) - colour).max(axis=-1) < tolerance
    down, across = np.nonzero(there.any(axis=1))[0], np.nonzero(there.any(axis=0))[0]
    return down[0], down[-1] + 1, across[0], across[-1] + 1


def test_the_features_are_shown_where_and_as_wide_as_they_are(tmp_path):
    frames = np.zeros((8, 120, 180, 3), dtype=np.uint8)
    frames[..., 1] = 200
    write_preview(tmp_path / "clip.pt", moving_square(), frames=frames)
    sheet, video = read(tmp_path / "clip.pt")
    assert len(video) == 8
    top, bottom, left, right = boxes(video[0], (0, 200, 0))
    assert (right - left) / (bottom - top) == pytest.approx(1.5, rel=0.02)
    panel = video[0][top:bottom, right + 8 : right + 8 + right - left]
    ground, square = panel[2, -3].astype(int), panel[len(panel) // 2, 3].astype(int)
    assert np.abs(ground - square).max() > 100
    for step in (0, 3, 7):
        panel = video[step][top:bottom, right + 8 : right + 8 + right - left]
        column = step * 6 // 7
        expected = (2 / 6, 5 / 6, column / 9, (column + 3) / 9)
        found = np.array(boxes(panel, square, 60)) / np.repeat(panel.shape[:2], 2)
        np.testing.assert_allclose(found, expected, atol=0.02)
    assert sheet.shape[1] > 6 * 90 and np.ptp(sheet, axis=(0, 1)).min() > 200


@pytest.mark.parametrize("name", ["clip.mp4", "clip.png"])
def test_what_is_no_preview_is_not_written_over(tmp_path, name):
    (tmp_path / name).write_bytes(b"somebody's clip")
    with pytest.raises(UserError, match="--preview would write over"):
        write_preview(tmp_path / "clip.pt", moving_square())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"somebody's clip"
    (tmp_path / name).unlink()
    write_preview(tmp_path / "clip.pt", moving_square())
    write_preview(tmp_path / "clip.pt", moving_square())


def test_a_cursor_goes_over_the_motion(tmp_path):
    write_preview(tmp_path / "clip.pt", moving_square(), moving_square()[..., :5])
    _, video = read(tmp_path / "clip.pt")
    reddest = [(frame[-100:, :, 0].astype(int) - frame[-100:, :, 1]).sum(axis=0).argmax() for frame in video]
    assert all(np.diff(reddest) > 10)


def test_what_is_dead_is_grey_and_what_is_alive_is_not(tmp_path):
    alive = moving_square()
    dead = 3 + 1e-7 * torch.randn(alive.shape)
    for name, (feature, latent) in {"model": (alive, dead[..., :4]), "features": (dead, alive)}.items():
        write_preview(tmp_path / f"{name}.pt", feature, latent)
        sheet, _ = read(tmp_path / f"{name}.pt")
        feature_row, latent_row = sheet[24 + 40], sheet[24 + 2 * 40 + 120]
        colourful = [np.abs(row.astype(int) - 127).max(axis=-1) for row in (feature_row, latent_row)]
        grey = colourful[name == "model"][8:80]
        assert grey.max() <= 1, name
        assert colourful[name != "model"][8:80].max() > 60, name


@pytest.mark.parametrize("shape", [(1, 7, 4), (3, 12, 2), (2, 1, 1, 1), (500, 2, 3, 5)])
def test_any_feature_can_be_shown(tmp_path, shape):
    write_preview(tmp_path / "clip.pt", torch.randn(shape).half())
    _, video = read(tmp_path / "clip.pt")
    assert len(video) == min(shape[0], 240)


def level_clip(path, num_frames):
    """Frame i is grey of level 10 * i on the left, black on the right."""
    frames = [np.full((64, 96, 3), 10 * index, dtype=np.uint8) for index in range(num_frames)]
    for frame in frames:
        frame[:, 48:] = 0
    write_video(path, frames, "MJPG")
    return path


def test_the_frames_are_those_that_the_features_were_made_of(tmp_path):
    frames = decode_frames(level_clip(tmp_path / "clip.avi", 21), 9)
    assert frames.shape == (9, 64, 96, 3)
    levels = frames[:, 10:50, 5:40].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(levels, 10 * np.linspace(0, 20, 9).round(), atol=3)
    repeated = decode_frames(level_clip(tmp_path / "short.avi", 2), 5)[:, 10:50, 5:40].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(repeated, [0, 0, 0, 10, 10], atol=3)


@pytest.mark.parametrize(("rotation", "bright"), [(90, "bottom"), (180, "right"), (270, "top")])
def test_a_rotated_video_is_upright(tmp_path, rotation, bright):
    """As FFmpeg itself shows it."""
    level_clip(tmp_path / "flat.avi", 12)
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error"]
    flat, turned, shown = (str(tmp_path / name) for name in ("flat.mp4", "turned.mp4", "shown.png"))
    subprocess.run(
        [*ffmpeg, "-i", str(tmp_path / "flat.avi"), "-c:v", "libx264", "-pix_fmt", "yuv420p", flat], check=True
    )
    subprocess.run([*ffmpeg, "-display_rotation", str(rotation), "-i", flat, "-c", "copy", turned], check=True)
    subprocess.run([*ffmpeg, "-i", turned, "-vf", "select=eq(n\\,11)", "-frames:v", "1", shown], check=True)
    expected = np.asarray(Image.open(shown).convert("RGB"))
    frame = decode_frames(tmp_path / "turned.mp4", 2)[1]
    assert frame.shape == expected.shape
    assert np.abs(frame.astype(int) - expected).mean() < 3


def test_encode_draws_previews_and_does_without_a_video(trained, tmp_path, run_here):
    source, target, videos = make_features(tmp_path / "f", count=3), tmp_path / "z", tmp_path / "videos"
    shutil.copy(source / "0000.pt", source / "0003.pt")
    videos.mkdir()
    level_clip(videos / "0.avi", 12).rename(videos / "0.mp4")
    (videos / "1.mp4").write_text("no video")
    os.mkfifo(videos / "2.mp4")  # a decoder waits for ever
    arguments = ["encode.py", "--checkpoint", trained[0] / "ck" / "motion_ae_epoch1.pt", "--input", source]
    arguments += ["--output", target]
    assert run_here(*arguments).returncode == 0
    result = run_here(*arguments, "--preview", "--video_dir", videos, "--decode_timeout", 5)
    assert result.returncode == 0
    assert "4 written, 0 skipped" in result.stdout  # they were finished, but not drawn
    assert result.stderr.count("no frames") == 2 and "1.mp4: " in result.stderr
    assert "2.mp4: no end after 5 s" in result.stderr
    panels = []
    for index in range(4):
        assert has_preview(target / f"000{index}.pt")
        panels.append(read(target / f"000{index}.pt")[1][0].shape[1])
    assert panels[0] == panels[3] > panels[1] == panels[2]
    assert "0 written, 4 skipped" in run_here(*arguments, "--preview", "--video_dir", videos).stdout
    (target / "0001.png").unlink()
    assert "1 written, 3 skipped" in run_here(*arguments, "--preview").stdout


def test_ctrl_c_does_not_wait_for_the_video_of_a_preview(trained, tmp_path):
    source, target, videos = make_features(tmp_path / "f", count=1), tmp_path / "z", tmp_path / "videos"
    videos.mkdir()
    os.mkfifo(videos / "0.mp4")
    command = ["encode.py", "--checkpoint", trained[0] / "ck" / "motion_ae_epoch1.pt", "--input", source, "--output"]
    command = [*map(str, command), str(target), "--device", "cpu", "--preview", "--video_dir", str(videos)]
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=-1, preexec_fn=hear_ctrl_c)
    while not (target / "0000.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and b"stopped" in stderr and b"Traceback" not in stderr
    assert not has_preview(target / "0000.pt")  # so that the next run draws it


def test_vfm_feature_draws_what_the_model_saw(tmp_path, run_here):
    (tmp_path / "clips").mkdir()
    for index in range(2):
        level_clip(tmp_path / "clips" / f"{index}.avi", 12)
    arguments = ["vfm_feature.py", "--video_dir", tmp_path / "clips", "--output_root", tmp_path, "--num_frames", 4]
    arguments += ["--models", "VideoMAE", "--random_weights", "--videomae_resize_h", 32, "--videomae_resize_w", 48]
    for skipped in (0, 2):
        result = run_here(*arguments, "--preview")
        assert f"VideoMAE         {2 - skipped:>2}       {skipped}       0" in result.stdout
    for index in range(2):
        _, video = read(tmp_path / "VideoMAE" / f"{index}.pt")
        assert len(video) == 4
        for frame, level in zip(video, (0, 40, 70, 110), strict=True):
            panel = frame[40 : 40 + 240, 8 : 8 + 360]  # below two lines of text; 2 : 3, as the model's input
            assert np.abs(panel[10:-10, 10:170].astype(int) - level).mean() < 8
            assert panel[10:-10, 190:-10].mean() < 8
