"""What users do wrong, and the one line that each script says then."""

import numpy as np
import pytest
import torch
from made_up import SIZES, save


class Unsafe:
    def __reduce__(self):
        return (print, ("code from a file ran",))


BAD_FEATURES = {
    "nan.pt": (torch.zeros(20, 3, 12).index_fill(0, torch.tensor([19]), float("nan")), "its largest number is nan"),
    "infinity.npy": (np.full((2, 3, 12), np.inf, dtype=np.float32), "its largest number is inf"),
    "channels.pt": (torch.ones(2, 3, 11), "C is 11, but"),
    "rank.pt": (torch.zeros(3, 12), r"shape [3, 12]"),
    "empty.pt": (torch.zeros(0, 3, 12), "not empty"),
    "integers.npy": (np.zeros((2, 3, 12), dtype=np.int64), "floating point"),
    "objects.npy": (np.array([Unsafe()], dtype=object), "unsafe"),
    "words.pt": ({"caption": "no feature here"}, "no feature tensor"),
    "nothing.pt": ({}, "no feature tensor"),
    "unsafe.pt": ({"feature": Unsafe()}, "unsafe"),
    "huge.pt": (torch.full((2, 3, 12), 1e30), "its largest number is 1e+30; a feature's are finite"),
    "huge.npy": (np.full((2, 3, 12), 1e300), "its largest number is 1e+300"),
    "batch.pt": (torch.zeros(1, 2, 3, 12), "shape [1, 2, 3, 12], but a feature is"),
    "batch_grid.npy": (np.zeros((1, 2, 3, 4, 12), dtype=np.float32), "of one clip, not empty; save [0] of a batch"),
    "latents.pt": ({"latent": torch.ones(2, 3, 12), "motion_embedding": torch.ones(2, 12)}, ": latents, not features"),
    "stats.pt": ({"mean": torch.ones(12), "var": torch.ones(12)}, ": latents, not features; give the folder"),
    "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "run `git lfs pull`"),
    "pointer.npy": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "run `git lfs pull`"),
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


