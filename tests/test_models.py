"""vfm_feature.py: the further models against their authors' code, and models by name against their libraries."""

import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
from draw_clips import draw_frame, write_video
from made_up import ROOT, SMALL, filled, pattern_clip, published_shapes, published_state, timm_folder
from safetensors.torch import load_file, save_file

import vfm_feature as vfm
from model import UserError


def at_depth(model, depth, folder):
    """The table's model with `depth` blocks."""
    if model in vfm.VIDEO_MODELS:
        return replace(vfm.VIDEO_MODELS[model], depth=depth)
    grid = {"img_size": [96, 160]} if model.startswith("SigLIP") else {}
    return vfm.find_vfm(f"timm:{timm_folder(folder / 'timm', vfm.IMAGE_MODELS[model], depth=depth, **grid)}")


# Made with the authors' own code on the CPU in float32, at the number of blocks that stands first, on `filled` and
# `pattern_clip`: VideoREPA's `VideoMAE.py` and `VideoMAEv2.py` (commit 8002687), facebookresearch/dinov2 `vit_*` (518
# pixels, registers as in its hubconf, `x_norm_patchtokens`, b8931f7), facebookresearch/dinov3 `dinov3_vit*16*`
# (normalised patch tokens, 6876159), facebookresearch/perception_models PE-Spatial-* (3e352cc), google-research/
# big_vision `vit._Model` (after `encoder_norm`, 0127fb6; its positions are those of the grid, as it resizes squares
# alone), facebookresearch/vjepa2 `vit_huge_rope` and `vit_giant_xformers_rope` (c2963a4) and, in a public copy of it
# that has V-JEPA 2.1, `app/vjepa_2_1`; no final norm. Of each model: blocks, frames, height and width; the feature's
# mean, standard deviation and mean magnitude; then every (C // 6)th channel of three cells of the last step: row and
# column H // 2, the last of the first row, and the last of all.
MORE_REFERENCE = """
VideoMAE-L 2 48 32 80 0.240693 1.849515 1.492262
    1.54006 -1.42497 2.33355 -0.63968 -1.3435 1.93182
    2.98152 3.3841 -0.84368 0.12589 -4.1567 -0.6369
    1.6116 1.62821 2.88171 -0.20458 1.64022 -0.85674
DINOv2-S 12 2 126 182 -0.000889 1.00585 0.804876
    -0.17043 -0.34628 -2.22284 0.76296 0.28883 0.37339
    0.00748 -0.37009 -1.63108 1.21211 0.22338 -0.11121
    -0.57593 -0.65714 -1.00722 -0.01357 0.38718 -0.31356
DINOv2-L 2 2 126 182 -0.002503 1.005432 0.796605
    1.22929 -0.9663 -0.66499 0.61127 -0.33076 -1.13954
    0.71774 -0.89358 -0.00208 0.78383 -1.63529 -1.88
    -1.19525 0.86246 -0.51163 -0.05745 -1.11823 0.87568
DINOv2-g 2 2 126 182 0.000696 1.008735 0.797423
    -0.22984 -0.13592 -1.78384 1.36991 -1.00227 -0.76677
    -0.37695 -0.70214 -0.40603 0.04766 -0.94553 -0.68125
    -0.86938 -0.15812 1.99702 1.37536 -1.03622 0.2362
DINOv2-S-reg 12 2 126 182 -0.000798 1.007175 0.807564
    -0.10223 -0.17672 -2.02007 1.16136 0.19001 0.28163
    -0.04824 -0.41223 -1.53375 1.18574 0.38607 -0.06032
    -0.40978 -0.91883 -0.6449 -0.02195 0.40271 -0.04606
DINOv2-B-reg 2 2 126 182 0.002608 1.007424 0.798905
    0.42239 0.67849 -0.25516 -1.71177 -1.82924 0.55331
    -0.54474 0.1031 -0.81858 -1.35103 -1.81287 0.50908
    -0.83977 1.19363 -0.06255 -1.36861 1.47284 0.44837
DINOv2-L-reg 2 2 126 182 -0.002585 1.005165 0.795737
    0.97414 -0.82729 -0.08695 0.47575 -0.66872 -1.09239
    0.35183 -0.89385 0.53415 0.59207 -1.51455 -1.63249
    -1.03645 0.50547 -0.90448 -0.48623 -1.49176 0.66092
DINOv2-g-reg 2 2 126 182 0.000636 1.008924 0.795974
    -0.14199 0.05265 -2.19218 0.54511 -1.04276 -0.83958
    -0.46973 -0.56173 -1.1065 0.49894 -0.84242 -0.79872
    -0.76859 -0.51831 2.53183 1.13039 -1.29861 0.29724
DINOv3-B 2 2 96 160 0.004129 1.012151 0.805062
    2.21211 -1.31994 -2.12023 -0.82198 -1.29737 0.88675
    1.76696 -2.2062 0.57165 0.85046 0.98501 -0.98093
    2.37589 -0.75112 -1.99141 -0.6815 -1.28965 0.8807
PE-Spatial-B 2 2 96 160 0.00098 1.494411 1.189309
    -0.21995 3.10217 -1.42596 -1.96745 2.27726 -0.44962
    -1.67074 1.19983 0.49668 0.47583 0.60111 0.34313
    0.32569 1.39151 -1.60822 -0.80553 1.34038 -0.99159
VJEPA2-h 2 4 96 160 -0.036552 1.724297 1.373274
    -0.94845 0.84667 0.90006 2.38941 2.23442 2.70744
    0.76486 -0.58756 -0.71724 -2.74556 -0.65338 2.01583
    1.58823 0.10869 1.77429 -2.78384 1.26435 0.95701
VJEPA2-g 2 4 96 160 0.009583 1.758919 1.405547
    -0.22506 0.90175 2.00247 -1.09299 -1.45903 -1.68331
    -0.058 1.92589 0.14929 0.33827 2.16575 0.61189
    0.99413 0.59956 -1.72362 0.7041 2.01484 3.41831
VJEPA2.1-B 2 4 96 160 -0.014162 1.851799 1.481691
    -0.62146 2.081 -0.22972 0.43547 -1.65192 -3.17866
    2.48859 1.79671 0.18665 0.12535 -2.12602 -0.83314
    0.75722 -2.12443 2.66884 0.8935 0.67926 1.44313
VJEPA2.1-L 2 4 96 160 0.033604 1.887139 1.506728
    -0.62118 -0.6806 -2.02301 0.5636 -0.01918 -3.11867
    0.9577 -2.36544 -2.06575 0.68412 -0.83435 0.30103
    1.33342 -1.22288 -1.11625 1.08591 -3.3327 0.30241
VideoMAE-H 1 48 32 80 0.195179 1.665129 1.337798
    1.27676 -3.31572 0.79197 0.29968 -1.28756 1.99793
    1.21798 -1.71071 -3.09603 -0.95961 0.64816 -0.2782
    0.5373 -0.40178 2.42897 -0.55727 -0.27923 -0.09638
VideoMAEv2-S 12 48 32 80 0.309093 3.719714 2.987945
    2.10908 -4.57286 -3.23596 3.51564 -2.68132 0.05706
    4.03466 -4.85716 2.7369 4.55214 -4.22007 3.32989
    -1.29192 -3.68032 -7.98899 1.78968 -5.96601 -4.40568
VideoMAEv2-g 1 48 28 70 0.196643 1.665688 1.338300
    1.5231 -1.30449 -2.53119 1.96253 -1.89533 1.19182
    0.1522 -2.08326 -0.34813 -2.48886 -1.03553 1.94571
    0.72193 -2.13111 -0.59145 2.03447 -1.61949 0.93226
VJEPA2.1-g 1 4 96 160 0.006911 1.634827 1.304618
    1.28738 0.81477 2.84497 -0.85969 -1.79583 -4.37854
    1.84905 2.6604 0.42998 -0.43176 2.29068 -1.67435
    1.76928 0.61695 -1.1841 -0.69001 2.74834 0.56784
VJEPA2.1-G 1 4 96 160 -0.008734 1.640164 1.309763
    -0.54823 1.92086 -0.35004 0.77939 -3.32959 2.19006
    2.05702 2.90072 0.18031 0.46774 -0.03122 3.50639
    0.4234 2.00401 0.62302 -0.01452 1.26388 2.778
DINOv3-S 2 2 96 160 0.002623 1.010076 0.798695
    1.22247 0.58024 -0.20294 0.4074 -1.16969 -0.20698
    1.38558 0.6643 -2.88543 1.28283 0.38019 -1.04846
    1.22749 1.3277 -0.51373 0.17179 -1.12326 -0.36044
DINOv3-S+ 2 2 96 160 0.003756 1.010110 0.801088
    0.44387 -0.57943 -1.55595 0.18852 -1.50243 0.61874
    1.06342 -0.14726 -2.05835 0.92842 -0.27729 -1.33807
    0.85206 -0.38183 -1.77375 0.05546 -1.83239 0.25612
DINOv3-L 1 2 96 160 0.000266 1.008756 0.797907
    1.11977 -0.80717 0.11845 -0.16279 0.41773 -1.69054
    0.32038 -1.26977 0.08954 0.3865 1.14241 -1.96025
    1.88811 -0.84606 0.03315 0.19069 0.39314 -1.12663
DINOv3-H+ 1 2 96 160 -0.000754 1.007166 0.800514
    0.9621 0.27401 -0.89408 0.67618 -0.89748 -2.16474
    0.58809 1.17465 1.22614 -0.57014 0.05372 0.13684
    1.80244 0.40427 -0.92681 0.66955 -1.24664 -2.57867
PE-Spatial-T 2 2 96 160 -0.027269 1.531091 1.215924
    -1.73434 2.31065 -0.64925 -0.66283 1.47558 1.4875
    -1.25562 1.14045 3.38551 -1.26245 0.28654 0.7672
    -1.21985 0.9055 -0.00377 -2.23793 1.18165 0.64162
PE-Spatial-S 2 2 96 160 0.064603 1.497383 1.197273
    3.04174 -0.00822 3.76087 -0.36376 -0.69139 -0.53674
    1.13594 2.01361 0.26601 -1.75533 0.70496 -1.33016
    3.05514 0.57603 2.55834 0.77773 -0.73856 -0.50023
PE-Spatial-L 1 2 84 140 -0.021271 1.265652 1.004906
    -0.56132 0.29908 -0.05536 -0.00247 -2.09499 0.58132
    -0.91221 -0.01121 0.04153 -1.07006 -0.22791 -0.60134
    -0.32024 1.31806 0.34386 -2.37291 0.0754 0.58458
SigLIP2-B 2 2 96 160 0.003019 1.009477 0.803575
    -0.093 -0.90247 -1.71738 -1.1904 0.28417 0.98839
    0.55093 -2.78977 -0.0754 -0.09879 1.03159 -0.99328
    0.622 -1.09468 -2.44917 -1.2717 -0.30406 -0.28363
SigLIP2-L 1 2 96 160 -0.000631 1.006106 0.797926
    1.12854 -0.39445 -0.8817 -0.27681 0.06235 -1.89823
    -0.13132 -0.69505 -0.09638 -1.50723 0.68322 -0.41543
    2.27614 -0.60861 -0.46499 0.66241 1.06972 -0.38217
SigLIP2-So400m 1 2 96 160 0.002860 1.010233 0.803513
    -0.64441 -0.0004 0.09818 0.35633 -0.27717 1.25533
    -0.08138 0.44522 -0.19318 1.22082 -0.33991 1.57228
    0.03167 -0.16787 -0.60397 2.20282 1.01611 1.30539
"""


