"""encode.py from the command line, on made-up features and a checkpoint that train.py made of them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import torch
from made_up import ROOT, SIZES, full_disk, hear_ctrl_c, make_features

from model import MotionFeatureAutoencoder, load_checked

METRICS = ("reconstruction_error", "motion_error", "cosine")


def test_encode_needs_no_model_flag(trained, tmp_path, run_here):
    folder, _ = trained
    checkpoint = folder / "ck" / "motion_ae_epoch2.pt"
    source = folder / "features" / "nested" / "0001.pt"
    result = run_here(
        "encode.py", "--checkpoint", checkpoint, "--input", source, "--output", tmp_path / "deep" / "z.pt"
    )
    assert result.returncode == 0, result.stderr
    output = torch.load(tmp_path / "deep" / "z.pt", weights_only=True)
    documented = {"latent", "motion_embedding", "embedding_channels", "compression_ratio"}
    documented |= {"caption", "video", "model", "right", "down", "log speed"}
    assert set(output) == documented | {*METRICS, "settings"}
    assert output["caption"] == "clip 1"
    assert output["compression_ratio"] == 0.5
    x = torch.load(source, weights_only=True)["feature"].float()[None]
    expected = MotionFeatureAutoencoder.from_checkpoint(checkpoint)(x)
    torch.testing.assert_close(output["latent"], expected["latent"][0])
    torch.testing.assert_close(output["motion_embedding"], expected["motion_embedding"][0])
    figures = [f"{name.removesuffix('_error')} {output[name]:.3f}" for name in METRICS]
    assert result.stdout.splitlines() == [
        f"written to {tmp_path / 'deep' / 'z.pt'}, compression_ratio 0.5; {', '.join(figures)}"
    ]


def test_encode_mirrors_a_folder(trained, tmp_path, run_here):
    folder, _ = trained
    result = run_here(
        *("encode.py", "--checkpoint", folder / "ck" / "motion_ae_epoch1.pt", "--save_reconstruction"),
        *("--input", folder / "features", "--output", tmp_path / "z", *SIZES, "--use_token"),
    )
    assert result.returncode == 0, result.stderr
    written = sorted(path.relative_to(tmp_path / "z") for path in (tmp_path / "z").rglob("[!s]*.pt"))
    assert written == [Path("nested") / f"{index:04d}.pt" for index in range(12)]
    output = torch.load(tmp_path / "z" / "nested" / "0003.pt", weights_only=True)
    assert output["reconstruction"].shape == (6, 2, 3, 12)
    assert "caption" not in output


def encode_folder(run_here, trained, source, target, *flags, epoch=1):
    """Standard output's counts (written, skipped, failed) of a run over a folder, and its result."""
    checkpoint = trained[0] / "ck" / f"motion_ae_epoch{epoch}.pt"
    result = run_here("encode.py", "--checkpoint", checkpoint, "--input", source, "--output", target, *flags)
    words = result.stdout.replace(",", "").replace(";", "").split()
    return [int(words[words.index(name) - 1]) for name in ("written", "skipped", "failed")], result


def rows(target):
    table = pd.read_csv(target / "encode_report.csv", dtype=str, keep_default_na=False)
    return {row["file"]: row for row in table.to_dict("records")}


def test_finished_files_are_skipped_and_keep_their_row(trained, tmp_path, run_here):
    source, target = make_features(tmp_path / "f", count=6), tmp_path / "z"
    assert encode_folder(run_here, trained, source, target)[0] == [6, 0, 0]
    made, report = {path: path.read_bytes() for path in target.glob("[!s]*.pt")}, rows(target)
    (target / "0001.pt").write_bytes(made[target / "0001.pt"][:1000])  # torn, as another program might
    (target / "0002.pt").unlink()
    torch.save({"feature": torch.randn(6, 2, 3, 12)}, source / "0004.pt")  # another feature
    counts, result = encode_folder(run_here, trained, source, target)
    assert counts == [3, 3, 0]
    assert {path for path in made if path.read_bytes() != made[path]} == {target / "0004.pt"}
    assert [name for name, row in rows(target).items() if row != report[name]] == ["0004.pt"]
    assert len(rows(target)) == 6 and "cosine" in result.stdout
    assert encode_folder(run_here, trained, source, target, "--overwrite")[0] == [6, 0, 0]
    counts, result = encode_folder(run_here, trained, source, target, epoch=2)
    assert counts == [6, 0, 0] and "; 6 in place of others, of another checkpoint, feature or flag" in result.stdout
    assert encode_folder(run_here, trained, source, target, "--save_reconstruction", epoch=2)[0] == [6, 0, 0]
    assert encode_folder(run_here, trained, source, target, "--save_reconstruction", epoch=2)[0] == [0, 6, 0]


