"""Previews: what they show, and that they replace no other picture."""

import numpy as np
import pytest
import torch
from draw_clips import write_video
from made_up import SMALL, counts, make_features
from PIL import Image

from encode import write_preview
from model import UserError

GREEN = (0, 200, 0)
GREY = (127, 127, 127)
MARGIN, TOP, DISTANCE = 70, 50, 145  # pixels: left of the pictures, above them, from row to row
HEIGHT, WIDTH, GAP = 120, 180, 10  # of pictures of 2 : 3, and between them


def read(path):
    return np.asarray(Image.open(path.with_suffix(".png")).convert("RGB")).astype(int)


def pictures(sheet, row, count=6, height=HEIGHT, width=WIDTH):
    """The pictures of a row, [count, height, width, 3]."""
    places = [(TOP + row * (height + 25), MARGIN + column * (width + GAP)) for column in range(count)]
    return np.stack([sheet[top : top + height, left : left + width] for top, left in places])


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
    """The preview of a file."""
    write_preview(path, *args, **kwargs)
    return read(path)


def test_the_features_are_shown_where_and_as_wide_as_they_are(tmp_path):
    frames = np.zeros((8, 120, 180, 3), dtype=np.uint8)
    frames[..., 1] = 200
    sheet = draw(tmp_path / "clip.pt", moving_square(), frames=frames)
    assert is_colour(pictures(sheet, 0), GREEN).mean() > 0.97
    assert is_colour(sheet, GREEN).sum() == pytest.approx(6 * 120 * 180, rel=0.02)
    for step, picture in zip((0, 1, 3, 4, 6, 7), pictures(sheet, 1), strict=True):
        ground = np.median(picture, axis=(0, 1))
        found = np.array(box(np.abs(picture - ground)[2:-2, 2:-2].max(axis=-1) > 60)) / (120, 120, 180, 180)
        column = step * 6 // 7
        np.testing.assert_allclose(found, (2 / 6, 5 / 6, column / 9, (column + 3) / 9), atol=0.03)


def test_the_camera_is_drawn_by_the_embedding_if_there_is_one(tmp_path):
    """The figures that outputs hold, not what the latent's own channels would say."""
    feature, latent = moving_square(), moving_square()[..., :8]
    right = torch.stack([torch.zeros(8), torch.linspace(0, 1, 8)], dim=1)
    about = [{"embedding_channels": ["content 1", "camera right"], "motion_embedding": x} for x in (right, -right)]
    curves = [draw(tmp_path / "clip.pt", feature, latent, about=x)[-110:] for x in (None, *about)]
    differ = [(a != b).any(axis=-1).mean() for a, b in ((curves[0], curves[1]), (curves[1], curves[2]))]
    assert min(differ) > 0.005


def test_another_picture_is_not_written_over(tmp_path):
    write_preview(tmp_path / "clip.pt", moving_square())
    before = (tmp_path / "clip.png").read_bytes()
    write_preview(tmp_path / "clip.pt", moving_square().flip(0))  # its own may be
    assert (tmp_path / "clip.png").read_bytes() != before
    Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save(tmp_path / "clip.png")
    other = (tmp_path / "clip.png").read_bytes()
    with pytest.raises(UserError, match=r"--preview would write over .*clip\.png"):
        write_preview(tmp_path / "clip.pt", moving_square())
    assert [path.name for path in tmp_path.iterdir()] == ["clip.png"]
    assert (tmp_path / "clip.png").read_bytes() == other


def test_the_title_says_whose_preview_it_is(tmp_path, recwarn):
    plain = draw(tmp_path / "clip.pt", moving_square())
    about = {"video": "a$b$.mp4", "model": "VideoMAE", "caption": "貓 runs\n" + "far " * 200, "fps": 8.0}
    titled = draw(tmp_path / "clip.pt", moving_square(), about=about)
    title = (plain != titled).any(axis=-1)
    _, bottom, left, right = box(title)
    assert bottom <= 25 and left >= MARGIN and right < titled.shape[1]  # nothing else changes, nothing is cut off
    assert not recwarn.list


def test_what_is_dead_is_grey_and_what_is_alive_is_not(tmp_path):
    alive = moving_square()
    dead = 3 + 1e-7 * torch.randn(alive.shape)
    rows = []
    for feature, latent in ((alive, dead[..., :4]), (dead, alive)):
        sheet = draw(tmp_path / "clip.pt", feature, latent)
        grey = is_colour(sheet, GREY, 2)
        assert grey.sum() == pytest.approx(6 * 120 * 180, rel=0.02)  # all of the dead row, nothing of the other
        rows.append(np.flatnonzero(grey.mean(axis=1) > 0.5)[0])
        assert np.ptp(pictures(sheet, int(rows[-1] < 150)), axis=-1).max() > 60  # colours elsewhere
    assert rows[0] > rows[1] + 120


