"""bench_autoencoder.py: students that learn from videos the relations of a target."""

import json
import signal
import sys

import bench_autoencoder as bench
import pytest
import torch
from made_up import save
from test_frames import gray_clip

from model import UserError, load_feature, run_script


def feature_file(path, steps=6, **about):
    generator = torch.Generator().manual_seed(len(path.stem) + ord(path.stem[-1]))
    feature = torch.randn(steps, 2, 3, 8, generator=generator).cumsum(dim=0)
    return save(path, {"feature": feature, "video": "gray.mkv"} | about)


@pytest.mark.parametrize(
    ("about", "seen"),
    [
        ({}, [0, 5, 11, 16, 21, 26]),  # every second of linspace(0, 29, 12)
        ({"frame_indices": [0, 6, 12, 17, 23, 29]}, [0, 6, 12, 17, 23, 29]),  # a frame a step
        ({"frame_indices": [*range(10, 22)], "start": 1.0, "end": 2.2}, [*range(10, 22, 2)]),  # a part of the video
    ],
)
def test_a_student_sees_the_frames_that_the_features_were_made_of(tmp_path, about, seen):
    gray_clip(tmp_path / "gray.mkv", 30)
    frames = bench.read_frames(feature_file(tmp_path / "a.pt", **about), tmp_path)
    assert frames.shape == (6, 3, 80, 120) and frames.dtype == torch.uint8
    torch.testing.assert_close(frames.float().mean(dim=(1, 2, 3)) / 4, torch.tensor(seen).float(), atol=0.5, rtol=0)


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"frame_indices": [*range(12)]}, "evenly"),  # of another sampling
        ({"frame_indices": [0, 4, 8, 12, 17, 21, 25, 29]}, "evenly"),  # eight frames are not six steps
        ({"video": "gone.mkv"}, "`video`"),
        ({"video": ""}, "`video`"),
    ],
)
def test_features_of_other_frames_are_refused(tmp_path, about, words):
    gray_clip(tmp_path / "gray.mkv", 30)
    with pytest.raises(UserError, match=words):
        bench.read_frames(feature_file(tmp_path / "a.pt", **about), tmp_path)


def test_a_student_s_error_is_that_of_its_cosines_within_what_it_sees():
    torch.manual_seed(0)
    student = bench.Student((2, 3))
    assert 0.88e6 < sum(weights.numel() for weights in student.parameters()) < 0.92e6
    frames = [torch.randint(256, (steps, 3, *bench.PICTURE), dtype=torch.uint8) for steps in (14, 4)]
    features = [torch.randn(steps, 2, 3, 8) for steps in (14, 4)]

    def change(clip, steps):  # of the cosines between all tokens of every second step
        with torch.no_grad():
            ours = student(frames[clip][None, steps])[0].reshape(-1, 64)
        raw = features[clip][steps][::2].reshape(-1, 8)
        cosines = [torch.cosine_similarity(x[:, None], x[None], dim=2) for x in (ours, raw)]
        return (cosines[0] - cosines[1]).abs().mean()

    long = (change(0, slice(0, 6)) + change(0, slice(6, 12))) / 2  # two steps are left over
    expected = (long + change(1, slice(0, 4))) / 2
    assert bench.student_error(student, frames, features) == pytest.approx(expected.item(), rel=1e-4)


def test_students_differ_by_seed_and_target_alone():
    """A target whose cosines are the same gives the same student; more steps bring it nearer to its target."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(256, (4, 8, 3, 4, 6), dtype=torch.uint8, generator=generator)
    frames = list(colours.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4))
    targets = list(colours.permute(0, 1, 3, 4, 2).float() - 128)  # the colour of each cell
    few, scaled, other = (
        bench.train_student(frames, wanted, 2, seed).clips[0].weight
        for wanted, seed in ((targets, 0), ([2 * target for target in targets], 0), (targets, 1))
    )
    torch.testing.assert_close(few, scaled)
    assert (few - other).abs().max() > 0.01
    errors = [bench.student_error(bench.train_student(frames, targets, n, 0), frames, targets) for n in (1, 40)]
    assert errors[1] < 0.8 * errors[0]


def test_the_table_of_students(tmp_path, monkeypatch, capsys):
    for index in range(6):
        name = f"{'unseen' if index < 2 else 'seen'}_{index}"
        gray_clip(tmp_path / "videos" / f"{name}.mkv", 12 + index)
        feature_file(tmp_path / "features" / f"{name}.pt", video=f"{name}.mkv")
    (tmp_path / "figures.json").write_text('{"other": 1}')
    flags = ["--held_out", "^unseen", "--ratios", "2", "--student", "videos", "--json", "figures.json"]
    flags += ["--student_steps", "2", "--student_seeds", "2", "--epochs", "1", "--num_heads", "2", "--model_dim", "16"]
    monkeypatch.setattr(bench, "PICTURE", (16, 24))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_autoencoder.py", "features", *flags, "--models", "models"])
    with pytest.raises(SystemExit) as ending:
        run_script(bench.main)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert ending.value.code == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    codes = [f"C/2, {code}" for code in ("PCA", "closed form", "trained")]
    assert figures["other"] == 1
    assert list(figures["student"]) == ["features", *codes]
    assert figures["student"]["features"]["over the features'"] == 1

    seen, unseen = (sorted((tmp_path / "features").glob(f"{name}*")) for name in ("seen", "unseen"))
    (seen_frames, seen_features), held_out = (
        ([bench.read_frames(path, tmp_path / "videos") for path in paths], [load_feature(path)[0] for path in paths])
        for paths in (seen, unseen)
    )
    students = [bench.train_student(seen_frames, seen_features, 2, seed) for seed in range(2)]
    error, other = (bench.student_error(student, *held_out) for student in students)
    row = figures["student"]["features"]
    assert row["error"] == pytest.approx((error + other) / 2) and error != other
    assert row["its spread"] == pytest.approx(abs(error - other) / 2**0.5, rel=1e-3)
