"""What the tests of the scripts share."""

import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from made_up import ROOT, SIZES, make_features, run, timm_folder

import encode
import train
import vfm_feature
from model import run_script


@pytest.fixture(scope="session")
def small_image_models(tmp_path_factory):
    """Folders of timm, without weights, of some of the image models with two blocks of 24 channels."""
    folder = tmp_path_factory.mktemp("timm")
    return {
        name: str(timm_folder(folder / name, vfm_feature.IMAGE_MODELS[name], depth=2, embed_dim=24, num_heads=2))
        for name in ("DINOv2", "DINOv2-B-reg", "DINOv3-B")
    }


@pytest.fixture
def small_models(monkeypatch, small_image_models):
    """The models with two blocks of 24 channels: quick, and files of their weights are small."""
    for name, spec in vfm_feature.VIDEO_MODELS.items():
        monkeypatch.setitem(vfm_feature.VIDEO_MODELS, name, replace(spec, embed_dim=24, depth=2, num_heads=2))
    for name, folder in small_image_models.items():
        monkeypatch.setitem(vfm_feature.IMAGE_MODELS, name, folder)


@pytest.fixture
def run_here(monkeypatch, capfd, small_models):
    """The script's command line in this process, with small models: a new process would wait for torch to start."""

    def call(script, *arguments, cwd=ROOT):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [script, "--device", "cpu", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ending:
            run_script({"vfm_feature.py": vfm_feature.main, "train.py": train.main, "encode.py": encode.main}[script])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # run_script's handler would fail a test instead of ending pytest
        return subprocess.CompletedProcess(script, ending.value.code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    make_features(folder / "features" / "nested")
    (folder / "features" / "failed_videos.txt").write_text("5.mp4\tno frames\n")
    (folder / "features" / ".half.pt").write_bytes(b"half a file")
    result = run(
        "train.py", "--feature_dir", "features", "--save_dir", "ck", *SIZES, "--epochs", 2, "--use_token", cwd=folder
    )
    assert result.returncode == 0, result.stderr
    return folder, result.stdout