MISTAKES = [
    ("vfm_feature.py --video_dir nowhere", "--video_dir nowhere: no such folder"),
    ("vfm_feature.py --video_dir empty", "--video_dir empty: no videos in it"),
    ("vfm_feature.py --video_dir twice", "a.MP4 and a.mov differ in their suffix alone"),
    ("vfm_feature.py --video_dir clips --csv_path nowhere.csv", "--csv_path nowhere.csv: no such file"),
    (
        "vfm_feature.py --video_dir clips --csv_path words.csv",
        "--csv_path words.csv: no column named caption; it has 'text'",
    ),
    ("vfm_feature.py --video_dir clips --csv_path latin.csv", "--csv_path latin.csv: cannot be read as text in UTF-8"),
    (
        "vfm_feature.py --video_dir clips --csv_path unquoted.csv",
        "--csv_path unquoted.csv: row 2: 3 fields where the header has 2",
    ),
    ("vfm_feature.py --video_dir clips --csv_path ragged.csv", "--csv_path ragged.csv: row 3: 4 fields where"),
    ("vfm_feature.py --video_dir clips --models DINOv3", "invalid choice: 'DINOv3' (choose from VideoMAEv2, "),
    ("vfm_feature.py --video_dir clips --models CLIP", "argument --models: invalid choice: 'CLIP' (choose from"),
    ("vfm_feature.py --video_dir clips --models timm:", "argument --models: invalid choice: 'timm:'"),
    (
        "vfm_feature.py --video_dir clips --models timm:vit_base_patch16_dinov4",
        "timm:vit_base_patch16_dinov4: RuntimeError: Unknown model (vit_base_patch16_dinov4); timm.list_models() names",
    ),
    ("vfm_feature.py --video_dir clips --models hf:./nowhere", "hf:./nowhere: there is no folder ./nowhere, and"),
    ("vfm_feature.py --video_dir clips --models hf:clips", "--models hf:clips: "),
    ("vfm_feature.py --video_dir clips --models timm:clips", "--models timm:clips: "),
    ("vfm_feature.py --video_dir clips --models timm:a timm_a", "invalid choice: 'timm_a'"),
    ("vfm_feature.py --video_dir clips --models hf:a/b hf:a_b", "hf:a/b and hf:a_b would both write into hf_a_b"),
    ("vfm_feature.py --video_dir clips --models VJEPA2 --layers 6 25", "--layers 25: VJEPA2 has 2 blocks"),
    ("vfm_feature.py --video_dir clips --layers 1 1", "--layers 1 1: give each block once"),
    ("vfm_feature.py --video_dir clips --layers 0", "argument --layers: 0 must be >= 1"),
    ("vfm_feature.py --video_dir clips --weights a.pth", "argument --weights: 'a.pth' is not MODEL=FILE"),
    ("vfm_feature.py --video_dir clips --weights DINOv3-B=a.pth", "--weights DINOv3-B: not one of --models"),
    ("vfm_feature.py --video_dir clips --models DINOv3-B --weights dinov3-b=a.pth", "DINOv3-B=a.pth: no such file"),
    (
        "vfm_feature.py --video_dir clips --weights VideoMAE=a_file --videomae_ckpt a_file",
        "--weights VideoMAE=a_file and --videomae_ckpt are one; leave one of them out",
    ),
    (
        "vfm_feature.py --video_dir clips --models DINOv3-B --dinov2_resize_w 630",
        "--dinov2_resize_w 630: DINOv3-B needs a multiple of 16; try --dinov2_resize_w 624",
    ),
    ("vfm_feature.py --video_dir clips --device cuda:99", "--device cuda:99 is not on this machine; use cpu"),
    ("vfm_feature.py --video_dir clips --device gpu", "--device gpu is not on this machine; use cpu"),
    (
        "vfm_feature.py --video_dir clips --num_frames 5",
        "--num_frames 5: VideoMAEv2 needs a multiple of 2; try --num_frames 4",
    ),
    ("vfm_feature.py --video_dir clips --num_frames 0", "argument --num_frames: 0 must be >= 1"),
    ("vfm_feature.py --video_dir clips --num_frames many", "argument --num_frames: invalid int value: 'many'"),
    (
        "vfm_feature.py --video_dir clips --videomae_resize_h 100",
        "--videomae_resize_h 100: VideoMAEv2 needs a multiple of 16; try",
    ),
    (
        "vfm_feature.py --video_dir clips --dinov2_resize_w 640",
        "--dinov2_resize_w 640: DINOv2 needs a multiple of 14; try --dinov2_resize_w 644",
    ),
    ("vfm_feature.py --video_dir clips --videomaev2_ckpt nowhere.pth", "--videomaev2_ckpt nowhere.pth: no such file"),
    ("vfm_feature.py --video_dir clips --videomae_resize_w 0", "argument --videomae_resize_w: 0 must be >= 1"),
    (
        "vfm_feature.py --video_dir clips --dinov2_resize_h 421",
        "--dinov2_resize_h 421: DINOv2 needs a multiple of 14; try",
    ),
    ("vfm_feature.py --video_dir clips --dinov2_chunk 0", "argument --dinov2_chunk: 0 must be >= 1"),
    ("vfm_feature.py --video_dir clips --batch_size 0", "argument --batch_size: 0 must be >= 1"),
    ("vfm_feature.py --video_dir clips --num_workers 0", "argument --num_workers: 0 must be >= 1"),
    ("vfm_feature.py --video_dir clips --decode_timeout 0", "argument --decode_timeout: 0 must be >= 1"),
    ("vfm_feature.py --video_dir clips --precision float16", "argument --precision: invalid choice: 'float16'"),
    ("vfm_feature.py --video_dir clips --videomae_ckpt nowhere.pth", "--videomae_ckpt nowhere.pth: no such file"),
    ("vfm_feature.py --video_dir clips --dinov2_ckpt nowhere.pth", "--dinov2_ckpt nowhere.pth: no such file"),
    ("vfm_feature.py --video_dir clips --vjepa2_ckpt clips", "--vjepa2_ckpt clips: no such file"),
    ("vfm_feature.py --video_dir clips --save_dtype int8", "argument --save_dtype: invalid choice: 'int8'"),
    (
        "vfm_feature.py --video_dir clips --motion_checkpoint ck/motion_ae_best.pt",
        "--motion_checkpoint encodes the features of one model; say with --models",
    ),
    (
        "vfm_feature.py --video_dir clips --models VideoMAE --motion_checkpoint nowhere.pt",
        "nowhere.pt does not exist",
    ),
    (
        "vfm_feature.py --video_dir clips --models VideoMAE --motion_checkpoint ck/motion_ae_epoch1.pt",
        "--motion_checkpoint ck/motion_ae_epoch1.pt was trained on features of C = 12, but VideoMAE's have 24; give",
    ),
    ("vfm_feature.py --video_dir clips --sampling random", "argument --sampling: invalid choice: 'random'"),
    ("vfm_feature.py --video_dir clips --sampling stride --fps 8", "--fps: not allowed with argument --sampling"),
    ("vfm_feature.py --video_dir clips --fps 0", "argument --fps: 0 must be >= 0.001"),
    ("vfm_feature.py --video_dir clips --window nan", "argument --window: nan must be >="),
    ("vfm_feature.py --video_dir clips --hop 2", "--hop 2 is the distance of windows; give --window too"),
    ("vfm_feature.py --video_dir clips --fit stretch", "argument --fit: invalid choice: 'stretch'"),
    ("vfm_feature.py --video_dir clips --recipe repa", "argument --recipe: invalid choice: 'repa'"),
    ("vfm_feature.py --video_dir clips --recipe videorepa --fps 8", "--recipe videorepa sets --fps; leave one of them"),
    (
        "vfm_feature.py --video_dir clips --recipe videorepa --num_frames 48",
        "--recipe videorepa sets --num_frames; leave one of them out",
    ),
    (
        "vfm_feature.py --video_dir clips --recipe videorepa --dinov2_resize_w 630",
        "--recipe videorepa sets --dinov2_resize_w; leave one of them out",
    ),
    ("vfm_feature.py --video_dir empty --recursive", "--video_dir empty: no videos in it"),
    (
        "vfm_feature.py --video_dir clips --csv_path clock.csv",
        "--csv_path clock.csv: a.mp4 is to start at '1:20' and to end at ''; give seconds from the video's first frame",
    ),
    (
        "vfm_feature.py --video_dir clips --csv_path backwards.csv",
        "--csv_path backwards.csv: a.mp4 is to start at '3' and to end at '2'; give seconds",
    ),
    ("vfm_feature.py --video-dir clips", "unrecognized arguments: --video-dir clips"),
    ("train.py --feature_dir missing", "missing is not a folder"),
    ("train.py --feature_dir empty", "empty holds no"),
    ("train.py --feature_dir same_name", "a.pt and same_name/a.pth differ in their suffix alone; rename or remove one"),
    ("train.py --feature_dir features --input_dim 12 --latent_dim 13", "--latent_dim 13 is above --input_dim 12"),
    (
        "train.py --feature_dir features --input_dim 12 --latent_dim 6 --model_dim 30",
        "--model_dim 30 does not divide by --num_heads 8",
    ),
    ("train.py --feature_dir features --epochs -1", "argument --epochs: -1 must be"),
    ("train.py --feature_dir features --latent_dim 1", "argument --latent_dim: 1 must be"),
    ("train.py --feature_dir features --lr nan", "argument --lr: nan must be"),
    ("train.py --feature_dir features --device gpu", "--device gpu is not on this machine"),
    ("train.py --feature_dir features --batch_size two", "invalid int value: 'two'"),
    ("train.py --feature_dir features --input_dim 12 --latent_dim 6 --save_dir a_file", "--save_dir a_file"),
    ("encode.py --checkpoint missing.pt --input features --output z", "missing.pt does not exist"),
    ("encode.py --checkpoint features/nested/0000.pt --input features --output z", "is not a checkpoint of train.py"),
    (
        "encode.py --checkpoint ck/metrics.csv --input features --output z",
        "no file of torch.save begins with 'epoch,lr,",
    ),
    ("encode.py --checkpoint ck/motion_ae_epoch1.pt --input missing --output z", "--input missing does not exist"),
    ("encode.py --checkpoint ck/motion_ae_epoch1.pt --input features --output a_file", "--output a_file is no folder"),
    ("encode.py --checkpoint ck/motion_ae_epoch1.pt --input a_file --output z.pt", "a_file is not a .pt"),
    ("encode.py --checkpoint ck/motion_ae_epoch1.pt --input a_file --output z.npz", "--output z.npz: the suffix of"),
    (
        "encode.py --checkpoint ck/motion_ae_epoch1.pt --input features/nested/0000.pt --output ck",
        "--output ck: the suffix of a single",
    ),
    (
        "encode.py --checkpoint ck/motion_ae_epoch1.pt --input features --output z --latent_dim 7",
        "--latent_dim 7 contradicts ck/motion_ae_epoch1.pt, which was trained with 6",
    ),
    ("encode.py --checkpoint ck/motion_ae_epoch1.pt --input same_name --output z", "differ in their suffix alone"),
    (
        "encode.py --checkpoint ck/motion_ae_epoch1.pt --input of_latents --output z",
        "of_latents/stats.pt is named as latents' statistics are; give a folder of features, or rename it",
    ),
    ("encode.py --checkpoint ck/motion_ae_epoch1.pt --input features --output features", "would be lost"),
    (
        "encode.py --checkpoint ck/motion_ae_epoch1.pt --input same_name/a.pt --output same_name/a.pt",
        "would be lost",
    ),
    (
        "encode.py --checkpoint ck/motion_ae_epoch1.pt --input same_name/a.pt --output z --output_format safetensors",
        "--output z: the suffix of a single file says its format; end it in .pt or .safetensors",
    ),
    ("encode.py --checkpoint ck/motion_ae_epoch1.pt --input features --output z --output_format csv", "invalid choice"),
    (
        "encode.py --checkpoint ck/motion_ae_epoch1.pt --input features --output z --video_dir clips",
        "unrecognized arguments: --video_dir clips",
    ),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES)