LINES = [line.split() for line in MORE_REFERENCE.strip().splitlines()]
RECORDS = [pytest.param(LINES[i], LINES[i + 1 : i + 4], id=LINES[i][0]) for i in range(0, len(LINES), 4)]


@pytest.mark.parametrize(("about", "figures"), RECORDS)
def test_features_are_those_of_the_authors_code(about, figures, tmp_path):
    model, depth, frames, height, width = about[0], *map(int, about[1:5])
    spec = at_depth(model, depth, tmp_path)
    vit = vfm.build_vit(spec, frames, (height, width), published_state(model, spec))
    feature = vfm.extract_features(vit, spec, pattern_clip(frames, height, width))[0]  # [T, H, W, C]
    rows, columns, channels = feature.shape[1:]
    assert channels == spec.embed_dim
    places = (rows // 2, rows // 2), (0, columns - 1), (rows - 1, columns - 1)
    for place, line in zip(places, figures, strict=True):
        expected = torch.tensor([*map(float, line)])
        error = (feature[-1][place][:: channels // 6][:6] - expected).norm()
        assert error <= 1e-4 * expected.norm(), f"{model} at {place}"
    measured = torch.stack([feature.mean(), feature.std(), feature.abs().mean()])
    torch.testing.assert_close(measured, torch.tensor([*map(float, about[5:])]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "entry", "prefix"),
    [
        ("VJEPA2.1-L", "ema_encoder", "module.backbone."),
        ("VJEPA2.1-G", "target_encoder", "module.backbone."),
        ("VideoMAEv2-g", "model", "encoder."),
    ],
)
def test_a_file_of_several_encoders_gives_the_right_one(tmp_path, small_models, model, entry, prefix):
    spec = vfm.find_vfm(model)
    state = published_state(model, spec)
    other = {f"{prefix}{name}": value + 1 for name, value in state.items()}
    file = dict.fromkeys(("ema_encoder", "target_encoder", "encoder"), other)
    file[entry] = {f"{prefix}{name}": value for name, value in state.items()}
    torch.save(file, tmp_path / "weights.pth")
    vit = vfm.build_vit(spec, 2, (32, 48), vfm.read_weights(tmp_path / "weights.pth", spec))
    assert torch.equal(vit.state_dict()["blocks.1.mlp.fc2.weight"], state["blocks.1.mlp.fc2.weight"])
    torch.save({"predictor": other, "epoch": 3}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="holds no weights"):
        vfm.read_weights(tmp_path / "weights.pth", spec)


def test_the_table_of_models():
    header, *lines = vfm.describe_models().splitlines()
    assert header.split() == ["name", "C", "patch", "tubelet", "grid", "final", "norm", "licence", "weights"]
    assert [line.split()[0] for line in lines] == vfm.MODELS
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    videomae = "768 16 2 24 x 10 x 15 no cc-by-nc-4.0 model.safetensors of MCG-NJU/videomae-base"
    dinov3 = "768 16 1 48 x 26 x 39 yes dinov3-license model.safetensors of timm/vit_base_patch16_dinov3.lvd1689m"
    assert (rows["VideoMAE"], rows["DINOv3-B"]) == (videomae, dinov3)
    assert rows["VideoMAEv2-g"].startswith("1408 14 2 24 x 11 x 17 no")
    assert rows["PE-Spatial-L"].startswith("1024 14 1 48 x 30 x 45 no apache-2.0")
    assert " no mit " in rows["VJEPA2"] and " no apache-2.0 " in rows["VJEPA2-g"]  # their cards differ


def test_dinov3_with_biases_is_refused(tmp_path):
    spec = at_depth("DINOv3-B", 1, tmp_path)
    state = {name: filled(name, shape) for name, shape in published_shapes("DINOv3-B", spec).items()}
    with pytest.raises(ValueError, match=r"qkv.bias is not zero"):
        vfm.build_vit(spec, 1, (32, 48), state)


SMALL_VIT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 64)])
@pytest.mark.parametrize("layers", [[2], [1, 2]])
def test_a_timm_folder_gives_timm_s_maps(tmp_path, size, layers):
    arguments = {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 64}
    model = timm.create_model("vit_large_patch16_siglip_512.v2_webli", **arguments, num_classes=0).eval()
    timm.models.save_for_hf(model, tmp_path, model_args=arguments, safe_serialization=True)
    spec = vfm.find_vfm(f"timm:{tmp_path}")
    assert (spec.patch_size, spec.mean) == (16, (0.5, 0.5, 0.5))
    vit = vfm.build_vit(spec, 2, size, vfm.read_weights(spec.folder, spec))
    feature = vfm.extract_features(vit, spec, pattern_clip(2, *size), layers=layers)[0]
    model.set_input_size(img_size=size)
    images = (pattern_clip(2, *size)[0].permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.inference_mode():
        maps = model.forward_intermediates(images, [n - 1 for n in layers], norm=True, intermediates_only=True)
    torch.testing.assert_close(feature, torch.cat(maps, 1).permute(0, 2, 3, 1))


def test_a_timm_model_keeps_its_own_names(tmp_path):
    """BEiT publishes biases of queries and values, as VideoMAE does, and timm's has them too."""
    model = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=48, num_heads=4, num_classes=0)
    timm.models.save_for_hf(
        model, tmp_path, model_args={"depth": 1, "embed_dim": 48, "num_heads": 4}, safe_serialization=True
    )
    spec = vfm.find_vfm(f"timm:{tmp_path}")
    vit = vfm.build_vit(spec, 1, (224, 224), vfm.read_weights(spec.folder, spec))
    assert vfm.extract_features(vit, spec, pattern_clip(1, 224, 224)).shape == (1, 1, 14, 14, 48)
    assert torch.equal(vit.model.blocks[0].attn.q_bias, model.blocks[0].attn.q_bias)


