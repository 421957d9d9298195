"""Latents straight from clips, against encode.py's of the same clips; and how trainers read both."""

import functools
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from draw_clips import draw_frame, write_video
from made_up import ROOT, SMALL, counts
from PIL import Image
from torch.utils.data import DataLoader

import vfm_feature as vfm
from model import LatentDataset, MotionFeatureAutoencoder, UserError, save_atomically
from train import fit_code


@pytest.fixture
def clips(tmp_path):
    (tmp_path / "clips").mkdir()
    for index in range(3):
        frames = [draw_frame(index, step / 7, 48, 64) for step in range(8)]
        write_video(tmp_path / "clips" / f"{index}.mp4", frames, "mp4v")
    (tmp_path / "clips.csv").write_text("video,caption\n0,a ball\n1,a square\n")
    return tmp_path / "clips"


@pytest.fixture
def extract(clips, tmp_path, run_here):
    """vfm_feature.py on the clips with a model of 24 channels, into `out`."""
    flags = ["--video_dir", clips, "--csv_path", tmp_path / "clips.csv", "--output_root", tmp_path / "out"]
    return functools.partial(run_here, "vfm_feature.py", *flags, "--models", "VideoMAE", *SMALL)


def write_checkpoint(path, input_dim=24, gain=1.0):
    """An autoencoder measured on noise, whose networks do something, as train.py writes it."""
    torch.manual_seed(0)
    model = MotionFeatureAutoencoder(input_dim, 16, latent_dim=8, num_heads=2, num_layers=1, use_token=True)
    fit_code(model.code, [torch.randn(6, 2, 3, input_dim) for _ in range(4)])
    model.code.mix *= gain
    model.code.unmix /= gain
    torch.nn.init.normal_(model.network.networks[0].head.weight, std=0.1)
    torch.save({"config": model.config, "model": model.state_dict()}, path)
    return path


def load(path):
    return torch.load(path, weights_only=True)


def test_they_are_what_encode_makes_of_the_features(extract, tmp_path, run_here):
    checkpoint, out = write_checkpoint(tmp_path / "ck.pt"), tmp_path / "out"
    assert counts(extract("--motion_checkpoint", checkpoint)) == [3, 0, 0]
    straight = out / "VideoMAE_motion"
    names = [*(f"{index}.pt" for index in range(3)), "encode_report.csv", "stats.pt"]
    assert sorted(path.name for path in straight.iterdir()) == names
    assert [path.name for path in out.iterdir() if path.is_dir()] == [straight.name]
    assert (out / "vfm_dimensions.txt").read_text() == "VideoMAE: latent shape [2, 2, 3, 8], C = 8\n"

    assert counts(extract()) == [3, 0, 0]
    command = ["--checkpoint", checkpoint, "--input", out / "VideoMAE", "--output", tmp_path / "z"]
    assert run_here("encode.py", *command).returncode == 0
    for name in names[:3]:
        one, other = load(straight / name), load(tmp_path / "z" / name)
        assert one.keys() == other.keys()
        assert one["model"] == "VideoMAE" and one["weights"] == "random"
        for key in one.keys() - {"settings"}:
            if isinstance(one[key], str | list):
                assert one[key] == other[key]
            else:
                torch.testing.assert_close(one[key], other[key], equal_nan=True)
    assert load(straight / "1.pt")["caption"] == "a square"
    reports = [pd.read_csv(folder / "encode_report.csv", dtype={"file": str}) for folder in (straight, tmp_path / "z")]
    pd.testing.assert_frame_equal(*reports, rtol=1e-3)


