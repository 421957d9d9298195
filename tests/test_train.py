"""train.py from the command line, on a folder of made-up features."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from made_up import ROOT, SIZES, make_features, run, save

import train
from losses import COMPARED
from model import MotionFeatureAutoencoder, load_feature


def test_train_writes_a_checkpoint_that_explains_itself(trained):
    folder, stdout = trained
    assert "11 training files, 1 held out" in stdout
    checkpoints = [
        "motion_ae_best.pt",
        "motion_ae_epoch0.pt",
        "motion_ae_epoch1.pt",
        "motion_ae_epoch2.pt",
        "motion_ae_last.pt",
    ]
    assert sorted(path.name for path in (folder / "ck").iterdir()) == ["loss_curves.png", "metrics.csv", *checkpoints]
    checkpoint = torch.load(folder / "ck" / "motion_ae_epoch2.pt", weights_only=True)
    assert checkpoint["epoch"] == 2
    assert checkpoint["config"]["latent_dim"] == 6
    assert checkpoint["config"]["use_token"] is True
    assert checkpoint["config"]["clip_shape"] == (6, 2, 3)  # of every clip
    fresh = MotionFeatureAutoencoder(**checkpoint["config"]).state_dict()
    assert checkpoint["model"].keys() == fresh.keys()  # no wrapper's names
    assert checkpoint["model"]["network.networks.0.head.weight"].abs().max() > 0  # where it starts
    assert checkpoint["args"]["epochs"] == 2 and checkpoint["args"]["device"] == "cpu"
    assert "optimizer" not in checkpoint
    assert all(np.isfinite(value) for value in checkpoint["history"][-1].values())


def test_epoch_0_is_the_code_alone(trained):
    """A row and a checkpoint like the others; trained or not, reconstruction and motion are the code's."""
    folder, stdout = trained
    assert "epoch 0: the code alone | held out, x PCA's: " in stdout
    rows = torch.load(folder / "ck" / "motion_ae_last.pt", weights_only=True)["history"]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    for name in ("reconstruction_error", "motion_error"):
        assert [row[f"val_{name}"] for row in rows] == pytest.approx([rows[0][f"val_{name}"]] * 3, rel=1e-3)
    models = [MotionFeatureAutoencoder.from_checkpoint(folder / "ck" / f"motion_ae_epoch{n}.pt") for n in (0, 2)]
    assert [model.network.at_rest for model in models] == [True, False]


def test_train_says_how_it_stands_against_pca(trained):
    folder, stdout = trained
    row = torch.load(folder / "ck" / "motion_ae_epoch2.pt", weights_only=True)["history"][2]
    (line,) = (line for line in stdout.splitlines() if line.startswith("epoch 2: "))
    for name, column in COMPARED.items():
        ratio = row[f"val_{column}"] / row[f"pca_{column}"]
        assert f"{name} {ratio:.3f}" in line and row[f"ratio_{name}"] == pytest.approx(ratio)
    ours, pca = (row[f"{part}_reconstruction_loss"] + row[f"{part}_motion_loss"] for part in ("val", "pca"))
    assert f"total {ours / pca:.3f}" in line
    assert f"motion-weighted PCA: reconstruction {row['pca_reconstruction_error']:.4f}" in stdout
    assert "low-pass PCA of blocks: reconstruction" in stdout