def test_mistakes_end_in_one_line(command, message, trained, run_here):
    folder, _ = trained
    for name in ("empty", "twice", "clips"):
        (folder / name).mkdir(exist_ok=True)
    for name in ("a_file", "twice/a.MP4", "twice/a.mov", "clips/a.mp4"):
        (folder / name).touch()
    (folder / "words.csv").write_text("text\nhello\n")
    (folder / "latin.csv").write_bytes("caption\ncafé\n".encode("latin-1"))
    (folder / "unquoted.csv").write_text("video,caption\na.mp4,a dog, running\nb.mp4,a cat, asleep\n")
    (folder / "ragged.csv").write_text("caption,video\na,b\na,b,c,d\n")
    (folder / "clock.csv").write_text("video,caption,start\na,a dog,1:20\n")
    (folder / "backwards.csv").write_text("video,caption,start,end\na,a dog,3,2\n")
    for name in ("same_name/a.pt", "same_name/a.pth", "of_latents/stats.pt"):
        save(folder / name, torch.zeros(2, 3, 12))
    script, *arguments = command.split()
    if script == "vfm_feature.py":
        arguments += ["--output_root", "z"]
    result = run_here(script, *arguments, cwd=folder)
    assert result.returncode == 2
    *warnings, error = result.stderr.strip().splitlines()
    assert error.startswith(f"{script}: error: ") and message in error, result.stderr
    assert all(": warning: " in line for line in warnings), result.stderr
    assert not (folder / "z").exists()


