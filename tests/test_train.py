"""train.py from the command line, on a folder of made-up features."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from made_up import ROOT, SIZES, make_features, run, save

import train
from model import MotionFeatureAutoencoder


def test_train_writes_a_checkpoint_that_explains_itself(trained):
    folder, stdout = trained
    assert "11 training files, 1 held out" in stdout
    checkpoints = ["motion_ae_best.pt", "motion_ae_epoch1.pt", "motion_ae_epoch2.pt"]
    assert sorted(path.name for path in (folder / "ck").iterdir()) == ["loss_curves.png", "metrics.csv", *checkpoints]
    checkpoint = torch.load(folder / "ck" / "motion_ae_epoch2.pt", weights_only=True)
    assert checkpoint["epoch"] == 2
    assert checkpoint["config"]["latent_dim"] == 6
    assert checkpoint["config"]["use_token"] is True
    fresh = MotionFeatureAutoencoder(**checkpoint["config"]).state_dict()
    assert checkpoint["model"].keys() == fresh.keys()  # no wrapper's names
    assert checkpoint["model"]["decoder.network.head.weight"].abs().max() > 0  # where it starts
    assert checkpoint["command"].endswith("--epochs 2 --use_token --device cpu")
    for means in (checkpoint["train_mean"], checkpoint["val_mean"], checkpoint["pca_mean"]):
        assert set(means) >= {"loss", "reconstruction", "motion", "smoothness"}
        assert all(np.isfinite(value) for value in means.values())


def test_train_says_how_it_stands_against_pca(trained):
    folder, stdout = trained
    lines = stdout.splitlines()
    assert "held out, motion-weighted PCA: reconstruction" in lines[1]
    checkpoint = torch.load(folder / "ck" / "motion_ae_epoch2.pt", weights_only=True)
    ours, pca = (
        sum(checkpoint[key][name] for name in ("reconstruction", "motion")) for key in ("val_mean", "pca_mean")
    )
    assert f"{ours / pca:.3f} x PCA's error" in lines[3]


def test_same_seed_same_result(trained, tmp_path, run_here):
    folder, _ = trained
    flags = ["--feature_dir", folder / "features", *SIZES, "--epochs", 2, "--use_token"]
    assert run("train.py", *flags, "--save_dir", tmp_path / "again").returncode == 0
    first, again = (
        torch.load(path / "motion_ae_epoch2.pt", weights_only=True) for path in (folder / "ck", tmp_path / "again")
    )
    assert first["train_mean"] == again["train_mean"]
    assert all(torch.equal(first["model"][name], again["model"][name]) for name in first["model"])
    assert run_here("train.py", *flags, "--save_dir", tmp_path / "other", "--seed", 1).returncode == 0
    other = torch.load(tmp_path / "other" / "motion_ae_epoch2.pt", weights_only=True)
    assert first["train_mean"] != other["train_mean"]


def test_files_of_different_shapes_train_together(tmp_path, run_here, one_thread):
    make_features(tmp_path / "f" / "a", 3, (6, 2, 3, 12))
    make_features(tmp_path / "f" / "b", 3, (9, 4, 12))
    make_features(tmp_path / "f" / "c", 1, (1, 1, 2, 12))
    result = run_here("train.py", "--feature_dir", tmp_path / "f", "--save_dir", tmp_path / "ck", *SIZES, "--epochs", 1)
    assert result.returncode == 0, result.stderr
    assert "7 training files, 0 held out, 3 shapes" in result.stdout


def test_features_too_large_to_square_are_refused(tmp_path, run_here):
    save(tmp_path / "f" / "huge.pt", torch.randn(6, 3, 12) * 1e30)
    result = run_here("train.py", "--feature_dir", tmp_path / "f", "--save_dir", tmp_path / "ck", *SIZES)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "overflow" in result.stderr


def test_one_token_is_enough_to_train(tmp_path, run_here):
    save(tmp_path / "f" / "one.pt", torch.randn(1, 1, 12))
    flags = ["--feature_dir", tmp_path / "f", "--save_dir", tmp_path / "ck", *SIZES, "--epochs", 1, "--use_token"]
    result = run_here("train.py", *flags)
    assert result.returncode == 0, result.stderr
    assert "PCA makes no error" in result.stdout


def test_every_unusable_file_is_named_before_training(trained, tmp_path, run_here):
    make_features(tmp_path / "f", 3)
    whole = (trained[0] / "features" / "nested" / "0000.pt").read_bytes()
    (tmp_path / "f" / "cut.pt").write_bytes(whole[: len(whole) // 2])
    save(tmp_path / "f" / "narrow.pt", torch.zeros(6, 3, 11))
    save(tmp_path / "f" / "flat.npy", np.zeros((6, 12), dtype=np.float32))
    result = run_here("train.py", "--feature_dir", tmp_path / "f", "--save_dir", tmp_path / "ck", *SIZES)
    assert result.returncode == 2
    *warnings, error = result.stderr.splitlines()
    assert len(warnings) == 3 and all(line.startswith("train.py: warning: ") for line in warnings)
    assert all(any(name in line for line in warnings) for name in ("cut.pt", "narrow.pt", "flat.npy"))
    assert error.startswith("train.py: error: 3 of 6 feature files")
    assert not (tmp_path / "ck").exists()


def test_a_truncated_file_is_named(trained, tmp_path, run_here):
    whole = (trained[0] / "features" / "nested" / "0000.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    result = run_here("train.py", "--feature_dir", tmp_path, "--save_dir", tmp_path / "ck", *SIZES)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "cut.pt is damaged" in result.stderr


def tensors(value):
    """All tensors in a nest of dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [tensor for child in children for tensor in tensors(child)]