def test_what_is_finished_is_skipped_unless_something_changed(extract, tmp_path):
    flags = ["--motion_checkpoint", write_checkpoint(tmp_path / "ck.pt")]
    folder = tmp_path / "out" / "VideoMAE_motion"
    assert counts(extract(*flags)) == [3, 0, 0]
    whole, report = load(folder / "0.pt"), (folder / "encode_report.csv").read_text()
    (folder / "2.pt").unlink()
    (tmp_path / "clips.csv").write_text("video,caption\n0,another ball\n")
    assert counts(extract(*flags)) == [1, 2, 0]
    renewed = load(folder / "0.pt")
    assert renewed["caption"] == "another ball" and torch.equal(renewed["latent"], whole["latent"])
    assert (folder / "encode_report.csv").read_text() == report  # of all files, whenever they were made

    assert counts(extract(*flags, "--save_dtype", "float16")) == [3, 0, 0]
    half = load(folder / "0.pt")
    assert half["latent"].dtype == torch.float16 and half["motion_embedding"].dtype == torch.float32
    torch.testing.assert_close(half["latent"], whole["latent"].half())
    shutil.copy(tmp_path / "ck.pt", tmp_path / "same.pt")
    assert counts(extract("--motion_checkpoint", tmp_path / "same.pt", "--save_dtype", "float16")) == [0, 3, 0]
    other = write_checkpoint(tmp_path / "other.pt", gain=2.0)
    assert counts(extract("--motion_checkpoint", other, "--save_dtype", "float16")) == [3, 0, 0]
    assert counts(extract()) == [3, 0, 0]  # the features have a folder of their own
    assert counts(extract("--motion_checkpoint", other, "--save_dtype", "float16")) == [0, 3, 0]


def test_what_fails_is_recorded(extract, clips, tmp_path):
    (clips / "broken.mp4").write_bytes(b"this is no video")
    folder = tmp_path / "out" / "VideoMAE_motion"
    assert counts(extract("--motion_checkpoint", write_checkpoint(tmp_path / "ck.pt"))) == [3, 0, 1]
    assert (folder / "failed_videos.txt").read_text().startswith("broken.mp4\tcannot be read")
    report = pd.read_csv(folder / "encode_report.csv", keep_default_na=False).set_index("file")
    assert report["failure"]["broken.mp4"].startswith("cannot be read") and report["failure"]["0.pt"] == ""
    large = write_checkpoint(tmp_path / "large.pt", gain=1e6)
    result = extract("--motion_checkpoint", large, "--save_dtype", "float16")
    assert result.returncode == 1
    assert "0.mp4\tVideoMAE gave NaN or infinity in float16\n" in (folder / "failed_videos.txt").read_text()


def test_previews_show_frames_features_and_latents(extract, tmp_path):
    flags = ["--motion_checkpoint", write_checkpoint(tmp_path / "ck.pt")]
    folder = tmp_path / "out" / "VideoMAE_motion"
    assert counts(extract(*flags, "--preview")) == [3, 0, 0]
    heights = [Image.open(folder / f"{index}.png").height for index in range(3)]
    assert heights == [25 + 3 * (25 + 120) + 2 * 110 + 25] * 3  # three rows of pictures, two plots


def test_ranks_write_what_one_process_writes(clips, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "ck.pt", vfm.find_vfm("VideoMAE").embed_dim)
    (clips / "broken.mp4").write_bytes(b"this is no video")
    flags = [str(ROOT / "vfm_feature.py"), "--video_dir", str(clips), "--models", "VideoMAE", *SMALL]
    flags += ["--device", "cpu", "--motion_checkpoint", str(checkpoint), "--output_root"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    started = [
        subprocess.Popen([*command, *flags, str(tmp_path / out)], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=-1)
        for out, command in (("one", [sys.executable]), ("ranks", torchrun))
    ]
    for process in started:
        said = process.communicate(timeout=200)[1]
        assert process.returncode == 0, said.decode()
    one, ranks = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "one", tmp_path / "ranks")
    )
    assert len(one) == 3 + 4 and one.keys() == ranks.keys()
    assert not [path for path in one if one[path] != ranks[path]]


def test_a_file_holds_its_own_clip_of_a_batch(extract, tmp_path):
    assert counts(extract()) == [3, 0, 0]
    alone = (tmp_path / "out" / "VideoMAE" / "0.pt").stat().st_size
    assert counts(extract("--batch_size", 3, "--overwrite")) == [3, 0, 0]
    assert (tmp_path / "out" / "VideoMAE" / "0.pt").stat().st_size == alone


