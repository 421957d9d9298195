"""Broken videos, hostile names, mutated files, full disks, killed processes; `bench_faults.py` does some at length."""

import os
import shutil
import threading
import time

import pytest
import torch
from bench_faults import decode_corpus, draw, encode, judge, load_mutants, make_corpus
from made_up import SIZES, SMALL, decode_clip, full_disk, make_features

SMALL = [*SMALL, "--models", "VideoMAE"]
TRAINING = ["--input_dim", "24", *SIZES[2:], "--epochs", "1"]


def small_clip(path):
    encode(draw(48, 64)[::8], path.parent / "clip.avi", ["-c:v", "mjpeg"])  # FFmpeg's % and : are not for file names
    (path.parent / "clip.avi").rename(path)


HOSTILE = ["two..dots", "a ", "貓 跑", "😀" * 50, "line\nbreak\ttab", "x" * 250, "-v", "%04d", "concat:a", "pipe:0"]
HOSTILE += ["*", "[a]", "'; exit;", "$HOME", "\\"]
NOT_UTF8 = os.fsdecode(b"\xff\xfe broken.mp4")


def test_hostile_names_do_no_harm(tmp_path, run_here):
    clips = tmp_path / "clips"
    clips.mkdir()
    small_clip(clips / "x.mp4")
    clip = (clips / "x.mp4").read_bytes()
    for name in HOSTILE:
        (clips / f"{name}.mp4").write_bytes(clip)
        (clips / f"{name[:240]} broken.mp4").write_bytes(b"no video")
    (clips / "x.mp4").unlink()
    (clips / NOT_UTF8).write_bytes(clip)

    result = run_here("vfm_feature.py", "--video_dir", ".", "--output_root", tmp_path / "f", *SMALL, cwd=clips)
    assert result.returncode == 0, result.stderr
    features = tmp_path / "f" / "VideoMAE"
    assert {path.stem for path in features.glob("*.pt")} == set(HOSTILE)
    assert {torch.load(path, weights_only=True)["video"] for path in features.glob("*.pt")} == {
        f"{n}.mp4" for n in HOSTILE
    }
    failures = (features / "failed_videos.txt").read_text().splitlines()
    assert len(failures) == len(HOSTILE) + 1
    assert all(line.count("\t") == 1 and " broken.mp4\t" in line for line in failures)

    result = run_here("train.py", "--feature_dir", features, "--save_dir", tmp_path / "ck", *TRAINING)
    assert result.returncode == 0, result.stderr
    checkpoint = tmp_path / "ck" / "motion_ae_epoch1.pt"
    result = run_here("encode.py", "--checkpoint", checkpoint, "--input", ".", "--output", tmp_path / "z", cwd=features)
    assert result.returncode == 0, result.stderr
    assert {path.stem for path in (tmp_path / "z").glob("*.pt")} == {*HOSTILE, "stats"}
    assert {path.name for path in tmp_path.iterdir()} == {"clips", "f", "ck", "z"}


def test_links_pipes_and_devices_are_passed_over(tmp_path, run_here, trained):
    """A pipe would be waited for, a device would never end, a folder that holds itself would be searched for ever."""
    folder = tmp_path / "in"
    make_features(folder, 2)
    small_clip(folder / "clip.mp4")
    (folder / "again").symlink_to(folder)
    (folder / "folder.mp4").mkdir()
    (folder / "folder.pt").mkdir()
    for suffix in (".mp4", ".pt", ".npy", ".csv"):
        (tmp_path / f"itself{suffix}").symlink_to(tmp_path / f"itself{suffix}")
        (folder / f"device{suffix}").symlink_to("/dev/zero")
        os.mkfifo(folder / f"pipe{suffix}")
    (folder / "empty.mp4").touch()

    result = run_here("vfm_feature.py", "--video_dir", folder, "--output_root", tmp_path / "f", *SMALL)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (tmp_path / "f" / "VideoMAE").glob("*.pt")] == ["clip.pt"]
    assert (tmp_path / "f" / "VideoMAE" / "failed_videos.txt").read_text().startswith("empty.mp4\t")
    result = run_here("train.py", "--feature_dir", folder, "--save_dir", tmp_path / "ck", *SIZES, "--epochs", 1)
    assert result.returncode == 0, result.stderr
    assert "2 training files" in result.stdout
    encoding = ["--checkpoint", trained[0] / "ck" / "motion_ae_epoch1.pt", "--output"]
    assert run_here("encode.py", *encoding, tmp_path / "z", "--input", folder).returncode == 0
    assert len(list((tmp_path / "z").rglob("*.pt"))) == 3  # with stats.pt

    for path in (tmp_path / "itself", folder / "device", folder / "pipe"):
        for command in (
            ["vfm_feature.py", "--video_dir", folder, "--csv_path", f"{path}.csv"],
            ["train.py", "--feature_dir", f"{path}.pt"],
            ["encode.py", *encoding, tmp_path / "one.pt", "--input", f"{path}.pt"],
            ["encode.py", *encoding, tmp_path / "one.pt", "--input", f"{path}.npy"],
            ["encode.py", "--checkpoint", f"{path}.pt", "--input", folder, "--output", tmp_path / "one"],
        ):
            result = run_here(*command)
            assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return folder, make_corpus(folder, seed=1, cuts=2, rotten=16)