def test_failed_files_are_named_and_the_others_are_made(trained, tmp_path, run_here):
    source, target = make_features(tmp_path / "f", count=4), tmp_path / "f" / "latents"  # below its own input
    torch.save(torch.full((6, 2, 3, 12), float("nan")), source / "nan.pt")
    (source / "torn.pt").write_bytes((source / "0000.pt").read_bytes()[:-100])
    for _ in range(2):  # a failed file has another try
        counts, result = encode_folder(run_here, trained, source, target)
        assert counts[2] == 2 and result.returncode == 0
        assert "nan.pt: its largest number is nan" in result.stderr and "torn.pt is damaged" in result.stderr
    assert sorted(path.name for path in target.iterdir()) == [
        *(f"000{i}.pt" for i in range(4)),
        "encode_report.csv",
        "stats.pt",
    ]
    assert "largest number is nan" in rows(target)["nan.pt"]["failure"] and rows(target)["0000.pt"]["failure"] == ""
    shutil.rmtree(target)
    for path in source.glob("000*"):
        path.unlink()
    counts, result = encode_folder(run_here, trained, source, tmp_path / "z")
    assert (counts, result.returncode) == ([0, 0, 2], 1)


def test_safetensors_hold_the_same(trained, tmp_path, run_here):
    source, target = make_features(tmp_path / "f", count=4), tmp_path / "z"
    encode_folder(run_here, trained, source, target)
    for _ in range(2):
        counts, _ = encode_folder(run_here, trained, source, target, "--output_format", "safetensors")
    assert counts == [0, 4, 0]
    sorted(source.glob("0003.*"))[0].unlink()
    _, result = encode_folder(run_here, trained, source, target, "--output_format", "safetensors")
    assert "also holds 5 files of other features, models or formats, such as 0000.pt\n" in result.stdout
    expected = torch.load(target / "0001.pt", weights_only=True)
    arrays = safetensors.numpy.load_file(target / "0001.safetensors")
    np.testing.assert_array_equal(arrays["latent"], expected["latent"].numpy())
    with safetensors.safe_open(target / "0001.safetensors", "np") as file:
        assert file.metadata()["caption"] == "clip 1"
    single = ["--checkpoint", trained[0] / "ck" / "motion_ae_epoch1.pt", "--input", source / "0001.pt"]
    assert run_here("encode.py", *single, "--output", tmp_path / "one.safetensors").returncode == 0
    for path in (target / "0001.safetensors", tmp_path / "one.safetensors"):
        saved = load_checked(path)
        assert saved.keys() == expected.keys()
        for name, value in saved.items():
            assert type(value) is type(expected[name])
            np.testing.assert_array_equal(value, expected[name])  # of numbers some are NaN


def test_what_else_a_feature_file_says_goes_along(trained, tmp_path, run_here):
    entries = {"license": "cc-by-4.0", "fps": 12.5, "frame_indices": torch.tensor([0, 3, 5]), "layers": [6, 12]}
    not_kept = {"cosine": 7.0, "settings": {"num_frames": 6}, "pixels": torch.zeros(2, 3), "nothing": None}
    torch.save({"feature": torch.randn(6, 2, 3, 12), **entries, **not_kept}, tmp_path / "x.pt")
    arguments = ["--checkpoint", trained[0] / "ck" / "motion_ae_epoch1.pt", "--input", tmp_path / "x.pt", "--output"]
    for suffix in ("pt", "safetensors"):
        assert run_here("encode.py", *arguments, tmp_path / f"z.{suffix}").returncode == 0
    saved = torch.load(tmp_path / "z.pt", weights_only=True)
    assert {name: saved[name] for name in entries if name != "frame_indices"} == {
        name: value for name, value in entries.items() if name != "frame_indices"
    }
    assert saved["frame_indices"].tolist() == [0, 3, 5]
    assert saved["cosine"] < 1.01 and isinstance(saved["settings"], str) and not {"pixels", "nothing"} & saved.keys()
    other = load_checked(tmp_path / "z.safetensors")
    assert other.keys() == saved.keys() and other["frame_indices"].tolist() == [0, 3, 5]
    assert (other["license"], other["fps"], other["layers"]) == ("cc-by-4.0", 12.5, [6, 12])