def test_features_of_another_model_are_refused(extract, tmp_path, run_here):
    """Another model's features can have as many channels."""
    assert counts(extract()) == [3, 0, 0]
    features, save_dir = tmp_path / "out" / "VideoMAE", tmp_path / "ck"
    sizes = ["--input_dim", 24, "--model_dim", 16, "--latent_dim", 8, "--num_heads", 2, "--num_layers", 1]
    training = ["train.py", "--save_dir", save_dir, *sizes, "--epochs", 1, "--feature_dir"]
    assert run_here(*training, features).returncode == 0
    checkpoint = save_dir / "motion_ae_best.pt"
    assert counts(extract("--motion_checkpoint", checkpoint)) == [3, 0, 0]
    said = "the checkpoint was trained on features of VideoMAE (weights random), not of "
    result = extract("--motion_checkpoint", checkpoint, "--models", "VideoMAEv2")
    assert result.returncode == 2 and said + "VideoMAEv2 (weights random)" in result.stderr
    result = extract("--motion_checkpoint", checkpoint, "--layers", 1)
    assert result.returncode == 2 and said + "VideoMAE (weights random, layers [1])" in result.stderr

    torch.save(load(features / "0.pt") | {"weights": "sha256:0"}, features / "0.pt")
    command = ["encode.py", "--checkpoint", checkpoint, "--input", features, "--output", tmp_path / "z"]
    result = run_here(*command)
    assert "2 written, 0 skipped, 1 failed" in result.stdout.splitlines()[-1]
    assert "0.pt: " + said + "VideoMAE (weights sha256:0)" in result.stderr
    result = run_here(*training, features, "--overwrite")
    assert result.returncode == 2
    assert "features of VideoMAE (weights random) and of VideoMAE (weights sha256:0); give a" in result.stderr


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_dataset_of_latents(extract, tmp_path, run_here, suffix):
    checkpoint, latents = write_checkpoint(tmp_path / "ck.pt"), tmp_path / "z"
    assert counts(extract()) == [3, 0, 0]
    features = tmp_path / "out" / "VideoMAE"
    for index in range(3):
        path = features / f"{index}.pt"
        torch.save(load(path) | {"frame_indices": [index, 2, 5, 7]}, path)
    (features / "deep.er").mkdir()
    shutil.move(features / "2.pt", features / "deep.er" / "2.x.pt")
    command = ["--checkpoint", checkpoint, "--input", features, "--output", latents, "--output_format", suffix]
    assert run_here("encode.py", *command).returncode == 0

    dataset = LatentDataset(latents)
    assert dataset.stems == ["0", "1", "deep.er/2.x"] and len(dataset) == 3
    assert torch.as_tensor(dataset.load("deep.er/2.x")["frame_indices"]).tolist() == [2, 2, 5, 7]
    assert [clip["caption"] for clip in dataset] == ["a ball", "a square", ""]
    reference = tmp_path / "one.pt"
    command = ["--checkpoint", checkpoint, "--input", features / "1.pt", "--output", reference]
    assert run_here("encode.py", *command).returncode == 0
    for name in ("latent", "motion_embedding"):
        torch.testing.assert_close(dataset[-2][name], load(reference)[name])
    [batch] = DataLoader(dataset, batch_size=3, num_workers=2)
    assert batch["latent"].shape == (3, 2, 2, 3, 8) and batch["motion_embedding"].shape == (3, 2, 8)
    assert batch["stem"] == dataset.stems and batch["caption"][0] == "a ball"
    torch.testing.assert_close(batch["latent"][1], dataset["1"]["latent"])
    assert [clip["stem"] for clip in DataLoader(dataset, batch_size=None, num_workers=1)] == dataset.stems


def test_a_dataset_reads_what_it_is_asked_for(tmp_path):
    torch.save({"latent": torch.zeros(1000, 100, 192), "motion_embedding": torch.ones(1000, 192)}, tmp_path / "a.pt")
    clip = LatentDataset(tmp_path)["a"]
    assert set(clip) == {"stem", "latent", "motion_embedding", "caption"} and clip["caption"] == ""
    with open("/proc/self/maps") as maps:
        assert str(tmp_path / "a.pt") in maps.read()


