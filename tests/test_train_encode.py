"""train.py and encode.py from the command line, on a folder of made-up features."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import encode
import train
from model import MotionFeatureAutoencoder, run_script

ROOT = Path(__file__).resolve().parents[1]
SIZES = ["--input_dim", "12", "--model_dim", "16", "--latent_dim", "6", "--num_heads", "2", "--num_layers", "1"]


def run(script, *arguments, cwd=ROOT):
    """The script as a user runs it."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments), "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


@pytest.fixture
def run_here(monkeypatch, capfd):
    """The script's command line in this process: the many mistakes would otherwise each wait for torch to start."""

    def call(script, *arguments, cwd=ROOT):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments), "--device", "cpu"])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ending:
            run_script({"train.py": train.main, "encode.py": encode.main}[script])
        return subprocess.CompletedProcess(script, ending.value.code, *capfd.readouterr())

    return call


def make_features(folder, count=12, shape=(6, 2, 3, 12), seed=0):
    """Clips of a slowly moving low-rank signal with noise, in every suffix and dtype that is read."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(5, shape[-1], generator=generator)
    for index in range(count):
        walk = torch.randn(*shape[:-1], 5, generator=generator).cumsum(0) * 0.3
        walk = walk + torch.randn(1, *shape[1:-1], 5, generator=generator)
        x = walk @ basis + 0.1 * torch.randn(shape, generator=generator)
        if index % 4 == 3:
            np.save(folder / f"{index:04d}.npy", x.numpy())
        else:
            data = {"feature": x.half() if index % 2 else x, "caption": f"clip {index}", "video": f"{index}.mp4"}
            torch.save(data, folder / f"{index:04d}.pt")
    return folder


@pytest.fixture(scope="module")
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


def test_train_writes_a_checkpoint_that_explains_itself(trained):
    folder, stdout = trained
    assert "11 training files, 1 held out" in stdout
    assert sorted(path.name for path in (folder / "ck").iterdir()) == ["motion_ae_epoch1.pt", "motion_ae_epoch2.pt"]
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


def save(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, data) if path.suffix == ".npy" else torch.save(data, path)


class Unsafe:
    def __reduce__(self):
        return (print, ("code from a file ran",))


BAD_FEATURES = {
    "nan.pt": (torch.full((2, 3, 12), float("nan")), "NaN or infinity"),
    "infinity.npy": (np.full((2, 3, 12), np.inf, dtype=np.float32), "NaN or infinity"),
    "channels.pt": (torch.zeros(2, 3, 11), "C is 11, but --input_dim is 12"),
    "rank.pt": (torch.zeros(3, 12), r"shape [3, 12]"),
    "empty.pt": (torch.zeros(0, 3, 12), "not empty"),
    "integers.npy": (np.zeros((2, 3, 12), dtype=np.int64), "floating point"),
    "objects.npy": (np.array([Unsafe()], dtype=object), "no array of numbers"),
    "words.pt": ({"caption": "no feature here"}, "no feature tensor"),
    "nothing.pt": ({}, "no feature tensor"),
    "unsafe.pt": ({"feature": Unsafe()}, "unsafe"),
}


@pytest.mark.parametrize("name", BAD_FEATURES)
def test_bad_features_are_named(name, trained, tmp_path, run_here):
    data, message = BAD_FEATURES[name]
    save(tmp_path / "f" / name, data)
    arguments = ["--checkpoint", trained[0] / "ck" / "motion_ae_epoch1.pt", "--output", tmp_path / "z.pt"]
    for result in (
        run_here("train.py", "--feature_dir", tmp_path / "f", "--save_dir", tmp_path / "ck", *SIZES),
        run_here("encode.py", *arguments, "--input", tmp_path / "f" / name),
    ):
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert name in result.stderr
        assert message in result.stderr
        assert "code from a file ran" not in result.stdout
    assert not (tmp_path / "z.pt").exists()


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


MISTAKES = [
    ("train.py --feature_dir missing", "missing is not a folder"),
    ("train.py --feature_dir empty", "empty holds no"),
    ("train.py --feature_dir features --input_dim 12 --latent_dim 13", "--latent_dim 13 is above --input_dim 12"),
    (
        "train.py --feature_dir features --input_dim 12 --latent_dim 6 --model_dim 30",
        "--model_dim 30 does not divide by --num_heads 8",
    ),
    ("train.py --feature_dir features --epochs 0", "argument --epochs: 0 must be"),
    ("train.py --feature_dir features --latent_dim 1", "argument --latent_dim: 1 must be"),
    ("train.py --feature_dir features --lr nan", "argument --lr: nan must be"),
    ("train.py --feature_dir features --batch_size two", "invalid int value: 'two'"),
    ("train.py --feature_dir features --input_dim 12 --latent_dim 6 --save_dir a_file", "--save_dir a_file"),
    ("encode.py --checkpoint missing.pt --input features --output z", "missing.pt does not exist"),
    ("encode.py --checkpoint features/nested/0000.pt --input features --output z", "is not a checkpoint of train.py"),
    ("encode.py --checkpoint ck/motion_ae_epoch1.pt --input missing --output z", "--input missing does not exist"),
    ("encode.py --checkpoint ck/motion_ae_epoch1.pt --input features --output a_file", "--output a_file is a file"),
    ("encode.py --checkpoint ck/motion_ae_epoch1.pt --input a_file --output z", "--input a_file is not a .pt"),
    ("encode.py --checkpoint ck/motion_ae_epoch1.pt --input features/nested/0000.pt --output ck", "ck is a folder"),
    (
        "encode.py --checkpoint ck/motion_ae_epoch1.pt --input features --output z --latent_dim 7",
        "--latent_dim 7 contradicts ck/motion_ae_epoch1.pt, which was trained with 6",
    ),
    ("encode.py --checkpoint ck/motion_ae_epoch1.pt --input same_name --output z", "would both write"),
    ("encode.py --checkpoint ck/motion_ae_epoch1.pt --input features --output features", "would be lost"),
    (
        "encode.py --checkpoint ck/motion_ae_epoch1.pt --input same_name/a.pt --output same_name/a.pt",
        "would be lost",
    ),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES)
def test_mistakes_end_in_one_line(command, message, trained, run_here):
    folder, _ = trained
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "a_file").touch()
    for name in ("same_name/a.pt", "same_name/a.pth"):
        save(folder / name, torch.zeros(2, 3, 12))
    script, *arguments = command.split()
    result = run_here(script, *arguments, cwd=folder)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(f"{script}: error: ")
    assert not (folder / "z").exists()


def test_an_unknown_device_is_refused(trained):
    command = [sys.executable, ROOT / "train.py", "--feature_dir", trained[0] / "features", "--device", "gpu"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "--device gpu" in result.stderr


@pytest.mark.parametrize("script", ["train.py", "encode.py"])
def test_help_shows_every_default(script):
    text = " ".join(run(script, "--help").stdout.split())
    defaults = {"input_dim": 768, "model_dim": 384, "latent_dim": 192, "num_heads": 8, "num_layers": 2, "dropout": 0.1}
    if script == "train.py":
        defaults |= {"save_dir": "checkpoints", "epochs": 10, "batch_size": 2, "lr": 0.0002, "weight_decay": 0.0001}
        defaults |= {"num_workers": 4, "recon_weight": 1.0, "motion_weight": 1.0, "smooth_weight": 0.05}
    for name, default in defaults.items():
        description = text.split(f" --{name} {name.upper()} ")[-1].split(" --")[0]
        assert f"(default: {default})" in description, name
    assert "--use_token" in text


def test_the_package_imports_from_the_folder_above_under_any_name(tmp_path):
    (tmp_path / "another_name").symlink_to(ROOT)
    code = "import another_name; print(*another_name.__all__); [getattr(another_name, n) for n in another_name.__all__]"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert result.returncode == 0, result.stderr
    assert {"MotionFeatureAutoencoder", "motion_autoencoder_loss"} <= set(result.stdout.split())
