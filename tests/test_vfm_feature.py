"""vfm_feature.py: the models' numbers, decoding, captions, and the command line."""

import argparse
import functools
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from bench_faults import ffmpeg
from draw_clips import draw_frame, write_video
from made_up import ROOT, SMALL, counts, decode_clip, hear_ctrl_c, pattern_clip, published_state
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

import vfm_feature as vfm
from model import UserError, load_checked, provenance


@pytest.fixture
def run_here(run_here):
    return functools.partial(run_here, "vfm_feature.py")


def gray_clip(path: Path, num_frames: int, codec: str = "mp4v", size: tuple[int, int] = (48, 64)) -> Path:
    """A clip whose frame i is a plain gray of level 8 * i + 8, so that a frame tells which one it is."""
    write_video(path, [np.full((*size, 3), 8 * index + 8, np.uint8) for index in range(num_frames)], codec)
    return path


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, shape in [("ball.mp4", 0), ("square.avi", 1)]:
        frames = [draw_frame(shape, index / 7, 48, 64) for index in range(8)]
        write_video(folder / name, frames, "mp4v" if name.endswith("mp4") else "MJPG")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# The models against their authors' code
# ---------------------------------------------------------------------------------------------------------------------


def published_file(model: str, path: Path, **more: torch.Tensor) -> Path:
    """The filled weights in the layout that the authors publish, with the parts that no feature needs, and `more`."""
    state = published_state(model, vfm.find_vfm(model)) | more
    unused = torch.ones(3)
    encoder = {f"encoder.{name}": value for name, value in state.items()}
    backbone = {f"module.backbone.{name}": value for name, value in state.items()}
    masking = ("encoder_to_decoder.weight", "mask_token", "decoder.blocks.0.norm1.weight", "decoder.head.weight")
    torch.save(
        {
            "VideoMAEv2": {"module": {**state, "head.weight": unused, "fc_norm.weight": unused}},
            "VideoMAE": {
                "model": {**encoder, "encoder.norm.weight": unused, **dict.fromkeys(masking, unused)},
                "args": argparse.Namespace(lr=1e-3, model="pretrain_videomae_base_patch16_224"),
                "epoch": 1600,
            },
            "DINOv2": state,
            "VJEPA2": {
                "encoder": {**backbone, "module.backbone.norm.weight": unused, "module.backbone.pos_embed": unused},
                "predictor": {"module.backbone.norm.weight": unused},
                "target_encoder": backbone,
                "epoch": 90,
            },
        }[model],
        path,
    )
    return path


