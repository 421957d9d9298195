"""Previews: what they show, that they are whole, and that they are made again where what they show has changed."""

import re
import shutil

import av
import numpy as np
import pytest
import torch
from draw_clips import write_video
from made_up import SMALL, make_features
from PIL import Image

from model import UserError, has_preview, thumbnails, write_preview

GREEN = (0, 200, 0)
GREY = (127, 127, 127)


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


def is_colour(picture, colour, tolerance=24):
    return np.abs(picture.astype(int) - colour).max(axis=-1) < tolerance


def box(there):
    """(top, bottom, left, right) of what is true."""
    down, across = np.nonzero(there.any(axis=1))[0], np.nonzero(there.any(axis=0))[0]
    return down[0], down[-1] + 1, across[0], across[-1] + 1


def draw(path, *args, **kwargs):
    """The sheet and the frames of the preview of a new file."""
    path.write_bytes(b"a feature")
    write_preview(path, *args, **kwargs)
    return read(path)


def test_the_features_are_shown_where_and_as_wide_as_they_are(tmp_path):
    frames = torch.zeros(8, 120, 180, 3, dtype=torch.uint8)
    frames[..., 1] = 200
    sheet, video = draw(tmp_path / "clip.pt", moving_square(), frames=frames)
    assert len(video) == 8
    top, bottom, left, right = box(is_colour(video[0], GREEN))
    assert (right - left) / (bottom - top) == pytest.approx(1.5, rel=0.02)
    gap = right + 5  # the features are right of the frames, and as large
    panel_left, panel_right = box(~is_colour(video[0][top:bottom, gap:], (255, 255, 255), 8))[2:]
    assert panel_right - panel_left == pytest.approx(right - left, abs=2)
    for step in (0, 3, 7):
        panel = video[step][top:bottom, gap:][3:-3, panel_left + 3 : panel_right - 3].astype(int)
        ground = np.median(panel, axis=(0, 1))
        found = np.array(box(np.abs(panel - ground).max(axis=-1) > 60)) / np.repeat(panel.shape[:2], 2)
        column = step * 6 // 7
        np.testing.assert_allclose(found, (2 / 6, 5 / 6, column / 9, (column + 3) / 9), atol=0.03)
    assert is_colour(sheet, GREEN).sum() == pytest.approx(6 * 120 * 180, rel=0.02)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.png"])
def test_what_is_no_preview_is_not_written_over(tmp_path, name):
    (tmp_path / name).write_bytes(b"somebody's clip")
    with pytest.raises(UserError, match="--preview would write over"):
        write_preview(tmp_path / "clip.pt", moving_square())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"somebody's clip"
    (tmp_path / name).unlink()
    draw(tmp_path / "clip.pt", moving_square())
    draw(tmp_path / "clip.pt", moving_square())


def test_a_preview_is_of_the_file_as_it_is(tmp_path):
    path = tmp_path / "clip.pt"
    draw(path, moving_square())
    assert has_preview(path)
    shutil.copytree(tmp_path, tmp_path / "copy", copy_function=shutil.copyfile)  # with new times
    assert has_preview(tmp_path / "copy" / "clip.pt")
    path.write_bytes(b"A feature")
    assert not has_preview(path)
    path.unlink()
    assert not has_preview(path)


def test_a_cursor_goes_over_the_motion(tmp_path):
    _, video = draw(tmp_path / "clip.pt", moving_square(), moving_square()[..., :5])
    cursors = [is_colour(frame[-120:], (214, 39, 40), 30).sum(axis=0).argmax() for frame in video]
    steps = np.diff(cursors)
    assert steps.min() > 10 and np.ptp(steps) <= 1


def test_what_is_dead_is_grey_and_what_is_alive_is_not(tmp_path):
    alive = moving_square()
    dead = 3 + 1e-7 * torch.randn(alive.shape)
    rows = []
    for feature, latent in ((alive, dead[..., :4]), (dead, alive)):
        sheet, _ = draw(tmp_path / "clip.pt", feature, latent)
        grey = is_colour(sheet, GREY, 2)
        assert grey.sum() == pytest.approx(6 * 120 * 180, rel=0.02)  # all of the dead row, nothing of the other
        rows.append(np.flatnonzero(grey.mean(axis=1) > 0.5)[0])
        assert np.ptp(sheet.astype(int), axis=-1).max() > 60  # colours elsewhere
    assert rows[0] > rows[1] + 120


def test_the_latent_has_the_colours_of_the_features(tmp_path):
    """Of the same clip under another basis: turned so that what is alike looks alike."""
    x = moving_square() + 0.3 * torch.randn(8, 6, 9, 16, generator=torch.Generator().manual_seed(1))
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2))).Q
    sheet, _ = draw(tmp_path / "clip.pt", x, x @ rotation * 7)
    top, left, distance = 25, 40, 25 + 120  # of the pictures, and from row to row
    features, latent = (sheet[y : y + 120, left:-20].astype(int) for y in (top, top + distance))
    assert np.abs(features - latent).mean() < 10 < np.abs(features - features[:, ::-1]).mean()