def assert_same_run(folder, unbroken, epoch):
    """The same weights, optimizer state and errors, bit by bit; only the time that they took may differ."""
    ours, theirs = (torch.load(path / f"motion_ae_epoch{epoch}.pt", weights_only=True) for path in (folder, unbroken))
    pairs = list(zip(tensors(ours), tensors(theirs), strict=True))
    assert len(pairs) > 100 and all(torch.equal(a, b) for a, b in pairs)
    for ours_row, theirs_row in zip(ours["history"], theirs["history"], strict=True):
        assert {**ours_row, "seconds": 0} == {**theirs_row, "seconds": 0}
    best, unbroken_best = (
        torch.load(path / "motion_ae_best.pt", weights_only=True)["epoch"] for path in (folder, unbroken)
    )
    assert best == unbroken_best
    lines = (folder / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", *map(str, range(1, epoch + 1))]


@pytest.fixture
def one_thread():
    """Tests that compare runs of several processes use one thread in each: sums depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {**os.environ, "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("streaming", "killed_at"), [(False, "motion_ae_*.pt"), (True, "motion_ae_epoch2.pt")])
def test_a_killed_run_is_resumed_to_the_same_result(streaming, killed_at, tmp_path, run_here, monkeypatch, one_thread):
    make_features(tmp_path / "f", 12, (6, 80, 12))  # more positions than a step takes
    monkeypatch.setattr(train, "IN_MEMORY_BYTES", 0 if streaming else train.IN_MEMORY_BYTES)
    flags = ["--feature_dir", tmp_path / "f", *SIZES, "--epochs", 4, "--use_token", "--num_workers", int(streaming)]
    assert run_here("train.py", *flags, "--save_dir", tmp_path / "unbroken", "--resume").returncode == 0

    code = f"import sys, train; train.IN_MEMORY_BYTES = {train.IN_MEMORY_BYTES}; train.run_script(train.main)"
    command = [sys.executable, "-c", code, *map(str, flags), "--save_dir", str(tmp_path / "ck"), "--device", "cpu"]
    process = subprocess.Popen([*command, "--resume"], cwd=ROOT, env=one_thread, start_new_session=True)
    while not list((tmp_path / "ck").glob(killed_at)):
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    result = run_here("train.py", *flags, "--save_dir", tmp_path / "ck", "--resume")
    assert result.returncode == 0, result.stderr
    assert "going on after epoch" in result.stdout
    assert_same_run(tmp_path / "ck", tmp_path / "unbroken", 4)
    states = [torch.load(tmp_path / "ck" / f"motion_ae_epoch{n}.pt", weights_only=True) for n in (1, 2, 3, 4)]
    assert ["training" in state for state in states] == [False, False, False, True]
    (tmp_path / "ck" / "metrics.csv").unlink()  # as if killed after the last checkpoint
    again = run_here("train.py", *flags, "--save_dir", tmp_path / "ck", "--resume")
    assert again.returncode == 0 and "nothing left to do" in again.stdout
    assert_same_run(tmp_path / "ck", tmp_path / "unbroken", 4)


def test_two_ranks_learn_what_one_learns_from_their_clips_together(tmp_path, run_here, one_thread):
    make_features(tmp_path / "f" / "a", 7, (6, 2, 3, 12))  # batches of 4 and 3
    make_features(tmp_path / "f" / "b", 5, (5, 4, 12), seed=1)  # of 4 and 1
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
        for name in (f"{part}_{term}" for part in ("train", "val", "pca") for term in ("reconstruction", "motion")):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
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

    newest = tmp_path / "ck" / "motion_ae_epoch2.pt"
    refused("--resume, give another --save_dir, or lose it by --overwrite", "--epochs", 2)
    refused(f"--epochs 3 contradicts {newest}, begun with 2", "--epochs", 3, "--resume")
    refused(f"--lr 0.5 contradicts {newest}, begun with 0.0002", "--epochs", 2, "--lr", 0.5, "--resume")
    refused("--batch_size times ranks 3 contradicts", "--epochs", 2, "--batch_size", 3, "--resume")
    refused("nowhere.pt does not exist", "--resume", tmp_path / "ck" / "nowhere.pt")
    refused("holds motion_ae_epoch2.pt of another run", "--resume", save(tmp_path / "elsewhere.pt", {}))
    refused("only the newest checkpoint", "--epochs", 2, "--resume", tmp_path / "ck" / "motion_ae_epoch1.pt")
    refused("not allowed with argument", "--resume", "--overwrite")
    make_features(tmp_path / "f" / "more", 1)
    refused("the fingerprint of --feature_dir", "--epochs", 2, "--resume")
    whole = newest.read_bytes()
    newest.write_bytes(whole[: len(whole) // 2])
    refused("motion_ae_epoch2.pt is damaged", "--epochs", 2, "--resume")

    assert run_here("train.py", *flags, "--epochs", 1, "--overwrite").returncode == 0
    assert sorted(path.name for path in (tmp_path / "ck").glob("*.pt")) == ["motion_ae_best.pt", "motion_ae_epoch1.pt"]


def test_metrics_and_curves_tell_the_run(trained):
    folder, stdout = trained
    header, *rows = [line.split(",") for line in (folder / "ck" / "metrics.csv").read_text().splitlines()]
    rows = [dict(zip(header, map(float, row), strict=True)) for row in rows]
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        checkpoint = torch.load(folder / "ck" / f"motion_ae_epoch{row['epoch']:.0f}.pt", weights_only=True)
        for name in ("train", "val", "pca"):
            assert {term: row[f"{name}_{term}"] for term in train.TERMS} == checkpoint[f"{name}_mean"]
        assert f"{row['ratio']:.3f} x PCA's error" in stdout
    assert 0 <= rows[1]["lr"] < rows[0]["lr"] <= 2e-4
    assert (folder / "ck" / "loss_curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_checkpoint_is_the_epoch_of_least_held_out_loss(trained, tmp_path, run_here):
    flags = ["--feature_dir", trained[0] / "features", "--save_dir", tmp_path, *SIZES, "--use_token"]
    assert run_here("train.py", *flags, "--epochs", 5, "--lr", 0.1).returncode == 0
    losses = [
        torch.load(tmp_path / f"motion_ae_epoch{epoch}.pt", weights_only=True)["val_mean"]["loss"]
        for epoch in range(1, 6)
    ]
    best = torch.load(tmp_path / "motion_ae_best.pt", weights_only=True)
    assert best["epoch"] == 1 + losses.index(min(losses)) < 5
    assert "training" not in best
    MotionFeatureAutoencoder.from_checkpoint(tmp_path / "motion_ae_best.pt")


def test_a_loss_that_is_not_finite_ends_the_run(trained, tmp_path, run_here):
    flags = ["--feature_dir", trained[0] / "features", "--save_dir", tmp_path, *SIZES, "--use_token"]
    result = run_here("train.py", *flags, "--lr", 1e30)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "the loss is" in result.stderr and "lower --lr (now 1e+30)" in result.stderr
    for path in tmp_path.glob("motion_ae_*.pt"):
        assert torch.load(path, weights_only=True)["val_mean"]["loss"] < float("inf")


def test_bfloat16_learns_the_same(trained, tmp_path, run_here):
    flags = ["--feature_dir", trained[0] / "features", *SIZES, "--use_token", "--epochs", 2]
    flags += ["--precision", "bfloat16", "--save_dir", tmp_path]
    assert run_here("train.py", *flags).returncode == 0
    low, full = (
        torch.load(folder / "motion_ae_epoch2.pt", weights_only=True) for folder in (tmp_path, trained[0] / "ck")
    )
    assert low["train_mean"] != full["train_mean"]
    assert low["val_mean"] == pytest.approx(full["val_mean"], rel=0.01)
    assert all(weight.dtype in (torch.float32, torch.int64) for weight in low["model"].values())


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