def saved(folder, kind, **settings):
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SMALL_VIT, **settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    pixels = {"image_mean": vfm.IMAGENET_MEAN, "image_std": vfm.IMAGENET_STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return model


def last_block(model, blocks, **inputs):
    """What transformers' own forward pass has after its last block."""
    kept = []
    blocks[-1].register_forward_hook(lambda module, given, out: kept.append(out[0] if isinstance(out, tuple) else out))
    with torch.inference_mode():
        model(**inputs)
    return kept[0]


SMALL_PREDICTOR = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("kind", "settings", "frames", "side", "name", "inputs"),
    [
        ("VideoMAE", {"intermediate_size": 96, "image_size": 112, "num_frames": 8}, 8, 112, "pixel_values", {}),
        ("VJEPA2", {"crop_size": 64, **SMALL_PREDICTOR}, 4, 64, "pixel_values_videos", {"skip_predictor": True}),
    ],
)
def test_video_models_of_transformers_are_ours(tmp_path, kind, settings, frames, side, name, inputs):
    clip = pattern_clip(frames, side, side)
    pixels = (clip / 255 - torch.tensor(vfm.IMAGENET_MEAN)) / torch.tensor(vfm.IMAGENET_STD)
    model = saved(tmp_path, kind, **settings)
    expected = last_block(model, model.encoder.layer, **{name: pixels.permute(0, 1, 4, 2, 3)}, **inputs)
    spec = vfm.find_vfm(f"hf:{tmp_path}")
    vit = vfm.build_vit(spec, frames, (side, side), vfm.read_weights(tmp_path, spec))
    feature = vfm.extract_features(vit, spec, clip)
    torch.testing.assert_close(feature.flatten(1, 3), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "ViT",
            {"intermediate_size": 96, "image_size": 64},
            "not vit; image models are timm's: timm:NAME, or one of DINO",
        ),
        ("Dinov2", {"image_size": 70, "patch_size": 14}, "not dinov2; image models are timm's: timm:NAME"),
        ("Timesformer", {"intermediate_size": 96}, "only VideoMAE and V-JEPA 2 are taken, not timesformer"),
        ("Bert", {"intermediate_size": 96, "vocab_size": 9}, "only VideoMAE and V-JEPA 2 are taken, not bert"),
        ("VideoMAE", {"hidden_act": "relu"}, "videomae with relu for gelu"),
    ],
)
def test_what_is_no_video_model_of_transformers_is_refused(tmp_path, kind, settings, message):
    import transformers

    getattr(transformers, f"{kind}Config")(**settings).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        vfm.find_vfm(f"hf:{tmp_path}")