HUB_NAMES = [  # the authors' names -> those of transformers, in which the hub has VideoMAE and V-JEPA 2
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("blocks.", "encoder.layer."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
    (".attn.", ".attention.attention."),
]


def hub_file(path: Path) -> Path:
    """VideoMAE's filled weights as they lie in the hub, with its decoder."""
    encoder = published_state("VideoMAE", vfm.find_vfm("VideoMAE"))
    state = {f"decoder.{name}": value.clone() for name, value in encoder.items()}
    state |= {"position_embeddings": torch.ones(3), "videomae.layernorm.weight": torch.ones(3)}
    for name, value in encoder.items():
        for theirs, hub in HUB_NAMES:
            name = name.replace(theirs, hub)
        if name.endswith("qkv.weight"):
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[f"videomae.{name.replace('qkv', part)}"] = rows.clone()
        else:
            state[f"videomae.{name}"] = value
    save_file(state, path)
    return path


# Made with the authors' own code on the CPU in float32, on `filled` and `pattern_clip`: VideoREPA's `VideoMAEv2.py`
# and `VideoMAE.py` (`vit_base_patch16_224`, positions by its `interpolate_pos_embed`, commit 8002687),
# facebookresearch/dinov2 `vit_base` (patch 14, 518 pixels, `x_norm_patchtokens`, commit b8931f7),
# facebookresearch/vjepa2 `vit_large_rope` (256 pixels, 64 frames, no final norm, commit c2963a4).
# A figure is the feature at [t, h, w], every (C // 6)th channel of it. VideoMAE has VideoMAEv2's figures.
REFERENCE = {  # (frames, height, width), the feature's mean, standard deviation and mean magnitude, figures
    "VideoMAEv2": (
        (48, 160, 240),
        (0.174445, 3.671439, 2.943526),
        {
            (0, 0, 0): [-5.74436, -0.59138, 3.98339, 0.76995, -1.97517, 0.00124],
            (12, 5, 5): [-5.92517, 0.65502, 1.98125, 0.32384, 0.99954, 2.61564],
            (23, 0, 14): [-5.70041, 0.3013, 3.73457, 1.06822, -3.46494, 1.73838],
            (23, 9, 14): [-0.84401, -1.42673, 0.80384, 0.9967, -2.96765, 1.55334],
        },
    ),
    "DINOv2": (
        (2, 420, 630),
        (0.004537, 1.007017, 0.800721),
        {
            (0, 0, 0): [-2.13548, 0.32951, 1.17461, 1.54171, -0.08438, -0.48294],
            (1, 15, 15): [-2.12295, 0.74985, -0.49089, 0.31389, 0.73404, 0.6133],
            (1, 0, 44): [-1.32739, 1.03435, -0.24331, -1.37132, -1.08652, 0.45886],
            (1, 29, 44): [-1.70767, -0.12595, 0.91508, -0.42071, -0.75708, -0.25864],
        },
    ),
    "VJEPA2": (
        (8, 160, 240),
        (0.019649, 5.210355, 4.176344),
        {
            (0, 0, 0): [-0.63788, -1.03051, -1.82823, -7.93889, -8.26964, 0.32995],
            (2, 5, 5): [1.20197, -7.91314, 1.58126, -7.73427, -11.19328, 2.7281],
            (3, 0, 14): [2.51422, 2.33714, -3.35956, -9.95796, -6.66365, 7.22377],
            (3, 9, 14): [4.2707, -8.18992, 0.05345, -5.95283, -7.24269, -2.49043],
        },
    ),
}


@pytest.mark.parametrize("model", REFERENCE)
def test_features_are_those_of_the_authors_code(model, tmp_path):
    (frames, height, width), statistics, figures = REFERENCE[model]
    spec = vfm.find_vfm(model)
    weights = vfm.read_weights(published_file(model, tmp_path / "weights.pth"), spec)
    (tmp_path / "weights.pth").unlink()  # over a gigabyte for the largest
    vit = vfm.build_vit(spec, frames, (height, width), weights)
    feature = vfm.extract_features(vit, spec, pattern_clip(frames, height, width), chunk=1)[0]
    channels = feature.shape[-1]
    for place, expected in figures.items():
        error = (feature[place][:: channels // 6][:6] - torch.tensor(expected)).norm()
        assert error <= 1e-4 * torch.tensor(expected).norm(), f"{model} at {place}"
    measured = torch.stack([feature.mean(), feature.std(), feature.abs().mean()])
    torch.testing.assert_close(measured, torch.tensor(statistics), rtol=1e-4, atol=1e-5)


def test_videomae_s_two_files_hold_one_model(tmp_path, small_models):
    """VideoMAE has VideoMAEv2's figures at equal weights, so what remains to check is its own layout."""
    first, second = (
        vfm.build_vit(
            vfm.find_vfm(model),
            4,
            (32, 48),
            vfm.read_weights(published_file(model, tmp_path / f"{model}.pth"), vfm.find_vfm(model)),
        )
        for model in ("VideoMAEv2", "VideoMAE")
    )
    assert len(first.state_dict()) == 2 + 2 * 12 + 1  # and the table of positions
    assert first.weights_hash == second.weights_hash


def test_the_hub_s_file_is_the_authors_file(clips, tmp_path, run_here):
    """transformers' files have separate queries, keys and values; features and hash are the same."""
    for path in (published_file("VideoMAE", tmp_path / "a.pth"), hub_file(tmp_path / "b.safetensors")):
        command = ["--video_dir", clips, "--models", "VideoMAE", *SMALL[1:], "--videomae_ckpt", path]
        assert run_here(*command, "--output_root", tmp_path / path.stem).returncode == 0
    ours, theirs = (torch.load(tmp_path / name / "VideoMAE" / "ball.pt", weights_only=True) for name in "ab")
    assert torch.equal(ours["feature"], theirs["feature"])
    assert ours["weights"] == theirs["weights"] and ours["weights"].startswith("sha256:")


def test_v_jepa_2_in_the_hub_s_names():
    """There all of queries, keys and values have a bias."""
    bias, block = torch.ones(2), "encoder.layer.3"
    parts = ("query", "key", "value", "proj")
    names = vfm.to_timm_names(
        {
            "encoder.embeddings.patch_embeddings.proj.bias": bias,
            **{f"{block}.attention.{part}.weight": torch.eye(2) for part in parts},
            **{f"{block}.attention.{part}.bias": i * bias for i, part in enumerate(parts)},
            f"{block}.norm1.weight": bias,
            f"{block}.mlp.fc1.weight": bias,
        }
    )
    layers = (
        "attn.qkv.weight",
        "attn.qkv.bias",
        "attn.proj.weight",
        "attn.proj.bias",
        "norm1.weight",
        "mlp.fc1.weight",
    )
    assert set(names) == {"patch_embed.proj.bias", *(f"blocks.3.{layer}" for layer in layers)}
    assert names["blocks.3.attn.qkv.bias"].tolist() == [0, 0, 1, 1, 2, 2]
    assert names["blocks.3.attn.proj.bias"].tolist() == [3, 3]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("DINOv2", "register_tokens"),
        ("DINOv2", "blocks.0.mlp.w12.weight"),
        ("VideoMAE", "pos_embed"),
        ("VideoMAEv2", "blocks.2.norm1.weight"),
        ("VideoMAEv2", "blocks.0.attn.k_bias"),
        ("VJEPA2", "blocks.0.attn.q_norm.weight"),
        ("VJEPA2", "blocks.1.attn.relative_position_bias_table"),
    ],
)
def test_weights_that_the_model_has_no_place_for_are_refused(model, name, clips, tmp_path, run_here):
    path = published_file(model, tmp_path / "weights.pth", **{name: torch.ones(3)})
    command = ["--video_dir", clips, "--models", model, *SMALL[1:], f"--{model.lower()}_ckpt", path]
    result = run_here(*command, "--output_root", tmp_path / "out")
    assert_one_line(result, f"{path}: not the weights of {model}: {name} has no place in it")


def test_the_two_kinds_of_batching_change_nothing(small_models):
    """Two clips in one pass are two passes, and DINOv2's chunks are one."""
    clips = torch.cat([pattern_clip(4, 32, 48), pattern_clip(4, 32, 48).flip(2)])
    vit = vfm.build_vit(vfm.find_vfm("VideoMAE"), 4, (32, 48))
    both = vfm.extract_features(vit, vfm.find_vfm("VideoMAE"), clips)
    assert both.shape == (2, 2, 2, 3, 24)
    torch.testing.assert_close(both[1:], vfm.extract_features(vit, vfm.find_vfm("VideoMAE"), clips[1:]))
    vit = vfm.build_vit(vfm.find_vfm("DINOv2"), 4, (28, 42))
    clips = pattern_clip(4, 28, 42)
    whole = vfm.extract_features(vit, vfm.find_vfm("DINOv2"), clips)
    assert whole.shape == (1, 4, 2, 3, 24)
    torch.testing.assert_close(whole, vfm.extract_features(vit, vfm.find_vfm("DINOv2"), clips, chunk=3))


# ---------------------------------------------------------------------------------------------------------------------
# Decoding and captions
# ---------------------------------------------------------------------------------------------------------------------


def test_frame_indices():
    assert vfm.frame_indices(49, 48)[[0, 1, 23, 24, 47]].tolist() == [0, 1, 23, 25, 48]
    assert vfm.frame_indices(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert vfm.frame_indices(3, 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert vfm.frame_indices(1, 4).tolist() == [0, 0, 0, 0]
    assert vfm.frame_indices(1000, 4).tolist() == [0, 333, 666, 999]


@pytest.mark.parametrize("backend", vfm.BACKENDS)
@pytest.mark.parametrize(("name", "codec"), [("clip.mp4", "mp4v"), ("clip.AVI", "MJPG")])
@pytest.mark.parametrize("num_available", [1, 3, 30])
def test_each_backend_takes_the_frames_of_the_indices(tmp_path, backend, name, codec, num_available):
    path = gray_clip(tmp_path / name, num_available, codec)
    clips = decode_clip(str(path), 8, [(48, 64), (32, 48)], backend)
    assert {size: (clip.shape, clip.dtype) for size, clip in clips.items()} == {
        (48, 64): ((8, 48, 64, 3), np.uint8),
        (32, 48): ((8, 32, 48, 3), np.uint8),
    }
    levels = 8 * vfm.frame_indices(num_available, 8) + 8
    for clip in clips.values():
        assert np.abs(clip.mean(axis=(1, 2, 3)) - levels).max() < 3.9  # two frames are 8 levels apart


def test_backends_agree_and_give_rgb(tmp_path):
    frames = [np.full((48, 64, 3), (30, 60, 220), np.uint8)] * 4  # BGR: OpenCV's order
    write_video(tmp_path / "red.avi", frames, "MJPG")
    clips = [decode_clip(str(tmp_path / "red.avi"), 4, [(48, 64)], name)[48, 64] for name in vfm.BACKENDS]
    for clip in clips:
        assert np.abs(clip.astype(int) - clips[0]).mean() <= 3
        assert np.abs(clip.mean(axis=(0, 1, 2)) - [220, 60, 30]).max() < 6


def h264_clip(path: Path, **options) -> np.ndarray:
    """40 frames of a circling ball in H.264: the frames as drawn, uint8 RGB [40, 48, 64, 3]."""
    frames = np.stack([draw_frame(2, index / 39, 48, 64)[..., ::-1] for index in range(40)])
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream("libx264", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return frames


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "clip.mov"])
def test_a_video_that_is_cut_short_fails_with_both_numbers(tmp_path, name):
    path = tmp_path / name
    options = {"movflags": "faststart"} if name.endswith(("mp4", "mov")) else {}
    h264_clip(path, container_options=options)
    assert decode_clip(str(path), 8, [(48, 64)], "pyav")[48, 64].shape == (8, 48, 64, 3)
    whole = path.read_bytes()
    for share in (0.5, 0.7, 0.85):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"^cut short: \d+ of 40 frames are there$"):
            decode_clip(str(path), 8, [(48, 64)], "pyav")


def test_a_video_with_damaged_frames_fails(tmp_path):
    path = tmp_path / "clip.mp4"
    h264_clip(path)
    rotten = bytearray(path.read_bytes())
    middle = rotten.index(b"mdat") + 2000
    rotten[middle : middle + 40] = bytes(40)
    path.write_bytes(rotten)
    with pytest.raises(ValueError, match=r"^damaged: \d+ frames are whole, then: "):
        decode_clip(str(path), 8, [(48, 64)], "pyav")


def test_a_refusal_says_what_the_video_is(tmp_path):
    h264_clip(tmp_path / "clip.mp4")
    whole = (tmp_path / "clip.mp4").read_bytes()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux([*stream.encode(sound), *stream.encode()])
    (tmp_path / "unknown.mp4").write_bytes(whole.replace(b"avc1", b"xyz1").replace(b"avcC", b"xyzC"))
    (tmp_path / "text.mp4").write_bytes(b"no video")
    said = {
        "sound.mp4": "no video track",
        "unknown.mp4": "a codec that FFmpeg cannot decode",
        "text.mp4": "cannot be read: Invalid data found when processing input; moov atom not found",
    }
    for name, reason in said.items():
        with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
            decode_clip(str(tmp_path / name), 8, [(48, 64)], "pyav")


def test_resizing_is_bicubic_with_antialiasing_and_leaves_a_fitting_frame_alone():
    frame = draw_frame(0, 0.5)
    assert vfm.resize_frame(frame, frame.shape[:2]) is frame
    exact = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
    exact = F.interpolate(exact, size=(160, 230), mode="bicubic", antialias=True).clamp(0, 255)[0].permute(1, 2, 0)
    resized = torch.from_numpy(vfm.resize_frame(frame, (160, 230)).copy())
    assert resized.dtype == torch.uint8
    assert (resized - exact).abs().max() <= 1.25  # a rounding for each axis, and weights of 16 bits
    assert (resized - exact).abs().mean() <= 0.3


def read_captions(folder, table, names):
    """The captions of videos of these names in `folder`, by name, None where the table does not name them."""
    (folder / "captions.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    found = vfm.read_captions(folder / "captions.csv", [Path(name) for name in names], folder)
    captions = defaultdict(list)
    for clip in found:
        captions[clip.video.as_posix()].append(clip.caption)
    return captions


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ('caption\n"a dog, running"\n小狗在跑\n', {"0000.mp4": "a dog, running", "0001.mp4": "小狗在跑"}),
        ("caption\nfirst\n\nthird\n", {"0000.mp4": "first", "0001.mp4": "", "0002.mp4": "third"}),
        ("id,Caption\n7,first\n\n8,second\n", {"0000.mp4": None, "0001.mkv": None, "7.mp4": "first"}),
        (
            "image_path,caption\n/data/b.mp4,bee\nsub\\a.mov,ay\nc,sea\n貓.mp4,cat\n",
            {"a.mov": "ay", "b.mp4": "bee", "c.webm": "sea", "貓.mp4": "cat", "0000.mp4": None},
        ),
        (
            'caption,video\n"line\r\nbreak ""quoted""",a.mp4\nagain,a.mp4\n,b.mp4\n',
            {"a.mp4": 'line\r\nbreak "quoted"', "b.mp4": ""},
        ),
        (
            "\ufeffvideo,caption\nv1.2.mp4,a dot\n0007,seven\nNA,none\nnan.mp4,null\n1e3,NaN\n",
            {"v1.2.mp4": "a dot", "0007.mp4": "seven", "NA.mp4": "none", "nan.mp4": "null", "1e3.mp4": "NaN"},
        ),
        ("video,caption\n", {"a.mp4": None}),
        (f"video,caption\na.mp4,{'x' * 300_000}\nb.mp4,bee\n", {"a.mp4": "x" * 300_000, "b.mp4": "bee"}),
        (
            "video,caption\n" + "c.mp4,sea\n" * 1000 + f'a.mp4,"{"x, " * 1_000_000}end"\nb.mp4,bee\n',
            {"a.mp4": "x, " * 1_000_000 + "end", "b.mp4": "bee", "c.mp4": "sea"},
        ),
        ("id,caption\n1,one\n2.0,two\n12.,twelve\n", {"0001.mp4": "one", "0002.mp4": "two", "012.avi": "twelve"}),
        ("id,caption\n1,stem\n7.0,number\n", {"1.mp4": "stem", "0001.mp4": None, "007.mp4": "number"}),
        (
            'x,caption\n"""0003.mp4""",a\n " 0001 ",b\n“2”,c\n\'q\',d\n',
            {"0003.mp4": "a", "0001.mp4": "b", "0002.mp4": "c", "q.mp4": "d"},
        ),
        (",video,caption\n0,2.mp4,two\n1,0.mp4,zero\n2,gone.mp4,-\n", {"0.mp4": "zero", "1.mp4": None, "2.mp4": "two"}),
        (",clip,caption\n0,0001,one\n1,0000,zero\n", {"0000.mp4": "zero", "0001.mp4": "one"}),
        ("path,file,caption\nx/a.mp4,a,ay\nx/b.mp4,b,bee\n", {"a.mp4": "ay", "b.mp4": "bee"}),
    ],
    ids=[
        *("by row", "blank line in one column", "another name", "paths", "quotes and repeats"),
        *("byte order mark, dots, numbers", "header alone", "300 KB", "3 MB behind 10 KB", "numbers"),
        *("a number of two videos", "quoted names", "full names before an index", "stems before an index", "agreement"),
    ],
)
def test_captions(tmp_path, table, expected):
    assert read_captions(tmp_path, table, expected) == {name: [caption] for name, caption in expected.items()}


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (
            "video,caption\nsub/a.mp4,below\ndata/sub/b.mp4,bee\na.mp4,above\n",
            {"a.mp4": "above", "b.mp4": None, "sub/a.mp4": "below", "sub/b.mp4": "bee"},
        ),
        ("video,caption\ntrain/1.mp4,train\nval/1.mp4,val\n", {"val/1.mp4": "val"}),
        ("video,caption\nx/b.mp4,in x\ny/b.mp4,in y\n", {"x/b.mp4": "in x", "x/y/b.mp4": "in y"}),
        ("video,caption\n2,two\n", {"x/02.mp4": "two", "y/03.mp4": None}),
    ],
)
def test_a_caption_is_of_the_video_of_the_longest_path(tmp_path, table, expected):
    assert read_captions(tmp_path, table, expected) == {name: [caption] for name, caption in expected.items()}


