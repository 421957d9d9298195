"""The three scripts in a row, as a user runs them, on clips drawn here."""

import os
import shutil
import subprocess
import sys

import torch
from draw_clips import CAPTIONS, draw_clips
from made_up import ROOT, run


def test_from_clips_to_motion_embeddings(tmp_path):
    draw_clips(tmp_path / "videos", num_frames=12, height=64, width=96)
    for command in (
        "vfm_feature.py --video_dir videos --csv_path videos/captions.csv --output_root features --models VideoMAE "
        "--random_weights --num_frames 8 --videomae_resize_h 32 --videomae_resize_w 48",
        "train.py --feature_dir features/VideoMAE --save_dir checkpoints --epochs 1 --model_dim 64 --num_workers 0 "
        "--use_token",
        "encode.py --checkpoint checkpoints/motion_ae_best.pt --input features/VideoMAE --output latents",
    ):
        result = run(*command.split(), cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "latents").glob("0*.pt")) == ["0000.pt", "0001.pt"]
    for name, caption in zip(("0000.pt", "0001.pt"), CAPTIONS, strict=True):
        encoded = torch.load(tmp_path / "latents" / name, weights_only=True)
        assert encoded["latent"].shape == (4, 2, 3, 192)
        assert encoded["motion_embedding"].shape == (4, 192)
        assert encoded["compression_ratio"] == 0.25
        assert (encoded["caption"], encoded["model"]) == (caption, "VideoMAE")
        assert torch.isfinite(encoded["latent"]).all() and encoded["latent"].std() > 0


def test_the_package_imports_from_the_folder_above_whatever_its_name(tmp_path):
    (tmp_path / "any_name").mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path / "any_name")
    code = "import any_name as vfm; print(vfm.LatentDataset.__name__, vfm.motion_autoencoder_loss.__name__)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert result.stdout.split() == ["LatentDataset", "motion_autoencoder_loss"]


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