def test_every_video_is_right_or_recorded(corpus):
    verdicts = decode_corpus(*corpus)
    assert set(verdicts["whole"]) == {"right"} and verdicts["whole"]["right"] > 80
    assert verdicts["not a video"] == {"recorded": 6}
    assert verdicts["cut"]["WRONG"] == 0 and verdicts["cut"]["recorded"] >= 12
    # VP8, VP9 and HEVC have no checks of their own: a flipped bit can look like another picture
    assert verdicts["bit rot"]["WRONG"] <= 6


@pytest.mark.parametrize("backend", ["decord", "opencv"])
def test_the_other_decoders_give_right_frames_or_none(corpus, backend):
    """In the kinds of video of which they take the wrong track, count hidden frames, turn, mirror or map colours."""
    folder, shows = corpus
    plain = {"h264_b_frames.mkv", "h264_bt709.mp4", "mpeg4.avi", "vp9.webm"}
    lying = {"two_tracks.mp4", "upside_down.mp4", "rotated_90.mp4", "copied.mp4", "keyless.mkv", "hidden_packets.webm"}
    lying |= {
        "hevc_pq.mp4",
        "hevc_hlg.mov",
        "hevc_p3.mp4",
        "mpeg2_interlaced.mpg",
        "copied_open.mkv",
        "cut_0_mpeg4.avi",
    }
    read = set()
    for name in plain | lying:
        try:
            clips = decode_clip(str(folder / name), 8, [(96, 128)], backend)
        except Exception:  # decord has its own kind
            continue
        assert judge(shows[name], clips) == "right", name
        read.add(name)
    assert plain <= read


def test_mutated_files_load_or_are_refused():
    for file, counts in load_mutants(seed=1, count=400).items():
        assert counts["WRONG"] == 0, file
        assert counts["loads"] > 0 and counts["refused"] > 0, file


def test_a_full_disk_ends_the_run_in_one_line(tmp_path, run_here):
    (tmp_path / "clips").mkdir()
    for index in range(3):
        small_clip(tmp_path / "clips" / f"{index}.mp4")
    command = ["vfm_feature.py", "--video_dir", tmp_path / "clips", "--output_root", tmp_path / "f", *SMALL]
    with full_disk(1000):
        result = run_here(*command)
    assert result.returncode == 1
    assert "error: [Errno 27] File too large; finished files are whole" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr and "VideoMAE" in result.stdout
    assert not [path for path in (tmp_path / "f").rglob("*") if path.suffix in (".pt", ".tmp")]
    assert run_here(*command).returncode == 0 and len(list((tmp_path / "f").rglob("*.pt"))) == 3


@pytest.mark.parametrize(("script", "count"), [("vfm_feature.py", 12), ("train.py", 2), ("encode.py", 12)])
def test_a_folder_that_vanishes_is_made_again(script, count, trained, tmp_path, run_here):
    out, clips = tmp_path / "out", tmp_path / "clips"
    clips.mkdir()
    small_clip(clips / "0.mp4")
    for index in range(1, 12):
        shutil.copy(clips / "0.mp4", clips / f"{index}.mp4")
    features, checkpoint = trained[0] / "features", trained[0] / "ck" / "motion_ae_epoch1.pt"
    command = {
        "vfm_feature.py": ["--video_dir", clips, *SMALL, "--output_root", out],
        "train.py": ["--feature_dir", features, *SIZES, "--epochs", 5, "--resume", "--save_dir", out],
        "encode.py": ["--checkpoint", checkpoint, "--input", features, "--output", out],
    }[script]

    def vanish():
        while not list(out.rglob("[!.]*.pt")):
            time.sleep(0.002)
        while out.exists():  # a file may come while the folder is emptied
            shutil.rmtree(out, ignore_errors=True)

    thread = threading.Thread(target=vanish)
    thread.start()
    result = run_here(script, *command)
    thread.join()
    assert "Traceback" not in result.stderr
    assert result.returncode == 0 or "error: " in result.stderr.splitlines()[-1], result.stderr
    result = run_here(script, *command)
    assert result.returncode == 0, result.stderr
    paths = list(out.rglob("[!.]*.pt"))
    assert len([torch.load(path, weights_only=True) for path in paths]) >= count and not list(out.rglob(".*"))


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path, run_here):
    (tmp_path / "clips").mkdir()
    small_clip(tmp_path / "clips" / "a.mp4")
    (tmp_path / "file").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "VideoMAE").touch()
    for out in ("file", "file/below", "out"):
        result = run_here("vfm_feature.py", "--video_dir", tmp_path / "clips", "--output_root", tmp_path / out, *SMALL)
        *warnings, error = result.stderr.splitlines()
        assert result.returncode == 2 and all(": warning: " in line for line in warnings), result.stderr
        assert f"--output_root {tmp_path / out}" in error and "no folder" in error
