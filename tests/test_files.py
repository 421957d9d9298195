"""Files that are not what they seem, and runs of several processes: what is found, what is refused, who says so."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from made_up import ROOT, SIZES, full_disk, make_features, save

from model import UserError, find_files, load_checked, load_feature, make_folder, run_script, save_atomically


def names(folder, **options):
    return [path.relative_to(folder).as_posix() for path in find_files(folder, (".pt",), **options)]


def test_linked_folders_are_searched_and_loops_are_not(tmp_path):
    top, store = tmp_path / "top", tmp_path / "store"
    for path in ("top/here/0.pt", "top/.git/annex/1.pt", "store/2.pt", "store/.hidden.pt"):
        save(tmp_path / path, b"")
    (top / "elsewhere").symlink_to("../store")
    (top / "here" / "store").symlink_to(store)
    (top / "again").symlink_to(top)
    (top / "here" / "up").symlink_to(tmp_path)
    (top / "latest").symlink_to(top / "here")  # is searched anyway
    (top / "annex").symlink_to(top / ".git" / "annex")  # is not
    (store / "round").symlink_to(tmp_path / "other")
    (tmp_path / "other").mkdir()
    save(tmp_path / "other" / "3.pt", b"")
    (tmp_path / "other" / "round").symlink_to(store)
    inside = ["2.pt", "round/3.pt"]
    expected = ["annex/1.pt", *(f"elsewhere/{name}" for name in inside), "here/0.pt"]
    assert names(top) == [*expected, *(f"here/store/{name}" for name in inside)]
    assert names(top / "here", recursive=False) == ["0.pt"]


def make_pointers(folder):
    """File name -> what is said of it."""
    (folder / "annex.pt").symlink_to("../.git/annex/objects/Gx/q1/SHA256E-s9--00.pt/SHA256E-s9--00.pt")
    (folder / "gone.npy").symlink_to("/gone/gone.npy")
    (folder / "itself.pt").symlink_to("itself.pt")
    save(folder / "unlocked.safetensors", b"/annex/objects/SHA256E-s9--00.safetensors\n")
    save(folder / "lfs.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    return {
        "annex.pt": "which is not there; run `git annex get`",
        "gone.npy": "is a link to /gone/gone.npy, which is not there",
        "itself.pt": "is a link to itself.pt, which is not there",
        "unlocked.safetensors": "is a pointer, not the file itself; run `git annex get`",
        "lfs.pth": "is a pointer, not the file itself; run `git lfs pull`",
    }


def test_files_that_were_not_fetched_are_failures_with_their_names(trained, tmp_path, run_here):
    source = make_features(tmp_path / "f", count=2)
    expected = make_pointers(source)
    result = run_here("train.py", "--feature_dir", source, "--save_dir", tmp_path / "ck", *SIZES)
    *lines, last = result.stderr.splitlines()
    assert result.returncode == 2 and "5 of 7 feature files cannot be used" in last
    checkpoint = trained[0] / "ck" / "motion_ae_epoch1.pt"
    result = run_here("encode.py", "--checkpoint", checkpoint, "--input", source, "--output", tmp_path / "z")
    assert result.returncode == 0 and result.stdout.splitlines()[-1].startswith("2 written, 0 skipped, 5 failed")
    assert "encode_report.csv; its column failure says why" in result.stdout.splitlines()[-1]
    report = (tmp_path / "z" / "encode_report.csv").read_text()
    for name, reason in expected.items():
        assert [reason in line for line in lines if f"{source / name} " in line] == [True]
        assert [reason in line for line in result.stderr.splitlines() if f"{source / name} " in line] == [True]
        assert reason in report


def zero_a_page(path):
    """A page of the largest entry of an archive becomes zeros. Returns the name of the entry."""
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
        content = archive.read(entry)
    data = path.read_bytes()
    place = data.index(content) + min(4096, len(content) // 2)
    size = min(4096, len(content) // 4)
    path.write_bytes(data[:place] + bytes(size) + data[place + size :])
    return entry.filename.partition("/")[2]


def test_a_page_of_zeros_is_found(trained, tmp_path, run_here):
    source = make_features(tmp_path / "f", count=3)
    checkpoint = shutil.copy(trained[0] / "ck" / "motion_ae_epoch1.pt", tmp_path / "ck.pt")
    command = ["encode.py", "--input", source, "--output", tmp_path / "z", "--checkpoint", checkpoint]
    entry = zero_a_page(source / "0001.pt")
    assert run_here(*command).returncode == 0
    result = run_here(*command)
    assert result.stdout.splitlines()[-1].startswith("0 written, 2 skipped, 1 failed")
    assert f"0001.pt is damaged or of another format ({entry} in it is not as it was written); make" in result.stderr
    result = run_here("train.py", "--feature_dir", source, "--save_dir", tmp_path / "t", *SIZES, "--epochs", 1)
    assert (
        result.returncode == 2
        and f"0001.pt is damaged or of another format ({entry} in it" in result.stderr.splitlines()[-1]
    )
    entry = zero_a_page(checkpoint)
    result = run_here(*command)
    assert result.returncode == 2 and f"ck.pt is damaged or of another format ({entry} in it" in result.stderr

    torch.serialization.set_crc32_options(False)
    torch.save({"feature": torch.ones(2, 3, 12)}, tmp_path / "none.pt")
    torch.serialization.set_crc32_options(True)
    assert load_feature(tmp_path / "none.pt")[0].shape == (2, 3, 12)
    torch.save({"feature": torch.ones(2, 3, 12)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load_feature(tmp_path / "old.pt")[0].shape == (2, 3, 12)


@pytest.mark.parametrize("name", ["metrics.csv", "page.pt", "page.npy", "page.safetensors", "empty.pt"])
def test_a_file_of_another_kind_is_named_as_such(tmp_path, name):
    content = b"" if name == "empty.pt" else b"<!DOCTYPE html><html><body>404</body></html>"
    (tmp_path / name).write_bytes(content)
    writer = {".npy": "np.save", ".safetensors": "safetensors"}.get(f".{name.split('.')[1]}", "torch.save")
    said = f"{name} is damaged or of another format (no file of {writer} begins with {content[:32].decode()!r}); make"
    with pytest.raises(UserError, match=re.escape(said)):
        load_checked(tmp_path / name)


def test_a_feature_is_read_from_safetensors(tmp_path):
    feature = torch.randn(6, 6, 12).bfloat16()
    other = {"caption": "貓 {", "video": "a.mp4", "model": "VideoMAE", "fps": 12.5, "layers": [6, 12], "grid": [2, 3]}
    save_atomically({"feature": feature, "frame_indices": torch.tensor([0, 2]), **other}, tmp_path / "a.safetensors")
    for mmap in (False, True):
        read, metadata = load_feature(tmp_path / "a.safetensors", 12, mmap=mmap)
        assert read.dtype == torch.bfloat16 and torch.equal(read, feature.unflatten(1, (2, 3)))
        assert metadata.pop("frame_indices").tolist() == [0, 2]
        assert metadata == {name: value for name, value in other.items() if name != "grid"}
    save_atomically({"feature": torch.zeros(2, 3, 12, dtype=torch.int8)}, tmp_path / "i.safetensors")
    with pytest.raises(UserError, match=r"i\.safetensors: dtype torch\.int8"):
        load_feature(tmp_path / "i.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for size in (0, 7, 200, len(whole) - 1):
        (tmp_path / "a.safetensors").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"a\.safetensors is damaged or of another format \(\S+.*\); make"):
            load_feature(tmp_path / "a.safetensors")
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        save_atomically({"latent": torch.zeros(1000)}, tmp_path / "b.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "i.safetensors"]


def train(run_here, features, *flags):
    sizes = ["--model_dim", 16, "--latent_dim", 3, "--num_heads", 2, "--num_layers", 1, "--use_token"]
    return run_here("train.py", "--feature_dir", features, "--save_dir", features / "ck", "--epochs", 1, *sizes, *flags)


LAYOUTS = {  # of x [T, H, W, C] = [6, 2, 3, 12], what train.py says, with --input_dim 12 and without
    "tokens of a batch": (lambda x: x.flatten(0, 2)[None], "all features have one time step", "can have its channels"),
    "[C, T, H, W]": (
        lambda x: x.permute(3, 0, 1, 2),
        "permute the axes if C is not the last",
        "--input_dim 3 if it is the last",
    ),
    "[T, C, H, W]": (
        lambda x: x.permute(0, 3, 1, 2),
        "permute the axes if C is not the last",
        "--input_dim 3 if it is the last",
    ),
    "[T, C, N]": (
        lambda x: x.flatten(1, 2).mT,
        "permute the axes if C is not the last",
        "--input_dim 6 if it is the last",
    ),
    "[T, H, W, C]": (lambda x: x, "", ""),
    "others": (lambda x: x[..., :10], "C is 10, but --input_dim is 12; permute", ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels_are_last_or_it_is_said(layout, tmp_path, run_here):
    arrange, *said = LAYOUTS[layout]
    make_features(tmp_path / "made", count=4)
    (tmp_path / "f").mkdir()
    for path in sorted((tmp_path / "made").iterdir()):
        np.save(tmp_path / "f" / f"{path.stem}.npy", arrange(load_feature(path)[0].float()).contiguous().numpy())
    for flags, message in zip((["--input_dim", 12], []), said, strict=True):
        result = train(run_here, tmp_path / "f", *flags)
        assert message in result.stderr
        assert (result.returncode, result.stderr.count("\n")) == ((2, 1) if message else (0, 0)), result.stderr
        if message and "all features" not in message:
            assert "f/0000.npy and 3 more: " in result.stderr
        shutil.rmtree(tmp_path / "f" / "ck", ignore_errors=True)


def test_features_without_content_or_of_two_models_are_refused(trained, tmp_path, run_here):
    source = make_features(tmp_path / "f", count=3)
    torch.save({"feature": torch.zeros(6, 2, 3, 12)}, source / "zeros.pt")
    result = train(run_here, source)
    assert result.returncode == 2 and "zeros.pt: its largest number is 0" in result.stderr.splitlines()[-1]
    checkpoint = trained[0] / "ck" / "motion_ae_epoch1.pt"
    result = run_here("encode.py", "--checkpoint", checkpoint, "--input", source, "--output", tmp_path / "z")
    assert "3 written, 0 skipped, 1 failed" in result.stdout and "zeros.pt: its largest number is 0" in result.stderr
    torch.save({"feature": torch.ones(6, 2, 3, 14)}, source / "zeros.pt")
    result = train(run_here, source)
    assert result.returncode == 2 and "has C = 12 and " in result.stderr and "zeros.pt has C = 14;" in result.stderr


def test_full_memory_is_said_as_what_it_is(tmp_path, capfd):
    with open(tmp_path / "a.npy", "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (2**40, 3, 1024)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(UserError, match=r"a\.npy does not fit into memory \(Unable to allocate"):
        load_feature(tmp_path / "a.npy")
    for fill in (lambda: np.zeros((2**47,)), lambda: torch.zeros(2**47)):
        with pytest.raises(SystemExit) as ending:
            run_script(fill)
        assert ending.value.code == 2
        assert "error: the machine's memory is full; lower --batch_size" in capfd.readouterr().err


def test_a_lost_ctrl_c_comes_again(capfd, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    class Callback:
        def __del__(self):  # Python drops what is raised here
            signal.raise_signal(signal.SIGINT)

    def main():
        del [Callback()][0]
        time.sleep(5)
        raise AssertionError("it was lost")

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with pytest.raises(SystemExit) as ending:
        run_script(main)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert ending.value.code == 130
    assert capfd.readouterr().err.endswith(": stopped; finished files are whole, and the same command goes on\n")


def test_names_that_cannot_be_shown_are_escaped(trained, tmp_path, run_here):
    source = make_features(tmp_path / "f", count=2)
    name = os.fsdecode(b"caf\xe9.pt")
    shutil.copy(source / "0000.pt", source / name)
    (source / os.fsdecode(b"broken \xe9.pt")).touch()
    checkpoint = trained[0] / "ck" / "motion_ae_epoch1.pt"
    result = run_here("encode.py", "--checkpoint", checkpoint, "--input", source, "--output", tmp_path / "z")
    assert result.returncode == 0 and r"broken \udce9.pt is damaged" in result.stderr
    assert "3 written, 0 skipped, 1 failed" in result.stdout
    assert r"caf\udce9.pt" in (tmp_path / "z" / "encode_report.csv").read_text()
    assert (tmp_path / "z" / name).exists()


def two_ranks(port, *commands):
    """What two ranks that no launcher ends say and end with, each started by its own arguments of Python."""
    shared = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(index), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, command in enumerate(commands)
    ]
    return [(*process.communicate(timeout=120), process.returncode) for process in started]


def test_rank_0_plans_and_a_mistake_is_said_once(trained, tmp_path):
    checkpoint, source = trained[0] / "ck" / "motion_ae_epoch1.pt", trained[0] / "features"
    shutil.copytree(source, tmp_path / "late")
    (tmp_path / "late" / "nested" / "0000.pt").unlink()  # as the other node still sees it
    encoding = ["encode.py", "--device", "cpu", "--output", tmp_path / "z", "--checkpoint"]
    results = two_ranks(29731, *([*encoding, checkpoint, "--input", path] for path in (source, tmp_path / "late")))
    assert [code for *_, code in results] == [0, 0], results
    assert "12 written, 0 skipped, 0 failed" in results[0][0] and len(list((tmp_path / "z").rglob("[!s]*.pt"))) == 12

    wrong = [*encoding, tmp_path / "none.pt", "--input", source]
    results = two_ranks(29732, wrong, wrong)
    said = [
        line for text in results[1][:2] for line in text.splitlines() if not line.startswith("[Gloo]")
    ]  # torch 2.10
    assert [code for *_, code in results] == [2, 2] and not said
    assert results[0][1].count("error: ") == 1 and "none.pt does not exist" in results[0][1]


ONE_RANK_FAILS = """
import model

def main():
    model.ranks.join()
    with model.ranks.first_then_others():
        if model.ranks.index == 1:
            raise model.UserError("my own mistake")
    model.ranks.gather(0)

model.run_script(main)
"""


def test_a_mistake_of_one_rank_ends_all(tmp_path):
    first, second = two_ranks(29733, *[["-c", ONE_RANK_FAILS]] * 2)
    assert (first[2], second[2]) == (2, 2)
    assert first[1].endswith("error: another process of this run has ended; what it said says why\n")
    assert second[1].endswith("error: my own mistake\n") and second[1].count("error: ") == 1


def test_half_written_files_of_killed_runs_are_removed_after_a_day(tmp_path):
    for name, age in ((".old.vfm.tmp", 2 * 86400), (".young.vfm.tmp", 60), ("old.tmp", 2 * 86400)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    make_folder(tmp_path, "--output")
    assert {path.name for path in tmp_path.iterdir()} == {".young.vfm.tmp", "old.tmp"}