def test_the_latent_has_the_colours_of_the_features(tmp_path):
    """Of the same clip under another basis: turned so that what is alike looks alike."""
    x = moving_square() + 0.3 * torch.randn(8, 6, 9, 16, generator=torch.Generator().manual_seed(1))
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2))).Q
    sheet = draw(tmp_path / "clip.pt", x, x @ rotation * 7)
    features, latent = pictures(sheet, 0), pictures(sheet, 1)
    assert np.abs(features - latent).mean() < 10 < np.abs(features - features[:, :, ::-1]).mean()


@pytest.mark.parametrize("shape", [(1, 7, 4), (3, 12, 2), (2, 1, 1, 1), (500, 2, 3, 5)])
def test_any_feature_can_be_shown(tmp_path, shape):
    assert draw(tmp_path / "clip.pt", torch.randn(shape).half()).shape[1] >= 640


def test_encode_draws_what_it_encodes(trained, tmp_path, run_here):
    source, target = make_features(tmp_path / "f", count=3), tmp_path / "z"
    arguments = ["encode.py", "--checkpoint", trained[0] / "ck" / "motion_ae_epoch1.pt", "--input", source]
    arguments += ["--output", target]
    assert "3 written, 0 skipped" in run_here(*arguments, "--preview").stdout
    assert sorted(path.stem for path in target.glob("*.png")) == ["0000", "0001", "0002"]
    (target / "0000.png").unlink()
    (target / "0001.png").write_bytes(b"somebody's picture")
    assert "0 written, 3 skipped" in run_here(*arguments, "--preview").stdout  # what is finished stays as it is
    result = run_here(*arguments, "--preview", "--overwrite")
    assert "2 written, 0 skipped, 1 failed" in result.stdout and "--preview would write over" in result.stderr
    assert (target / "0000.png").exists() and (target / "0001.png").read_bytes() == b"somebody's picture"
    assert "3 written, 0 skipped" in run_here(*arguments, "--overwrite").stdout  # pictures of earlier latents go
    assert [path.read_bytes() for path in target.glob("*.png")] == [b"somebody's picture"]


def test_somebody_elses_picture_costs_that_clip_alone(tmp_path, run_here):
    (tmp_path / "clips").mkdir()
    for name in ("0", "1"):
        write_video(tmp_path / "clips" / f"{name}.avi", [np.zeros((64, 96, 3), dtype=np.uint8)] * 4, "MJPG")
    folder = tmp_path / "VideoMAE"
    folder.mkdir()
    (folder / "0.png").write_bytes(b"somebody's picture")
    arguments = ["vfm_feature.py", "--video_dir", tmp_path / "clips", "--output_root", tmp_path, *SMALL]
    assert counts(run_here(*arguments, "--models", "VideoMAE", "--preview")) == [1, 0, 1]
    assert "--preview would write over" in (folder / "failed_videos.txt").read_text()
    assert (folder / "0.png").read_bytes() == b"somebody's picture" and not (folder / "0.pt").exists()
    assert (folder / "1.pt").exists() and (folder / "1.png").exists()


def test_vfm_feature_draws_what_the_model_saw(tmp_path, run_here):
    (tmp_path / "clips").mkdir()
    frames = [np.full((64, 96, 3), 10 * index, dtype=np.uint8) for index in range(12)]
    for frame in frames:
        frame[:, 48:] = GREEN[::-1]  # OpenCV's order
    write_video(tmp_path / "clips" / "0.avi", frames, "MJPG")
    arguments = ["vfm_feature.py", "--video_dir", tmp_path / "clips", "--output_root", tmp_path, *SMALL]
    assert counts(run_here(*arguments, "--models", "VideoMAE", "--preview")) == [1, 0, 0]
    shown = pictures(read(tmp_path / "VideoMAE" / "0.pt"), 0, 2)  # 4 frames for 2 steps
    for picture, level in zip(shown, (0, 70), strict=True):
        assert is_colour(picture, GREEN)[:, 95:].mean() > 0.95
        assert np.abs(picture[10:-10, 10:80] - level).mean() < 8