def test_the_folder_that_was_given_counts_as_part_of_the_path(tmp_path):
    (tmp_path / "val").mkdir()
    table = "video,caption\ntrain/1.mp4,train\nval/1.mp4,val\n"
    assert read_captions(tmp_path / "val", table, ["1.mp4"]) == {"1.mp4": ["val"]}
    with pytest.raises(UserError, match=r"1\.mp4 can be train/1 or val/1; keep the rows of one"):
        read_captions(tmp_path, table, ["1.mp4"])
    table = "video,caption\nval/2.mp4,two\nval/1.mp4,either\n"  # in val/val, too, lies a 1.mp4
    with pytest.raises(UserError, match=r"row 3: column 'video' has 'val/1\.mp4', which can be 1\.mp4 or val/1\.mp4"):
        read_captions(tmp_path / "val", table, ["1.mp4", "val/1.mp4", "2.mp4"])


def test_a_name_of_several_videos_is_refused(tmp_path):
    for cell, videos in {"7": ["007.mp4", "07.mp4"], "b.mp4": ["x/b.mp4", "x/y/b.mp4"]}.items():
        several = re.escape(f"row 3: column 'id' has '{cell}', which can be {videos[0]} or {videos[1]}; write the path")
        with pytest.raises(UserError, match=several):
            read_captions(tmp_path, f"id,caption\na,ay\n{cell},either\n", ["a.mp4", *videos])


