"""train.py from the command line, on a folder of made-up features."""

import numpy as np
import torch
from made_up import SIZES, make_features, run, save

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


def test_files_of_different_shapes_train_together(tmp_path, run_here):
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


def test_a_truncated_file_is_named(trained, tmp_path, run_here):
    whole = (trained[0] / "features" / "nested" / "0000.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    result = run_here("train.py", "--feature_dir", tmp_path, "--save_dir", tmp_path / "ck", *SIZES)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "cut.pt is damaged" in result.stderr