def test_latents_spread_is_that_of_the_training_clips(trained):
    folder, _ = trained
    model = MotionFeatureAutoencoder.from_checkpoint(folder / "ck" / "motion_ae_epoch2.pt")
    files, _ = train.split_files(train.look_at_files(folder / "features", 12), 0.1, 0)
    latents = torch.stack([model.encode(load_feature(file.path)[0][None].float()) for file in files])
    torch.testing.assert_close(model.latent_mean, latents.mean(dim=(0, 1, 2, 3, 4)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.latent_var, latents.flatten(0, 4).var(dim=0), atol=1e-4, rtol=1e-2)


def test_training_lowers_the_error_of_relations(tmp_path, run_here):
    """On clips that it has not seen, more than a tenth; the code's errors stay."""
    make_features(tmp_path / "f", 24, (6, 4, 4, 12))
    flags = ["--feature_dir", tmp_path / "f", "--save_dir", tmp_path / "ck", *SIZES, "--use_token"]
    result = run_here("train.py", *flags, "--epochs", 14, "--lr", 5e-3, "--keep_epochs", "best")
    assert result.returncode == 0, result.stderr
    ck, features = tmp_path / "ck", tmp_path / "f"
    flags = f"--checkpoint {ck}/motion_ae_best.pt --input {features} --output latents"
    assert result.stdout.splitlines()[-1].endswith(f"to encode by it: python encode.py {flags}")
    table = pd.read_csv(tmp_path / "ck" / "metrics.csv").set_index("epoch")
    assert table["val_relations_loss"].min() < 0.9 * table["val_relations_loss"][0]
    assert sorted(path.name for path in (tmp_path / "ck").glob("*.pt")) == ["motion_ae_best.pt", "motion_ae_last.pt"]


def test_videos_are_held_out_whole(tmp_path):
    """By the entry `video`, else by the name without a window's number."""
    for index in range(30):
        data = {"feature": torch.zeros(2, 1, 4)} | ({"video": f"{index // 3}.mp4"} if index < 15 else {})
        save(tmp_path / f"{'x' if index < 15 else f'clip{index // 3}'}_{index:03d}.pt", data)
    files = train.look_at_files(tmp_path, 4)
    assert len({file.video for file in files}) == 10
    for seed in range(5):
        parts = train.split_files(files, 0.2, seed)
        assert len(parts[1]) == 6 and not {file.video for file in parts[0]} & {file.video for file in parts[1]}
    windows = [file._replace(video="one.mp4") for file in files]
    assert train.split_files(windows, 0.2, 0) == (windows, [])
    for seed in range(5):  # of a long video and some short ones, the long one is trained on
        long = [file._replace(video="long.mp4" if index < 20 else file.video) for index, file in enumerate(files)]
        parts = train.split_files(long, 0.1, seed)
        assert len(parts[1]) in (3, 4) and "long.mp4" not in {file.video for file in parts[1]}


def test_the_errors_are_what_numpy_says(trained):
    """Of the checkpoint's own reconstruction of the held-out clip, as encode.py reports them."""
    folder, _ = trained
    path = folder / "ck" / "motion_ae_epoch2.pt"
    checkpoint, model = torch.load(path, weights_only=True), MotionFeatureAutoencoder.from_checkpoint(path)
    _, (held_out,) = train.split_files(train.look_at_files(folder / "features", 12), 0.1, 0)
    x = load_feature(held_out.path)[0].double()
    r = model(x.float()[None])["reconstruction"][0].double().numpy()
    x = x.numpy()
    expected = {
        "val_reconstruction_error": ((r - x) ** 2).sum() / ((x - x.mean(axis=(0, 1, 2))) ** 2).sum(),
        "val_motion_error": (np.diff(r - x, axis=0) ** 2).sum() / (np.diff(x, axis=0) ** 2).sum(),
        "val_cosine": ((r * x).sum(-1) / np.linalg.norm(r, axis=-1) / np.linalg.norm(x, axis=-1)).mean(),
    }
    found = {name: checkpoint["history"][-1][name] for name in expected}
    assert found == pytest.approx(expected, rel=1e-3)


def test_what_the_model_has_to_beat_is_pca(trained):
    """Motion-weighted PCA of the training files, made by numpy, of the held-out one."""
    folder, _ = trained
    checkpoint = torch.load(folder / "ck" / "motion_ae_epoch2.pt", weights_only=True)
    mean = checkpoint["model"]["code.mean"].double().numpy()
    files, (held_out,) = train.split_files(train.look_at_files(folder / "features", 12), 0.1, 0)
    x = np.stack([load_feature(file.path)[0].double().numpy() for file in files]) - mean
    moment = sum(part.reshape(-1, 12).T @ part.reshape(-1, 12) / (part.size / 12) for part in (x, np.diff(x, axis=1)))
    basis = np.linalg.eigh(moment)[1][:, -6:]
    clip = load_feature(held_out.path)[0].double().numpy()
    error = (clip - mean) @ basis @ basis.T + mean - clip
    expected = {
        "pca_reconstruction_error": (error**2).sum() / ((clip - clip.mean(axis=(0, 1, 2))) ** 2).sum(),
        "pca_motion_error": (np.diff(error, axis=0) ** 2).sum() / (np.diff(clip, axis=0) ** 2).sum(),
    }
    found = {name: checkpoint["history"][-1][name] for name in expected}
    assert found == pytest.approx(expected, rel=1e-3)


def test_same_seed_same_result(trained, tmp_path, run_here):
    folder, _ = trained
    flags = ["--feature_dir", folder / "features", *SIZES, "--epochs", 2, "--use_token"]
    assert run("train.py", *flags, "--save_dir", tmp_path / "again").returncode == 0
    first, again = (
        torch.load(path / "motion_ae_epoch2.pt", weights_only=True) for path in (folder / "ck", tmp_path / "again")
    )
    assert [{**row, "seconds": 0} for row in first["history"]] == [{**row, "seconds": 0} for row in again["history"]]
    assert all(torch.equal(first["model"][name], again["model"][name]) for name in first["model"])
    assert run_here("train.py", *flags, "--save_dir", tmp_path / "other", "--seed", 1).returncode == 0
    other = torch.load(tmp_path / "other" / "motion_ae_epoch2.pt", weights_only=True)
    assert first["history"][-1]["train_loss"] != other["history"][-1]["train_loss"]


def test_files_of_different_shapes_train_together(tmp_path, run_here):
    make_features(tmp_path / "f" / "a", 3, (6, 2, 3, 12))
    make_features(tmp_path / "f" / "b", 3, (9, 4, 12))
    make_features(tmp_path / "f" / "c", 1, (1, 1, 2, 12))
    result = run_here("train.py", "--feature_dir", tmp_path / "f", "--save_dir", tmp_path / "ck", *SIZES, "--epochs", 1)
    assert result.returncode == 0, result.stderr
    assert "7 training files, 0 held out, 3 shapes" in result.stdout


def test_an_epoch_sees_every_step_once(tmp_path, monkeypatch):
    """In parts of the whole grid, cut where blocks are."""
    make_features(tmp_path / "a", 3, (50, 5, 7, 12))
    make_features(tmp_path / "b", 2, (6, 80, 12))
    monkeypatch.setattr(train, "STEP_TOKENS", 24 * 35)
    clips = train.Clips(train.look_at_files(tmp_path, 12))
    seen = [torch.zeros(file.shape[0]) for file in clips.files]
    batches = clips.batches(2, seed=0, epoch=1)
    assert len(batches) == 6  # parts of 17, 17 and 16 steps of three clips, and two clips
    for batch in batches:
        assert len({clips.read(index, (part,)).shape for index, part in batch}) == 1  # they are stacked
        for index, part in batch:
            seen[index][part] += 1
    assert all(count.eq(1).all() for count in seen)
    assert clips.batches(2, seed=0, epoch=2) != batches
    for workers in (0, 1, 4):
        read = [x.shape[0] for x in clips.read_batches(batches, workers, "cpu")]
        assert read == [len(batch) for batch in batches]


def test_one_token_is_enough_to_train(tmp_path, run_here):
    save(tmp_path / "f" / "one.pt", torch.randn(2, 1, 12))
    flags = ["--feature_dir", tmp_path / "f", "--save_dir", tmp_path / "ck", *SIZES, "--epochs", 1, "--use_token"]
    result = run_here("train.py", *flags)
    assert result.returncode == 0, result.stderr
    assert "epoch 1: " in result.stdout and "x PCA's: relations" in result.stdout  # PCA makes no other error


def test_every_unusable_file_is_named_before_training(trained, tmp_path, run_here):
    make_features(tmp_path / "f", 3)
    whole = (trained[0] / "features" / "nested" / "0000.pt").read_bytes()
    (tmp_path / "f" / "cut.pt").write_bytes(whole[: len(whole) // 2])
    save(tmp_path / "f" / "narrow.pt", torch.zeros(6, 3, 11))
    save(tmp_path / "f" / "flat.npy", np.zeros((6, 12), dtype=np.float32))
    result = run_here("train.py", "--feature_dir", tmp_path / "f", "--save_dir", tmp_path / "ck", *SIZES)
    assert result.returncode == 2
    *lines, error = result.stderr.splitlines()
    assert len(lines) == 3 and all(line.startswith("failed: ") for line in lines)
    assert all(any(name in line for line in lines) for name in ("cut.pt", "narrow.pt", "flat.npy"))
    assert error.startswith("train.py: error: 3 of 6 feature files")
    assert not (tmp_path / "ck").exists()


def test_a_file_that_breaks_while_training_is_named(tmp_path, run_here, monkeypatch):
    """By the worker that reads it, in one line."""
    make_features(tmp_path / "f", 3)
    save(tmp_path / "f" / "late.pt", torch.full((6, 2, 12), float("nan")))  # the first look reads no numbers
    flags = ["--feature_dir", tmp_path / "f", "--save_dir", tmp_path / "ck", *SIZES]
    for workers in (0, 1):
        monkeypatch.setattr(train.Clips, "to_fit", lambda clips, *_: [torch.randn(6, 4, 12) for _ in range(4)])
        monkeypatch.setattr(train.Clips, "to_measure", lambda clips, *_: [torch.randn(1, 6, 4, 12)])
        result = run_here("train.py", *flags, "--num_workers", workers, "--overwrite")
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert result.stderr.startswith("train.py: error: ") and "late.pt: its largest number is nan" in result.stderr


def tensors(value):
    """All tensors in a nest of dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [tensor for child in children for tensor in tensors(child)]


def assert_same_run(folder, unbroken, epoch):
    """The same weights, optimizer state and errors, bit by bit; only the time that they took may differ."""
    for name in (f"motion_ae_epoch{epoch}.pt", "motion_ae_best.pt", "motion_ae_last.pt"):
        ours, theirs = (torch.load(path / name, weights_only=True) for path in (folder, unbroken))
        pairs = list(zip(tensors(ours), tensors(theirs), strict=True))
        assert len(pairs) > 25 and all(torch.equal(a, b) for a, b in pairs)
        assert ours["epoch"] == theirs["epoch"]
        for ours_row, theirs_row in zip(ours["history"], theirs["history"], strict=True):
            assert {**ours_row, "seconds": 0} == {**theirs_row, "seconds": 0}
    assert pd.read_csv(folder / "metrics.csv")["epoch"].tolist() == list(range(epoch + 1))
    assert (folder / "loss_curves.png").exists()


@pytest.fixture
def one_thread():
    """Tests that compare runs of several processes use one thread in each: sums depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {**os.environ, "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(threads)


def test_a_killed_run_is_resumed_to_the_same_result(tmp_path, run_here, one_thread):
    make_features(tmp_path / "f", 12, (6, 80, 12))  # more positions than a step takes
    flags = ["--feature_dir", tmp_path / "f", *SIZES, "--epochs", 4, "--use_token", "--num_workers", 1]
    assert run_here("train.py", *flags, "--save_dir", tmp_path / "unbroken", "--resume").returncode == 0

    command = [sys.executable, ROOT / "train.py", *flags, "--save_dir", tmp_path / "ck", "--device", "cpu", "--resume"]
    process = subprocess.Popen(list(map(str, command)), env=one_thread, start_new_session=True)
    while not (tmp_path / "ck" / "motion_ae_epoch2.pt").exists():
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    result = run_here("train.py", *flags, "--save_dir", tmp_path / "ck", "--resume")
    assert result.returncode == 0, result.stderr
    assert "going on after epoch" in result.stdout
    assert_same_run(tmp_path / "ck", tmp_path / "unbroken", 4)


def test_a_run_killed_between_any_two_files_goes_on(tmp_path, run_here, monkeypatch):
    make_features(tmp_path / "f", 4)
    flags = ["--feature_dir", tmp_path / "f", *SIZES, "--epochs", 2, "--use_token"]
    assert run_here("train.py", *flags, "--save_dir", tmp_path / "unbroken").returncode == 0
    replace = os.replace
    is_stopped = True
    written = -1
    while is_stopped:
        written, is_stopped, renamed = written + 1, False, []

        def stop_there(source, target, written=written, renamed=renamed):
            nonlocal is_stopped
            if len(renamed) == written:
                is_stopped = True
                raise KeyboardInterrupt  # nothing of the run is cleaned up after it but the temporary file
            replace(source, target)
            renamed.append(target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stop_there)
            stopped = run_here("train.py", *flags, "--save_dir", tmp_path / f"ck{written}")
        assert stopped.returncode == (130 if is_stopped else 0)
        result = run_here("train.py", *flags, "--save_dir", tmp_path / f"ck{written}", "--resume")
        assert result.returncode == 0, result.stderr
        assert_same_run(tmp_path / f"ck{written}", tmp_path / "unbroken", 2)
    assert written >= 12  # four files an epoch, and those of the best


def test_two_ranks_learn_what_one_learns_from_their_clips_together(tmp_path, run_here, one_thread):
    make_features(tmp_path / "f" / "a", 6, (6, 2, 3, 12))  # batches of 4 and 2
    make_features(tmp_path / "f" / "b", 4, (5, 4, 12), seed=1)
    flags = ["--feature_dir", tmp_path / "f", *SIZES, "--epochs", 2, "--use_token", "--dropout", 0, "--lr", 1e-3]
    flags += ["--val_fraction", 0]
    flags += ["--smooth_weight", 0]  # the latent's variance is taken over what a rank sees at once
    result = run_here("train.py", *flags, "--batch_size", 4, "--save_dir", tmp_path / "one")
    assert result.returncode == 0, result.stderr
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py", "--device=cpu"]
    command += [*flags, "--batch_size", 2, "--save_dir", tmp_path / "two"]
    ranks = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=one_thread, timeout=120
    )
    assert ranks.returncode == 0, ranks.stderr
    assert ranks.stdout.count("epoch 2: ") == 1
    one, two = (torch.load(tmp_path / name / "motion_ae_epoch2.pt", weights_only=True) for name in ("one", "two"))
    for ours, theirs in zip(two["history"], one["history"], strict=True):
        for name in (*(f"train_{term}_loss" for term in ("relations", "relations_of_moving")), "val_loss", "pca_loss"):
            if theirs["epoch"] > 0 or not name.startswith("train"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=1e-3, atol=1e-4)


def test_checkpoints_are_neither_lost_nor_mixed(tmp_path, run_here):
    make_features(tmp_path / "f", 4)
    flags = ["--feature_dir", tmp_path / "f", "--save_dir", tmp_path / "ck", *SIZES, "--use_token"]
    fresh = run_here("train.py", *flags, "--epochs", 2, "--resume")
    assert fresh.returncode == 0 and "no checkpoint in" in fresh.stdout

    def refused(message, *more):
        before = {path: path.read_bytes() for path in (tmp_path / "ck").iterdir()}
        result = run_here("train.py", *flags, *more)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert message in result.stderr, result.stderr
        assert before == {path: path.read_bytes() for path in (tmp_path / "ck").iterdir()}

    newest = tmp_path / "ck" / "motion_ae_last.pt"
    refused("--resume, give another --save_dir, or delete it with --overwrite", "--epochs", 2)
    refused(f"--epochs 3 contradicts {newest}, begun with 2", "--epochs", 3, "--resume")
    refused(f"--lr 0.5 contradicts {newest}, begun with 0.0002", "--epochs", 2, "--lr", 0.5, "--resume")
    refused("--batch_size times ranks 3 contradicts", "--epochs", 2, "--batch_size", 3, "--resume")
    refused("nowhere.pt does not exist", "--resume", tmp_path / "ck" / "nowhere.pt")
    refused("holds motion_ae_best.pt of an earlier run", "--resume", save(tmp_path / "elsewhere.pt", {}))
    refused("it holds no training state", "--epochs", 2, "--resume", tmp_path / "ck" / "motion_ae_epoch1.pt")
    refused("not allowed with argument", "--resume", "--overwrite")
    features = tmp_path / "f" / "0000.pt"
    before = features.read_bytes()
    torch.save({**torch.load(features), "feature": torch.randn(6, 2, 3, 12)}, features)  # other numbers
    assert features.stat().st_size == len(before)
    refused("the content of --feature_dir", "--epochs", 2, "--resume")
    features.write_bytes(before)
    make_features(tmp_path / "f" / "more", 1)
    refused("the content of --feature_dir", "--epochs", 2, "--resume")
    whole = newest.read_bytes()
    other = torch.load(newest) | {"epoch": 1}
    del other["model"]["code.mix"]
    shutil.rmtree(tmp_path / "f" / "more")
    save(newest, other)
    result = run_here("train.py", *flags, "--epochs", 2, "--resume")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "another version began that run" in result.stderr
    newest.write_bytes(whole[: len(whole) // 2])
    refused("motion_ae_last.pt is damaged", "--epochs", 2, "--resume")

    newest.write_bytes(whole)
    shutil.copytree(tmp_path / "ck", tmp_path / "begun")
    first_epoch = torch.load(newest)  # as if it had been stopped after one of two epochs, the better one
    first_epoch |= {
        "epoch": 1,
        "history": [row | {"val_loss": 1.0 - row["epoch"]} for row in first_epoch["history"][:2]],
    }
    save(tmp_path / "begun" / "motion_ae_last.pt", first_epoch)
    save(tmp_path / "begun" / "motion_ae_best.pt", first_epoch)
    flags[3] = tmp_path / "elsewhere"
    went_on = run_here("train.py", *flags, "--epochs", 2, "--resume", tmp_path / "begun" / "motion_ae_last.pt")
    assert went_on.returncode == 0, went_on.stderr
    assert torch.load(flags[3] / "motion_ae_best.pt")["epoch"] == 1
    (flags[3] / "motion_ae_last.pt").unlink()
    assert "going on" in went_on.stdout
    flags[3] = tmp_path / "ck"

    assert run_here("train.py", *flags, "--epochs", 1, "--overwrite").returncode == 0
    left = sorted(path.name for path in (tmp_path / "ck").glob("*.pt"))
    assert left == ["motion_ae_best.pt", "motion_ae_epoch0.pt", "motion_ae_epoch1.pt", "motion_ae_last.pt"]


def test_metrics_and_curves_tell_the_run(trained):
    folder, stdout = trained
    table = pd.read_csv(folder / "ck" / "metrics.csv")
    last = torch.load(folder / "ck" / "motion_ae_last.pt", weights_only=True)
    pd.testing.assert_frame_equal(table, pd.DataFrame(last["history"]))
    assert all(f"total {ratio:.3f}" in stdout for ratio in table["ratio_total"])
    assert 0 <= table["lr"][2] < table["lr"][1] <= 2e-4
    assert (folder / "ck" / "loss_curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_drawn_of_what_is_known():
    """Held-out clips that never change have no motion error, and no relations of what moves."""
    row = {f"{group}_{column}": float("nan") for group in ("val", "pca") for column in COMPARED.values()}
    known = {"epoch": 0, "val_reconstruction_error": 0.1, "pca_reconstruction_error": 0.5}
    assert train.draw_curves([row | known], "held out").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("losses", "expected"), [([3.0, 2.9, 1.0, 2.0], 2), ([3.0, 2.98, 2.975], 0), ([3.0, 2.98, float("nan")], 0)]
)
def test_the_best_checkpoint_is_the_epoch_of_least_held_out_loss(losses, expected, trained, tmp_path):
    """But epoch 0, which encodes without a network, unless another takes off 1 %."""
    last = torch.load(trained[0] / "ck" / "motion_ae_last.pt", weights_only=True)
    rows = [{**last["history"][0], "epoch": epoch, "val_loss": loss} for epoch, loss in enumerate(losses)]
    for epoch in range(len(rows)):
        train.write_outputs({**last, "epoch": epoch, "history": rows[: epoch + 1]}, "held out", tmp_path, "all")
    best = torch.load(tmp_path / "motion_ae_best.pt", weights_only=True)
    assert best["epoch"] == expected
    assert "optimizer" not in best
    MotionFeatureAutoencoder.from_checkpoint(tmp_path / "motion_ae_best.pt")


def test_a_loss_that_is_not_finite_ends_the_run(trained, tmp_path, run_here):
    flags = ["--feature_dir", trained[0] / "features", "--save_dir", tmp_path, *SIZES, "--use_token"]
    result = run_here("train.py", *flags, "--lr", 1e30)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "the loss is" in result.stderr and "lower --lr" in result.stderr
    for path in tmp_path.glob("motion_ae_*.pt"):
        assert torch.load(path, weights_only=True)["history"][-1]["val_loss"] < float("inf")


def test_bfloat16_learns_the_same(trained, tmp_path, run_here):
    flags = ["--feature_dir", trained[0] / "features", *SIZES, "--use_token", "--epochs", 2]
    flags += ["--precision", "bfloat16", "--save_dir", tmp_path]
    assert run_here("train.py", *flags).returncode == 0
    low, full = (pd.read_csv(folder / "metrics.csv").iloc[-1] for folder in (tmp_path, trained[0] / "ck"))
    assert low["train_loss"] != full["train_loss"]  # which falls by 7 % in the second epoch
    assert low["train_loss"] == pytest.approx(full["train_loss"], rel=0.07)
    assert low["val_loss"] == pytest.approx(full["val_loss"], rel=0.03)
    weights = torch.load(tmp_path / "motion_ae_best.pt", weights_only=True)["model"].values()
    assert all(weight.dtype in (torch.float32, torch.uint8, torch.int32) for weight in weights)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, None),  # left by another job
        ({"RANK": ""}, None),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "2"}, "environment variable RANK expected, but not set); start with torchrun, or unset it"),
    ],
)
def test_variables_that_another_job_left_do_no_harm(variables, message, trained, tmp_path, run_here, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    flags = ["--feature_dir", trained[0] / "features", "--save_dir", tmp_path / "ck", *SIZES, "--epochs", 1]
    result = run_here("train.py", *flags)
    if message:
        assert (result.returncode, result.stderr.count("\n")) == (2, 1) and message in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert "epoch 1: " in result.stdout and (tmp_path / "ck" / "motion_ae_epoch1.pt").exists()


def test_a_full_disk_ends_the_run_in_one_line(trained, tmp_path):
    """A file may grow to 500 kB here, less than this model takes; torch says of that what it says of a full disk."""
    code = (
        "import resource, signal, train; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)); train.run_script(train.main)"
    )
    flags = ["--feature_dir", trained[0] / "features", "--save_dir", tmp_path, *SIZES, "--model_dim", 128]
    command = [sys.executable, "-c", code, *map(str, flags), "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "File too large" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_code_is_fitted_on_so_many_tokens_and_no_more(tmp_path, monkeypatch):
    """On a block of each large clip."""
    monkeypatch.setattr(train, "FIT_TOKENS", 3000)
    monkeypatch.setattr(train, "WHOLE_TOKENS", 3000)
    files = []
    for index in range(6):
        torch.save(torch.randn(25, 20, 9, 4), tmp_path / f"{index}.pt")
        files.append(train.FeatureFile(tmp_path / f"{index}.pt", (25, 20, 9), 4, "", "", str(index)))
    clips = train.Clips(files)
    assert clips.block == (13, 10, 9) and clips.shape == (1, 1, 1)
    assert {x.shape[1:] for x in clips.to_fit(0, "cpu")} == {(10, 9, 4)}
    tokens = [x[..., 0].numel() for x in clips.to_fit(0, "cpu")]
    assert sum(tokens[:-1]) < 3000 <= sum(tokens)
    monkeypatch.setattr(train, "WHOLE_TOKENS", 2**13)
    assert [x.shape for x in clips.to_fit(0, "cpu")] == [(25, 20, 9, 4)] and clips.shape == (25, 20, 9)