def test_captions_of_thousands_of_videos_of_one_name(tmp_path):
    """Which a search among all of that name for each row would take minutes for."""
    expected = {f"{index}/clip.mp4": [str(index)] for index in range(3000)}
    table = "".join(f"{name},{index}\n" for index, name in enumerate(expected))
    assert read_captions(tmp_path, f"video,caption\n{table}", expected) == expected


def test_parts_are_in_the_order_of_the_rows(tmp_path, capsys):
    table = "video,caption,start,end\na,one,3,4\na.mkv,two,1,2\nb.mp4,bee,,\nz,gone,,\nx/a,three,0,1\n"
    assert read_captions(tmp_path, table, ["a.mkv", "b.mp4", "c.mp4"]) == {
        "a.mkv": ["one", "two"],  # x/a is another folder's
        "b.mp4": ["bee"],
        "c.mp4": [None],
    }
    assert capsys.readouterr().err.endswith(
        "captions.csv: column 'video' names 2 of 3 videos; 2 of its 5 rows belong to no video; start and end cut them "
        "into 4 clips, _000, _001 and so on of each\n"
    )
    read_captions(tmp_path, "video,caption\na,one\na.mkv,two\n", ["a.mkv"])
    assert "; 1 rows name a video again, such as a.mkv, and its first counts\n" in capsys.readouterr().err
    read_captions(tmp_path, "caption\none\ntwo\n", ["0000.mkv"])
    assert "; 1 of its 2 rows belong to no video\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "error"),
    [
        (b"", "no column named caption; it has nothing"),
        (b"video,text\na.mp4,a dog\n", "no column named caption; it has 'video', 'text'"),
        (b"," * 2**12, "no column named caption"),
        (b"caption,video,caption\na dog,a.mp4,two\n", "2 columns are named caption; rename all but one"),
        (b"video,caption\na.mp4,a dog\nb.mp4,a cat, asleep\n", "row 3: 3 fields where the header has 2"),
        (b"video,caption\na.mp4,a dog, running\nb.mp4,a cat, asleep\n", "row 2: 3 fields where the header has 2"),
        (b"video,caption\n" + b"x.mp4,word\n" * 10000 + b"a.mp4,a dog, running\n", "row 10002: 3 fields"),
        (b"video,caption\na.mp4\n", "row 2: 1 fields where the header has 2"),
        (b"video,caption\na.mp4,a\rdog\n", "row 2: a carriage return outside quotes; put commas between columns"),
        (b"caption\na dog\na\rcat\n", "row 3: a carriage return outside quotes; put commas between columns"),
        (b'video,caption\na.mp4,a dog\nb.mp4,"a cat\nc.mp4,a cow\n', "row 3: unexpected end of data"),
        (b'video,caption\na.mp4,"a dog\nb.mp4,"a cat"\n', "row 2: ',' expected after"),
        ("caption\ncafé\n".encode("latin-1"), "cannot be read as text in UTF-8 ('utf-8' codec can't decode"),
        (bytes(range(256)), "cannot be read as text in UTF-8"),
        (
            b"caption\na dog\n",
            "nothing names a.mp4: the number of the row, 0000, 0001, ..., has '0000'; give each row its video",
        ),
        (
            b"name,caption\n17,a dog\n18,a cat\n",
            "nothing names a.mp4: column 'name' has '17'; give each row its video's file name",
        ),
        (b"a,b,caption\na.mp4,b.mp4,x\nb.mp4,a.mp4,y\n", "column 'a' and column 'b' contradict each other: row 2 has"),
        (b"id,a,caption\nb,a,x\nz,b,y\n", "'a' and column 'id' contradict each other"),
        (b"caption\ra dog\ra cat\r", "row 1: a carriage return outside quotes; put commas between columns"),
    ],
    ids=[
        *(
            "empty",
            "other columns",
            "commas",
            "two captions",
            "long row",
            "all rows long",
            "late long row",
            "short row",
        ),
        *("carriage return", "carriage return by row", "unclosed quote", "stray quote", "latin-1", "binary"),
        *("no row for a video", "no name", "two files", "two stems", "lines of an old Mac"),
    ],
)
def test_a_table_that_cannot_be_trusted_is_refused(tmp_path, table, error):
    with pytest.raises(UserError, match=re.escape(error)):
        read_captions(tmp_path, table, ["a.mp4", "b.mp4"])


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def test_two_models_in_one_run(clips, tmp_path, run_here):
    (clips / "captions.csv").write_text("video,caption\nball.mp4,a ball\n", encoding="utf-8")
    (clips / ".hidden.mp4").write_bytes(b"not for us")
    out = tmp_path / "out"
    result = run_here(
        *("--video_dir", clips, "--csv_path", clips / "captions.csv", "--output_root", out, *SMALL),
        *("--models", "VideoMAEv2", "DINOv2", "--save_dtype", "float16"),
    )
    assert result.returncode == 0, result.stderr
    assert "1 of 2 clips have no caption" in result.stderr
    assert "mean NOTHING" in result.stdout
    assert f"captions: {clips / 'captions.csv'}: column 'video' names 1 of 2 videos" in result.stderr
    saved = torch.load(out / "VideoMAEv2" / "ball.pt", weights_only=True)
    assert saved["feature"].shape == (2, 2, 3, 24)
    assert saved["feature"].dtype == torch.float16
    assert {key: saved[key] for key in ("caption", "video", "model", "weights")} == {
        "caption": "a ball",
        "video": "ball.mp4",
        "model": "VideoMAEv2",
        "weights": "random",
    }
    assert torch.load(out / "DINOv2" / "square.pt", weights_only=True)["feature"].shape == (4, 2, 3, 24)
    assert (out / "vfm_dimensions.txt").read_text() == (
        "VideoMAEv2: feature shape [2, 2, 3, 24], C = 24\nDINOv2: feature shape [4, 2, 3, 24], C = 24\n"
    )
    # what the command wrote is what the functions give
    clip = torch.from_numpy(decode_clip(str(clips / "ball.mp4"), 4, [(32, 48)], "pyav")[32, 48])[None]
    vit = vfm.build_vit(vfm.find_vfm("VideoMAEv2"), 4, (32, 48))
    torch.testing.assert_close(vfm.extract_features(vit, vfm.find_vfm("VideoMAEv2"), clip)[0].half(), saved["feature"])