def test_latents_are_normalised_by_the_statistics_beside_them(tmp_path, run_here):
    """By mean and variance over the training clips, which a checkpoint holds and encode.py writes into the folder."""
    model = MotionFeatureAutoencoder(12, 16, 8, num_heads=2, num_layers=1)
    model.latent_mean.copy_(torch.linspace(-1, 1, 8))
    model.latent_var.copy_(torch.linspace(0, 4, 8))  # the first channel is dead
    torch.save({"config": model.config, "model": model.state_dict()}, tmp_path / "ck.pt")
    (tmp_path / "f").mkdir()
    for index in range(2):
        torch.save(torch.randn(2, 2, 3, 12), tmp_path / "f" / f"{index}.pt")
    command = ["--checkpoint", tmp_path / "ck.pt", "--input", tmp_path / "f", "--output", tmp_path / "z"]
    assert run_here("encode.py", *command).returncode == 0
    stats = torch.load(tmp_path / "z" / "stats.pt", weights_only=True)
    assert torch.equal(stats["mean"], model.latent_mean) and torch.equal(stats["var"], model.latent_var)
    plain, normalised = LatentDataset(tmp_path / "z"), LatentDataset(tmp_path / "z", normalise=True)
    assert plain.stems == normalised.stems == ["0", "1"]
    latent = normalised["1"]["latent"]
    torch.testing.assert_close(latent[..., -1], (plain["1"]["latent"][..., -1] - 1) / 2)
    torch.testing.assert_close(latent * normalised.std + normalised.mean, plain["1"]["latent"])
    assert latent.isfinite().all()

    torch.save({"mean": torch.zeros(6), "var": torch.ones(6)}, tmp_path / "z" / "stats.pt")
    with pytest.raises(UserError, match=r"stats\.pt is not of these latents"):
        LatentDataset(tmp_path / "z", normalise=True)

    (tmp_path / "z" / "stats.pt").unlink()
    with pytest.raises(UserError, match=r"stats\.pt does not exist"):
        LatentDataset(tmp_path / "z", normalise=True)
    (tmp_path / "f" / "0.pt").rename(tmp_path / "f" / "stats.pt")
    result = run_here("encode.py", *command)
    assert result.returncode == 2 and "named as latents' statistics are" in result.stderr


def test_items_have_the_same_keys_whatever_their_files_hold(tmp_path):
    """So that the default collate makes batches of them."""
    clip = {"latent": torch.zeros(2, 3, 8), "motion_embedding": torch.ones(2, 8)}
    torch.save(clip | {"caption": "a dog", "frame_indices": torch.tensor([0, 2, 5, 7])}, tmp_path / "a.pt")
    torch.save(clip, tmp_path / "b.pt")
    save_atomically(clip | {"caption": "12", "frame_indices": [1, 2, 3, 4], "fps": 8.0}, tmp_path / "c.safetensors")
    [batch] = DataLoader(LatentDataset(tmp_path), batch_size=3)
    assert batch["caption"] == ["a dog", "", "12"] and batch["latent"].shape == (3, 2, 3, 8)
    assert set(batch) == {"stem", "latent", "motion_embedding", "caption"}
    torch.save(clip, tmp_path / "c.pt")
    with pytest.raises(
        UserError, match=r"c\.pt and .*c\.safetensors differ in their suffix alone; rename or remove one"
    ):
        LatentDataset(tmp_path)


def test_a_folder_without_latents_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere holds no latents; make them with encode\.py or"):
        LatentDataset(tmp_path / "nowhere")
    (tmp_path / "encode_report.csv").touch()
    with pytest.raises(UserError, match="holds no latents"):
        LatentDataset(tmp_path)
    torch.save({"feature": torch.zeros(2, 2, 3, 8)}, tmp_path / "0.pt")
    with pytest.raises(UserError, match=r"0\.pt holds no latent; give"):
        LatentDataset(tmp_path)
    (tmp_path / "0.pt").unlink()
    (tmp_path / "0.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"0\.safetensors is damaged"):
        LatentDataset(tmp_path)
