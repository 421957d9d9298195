"""encode.py from the command line, on made-up features and a checkpoint that train.py made of them."""

from pathlib import Path

import torch
from made_up import SIZES, run

from model import MotionFeatureAutoencoder


def test_encode_needs_no_model_flag(trained, tmp_path):
    folder, _ = trained
    checkpoint = folder / "ck" / "motion_ae_epoch2.pt"
    source = folder / "features" / "nested" / "0001.pt"
    result = run("encode.py", "--checkpoint", checkpoint, "--input", source, "--output", tmp_path / "deep" / "z.pt")
    assert result.returncode == 0, result.stderr
    output = torch.load(tmp_path / "deep" / "z.pt", weights_only=True)
    assert set(output) == {"latent", "motion_embedding", "compression_ratio", "caption", "video"}
    assert output["caption"] == "clip 1"
    assert output["compression_ratio"] == 0.5
    x = torch.load(source, weights_only=True)["feature"].float()[None]
    expected = MotionFeatureAutoencoder.from_checkpoint(checkpoint)(x)
    torch.testing.assert_close(output["latent"], expected["latent"][0])
    torch.testing.assert_close(output["motion_embedding"], expected["motion_embedding"][0])


def test_encode_mirrors_a_folder(trained, tmp_path, run_here):
    folder, _ = trained
    result = run_here(
        *("encode.py", "--checkpoint", folder / "ck" / "motion_ae_epoch1.pt", "--save_reconstruction"),
        *("--input", folder / "features", "--output", tmp_path / "z", *SIZES, "--use_token"),
    )
    assert result.returncode == 0, result.stderr
    written = sorted(path.relative_to(tmp_path / "z") for path in (tmp_path / "z").rglob("*.pt"))
    assert written == [Path("nested") / f"{index:04d}.pt" for index in range(12)]
    output = torch.load(tmp_path / "z" / "nested" / "0003.pt", weights_only=True)
    assert output["reconstruction"].shape == (6, 2, 3, 12)
    assert "caption" not in output