def waves_that_move(speed, start=0.0):
    """[6, 10, 15, 12], to the right by `speed` cells a step, from `start` cells on."""
    x = torch.arange(15.0) - start - speed * torch.arange(6.0)[:, None]
    waves = torch.stack([(x * k / 9 + phase).sin() for k in (4, 6) for phase in range(6)], dim=-1)  # [T, W, 12]
    return waves[:, None].expand(-1, 10, -1, -1).contiguous()


def test_the_report_says_how_the_pictures_move(tmp_path, run_here):
    """Waves that move to the right, on a grid that the feature has, its file says, the flag says, or nobody knows."""
    feature = waves_that_move(0.3)
    source, target = tmp_path / "f", tmp_path / "z"
    (tmp_path / "seen").mkdir()
    for index in range(8):
        torch.save(waves_that_move(0.1 * index - 0.4, start=3.7 * index), tmp_path / "seen" / f"{index}.pt")
    flags = ["--save_dir", tmp_path / "ck", *SIZES, "--use_token", "--epochs", 0]
    assert run_here("train.py", "--feature_dir", tmp_path / "seen", *flags).returncode == 0
    source.mkdir()
    flat = feature.flatten(1, 2)
    torch.save({"feature": feature}, source / "whole.pt")
    torch.save({"feature": flat, "grid": torch.tensor([10, 15])}, source / "says.pt")
    torch.save({"feature": flat, "grid": [[-10, -15], "10 x 15"]}, source / "unknown.pt")
    counts, result = encode_folder(run_here, [tmp_path], source, target, epoch=0)
    assert counts == [3, 0, 0] and result.stdout.count("no grid in 1 files") == 1
    right = {name: row["right"] for name, row in rows(target).items()}
    assert float(right["whole.pt"]) == pytest.approx(0.3, abs=0.1)
    assert right["says.pt"] == right["whole.pt"] and right["unknown.pt"] == "nan"
    unknown = torch.load(target / "unknown.pt", weights_only=True)
    assert not unknown["motion_embedding"][:, unknown["embedding_channels"].index("camera right")].any()
    assert encode_folder(run_here, [tmp_path], source, target, epoch=0)[0] == [0, 3, 0]
    assert rows(target)["whole.pt"]["right"] == right["whole.pt"]

    counts, result = encode_folder(run_here, [tmp_path], source, target, "--grid", 10, 15, epoch=0)
    assert counts == [3, 0, 0] and "no grid" not in result.stdout
    told_right = {name: row["right"] for name, row in rows(target).items()}
    assert told_right == right | {"unknown.pt": right["says.pt"]}
    told = torch.load(target / "unknown.pt", weights_only=True)
    assert told["latent"].shape == (6, 10, 15, 6)
    counts, result = encode_folder(run_here, [tmp_path], source, target, "--grid", 9, 15, epoch=0)
    assert counts == [2, 0, 1] and "unknown.pt: N is 150, but --grid is 9 x 15" in result.stderr


@pytest.mark.parametrize("length", [6, 300])
def test_the_figures_are_what_numpy_says(trained, tmp_path, run_here, length):
    source = make_features(tmp_path, count=1, shape=(length, 2, 3, 12)) / "0000.pt"
    command = ["--checkpoint", trained[0] / "ck" / "motion_ae_epoch1.pt", "--input", source, "--save_reconstruction"]
    assert run_here("encode.py", *command, "--output", tmp_path / "z.safetensors").returncode == 0
    x = torch.load(source, weights_only=True)["feature"].double().numpy()
    saved = load_checked(tmp_path / "z.safetensors")
    r, found = saved["reconstruction"].double().numpy(), {name: saved[name] for name in METRICS}
    error = r - x
    expected = {
        "reconstruction_error": (error**2).sum() / ((x - x.mean(axis=(0, 1, 2))) ** 2).sum(),
        "motion_error": (np.diff(error, axis=0) ** 2).sum() / (np.diff(x, axis=0) ** 2).sum(),
        "cosine": ((r * x).sum(-1) / np.linalg.norm(r, axis=-1) / np.linalg.norm(x, axis=-1)).mean(),
    }
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_clip_of_one_step_has_no_motion(trained, tmp_path, run_here):
    make_features(tmp_path / "f", count=1, shape=(1, 2, 3, 12))
    counts, result = encode_folder(run_here, trained, tmp_path / "f", tmp_path / "z")
    assert counts == [1, 0, 0]
    assert rows(tmp_path / "z")["0000.pt"]["motion_error"] == "nan"
    assert "\nmotion_error " not in result.stdout and "\ncosine " in result.stdout