MODEL_FLAGS = {"input_dim": 768, "model_dim": 384, "latent_dim": 192, "num_heads": 8, "num_layers": 2, "dropout": 0.1}
PROMISED = {  # the defaults that the user's scripts and notes rely on
    "vfm_feature.py": {
        "video_dir": "../dataset/motion_top100",
        "csv_path": "../dataset/motion_top100.csv",
        "output_root": "../dataset/vfm_features_motion_top100",
        "models": "['VideoMAEv2', 'VideoMAE', 'DINOv2', 'VJEPA2']",
        "num_frames": 48,
        "videomae_resize_h": 160,
        "videomae_resize_w": 240,
        "dinov2_resize_h": 420,
        "dinov2_resize_w": 630,
        "dinov2_chunk": 128,
        "videomaev2_ckpt": "VideoREPA/ckpt/VideoMAEv2/vit_b_k710_dl_from_giant.pth",
        "videomae_ckpt": "VideoREPA/ckpt/VideoMAE/"
        "k400_videomae_pretrain_base_patch16_224_frame_16x4_tube_mask_ratio_0_9_e1600.pth",
        "allow_skip_missing": False,
    },
    "train.py": {
        **MODEL_FLAGS,
        **{"save_dir": "checkpoints", "epochs": 10, "batch_size": 2, "lr": 0.0002, "weight_decay": 0.0001},
        **{"num_workers": 4, "recon_weight": 1.0, "motion_weight": 1.0, "smooth_weight": 0.05, "use_token": False},
    },
    "encode.py": {**MODEL_FLAGS, "use_token": False},
}


@pytest.mark.parametrize("script", PROMISED)
def test_help_shows_every_default(script, run_here):
    text = "".join(run_here(script, "--help").stdout.split()).split("options:")[1]
    for name, default in PROMISED[script].items():
        assert f"(default:{default})".replace(" ", "") in text.split(f"--{name}", 1)[1].split("--")[0], name