def test_finished_features_are_skipped_unless_something_changed(clips, tmp_path, run_here):
    captions, out = tmp_path / "captions.csv", tmp_path / "out"
    captions.write_text("video,caption\nball,old\nsquare,same\n")
    command = ["--video_dir", clips, "--csv_path", captions, "--output_root", out, "--models", "VideoMAE", *SMALL]
    assert counts(run_here(*command)) == [2, 0, 0]
    made = (out / "VideoMAE" / "square.pt").stat().st_mtime_ns
    assert counts(run_here(*command)) == [0, 2, 0]

    captions.write_text("video,caption\nball,new\nsquare,same\n")  # a caption is renewed without the model
    assert counts(run_here(*command)) == [0, 2, 0]
    assert torch.load(out / "VideoMAE" / "ball.pt", weights_only=True)["caption"] == "new"
    assert (out / "VideoMAE" / "square.pt").stat().st_mtime_ns == made

    captions.write_text("video,caption\nsquare,\n")  # by a CSV that names the video, and by no other
    assert counts(run_here(*command)) == [0, 2, 0]
    assert counts(run_here(*command[:2], *command[4:])) == [0, 2, 0]
    assert torch.load(out / "VideoMAE" / "ball.pt", weights_only=True)["caption"] == "new"
    assert torch.load(out / "VideoMAE" / "square.pt", weights_only=True)["caption"] == ""

    size = (clips / "ball.mp4").stat().st_size
    other = gray_clip(tmp_path / "other.mp4", 5).read_bytes()  # another video of the same name and size
    box = (size - len(other)).to_bytes(4, "big") + b"free"
    (clips / "ball.mp4").write_bytes(other + box.ljust(size - len(other), b"\0"))
    (out / "VideoMAE" / "square.pt").write_bytes(b"torn")
    assert counts(run_here(*command)) == [2, 0, 0]
    shutil.copytree(clips, tmp_path / "copy")  # the same video elsewhere and later is the same
    assert counts(run_here(*command, "--video_dir", tmp_path / "copy")) == [0, 2, 0]
    assert counts(run_here(*command, "--save_dtype", "bfloat16")) == [2, 0, 0]
    assert counts(run_here(*command, "--save_dtype", "bfloat16", "--overwrite")) == [2, 0, 0]
    assert not [path for path in out.rglob("*") if path.suffix == ".tmp"]


def test_what_other_settings_replace_is_said_once(clips, tmp_path, run_here):
    command = ["--video_dir", clips, "--output_root", tmp_path / "out", "--models", "VideoMAE", *SMALL]
    said = "warning: VideoMAE: {} clips that were made with other settings are made again: {}\n"
    result = run_here(*command, "--preview")
    assert counts(result) == [2, 0, 0] and "made again" not in result.stderr
    Image.new("RGB", (9, 9)).save(tmp_path / "out" / "VideoMAE" / "mine.png")
    shutil.copy(clips / "ball.mp4", clips / "mine.mp4")
    result = run_here(*command, "--num_frames", 2, "--pool")  # a clip is new
    assert counts(result) == [3, 0, 0]
    assert said.format(2, "num_frames 4 -> 2, pool None -> True") in result.stderr
    # the pictures showed what is there no longer; another picture is the user's
    assert [path.name for path in (tmp_path / "out" / "VideoMAE").glob("*.png")] == ["mine.png"]

    shutil.copy(clips / "square.avi", clips / "ball.avi")
    (clips / "ball.avi").replace(clips / "ball.mp4")  # another video of that name
    result = run_here(*command, "--num_frames", 2, "--pool")
    assert counts(result) == [1, 2, 0] and said.format(1, "another video") in result.stderr
    published_file("VideoMAE", tmp_path / "weights.pth")
    weights = ["--videomae_ckpt", tmp_path / "weights.pth"]
    result = run_here(*command[: -len(SMALL)], *SMALL[1:], *weights, "--num_frames", 2, "--pool")
    assert counts(result) == [3, 0, 0] and "made again" not in result.stderr
    result = run_here(*command, "--num_frames", 2, "--pool")  # which would lose what has a meaning
    assert result.returncode == 2 and "ball.pt was made with weights; give the dry run another" in result.stderr
    result = run_here(*command, "--overwrite")
    assert counts(result) == [3, 0, 0] and "made again" not in result.stderr


def test_ranks_and_rival_runs_write_what_one_process_writes(clips, tmp_path):
    for index in range(3):
        gray_clip(clips / f"{index:04d}.mp4", 4 + index)
    (clips / "broken.mp4").write_bytes(b"this is no video")
    (clips / "torn.avi").write_bytes(b"nor this")
    script = [str(ROOT / "vfm_feature.py"), "--video_dir", str(clips), "--models", "VideoMAE", *SMALL]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as torchrun sets it; sums depend on the number of threads
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    started = [
        subprocess.Popen(
            [*launcher, *script, "--device", "cpu", "--output_root", str(tmp_path / out)],
            env=one_thread,
            stdout=-1,
            stderr=-1,
            text=True,
        )
        for launcher, out in [
            ([sys.executable], "one"),
            (torchrun, "ranks"),
            ([sys.executable], "rivals"),
            ([sys.executable], "rivals"),
        ]
    ]
    for process in started:
        result = subprocess.CompletedProcess(process.args, 0, *process.communicate(timeout=300))
        written, skipped, failed = counts(result)
        assert (process.returncode, written + skipped, failed) == (0, 5, 2), result.stderr
    one, ranks, rivals = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "one", tmp_path / "ranks", tmp_path / "rivals")
    )
    assert len(one) == 5 + 1 + 1  # features, failures, and the dimensions
    assert one == ranks == rivals


# Flags that decide no feature's values, or decide them by way of the weights' hash, the input's size or the settings.
HARMLESS = {"video_dir", "csv_path", "output_root", "recursive", "overwrite", "preview", "output_format", "models"}
HARMLESS |= {"list_models", "weights", "videomaev2_ckpt", "videomae_ckpt", "dinov2_ckpt", "vjepa2_ckpt"}
HARMLESS |= {"allow_skip_missing", "random_weights", "motion_checkpoint", "num_frames", "recipe", "device"}
HARMLESS |= {"videomae_resize_h", "videomae_resize_w", "dinov2_resize_h", "dinov2_resize_w"}
HARMLESS |= {"batch_size", "dinov2_chunk", "num_workers", "decode_timeout"}


def test_every_flag_is_in_the_settings_or_harmless():
    flags = vars(vfm.parse_args([]))
    settings = {*vars(flags.pop("settings"))}
    assert flags.keys() == settings | HARMLESS and not settings & HARMLESS


def test_weights_that_are_given_beat_those_in_the_default_place(tmp_path, monkeypatch):
    monkeypatch.setattr(vfm, "REPOSITORY", tmp_path)
    default, given = tmp_path / vfm.DEFAULT_PATHS["videomaev2_ckpt"], tmp_path / "given.pth"
    default.parent.mkdir(parents=True)
    default.touch()
    given.touch()
    assert vfm.parse_args([]).weights["VideoMAEv2"] == default
    for flags in (["--weights", f"VideoMAEv2={given}"], ["--videomaev2_ckpt", str(given)]):
        assert vfm.parse_args(flags).weights["VideoMAEv2"] == given


def test_the_default_captions_go_with_the_default_videos(clips, tmp_path, run_here, monkeypatch):
    (tmp_path / "repository").mkdir()
    monkeypatch.setattr(vfm, "REPOSITORY", tmp_path / "repository")
    shutil.copytree(clips, tmp_path / "dataset" / "motion_top100")
    (tmp_path / "dataset" / "motion_top100.csv").write_text("video,caption\nball,of the other data set\n")
    command = ["--models", "VideoMAE", *SMALL, "--output_root", tmp_path / "out", "--video_dir"]
    result = run_here(*command, clips)
    assert counts(result) == [2, 0, 0] and "no captions: --csv_path names a CSV file" in result.stderr
    assert torch.load(tmp_path / "out" / "VideoMAE" / "ball.pt", weights_only=True)["caption"] == ""
    result = run_here(*command[:-1])
    assert counts(result) == [0, 2, 0] and "VideoMAE: 1 of the skipped files have another caption now" in result.stdout
    assert (
        torch.load(tmp_path / "out" / "VideoMAE" / "ball.pt", weights_only=True)["caption"] == "of the other data set"
    )