@pytest.mark.parametrize("shape", [(1, 7, 4), (3, 12, 2), (2, 1, 1, 1), (500, 2, 3, 5)])
def test_any_feature_can_be_shown(tmp_path, shape):
    _, video = draw(tmp_path / "clip.pt", torch.randn(shape).half())
    assert len(video) == min(shape[0], 240)


def test_thumbnails_are_small_and_evenly_spread():
    clip = np.zeros((500, 90, 160, 3), dtype=np.uint8)
    clip[:, :, 80:] = (np.arange(500) // 2)[:, None, None, None]
    small = thumbnails(clip)
    assert (small.shape, small.dtype) == ((240, 90, 160, 3), torch.uint8)
    levels = small[:, 5:-5, 85:-5].float().mean(dim=(1, 2, 3))
    np.testing.assert_allclose(levels, np.linspace(0, 499, 240).round() // 2, atol=1)
    assert small[:, :, :75].max() == 0
    large = thumbnails(np.full((3, 420, 630, 3), 77, dtype=np.uint8))
    assert large.shape == (3, 120, 180, 3) and (large == 77).all()


def test_encode_draws_previews_with_the_frames_that_a_feature_brings(trained, tmp_path, run_here):
    source, target = make_features(tmp_path / "f", count=3), tmp_path / "z"
    with_frames = torch.load(source / "0000.pt", weights_only=True)
    with_frames["thumbnails"] = torch.zeros(12, 20, 30, 3, dtype=torch.uint8) + torch.tensor(GREEN, dtype=torch.uint8)
    torch.save(with_frames, source / "0000.pt")
    torch.save({**with_frames, "thumbnails": torch.zeros(3)}, source / "0001.pt")  # somebody else's of this name
    arguments = ["encode.py", "--checkpoint", trained[0] / "ck" / "motion_ae_epoch1.pt", "--input", source]
    arguments += ["--output", target]
    assert run_here(*arguments).returncode == 0
    result = run_here(*arguments, "--preview")
    assert "3 written, 0 skipped" in result.stdout  # they were finished, but not drawn
    assert "thumbnails" not in torch.load(target / "0000.pt", weights_only=True)
    for index, num_frames in enumerate((12, 6, 6)):
        sheet, video = read(target / f"000{index}.pt")
        assert len(video) == num_frames
        assert is_colour(video[0], GREEN).any() == is_colour(sheet, GREEN).any() == (index == 0)
    assert "0 written, 3 skipped" in run_here(*arguments, "--preview").stdout
    (target / "0001.png").unlink()
    shutil.copy(target / "0001.mp4", target / "0002.mp4")  # another clip's
    assert "2 written, 1 skipped" in run_here(*arguments, "--preview").stdout
    (target / "0001.mp4").write_bytes(b"somebody's video")
    result = run_here(*arguments, "--preview", "--overwrite")
    assert "2 written, 0 skipped, 1 failed" in result.stdout and "--preview would write over" in result.stderr


def test_vfm_feature_draws_what_the_model_saw(tmp_path, run_here):
    (tmp_path / "clips").mkdir()
    frames = [np.full((64, 96, 3), 10 * index, dtype=np.uint8) for index in range(12)]
    for frame in frames:
        frame[:, 48:] = GREEN[::-1]  # OpenCV's order
    write_video(tmp_path / "clips" / "0.avi", frames, "MJPG")
    arguments = ["vfm_feature.py", "--video_dir", tmp_path / "clips", "--output_root", tmp_path, *SMALL]
    arguments += ["--models", "VideoMAE"]
    for skipped in (0, 1, 1):  # the last time its caption has changed
        result = run_here(*arguments, "--preview")
        assert re.search(rf"^VideoMAE +{1 - skipped} +{skipped} +0 ", result.stdout, re.MULTILINE)
        assert has_preview(tmp_path / "VideoMAE" / "0.pt")
        (tmp_path / "c.csv").write_text(f"video,caption\n0.avi,caption {skipped}\n")
        arguments += ["--csv_path", tmp_path / "c.csv"] if skipped == 0 else []
    _, video = read(tmp_path / "VideoMAE" / "0.pt")
    assert len(video) == 4
    (tmp_path / "VideoMAE" / "0.mp4").write_bytes(b"somebody's video")
    for more in ([], ["--overwrite"]):
        result = run_here(*arguments, "--preview", *more)
        assert re.search(rf"^VideoMAE +{len(more)} +{1 - len(more)} +1 ", result.stdout, re.MULTILINE), result.stdout
        assert "--preview would write over" in (tmp_path / "VideoMAE" / "failed_videos.txt").read_text()
    for frame, level in zip(video, (0, 40, 70, 110), strict=True):
        top, bottom, left, right = box(is_colour(frame, GREEN))
        assert (right - left) / (bottom - top) == pytest.approx(0.75, rel=0.03)  # half of 2 : 3, the model's input
        other_half = frame[top:bottom, left - (right - left) : left][10:-10, 10:-10]
        assert np.abs(other_half.astype(int) - level).mean() < 8
