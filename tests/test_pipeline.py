"""The three scripts in a row, as a user runs them, on clips drawn here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from draw_clips import CAPTIONS, draw_clips

ROOT = Path(__file__).resolve().parents[1]


def run(*command, cwd):
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd, timeout=300)
    assert result.returncode == 0, result.stderr
    return result


def test_from_clips_to_motion_embeddings(tmp_path):
    draw_clips(tmp_path / "videos", num_frames=12)
    run(
        *(ROOT / "vfm_feature.py", "--video_dir", "videos", "--csv_path", "videos/captions.csv"),
        *("--output_root", "features", "--models", "VideoMAE", "--random_weights", "--device", "cpu"),
        *("--num_frames", 8, "--videomae_resize_h", 32, "--videomae_resize_w", 48),
        cwd=tmp_path,
    )
    run(
        *(ROOT / "train.py", "--feature_dir", "features/VideoMAE", "--save_dir", "checkpoints", "--epochs", 1),
        *("--model_dim", 64, "--num_workers", 0, "--device", "cpu", "--use_token"),
        cwd=tmp_path,
    )
    for source, target in [("features/VideoMAE", "latents"), ("features/VideoMAE/0003.pt", "latents/one.pt")]:
        run(
            *(ROOT / "encode.py", "--checkpoint", "checkpoints/motion_ae_epoch1.pt", "--device", "cpu"),
            *("--input", source, "--output", target),
            cwd=tmp_path,
        )
    assert sorted(path.name for path in (tmp_path / "latents").glob("*.pt")) == [
        *("0000.pt", "0001.pt", "0002.pt", "0003.pt", "one.pt"),
    ]
    for name, caption in [("0000.pt", CAPTIONS[0]), ("one.pt", CAPTIONS[3])]:
        encoded = torch.load(tmp_path / "latents" / name, weights_only=True)
        assert encoded["latent"].shape == (4, 2, 3, 192)
        assert encoded["motion_embedding"].shape == (4, 192)
        assert encoded["compression_ratio"] == 0.25
        assert (encoded["caption"], encoded["model"]) == (caption, "VideoMAE")
        assert torch.isfinite(encoded["latent"]).all() and encoded["latent"].std() > 0
    one, of_all = (torch.load(tmp_path / "latents" / name, weights_only=True) for name in ("one.pt", "0003.pt"))
    np.testing.assert_array_equal(one["latent"], of_all["latent"])


def test_the_package_imports_from_the_folder_above_whatever_its_name(tmp_path):
    (tmp_path / "any_name").mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path / "any_name")
    code = (
        "import any_name; print(any_name.MotionFeatureAutoencoder.__name__, any_name.motion_autoencoder_loss.__name__)"
    )
    result = run("-c", code, cwd=tmp_path)
    assert result.stdout.split() == ["MotionFeatureAutoencoder", "motion_autoencoder_loss"]


def test_the_top_level_holds_the_nine_names():
    names = sorted(name for name in os.listdir(ROOT) if not name.startswith(".") and name != "__pycache__")
    assert names == sorted(
        [
            *("model.py", "losses.py", "train.py", "encode.py", "vfm_feature.py", "__init__.py"),
            "envs",
            "tests",
            "README.md",
        ]
    )