def test_what_is_not_the_video_itself_fails_by_name(clips, tmp_path, run_here):
    """Links to nothing, what git-annex and Git LFS leave; linked folders are searched."""
    (clips / "gone.mp4").symlink_to(".git/annex/objects/xx/gone.mp4")
    (clips / "lfs.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    (clips / "unlocked.mp4").write_text("/annex/objects/MD5E-s9--00.mp4\n")
    (tmp_path / "store").mkdir()
    gray_clip(tmp_path / "store" / "1.mp4", 4)
    (clips / "linked").symlink_to(tmp_path / "store")
    out = tmp_path / "out" / "VideoMAE"
    command = ["--video_dir", clips, "--output_root", tmp_path / "out", "--models", "VideoMAE", *SMALL, "--recursive"]
    result = run_here(*command)
    assert counts(result) == [3, 0, 3] and (out / "linked" / "1.pt").is_file()
    reasons = {"gone.mp4": "git annex get", "lfs.mp4": "git lfs pull", "unlocked.mp4": "git annex get"}
    lines = (out / "failed_videos.txt").read_text().splitlines()
    for line, (name, reason) in zip(lines, reasons.items(), strict=True):
        assert line.startswith(f"{name}\t") and reason in line
    assert result.stdout.splitlines()[-1] == f"VideoMAE: 3 failed; {out / 'failed_videos.txt'} says why"


def test_a_name_that_is_too_long_fails_alone(clips, tmp_path, run_here):
    """Of 255 bytes, which a disk allows, that of a window's file, or of its picture, can be more."""
    long, picture = "影" * 83, "x" * 248
    gray_clip(clips / f"{long}.mp4", 4)
    shutil.copy(clips / f"{long}.mp4", clips / f"{picture}.mp4")
    out = tmp_path / "out" / "VideoMAE"
    command = ["--video_dir", clips, "--output_root", tmp_path / "out", "--models", "VideoMAE", *SMALL, "--window", 5]
    assert counts(run_here(*command, "--preview")) == [2, 0, 2]
    assert sorted(path.name for path in out.glob("*.pt") if len(path.name) < 99) == ["ball_000.pt", "square_000.pt"]
    lines = (out / "failed_videos.txt").read_text().splitlines()
    assert [line.split(" from ")[0] for line in lines] == [f"{picture}.mp4", f"{long}.mp4"]
    assert lines[1].endswith(f"\tno file can be named {long}_000: File name too long; rename the video")


def clip_with_a_gap(path: Path) -> None:
    """Eight frames a second from 0 to 1 s and from 5 to 6 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in [*range(8), *range(40, 48)]:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * index, np.uint8), format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_windows_hold_as_many_frames_as_fps_says_and_each_failure_has_its_line(clips, tmp_path, run_here):
    for path in clips.iterdir():
        path.unlink()
    clip_with_a_gap(clips / "gap.mkv")
    (tmp_path / "parts.csv").write_text("video,caption,start\ngap,late,3\ngap,whole,0\n")
    out = tmp_path / "out" / "VideoMAE"
    command = ["--video_dir", clips, "--csv_path", tmp_path / "parts.csv", "--output_root", tmp_path / "out"]
    command += ["--models", "VideoMAE", "--window", 1, "--fps", 8, "--random_weights", *SMALL[3:]]
    result = run_here(*command)
    assert counts(result) == [3, 0, 6]
    assert "8 frames of each window: 1 s at 8 frames a second" in result.stderr
    assert "start and end cut them into 2 clips, _000, _001 and so on of each" in result.stderr
    saved = {path.stem: torch.load(path, weights_only=True) for path in out.glob("*.pt")}
    assert {stem: (data["start"], data["frame_indices"]) for stem, data in saved.items()} == {
        "gap_000_002": (5.0, [*range(8, 16)]),
        "gap_001_000": (0.0, [*range(8)]),
        "gap_001_005": (5.0, [*range(8, 16)]),
    }
    assert saved["gap_000_002"]["feature"].shape == (4, 2, 3, 24) and saved["gap_000_002"]["caption"] == "late"
    failures = (out / "failed_videos.txt").read_text()
    assert [line.split("\t")[0] for line in failures.splitlines()] == [
        f"gap.mkv from {start} s to {start + 1} s" for start in (1, 2, 3, 3, 4, 4)
    ]  # a line each, of both parts
    made = {path: path.stat().st_mtime_ns for path in out.glob("*.pt")}
    assert counts(run_here(*command)) == [0, 3, 6]  # though the first window of a clip is not there
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.pt")} == made
    assert (out / "failed_videos.txt").read_text() == failures


def test_frames_that_repeat_are_counted(clips, tmp_path, run_here):
    gray_clip(clips / "short.mp4", 3)
    command = ["--video_dir", clips, "--output_root", tmp_path / "out", "--models", "VideoMAE", *SMALL[:2], "6"]
    for outcome in ([3, 0, 0], [0, 3, 0]):
        result = run_here(*command, *SMALL[3:])
        assert counts(result) == outcome
        assert (
            "VideoMAE: 1 clips show fewer frames than asked, and some repeat: 3 of the 6 of short.pt; " in result.stdout
        )
        assert "; --num_frames 2 avoids it\n" in result.stdout


def test_clips_that_go_on_after_their_last_frame_are_counted(clips, tmp_path, run_here):
    """Frames at a fixed rate, without --window, are of a clip's beginning."""
    gray_clip(clips / "long.mp4", 30)  # at 25 frames a second
    command = ["--video_dir", clips, "--output_root", tmp_path / "out", "--models", "VideoMAE", *SMALL[:2], "4"]
    said = "VideoMAE: of 1 clips only the first 1 s are seen, such as long.pt; --window 1 makes files of the rest too"
    for outcome in ([3, 0, 0], [0, 3, 0]):
        result = run_here(*command, *SMALL[3:], "--fps", 4)
        assert counts(result) == outcome and said in result.stdout.splitlines()
    assert "are seen" not in run_here(*command, *SMALL[3:], "--overwrite").stdout


def test_parts_that_end_after_their_video_are_counted(clips, tmp_path, run_here):
    (tmp_path / "parts.csv").write_text("video,caption,start,end\nball,short,0,99\nball,whole,0,0.3\nsquare,all,,\n")
    command = ["--video_dir", clips, "--csv_path", tmp_path / "parts.csv", "--output_root", tmp_path / "out"]
    for outcome in ([3, 0, 0], [0, 3, 0]):
        result = run_here(*command, "--models", "VideoMAE", *SMALL)
        assert counts(result) == outcome
        said = "VideoMAE: 1 parts were to end after their videos, and end with them, such as ball_000.pt\n"
        assert said in result.stdout


def test_squashing_is_said_once(clips, tmp_path, run_here):
    """What players show counts: the clips at 4 : 3, and at 3 : 4 once they are turned, however they are stored."""
    command = ["--video_dir", clips, "--output_root", tmp_path / "out", "--models", "VideoMAE", *SMALL]
    said = "VideoMAE: clips not shaped 64 : 48 are squashed; --fit crop keeps it"
    fitting = ["--videomae_resize_h", 48, "--videomae_resize_w", 64]
    assert "squashed" not in run_here(*command, *fitting).stderr
    for name in ("ball.mp4", "square.avi"):
        ffmpeg("-display_rotation", "90", "-i", clips / name, "-c", "copy", clips / f"turned_{name[:4]}.mp4")
    assert "squashed" not in run_here(*command, *fitting, "--fit", "crop").stderr
    assert run_here(*command, *fitting).stderr.count(said) == 1


def test_pooled_features_and_safetensors(clips, tmp_path, run_here):
    command = ["--video_dir", clips, "--output_root", tmp_path / "out", "--models", "VideoMAE", *SMALL]
    out = tmp_path / "out" / "VideoMAE"
    assert counts(run_here(*command)) == [2, 0, 0]
    whole = torch.load(out / "ball.pt", weights_only=True)["feature"]
    assert whole.shape == (2, 2, 3, 24)
    assert counts(run_here(*command, "--pool", "--preview")) == [2, 0, 0]  # another feature, so made again
    saved = torch.load(out / "ball.pt", weights_only=True)
    pooled = saved["feature"]
    assert provenance(saved) == "VideoMAE (weights random, pooled)"
    torch.testing.assert_close(pooled, whole.mean(dim=(1, 2), keepdim=True))
    assert (out / "ball.png").is_file()

    command += ["--output_format", "safetensors", "--save_dtype", "bfloat16"]
    result = run_here(*command)
    assert counts(result) == [2, 0, 0] and "also holds 2 files of other clips" in result.stderr
    with safe_open(out / "ball.safetensors", framework="pt") as file:
        torch.testing.assert_close(file.get_tensor("feature"), whole.bfloat16())
        assert file.metadata()["video"] == "ball.mp4"
    (tmp_path / "captions.csv").write_text("video,caption\nball,a ball\n")
    assert counts(run_here(*command, "--csv_path", tmp_path / "captions.csv")) == [0, 2, 0]
    saved = load_checked(out / "ball.safetensors")
    assert saved["caption"] == "a ball" and saved["settings"]["save_dtype"] == "bfloat16"
    torch.testing.assert_close(saved["feature"], whole.bfloat16())


def two_ranks(folders, *arguments):
    """What vfm_feature.py says as rank 0 and as rank 1, which stand in different folders."""
    command = [sys.executable, str(ROOT / "vfm_feature.py"), *map(str, arguments), *SMALL[:1], *SMALL[3:]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = [
        subprocess.Popen(
            [*command, "--device", "cpu"],
            cwd=folder,
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=-1,
            stderr=-1,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]
    said = [process.communicate(timeout=300) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *streams)
        for process, streams in zip(started, said, strict=True)
    ]


def test_ranks_do_what_rank_0_planned_and_leave_a_model_out_together(clips, tmp_path):
    """Rank 1 still sees the folder as it was, without the first video, and has no configuration of one model."""
    for index in range(2):
        gray_clip(clips / f"{index}.mp4", 4)
    shutil.copytree(clips, tmp_path / "old" / "clips")
    (tmp_path / "old" / "clips" / "0.mp4").unlink()
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    (tmp_path / "toy").mkdir()
    config = {"model_type": "videomae", "image_size": 32, "num_frames": 4, "patch_size": 16, **shape}
    (tmp_path / "toy" / "config.json").write_text(json.dumps(config))
    pixels = {"image_mean": vfm.IMAGENET_MEAN, "image_std": vfm.IMAGENET_STD}
    (tmp_path / "toy" / "preprocessor_config.json").write_text(json.dumps(pixels))
    command = ["--video_dir", "clips", "--output_root", tmp_path / "out", "--num_frames", 4, "--allow_skip_missing"]
    first, second = two_ranks([tmp_path, tmp_path / "old"], *command, "--models", "VideoMAE", "hf:./toy")
    assert counts(first) == [4, 0, 0], second.stderr
    assert re.search(r"^not run: hf:\./toy: .+ \(rank 1\)$", first.stdout, re.MULTILINE)
    assert not list((tmp_path / "out").glob("hf*/*.pt"))
    assert "not run" not in second.stdout and "warning" not in second.stderr


def test_a_mistake_is_told_once_by_all_ranks(clips, tmp_path):
    first, second = two_ranks([tmp_path] * 2, "--video_dir", "clips", "--num_frames", 3, "--models", "VideoMAE")
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr.count("\n") == 1 and second.stderr == ""


def test_batches_and_bfloat16_come_close_to_the_plain_run(clips, tmp_path, run_here):
    gray_clip(clips / "gray.mp4", 6)
    plain = ["--video_dir", clips, "--models", "VideoMAE", *SMALL, "--output_root"]
    features = []
    for name, flags in {"plain": [], "batched": ["--batch_size", "2"], "low": ["--precision", "bfloat16"]}.items():
        assert counts(run_here(*plain, tmp_path / name, *flags)) == [3, 0, 0]
        saved = [torch.load(path, weights_only=True) for path in sorted((tmp_path / name / "VideoMAE").glob("*.pt"))]
        assert [data["video"] for data in saved] == ["ball.mp4", "gray.mp4", "square.avi"]
        features.append(torch.stack([data["feature"] for data in saved]))
    plain, batched, low = features
    assert (batched - plain).norm() <= 1e-5 * plain.norm()
    assert 1e-5 * plain.norm() < (low - plain).norm() <= 1e-2 * plain.norm()


def test_a_video_that_fails_is_recorded_and_the_others_are_made(clips, tmp_path, run_here):
    (clips / "broken.mp4").write_bytes(b"this is no video" * 100)
    out = tmp_path / "out"
    command = ["--video_dir", clips, "--output_root", out, "--models", "VideoMAE", *SMALL]
    assert counts(run_here(*command)) == [2, 0, 1]
    name, reason = (out / "VideoMAE" / "failed_videos.txt").read_text().rstrip("\n").split("\t")
    assert name == "broken.mp4"
    assert reason.startswith("cannot be read: Invalid data")
    gray_clip(clips / "broken.mp4", 4)  # mended: the next run makes it and forgets the failure
    assert counts(run_here(*command)) == [1, 2, 0]
    assert not (out / "VideoMAE" / "failed_videos.txt").exists()

    for path in clips.iterdir():
        path.write_bytes(b"nothing left")
    result = run_here(*command, "--overwrite")
    assert result.returncode == 1
    assert len((out / "VideoMAE" / "failed_videos.txt").read_text().splitlines()) == 3


def test_a_decoder_that_hangs_or_dies_costs_its_process_only(tmp_path):
    """PyAV's conversion ends badly, by the width of the frame; decord reads what needs no turn."""
    (tmp_path / "sitecustomize.py").write_text(
        "import av, ctypes, os\n"
        "class Graph:\n"
        "    def add_buffer(self, width, **options):\n"
        "        if width == 32: ctypes.PyDLL(None).sleep(1000)\n"
        "        if width == 48: os.kill(os.getpid(), 11)\n"
        "        bytearray(6 * 2**30)\n"
        "av.filter.Graph = Graph\n"
    )
    (tmp_path / "clips").mkdir()
    reasons = {32: "no end after 4 s (--decode_timeout)", 48: "the process died", 64: "MemoryError"}
    for width in reasons:
        clip = gray_clip(tmp_path / "clips" / f"{width}.mp4", 4, size=(48, width))
        ffmpeg("-display_rotation", "90", "-i", clip, "-c", "copy", clip.with_name(f"turned_{width}.mp4"))
    command = ["--video_dir", tmp_path / "clips", "--output_root", tmp_path / "out", "--models", "VideoMAE", *SMALL]
    result = subprocess.run(
        [sys.executable, ROOT / "vfm_feature.py", *map(str, command), "--device", "cpu", "--decode_timeout", "4"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert counts(result) == [3, 0, 3]
    failures = (tmp_path / "out" / "VideoMAE" / "failed_videos.txt").read_text().splitlines()
    for failure, (width, reason) in zip(failures, reasons.items(), strict=True):
        assert failure.startswith(f"turned_{width}.mp4\tpyav: {reason}") and "; decord: " in failure


def processes_of_session(session: int) -> list[str]:
    """Those that live (Linux)."""
    living = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = path.read_text().rsplit(")", 1)
        except OSError:  # it has just ended
            continue
        state, _, _, its_session, *_ = fields.split()
        if int(its_session) == session and state != "Z":
            living.append(name)
    return living


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_at_any_moment_the_same_command_finishes_the_work(clips, tmp_path, number, run_here):
    for index in range(18):
        gray_clip(clips / f"{index:04d}.mp4", 4)
    out, arguments = (
        tmp_path / "VideoMAE",
        ["--video_dir", clips, "--output_root", tmp_path, "--models", "VideoMAE", *SMALL],
    )
    command = [sys.executable, ROOT / "vfm_feature.py", *map(str, arguments), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=-1, stderr=-1, start_new_session=True, preexec_fn=hear_ctrl_c)
    while len(list(out.glob("*.pt"))) < 3:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(number)  # to the process alone, as a cluster's scheduler does
    stdout, stderr = (stream.decode() for stream in process.communicate(timeout=10))
    assert "Traceback" not in stderr
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert stdout.splitlines()[2].startswith("VideoMAE")  # the summary
        assert "stopped" in stderr
    finished = {path: path.read_bytes() for path in out.glob("*.pt")}
    assert 3 <= len(finished) < 20
    deadline = time.monotonic() + 10
    while living := processes_of_session(process.pid):
        assert time.monotonic() < deadline, living

    written, skipped, failed = counts(run_here(*arguments))
    assert (written + skipped, failed) == (20, 0) and skipped >= len(finished)
    assert {path: path.read_bytes() for path in finished} == finished
    assert len([torch.load(path, weights_only=True) for path in out.glob("*.pt")]) == 20
    assert not list(out.glob(".*"))


def test_weights_from_a_file(clips, tmp_path, run_here):
    state = published_state("VideoMAEv2", vfm.find_vfm("VideoMAEv2"))
    del state["blocks.1.norm1.weight"]
    state["blocks.0.mlp.fc1.bias"] = torch.ones(7)
    torch.save({"module": state}, tmp_path / "bad.pth")
    command = ["--video_dir", clips, "--output_root", tmp_path / "out", "--models", "VideoMAEv2", *SMALL[1:]]
    result = run_here(*command, "--videomaev2_ckpt", tmp_path / "bad.pth")
    assert_one_line(result, "blocks.1.norm1.weight is missing, blocks.0.mlp.fc1.bias is [7] instead of [96]")


def test_other_weights_make_the_features_again(clips, tmp_path, run_here):
    command = ["--video_dir", clips, "--output_root", tmp_path / "out", "--models", "VideoMAE", *SMALL[1:]]
    command += ["--videomae_ckpt", tmp_path / "weights.pth"]
    published_file("VideoMAE", tmp_path / "weights.pth")
    assert counts(run_here(*command)) == [2, 0, 0]
    assert counts(run_here(*command)) == [0, 2, 0]
    published_file("VideoMAE", tmp_path / "weights.pth", **{"blocks.0.norm1.bias": torch.zeros(24)})
    assert counts(run_here(*command)) == [2, 0, 0]


def test_a_package_that_is_missing(clips, tmp_path, run_here, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models.vision_transformer", None)
    command = ["--video_dir", clips, "--output_root", tmp_path / "out", "--models", "VideoMAE", *SMALL]
    assert_one_line(
        run_here(*command), "VideoMAE: the package timm.models.vision_transformer is missing; install envs/"
    )
    result = run_here(*command, "--allow_skip_missing")
    assert result.returncode == 1 and "not run: VideoMAE: the package timm" in result.stdout


def test_weights_that_are_missing_are_told_once(clips, tmp_path, run_here, monkeypatch):
    """Of all models in one block: file, where it is published, flag."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run_here(
        "--video_dir", clips, "--output_root", tmp_path, "--models", "VideoMAEv2", "VideoMAE", "--num_frames", 4
    )
    block = result.stderr[result.stderr.index("error: ") + len("error: ") :].splitlines()
    assert result.returncode == 2 and result.stderr.endswith(", or skip such models with --allow_skip_missing\n")
    assert not result.stdout
    assert [line.split(":")[0].strip() for line in block] == ["VideoMAEv2", "VideoMAE"]
    assert "vit_b_k710_dl_from_giant.pth of OpenGVLab/VideoMAE2" in block[0] and "--weights VideoMAEv2=FILE" in block[0]
    assert result.stderr.count("--weights VideoMAE=FILE") == 1


def test_a_feature_that_is_not_finite_is_not_written(clips, tmp_path, run_here):
    """The weights are finite, and so are the features in float32; in float16 they are not."""
    path = published_file("VideoMAEv2", tmp_path / "large.pth", **{"blocks.1.mlp.fc2.bias": torch.full((24,), 1e5)})
    command = ["--video_dir", clips, "--output_root", tmp_path / "out", "--models", "VideoMAEv2", *SMALL[1:]]
    command += ["--videomaev2_ckpt", path]
    assert run_here(*command, "--save_dtype", "float16").returncode == 1
    assert not list((tmp_path / "out").rglob("*.pt"))
    failures = (tmp_path / "out" / "VideoMAEv2" / "failed_videos.txt").read_text()
    assert failures.splitlines()[0] == "ball.mp4\tVideoMAEv2 gave NaN or infinity in float16"
    assert counts(run_here(*command)) == [2, 0, 0]


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("malicious_code_ran",)


@pytest.mark.parametrize(
    "content", ["pickle", "torn", "text", "no weights", "torn safetensors", "pointer", "pointer to safetensors"]
)
def test_weights_that_are_none_are_refused_and_run_no_code(clips, tmp_path, run_here, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ("weights.safetensors" if "safetensors" in content else "weights.pth")
    if content == "pickle":
        path.write_bytes(pickle.dumps({"module": Malicious()}))
    elif content == "torn":
        torch.save({"module": {"a": torch.ones(1000)}}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif content.startswith("pointer"):
        path.write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 99\n"
        )
    elif content == "no weights":
        torch.save({"module": {"epoch": 3}}, path)
    else:
        path.write_bytes(b"\x10\0\0\0\0\0\0\0<html>404</html>")
    result = run_here("--video_dir", clips, "--models", "VideoMAE", *SMALL[1:], "--videomae_ckpt", path)
    assert_one_line(result, str(path))
    assert "weights_only" not in result.stderr
    assert ("run `git lfs pull`" in result.stderr) == content.startswith("pointer")
    assert not (tmp_path / "malicious_code_ran").exists()


def assert_one_line(result: subprocess.CompletedProcess, text: str) -> None:
    """One line on standard error that says `text`, after warnings; status 2; no traceback."""
    assert result.returncode == 2
    *warnings, error = result.stderr.strip().splitlines()
    assert ": error: " in error and text in error, result.stderr
    assert all(": warning: " in line for line in warnings), result.stderr


def test_a_hub_out_of_reach(clips, tmp_path):
    """What the summary says is the error's text, too, where --allow_skip_missing is not given."""
    command = [sys.executable, ROOT / "vfm_feature.py", "--video_dir", clips, "--output_root", tmp_path / "out"]
    command = [*map(str, command), "--models", "DINOv2", "--device", "cpu", "--allow_skip_missing"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=100)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "model.safetensors of timm/vit_base_patch14_dinov2.lvd142m cannot be downloaded from http" in result.stdout
    assert "--weights DINOv2=FILE" in result.stdout
