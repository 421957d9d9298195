"""What the tests of the scripts share."""

import subprocess
import sys

import pytest
from made_up import ROOT, SIZES, make_features, run

import encode
import train
import vfm_feature
from model import run_script


@pytest.fixture
def run_here(monkeypatch, capfd):
    """The script's command line in this process: the many mistakes would otherwise each wait for torch to start."""

    def call(script, *arguments, cwd=ROOT):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [script, "--device", "cpu", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ending:
            run_script({"vfm_feature.py": vfm_feature.main, "train.py": train.main, "encode.py": encode.main}[script])
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
