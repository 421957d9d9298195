"""The README: its flags exist, its commands and code run, its halves agree, its figures are the benchmark's."""

import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from draw_clips import draw_clips
from made_up import ROOT, SIZES, SMALL

import vfm_feature

ENGLISH, CHINESE = (ROOT / "README.md").read_text().split("\n---\n")
FIGURES = ROOT / "tests" / "assets" / "figures.json"
VIDEOREPA = {"--precomputing", "--align_dims", "--align_models"}  # flags of its trainer
# What is put into a command to make it small, behind its own flags.
TINY = {
    "vfm_feature.py": SMALL,
    "train.py": [*SIZES[2:], "--num_workers", "0"],  # without --input_dim, which the features tell
    "encode.py": [],
}


IMAGE_MODELS = dict(vfm_feature.IMAGE_MODELS)  # as they are when no test makes them small


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def without_blocks(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(text):
    """The scripts' command lines in the blocks, without comments: ["vfm_feature.py", "--list_models"], ..."""
    lines = [shlex.split(line, comments=True) for block in blocks(text, "bash") for line in block.splitlines()]
    return [words[1:] for words in lines if words[:1] == ["python"]]


def code_without_words(text):
    """The Python blocks without comments and docstrings, which each language has in its own words."""
    return [re.sub(r"\s*#.*|\"\"\".*?\"\"\"", "", block) for block in blocks(text, "python")]


def tables(text):
    """Of each table the rows of cells."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [[[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()] for table in found]


def test_both_languages_have_the_same_sections_commands_tables_and_figures():
    assert len(ENGLISH.splitlines()) <= 300
    english, chinese = (re.findall(r"^(#+) ", without_blocks(half), re.MULTILINE) for half in (ENGLISH, CHINESE))
    assert english == chinese
    assert commands(ENGLISH) == commands(CHINESE)
    assert code_without_words(ENGLISH) == code_without_words(CHINESE)
    for english, chinese in zip(tables(ENGLISH), tables(CHINESE), strict=True):
        for ours, theirs in zip(english, chinese, strict=True):
            assert len(ours) == len(theirs)
            assert re.findall(r"`[^`]*`", ours[0]) == re.findall(r"`[^`]*`", theirs[0])
            if len(ours) > 2:  # a table of figures
                assert [re.findall(r"[\d.]+", cell) for cell in ours] == [
                    re.findall(r"[\d.]+", cell) for cell in theirs
                ]
    for half, other in ((ENGLISH, CHINESE), (CHINESE, ENGLISH)):
        anchor = re.search(r"\]\(#(\S+)\)", half)[1]
        heading = re.search(r"^# (.*)", other, re.MULTILINE)[1]
        assert anchor == re.sub(r"[（）]", "", heading)


@pytest.mark.parametrize("half", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_every_flag_that_is_named_exists(half, run_here):
    known = {script: set(re.findall(r"--\w+", run_here(script, "--help").stdout)) for script in TINY}
    for script, *arguments in commands(half):
        assert {word for word in arguments if word.startswith("--")} <= known[script], script
    spans = re.findall(r"`([^`\n]+)`", without_blocks(half))
    flags = {flag for span in spans if span.startswith("--") for flag in re.findall(r"--\w+", span)}
    assert flags <= set.union(*known.values()) | VIDEOREPA
    for script, rest in re.findall(r"python (tests/bench_\w+\.py)([^`]*)`", half):
        assert all(flag in (ROOT / script).read_text() for flag in re.findall(r"--\w+", rest)), script


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the README takes as given: clips, `dataset` beside this folder, and the package under its name."""
    folder = tmp_path_factory.mktemp("readme")
    for clips in ("clips", "all_clips", "dataset/motion_top100"):
        draw_clips(folder / clips, num_frames=4, height=32, width=48)
        (folder / clips / "captions.csv").rename((folder / clips).with_suffix(".csv"))
    (folder / "vfm_encoder").symlink_to(ROOT)
    return folder


def test_commands_and_code_run_in_their_order(folder, run_here, monkeypatch):
    """In this process, on tiny clips and models with random weights; the default paths count from `clips`."""
    monkeypatch.setattr(vfm_feature, "REPOSITORY", folder / "clips")
    for script, *arguments in commands(ENGLISH):
        with monkeypatch.context() as patch:
            if "--list_models" in arguments:
                patch.setattr(vfm_feature, "IMAGE_MODELS", IMAGE_MODELS)
            result = run_here(script, *arguments, *TINY[script], cwd=folder)
        assert result.returncode == 0, (script, arguments, result.stderr)

    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    names = {}
    for block in blocks(ENGLISH, "python"):
        exec(block, names)
    sys.modules.pop("vfm_encoder", None)

    feature, latent = (torch.load(path, weights_only=True) for path in ("features/VideoMAEv2/0000.pt", "0000.pt"))
    cells = {row[0]: set(re.findall(r"`(\w+)`", row[1])) for table in tables(ENGLISH) for row in table if len(row) == 2}
    assert cells["`<output_root>/<model>/<stem>.pt`"] - {"random"} <= feature.keys()
    assert cells["`encode.py --output`"] - {"reconstruction"} <= latent.keys()
    assert cells["`<save_dir>/motion_ae_*.pt`"] <= torch.load("checkpoints/motion_ae_best.pt").keys()
    assert cells["`<output>/stats.pt`"] <= torch.load("latents/stats.pt").keys()
    for path in ("features/VideoMAEv2/0000.png", "features/VideoMAEv2_motion/0001.pt", "latents/encode_report.csv"):
        assert Path(path).is_file()


def main_table():
    """The cells of figures of the README's first table, from what the benchmark wrote: ours, and PCA's in brackets."""
    tables = json.loads(FIGURES.read_text())
    sizes = sorted({name.split(",")[0] for name in tables["sizes"]}, key=lambda size: int(size.removeprefix("C/")))

    def row(table, column, digits):
        cells = []
        for size in sizes:
            pair = [tables[table].get(f"{size}, {code}") for code in ("trained", "PCA")]
            ours, theirs = (figures[column] if figures else math.nan for figures in pair)
            cells.append("" if math.isnan(ours) else f"**{ours:.{digits}f}** ({theirs:.{digits}f})")
        return cells

    columns = ("reconstruction", "motion", "relations", "of moving")
    camera, student = row("sizes", "camera right", 2), row("student", "over the features'", 2)
    return [*(row("sizes", column, 3) for column in columns), camera, student]


@pytest.mark.parametrize("half", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_the_main_table_is_that_of_the_benchmark(half):
    assert [row[1:] for row in tables(half)[0][2:]] == main_table()
    assert "{{" not in half