def test_ranks_of_torchrun_write_what_one_process_writes(trained, tmp_path, run_here):
    arguments = ["encode.py", "--checkpoint", trained[0] / "ck" / "motion_ae_epoch2.pt", "--device", "cpu"]
    arguments += ["--input", trained[0] / "features", "--output"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, *map(str, arguments), str(tmp_path / "two")]
    ranks = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun does; sums depend on the number of threads
    alone = run_here(*arguments, tmp_path / "one")
    torch.set_num_threads(threads)
    for result in (ranks, alone):
        assert result.returncode == 0, result.stderr
        assert "12 written, 0 skipped, 0 failed" in result.stdout
    one, two = (
        {path.relative_to(t): path.read_bytes() for path in t.rglob("*.*")}
        for t in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two and len(one) == 14


def test_another_feature_of_the_same_size_and_time_is_encoded_again(trained, tmp_path, run_here):
    source, target = make_features(tmp_path / "f", count=1), tmp_path / "z"
    encode_folder(run_here, trained, source, target)
    path, before = source / "0000.pt", torch.load(target / "0000.pt", weights_only=True)["latent"]
    old = path.stat()
    torch.save(torch.load(path, weights_only=True) | {"feature": torch.randn(6, 2, 3, 12)}, path)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert path.stat().st_size == old.st_size
    assert encode_folder(run_here, trained, source, target)[0] == [1, 0, 0]
    assert not torch.equal(torch.load(target / "0000.pt", weights_only=True)["latent"], before)


def test_embeddings_of_another_version_are_made_again(trained, tmp_path, run_here, monkeypatch):
    source, target = make_features(tmp_path / "f", count=1), tmp_path / "z"
    encode_folder(run_here, trained, source, target)
    assert encode_folder(run_here, trained, source, target)[0] == [0, 1, 0]
    monkeypatch.setattr("model.EMBEDDING_VERSION", 0)
    assert encode_folder(run_here, trained, source, target)[0] == [1, 0, 0]


def test_a_copied_folder_is_finished(trained, tmp_path, run_here):
    source = make_features(tmp_path / "f", count=3)
    encode_folder(run_here, trained, source, tmp_path / "z", "--preview")
    for name in ("f", "z"):
        shutil.copytree(tmp_path / name, tmp_path / "copy" / name, copy_function=shutil.copyfile)  # with new times
    counts, _ = encode_folder(run_here, trained, tmp_path / "copy" / "f", tmp_path / "copy" / "z", "--preview")
    assert counts == [0, 3, 0]


def test_a_full_disk_ends_the_run_with_status_1(trained, tmp_path, run_here):
    source = make_features(tmp_path / "f", count=3)
    with full_disk(3000):
        counts, result = encode_folder(run_here, trained, source, tmp_path / "z")
    assert (counts, result.returncode) == ([0, 0, 0], 1)
    assert "File too large; finished files are whole" in result.stderr.splitlines()[-1]
    assert {path.name for path in (tmp_path / "z").iterdir()} == {"encode_report.csv", "stats.pt"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_at_any_moment_the_same_command_finishes_the_work(trained, tmp_path, run_here, number):
    source, target = make_features(tmp_path / "f", count=3, shape=(30, 8, 8, 12)), tmp_path / "z"
    for index in range(13):
        os.link(source / f"000{index % 3}.pt", source / f"more{index:03d}.pt")
    arguments = ["encode.py", "--checkpoint", trained[0] / "ck" / "motion_ae_epoch1.pt", "--device", "cpu"]
    command = [sys.executable, *map(str, arguments), "--input", str(source), "--output", str(target)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, preexec_fn=hear_ctrl_c)
    while len(list(target.glob("[!s]*.pt"))) < 3:  # beside stats.pt
        time.sleep(0.005)
        assert process.poll() is None
    process.send_signal(number)
    stdout, stderr = (stream.decode() for stream in process.communicate(timeout=30))
    assert "Traceback" not in stderr
    if number != signal.SIGKILL:
        assert process.returncode == 130 and "stopped" in stderr
        assert " written, 0 skipped, 0 failed" in stdout
    finished = {path: path.read_bytes() for path in target.glob("[!s]*.pt")}
    assert 3 <= len(finished) < 16
    counts, _ = encode_folder(run_here, trained, source, target)
    assert counts == [16 - len(finished), len(finished), 0]
    assert len(rows(target)) == 16
    assert {path: path.read_bytes() for path in finished} == finished
    whole = tmp_path / "whole"
    encode_folder(run_here, trained, source, whole)
    for path in whole.glob("[!s]*.pt"):
        one, other = (torch.load(folder / path.name, weights_only=True) for folder in (whole, target))
        torch.testing.assert_close(one["latent"], other["latent"])