def test_a_folder_says_mean_and_deviation(tmp_path):
    saved(tmp_path, "VideoMAE", intermediate_size=96)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    spec = vfm.find_vfm(f"hf:{tmp_path}")
    assert (spec.mean, spec.std) == ((0.5,) * 3, (0.25,) * 3)
    for unclear in ({"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}, {"size": 224}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(unclear))
        with pytest.raises(
            UserError, match=r"does not say how pixels are normalised; put the preprocessor_config.json"
        ):
            vfm.find_vfm(f"hf:{tmp_path}")
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": ')
    with pytest.raises(UserError, match=r"--models hf:.*: JSONDecodeError: "):
        vfm.find_vfm(f"hf:{tmp_path}")


def spoiled(value, how):
    """A copy of the weights that is damaged or quantised."""
    if how in ("int8", "bool", "float8_e4m3fn"):
        return (value * 20).to(getattr(torch, how))
    value = value.clone()
    value.view(-1)[: 1 if how in ("nan", "inf") else None] = float(how)
    return value


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("0", "is 0 everywhere: the file is damaged"),
        ("0.25", "is 0.25 everywhere: the file is damaged"),
        ("nan", "holds NaN or infinity"),
        ("inf", "holds NaN or infinity"),
        ("int8", "holds int8: it is quantised; give the unquantised weights"),
        ("bool", "holds bool: it is quantised"),
        ("float8_e4m3fn", "holds float8_e4m3fn: it is quantised"),
    ],
)
def test_weights_that_were_not_trained_are_refused_by_name(tmp_path, small_models, how, message):
    """Of the authors' file, of transformers' with queries, keys and values apart, and of timm's."""
    video, image = vfm.find_vfm("VideoMAE"), vfm.find_vfm("DINOv2")
    authors = {name: torch.rand(shape) for name, shape in published_shapes("VideoMAE", video).items()}
    apart = dict(authors)
    for layer_name in ("blocks.0", "blocks.1"):
        qkv = apart.pop(f"{layer_name}.attn.qkv.weight").chunk(3)
        for part, value in zip(("query", "key", "value"), qkv, strict=True):
            apart[f"{layer_name}.attn.{part}.weight"] = value
    timm_s = vfm.build_vit(image, 1, (28, 42)).model.state_dict()
    timm_s["pos_embed"] = torch.rand(1, 1 + 37 * 37, 24)
    for spec, size, state, name in (
        (video, (32, 48), authors, "blocks.1.mlp.fc1.weight"),
        (video, (32, 48), apart, "blocks.1.attn.key.weight"),
        (image, (28, 42), timm_s, "blocks.0.attn.proj.weight"),
    ):
        vfm.build_vit(spec, 2, size, state)
        with pytest.raises(ValueError, match=f"{name} {message}"):
            vfm.build_vit(spec, 2, size, state | {name: spoiled(state[name], how)})
    zeros = {name: torch.zeros_like(value) for name, value in timm_s.items() if name.endswith("bias")}
    vfm.build_vit(image, 1, (28, 42), timm_s | zeros)  # biases may be zero


def test_what_timm_cannot_convert_is_said_with_its_reason(small_models, monkeypatch):
    """DINOv3's file is sought in timm's module for its architecture; that of another model fails there."""
    spec = vfm.find_vfm("DINOv2")
    with pytest.raises(ValueError, match=r"timm cannot convert it \(\w+Error: .+\)"):
        vfm.build_vit(spec, 1, (28, 42), {"patch_embed.proj.weight": torch.rand(7)})


@pytest.fixture
def shards(tmp_path):
    """A folder of transformers in several files and their index, beside files of an earlier set."""
    model = saved(tmp_path / "one", "VideoMAE", intermediate_size=96)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    weights = load_file(tmp_path / "one" / "model.safetensors")
    old = {name: value + 1 for name, value in weights.items()}
    for number in (1, 2):
        save_file(old, tmp_path / "shards" / f"model-{number:05}-of-00009.safetensors")
    index = json.loads((tmp_path / "shards" / vfm.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 1
    return tmp_path / "shards", weights, index


def test_the_index_of_a_folder_decides_which_files_are_read(shards):
    folder, weights, index = shards
    read = vfm.read_weights(folder, vfm.VFM())
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    name, file = next(iter(index["weight_map"].items()))
    other = next(part for part in index["weight_map"].values() if part != file)
    index["weight_map"][name] = other
    (folder / vfm.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"index.json does not fit its files \(.*{name}.*\); download them again"):
        vfm.read_weights(folder, vfm.VFM())
    index["weight_map"][name] = "model-00007-of-00009.safetensors"
    (folder / vfm.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00007-of-00009.safetensors does not exist"):
        vfm.read_weights(folder, vfm.VFM())
    (folder / vfm.INDEX).write_text('{"weight_map": [')
    with pytest.raises(UserError, match="json does not fit its files"):
        vfm.read_weights(folder, vfm.VFM())
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"holds model.safetensors and model.safetensors.index.json; remove"):
        vfm.read_weights(folder, vfm.VFM())
    (folder / vfm.INDEX).unlink()
    assert vfm.read_weights(folder, vfm.VFM()).keys() == weights.keys()
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no model.safetensors in"):
        vfm.read_weights(folder, vfm.VFM())


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does: timm/open and timm/half hold a file, timm/gated and timm/locked are for some."""

    revision = "0123456789" * 4

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        repository = next(
            (name for name in ("open", "half", "gated", "empty", "locked") if f"/timm/{name}" in self.path), None
        )
        body, code, headers = b"", 200, {}
        if repository is None:
            code, headers = 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
        elif "/resolve/" in self.path and repository == "gated":
            code, headers = 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
        elif repository == "locked":
            code = 403
        elif "/resolve/" in self.path:
            body, headers = b"weights", {"ETag": '"e1"', "X-Repo-Commit": self.revision}
        elif "/tree/" in self.path:
            file = {"type": "file", "oid": "a" * 40, "size": 7, "path": "model.safetensors"}
            body = json.dumps([] if repository == "empty" else [file]).encode()
        else:
            body = json.dumps({"id": f"timm/{repository}", "sha": self.revision, "siblings": []}).encode()
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


ASK_THE_HUB = """
import sys
import vfm_feature as vfm
for name in sys.argv[1:]:
    try:
        print(name, vfm.download_weights("timm:x", vfm.VFM(hub=(f"timm/{name}", "model.safetensors"))).read_bytes())
    except FileNotFoundError as error:
        print(name, error)
"""


def test_the_hub_s_refusals_say_what_to_do(tmp_path, monkeypatch):
    """Of a hub on this machine, which HF_ENDPOINT names as it does a mirror; then from its cache alone."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": address, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ASK_THE_HUB, "open", "half", "gated", "locked", "empty", "private"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    server.shutdown()
    server.server_close()
    said = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert said["open"] == said["half"] == "b'weights'"
    reasons = {
        "gated": "GatedRepoError: 403 Client Error",
        "locked": "LocalEntryNotFoundError: Got: HfHubHTTPError: 403 Forbidden",
        "empty": "the repository, or what the cache has of it, does not hold it",
        "private": "RepositoryNotFoundError: 401 Client Error",
    }
    advice = "pass it by --weights timm:x=FILE, or try the rest with --random_weights; or set HF_ENDPOINT to a mirror "
    advice += "or, if it is gated or private, accept its terms on its page and set HF_TOKEN or run `hf auth login`"
    for name, reason in reasons.items():
        assert said[name].startswith(f"model.safetensors of timm/{name} cannot be downloaded from {address} ({reason}")
        assert said[name].endswith(f"): {advice}")
    next(tmp_path.glob("hub/models--timm--half/snapshots/*/model.safetensors")).unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    for offline in (True, False):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        assert vfm.download_weights("timm:x", vfm.VFM(("timm/open", "model.safetensors"))).read_bytes() == b"weights"
        for name, reason in (
            ("half", "IncompleteSnapshotError: .* incomplete: "),
            ("other", "LocalEntryNotFoundError: "),
        ):
            cause = "HF_HUB_OFFLINE" if offline else "ConnectError: .* refused"
            with pytest.raises(FileNotFoundError, match=rf"{reason}.*{cause}.*\): pass it by ") as refusal:
                vfm.download_weights("timm:x", vfm.VFM((f"timm/{name}", "model.safetensors")))
            assert "\n" not in str(refusal.value)
            assert ("; or unset HF_HUB_OFFLINE, set HF_ENDPOINT" in str(refusal.value)) == offline


@pytest.fixture
def clip(tmp_path):
    (tmp_path / "clips").mkdir()
    write_video(tmp_path / "clips" / "ball.mp4", [draw_frame(0, index / 7, 48, 64) for index in range(8)], "mp4v")
    return tmp_path / "clips"


@pytest.fixture
def extract(clip, tmp_path, run_here):
    """The command line on that clip; returns its result, and the file of `model`."""

    def call(model, *flags):
        command = ["--video_dir", clip, "--output_root", tmp_path / "out", "--models", model, *SMALL[1:], *flags]
        result = run_here("vfm_feature.py", *command)
        file = tmp_path / "out" / vfm.folder_name(model) / "ball.pt"
        return result, torch.load(file, weights_only=True) if file.is_file() else None

    return call


def test_models_by_name_in_a_run(tmp_path, extract):
    saved(tmp_path / "mae", "VideoMAE", intermediate_size=96, image_size=64)
    name = f"hf:{tmp_path}/mae"
    result, data = extract(name)
    assert result.returncode == 0, result.stderr
    assert vfm.folder_name(name).startswith("hf_") and data["model"] == name
    assert data["feature"].shape == (2, 2, 3, 48)
    assert data["license"] == "unknown" and data["weights"].startswith("sha256:")
    assert "licence unknown" in result.stderr
    assert data["settings"]["layers"] is None
    _, random = extract(name, "--random_weights", "--overwrite")
    assert random["weights"] == "random"


def test_layers_of_a_video_model_are_its_blocks_outputs(extract):
    _, data = extract("VJEPA2", "--random_weights", "--layers", 2, 1)
    assert data["feature"].shape == (2, 2, 3, 48) and data["license"] == "mit" and data["settings"]["layers"] == [2, 1]
    for part, flags in ((slice(24), ()), (slice(24, 48), ("--layers", 1))):
        assert torch.equal(data["feature"][..., part], extract("VJEPA2", "--random_weights", *flags)[1]["feature"])


def test_names_in_any_case():
    args = vfm.parse_args(["--models", "dinov3-b", "VJEPA2.1-L", "DINOv3-B", "--random_weights"])
    assert args.models == ["DINOv3-B", "VJEPA2.1-L"]


def test_a_default_size_is_rounded_to_the_patch(clip, tmp_path, run_here):
    command = ["--video_dir", clip, "--output_root", tmp_path / "out", "--models", "DINOv3-B", "--num_frames", 1]
    result = run_here("vfm_feature.py", *command, "--random_weights")
    assert result.returncode == 0, result.stderr
    assert "DINOv3-B: input size (416, 624), as (420, 630) does not divide by its patch of 16" in result.stderr
    data = torch.load(tmp_path / "out" / "DINOv3-B" / "ball.pt", weights_only=True)
    assert data["feature"].shape == (1, 26, 39, 24)
    assert (data["settings"]["height"], data["settings"]["width"]) == (416, 624)


def test_weights_by_flag(tmp_path, extract):
    """timm's layout; and the hash is that of the authors' layout."""
    state = vfm.build_vit(vfm.find_vfm("DINOv2-B-reg"), 1, (28, 42)).model.state_dict()
    table = torch.randn(1, 37 * 37, 24)
    save_file({**state, "pos_embed": table}, tmp_path / "timm.safetensors")
    theirs = {**state, "register_tokens": state["reg_token"], "mask_token": torch.zeros(1, 24)}
    del theirs["reg_token"]
    theirs["pos_embed"] = torch.cat([torch.zeros(1, 1, 24), table], 1)
    torch.save(theirs, tmp_path / "authors.pth")
    _, data = extract("DINOv2-B-reg", "--weights", f"DINOv2-B-reg={tmp_path}/timm.safetensors")
    result, again = extract("DINOv2-B-reg", "--weights", f"DINOv2-B-reg={tmp_path}/authors.pth", "--overwrite")
    assert data["weights"] == again["weights"] and torch.equal(data["feature"], again["feature"])
    assert "licence apache-2.0" in result.stderr


def test_what_is_missing_is_said_and_can_be_skipped(extract, monkeypatch, tmp_path):
    said = {
        "VJEPA2.1-B": "vjepa2_1_vitb_dist_vitG_384.pt of https://github.com/facebookresearch/vjepa2 is in no hub; "
        "download it as they say there and pass it by --weights VJEPA2.1-B=FILE",
        "timm:vit_tiny_patch16_224": "model.safetensors of timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k cannot be "
        "downloaded from https://huggingface.co (LocalEntryNotFoundError: Cannot find",
        "hf:nobody/nothing": "there is no folder nobody/nothing, and it cannot be downloaded from https://",
    }
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sizes = ["--dinov2_resize_h", 32, "--dinov2_resize_w", 48]
    for name, text in said.items():
        result, _ = extract(name, *sizes)
        assert result.returncode == 2 and text in result.stderr.splitlines()[-1]
        result, _ = extract(name, *sizes, "--allow_skip_missing")
        assert result.returncode == 1 and f"not run: {name}: " in result.stdout and text in result.stdout
    result, data = extract("timm:vit_tiny_patch16_224", *sizes, "--random_weights")
    assert data["feature"].shape == (4, 2, 3, 192)
    saved(tmp_path / "mae", "VideoMAE", intermediate_size=96, image_size=64)
    (tmp_path / "mae" / "model.safetensors").unlink()
    result, _ = extract(f"hf:{tmp_path}/mae")
    assert result.returncode == 2 and "there is no model.safetensors in " in result.stderr
    monkeypatch.setitem(sys.modules, "transformers", None)
    result, _ = extract(f"hf:{tmp_path}/mae")
    assert result.returncode == 2 and "the package transformers is missing; install envs/" in result.stderr


def test_an_image_model_without_a_token_for_each_patch_is_refused(extract):
    sizes = ["--dinov2_resize_h", 256, "--dinov2_resize_w", 256]
    result, _ = extract("timm:levit_128s", *sizes, "--random_weights")
    assert result.returncode == 2 and "gives no token for each patch of 256 x 256" in result.stderr.splitlines()[-1]
    spec = vfm.find_vfm("DINOv2")
    vit = vfm.build_vit(spec, 1, (56, 56))
    with pytest.raises(RuntimeError, match="shape"):  # four tokens for each patch are no token of four times the width
        vfm.extract_features(vit, replace(spec, patch_size=28), pattern_clip(1, 56, 56))


def test_a_folder_s_code_is_not_run_and_its_gaps_are_named(tmp_path, extract):
    saved(tmp_path / "mae", "VideoMAE", intermediate_size=96, image_size=64)
    shutil.copytree(tmp_path / "mae", tmp_path / "code")
    config = json.loads((tmp_path / "mae" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (tmp_path / "code" / "config.json").write_text(json.dumps(config))
    (tmp_path / "code" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    result, _ = extract(f"hf:{tmp_path}/code")
    assert result.returncode == 2 and "error: --models hf:" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "ran").exists()
    state = load_file(tmp_path / "mae" / "model.safetensors")
    save_file(
        {**state, "encoder.layer.0.layernorm_before.bias": torch.zeros(7)}, tmp_path / "mae" / "model.safetensors"
    )
    result, _ = extract(f"hf:{tmp_path}/mae")
    assert result.returncode == 2 and "blocks.0.norm1.bias is [7] instead of [48]" in result.stderr
    assert result.stderr.count("\n") == 2  # a warning and the error
    del state["encoder.layer.1.output.dense.weight"]
    save_file(state, tmp_path / "mae" / "model.safetensors")
    result, _ = extract(f"hf:{tmp_path}/mae")
    assert result.returncode == 2 and "not the weights of" in result.stderr
    assert "blocks.1.mlp.fc2.weight is missing" in result.stderr
