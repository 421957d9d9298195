"""vfm_feature.py: the further models against their authors' code, and models by name against their libraries."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from draw_clips import draw_frame, write_video
from made_up import SMALL, filled, pattern_clip, timm_folder
from safetensors.torch import load_file, save_file

import vfm_feature as vfm
from model import UserError


def layer(name, shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def at_depth(model, depth, folder):
    """The table's model with `depth` blocks."""
    if model in vfm.VIDEO_MODELS:
        return replace(vfm.VIDEO_MODELS[model], depth=depth)
    return vfm.find_vfm(f"timm:{timm_folder(folder / 'timm', vfm.IMAGE_MODELS[model], depth=depth)}")


def published_shapes(model, spec):
    """The encoder in the authors' names, with the parts that are of no use here."""
    dim, p = spec.embed_dim, spec.patch_size
    wide = int(dim * spec.mlp_ratio)
    if model.startswith("PE"):
        shapes = {"class_embedding": (dim,), "positional_embedding": (1 + 32 * 32, dim), "conv1.weight": (dim, 3, p, p)}
        shapes |= layer("ln_pre", (dim,))
        for i in range(spec.depth):
            block = f"transformer.resblocks.{i}"
            shapes |= {f"{block}.attn.in_proj_weight": (3 * dim, dim), f"{block}.attn.in_proj_bias": (3 * dim,)}
            shapes |= layer(f"{block}.attn.out_proj", (dim, dim)) | layer(f"{block}.ln_1", (dim,))
            shapes |= layer(f"{block}.mlp.c_fc", (wide, dim)) | layer(f"{block}.mlp.c_proj", (dim, wide))
            shapes |= layer(f"{block}.ln_2", (dim,))
        return shapes
    is_dino, is_dino_3 = model.startswith("DINO"), model.startswith("DINOv3")
    shapes = layer("patch_embed.proj", (dim, 3, p, p) if is_dino else (dim, 3, 2, p, p))
    if is_dino:
        shapes |= layer("norm", (dim,)) | {"cls_token": (1, 1, dim), "mask_token": (1, dim)}
        shapes |= {} if is_dino_3 else {"pos_embed": (1, 1 + 37 * 37, dim)}
        shapes |= {"register_tokens": (1, 4, dim)} if model.endswith("reg") else {}
        shapes |= {"storage_tokens": (1, 4, dim), "rope_embed.periods": (16,)} if is_dino_3 else {}
    if model.startswith("VJEPA2.1"):
        shapes |= {"video_mod_embed": (1, 1, dim), "img_mod_embed": (1, 1, dim)} | layer("norms_block.3", (dim,))
        shapes |= layer("patch_embed_img.proj", (dim, 3, 1, p, p))
    for i in range(spec.depth):
        block = f"blocks.{i}"
        shapes |= layer(f"{block}.norm1", (dim,)) | layer(f"{block}.norm2", (dim,))
        shapes |= layer(f"{block}.attn.qkv", (3 * dim, dim)) | layer(f"{block}.attn.proj", (dim, dim))
        if model.startswith("DINOv2-g"):
            shapes |= layer(f"{block}.mlp.w12", (8192, dim)) | layer(f"{block}.mlp.w3", (dim, 4096))
        elif model.endswith("+"):
            shapes |= layer(f"{block}.mlp.w1", (wide, dim)) | layer(f"{block}.mlp.w2", (wide, dim))
            shapes |= layer(f"{block}.mlp.w3", (dim, wide))
        else:
            shapes |= layer(f"{block}.mlp.fc1", (wide, dim)) | layer(f"{block}.mlp.fc2", (dim, wide))
        if model.startswith("VideoMAE"):
            del shapes[f"{block}.attn.qkv.bias"]
            shapes |= {f"{block}.attn.q_bias": (dim,), f"{block}.attn.v_bias": (dim,)}
        if is_dino:
            shapes |= {f"{block}.ls1.gamma": (dim,), f"{block}.ls2.gamma": (dim,)}
        if is_dino_3:
            shapes |= {f"{block}.attn.qkv.bias_mask": (3 * dim,)}
    return shapes


def published_state(model, spec):
    state = {name: filled(name, shape) for name, shape in published_shapes(model, spec).items()}
    if model.startswith("DINOv3"):  # as published
        state |= {name: torch.zeros_like(value) for name, value in state.items() if name.endswith("qkv.bias")}
    return state


def in_its_file(model, state):
    """The state dict as the authors' file holds it, beside what is not to be taken."""
    if model.startswith("VJEPA2.1"):
        other = {f"module.backbone.{name}": value + 1 for name, value in state.items()}
        entry = "ema_encoder" if model[-1] in "BL" else "target_encoder"
        return {"encoder": other, entry: {f"module.backbone.{name}": value for name, value in state.items()}}
    if model == "VideoMAEv2-g":
        return {"model": {f"encoder.{name}": value for name, value in state.items()} | {"mask_token": torch.zeros(3)}}
    return {"module": state} if model == "VideoMAEv2-S" else state


# Made with the authors' own code on the CPU in float32, at the number of blocks that stands first, on `filled` and
# `pattern_clip`: VideoREPA's `VideoMAE.py` (commit 8002687), facebookresearch/dinov2 `vit_*` (518 pixels, registers
# as in its hubconf, `x_norm_patchtokens`, b8931f7), facebookresearch/dinov3 `dinov3_vitb16` (normalised patch tokens,
# 6876159), facebookresearch/perception_models PE-Spatial-B16-512 (3e352cc), facebookresearch/vjepa2 `vit_huge_rope`
# and `vit_giant_xformers_rope` (c2963a4) and, in a public copy of it that has V-JEPA 2.1, `app/vjepa_2_1`; no final
# norm. A figure is the feature at [t, h, w], every (C // 6)th channel of it.
MORE_REFERENCE = {  # blocks, (frames, height, width), mean, standard deviation and mean magnitude, figures
    "VideoMAE-L": (
        2,
        (48, 32, 80),
        (0.240693, 1.849515, 1.492262),
        {
            (23, 1, 1): [1.54006, -1.42497, 2.33355, -0.63968, -1.3435, 1.93182],
            (23, 0, 4): [2.98152, 3.3841, -0.84368, 0.12589, -4.1567, -0.6369],
            (23, 1, 4): [1.6116, 1.62821, 2.88171, -0.20458, 1.64022, -0.85674],
        },
    ),
    "DINOv2-S": (
        12,
        (2, 126, 182),
        (-0.000889, 1.00585, 0.804876),
        {
            (1, 4, 4): [-0.17043, -0.34628, -2.22284, 0.76296, 0.28883, 0.37339],
            (1, 0, 12): [0.00748, -0.37009, -1.63108, 1.21211, 0.22338, -0.11121],
            (1, 8, 12): [-0.57593, -0.65714, -1.00722, -0.01357, 0.38718, -0.31356],
        },
    ),
    "DINOv2-L": (
        2,
        (2, 126, 182),
        (-0.002503, 1.005432, 0.796605),
        {
            (1, 4, 4): [1.22929, -0.9663, -0.66499, 0.61127, -0.33076, -1.13954],
            (1, 0, 12): [0.71774, -0.89358, -0.00208, 0.78383, -1.63529, -1.88],
            (1, 8, 12): [-1.19525, 0.86246, -0.51163, -0.05745, -1.11823, 0.87568],
        },
    ),
    "DINOv2-g": (
        2,
        (2, 126, 182),
        (0.000696, 1.008735, 0.797423),
        {
            (1, 4, 4): [-0.22984, -0.13592, -1.78384, 1.36991, -1.00227, -0.76677],
            (1, 0, 12): [-0.37695, -0.70214, -0.40603, 0.04766, -0.94553, -0.68125],
            (1, 8, 12): [-0.86938, -0.15812, 1.99702, 1.37536, -1.03622, 0.2362],
        },
    ),
    "DINOv2-S-reg": (
        12,
        (2, 126, 182),
        (-0.000798, 1.007175, 0.807564),
        {
            (1, 4, 4): [-0.10223, -0.17672, -2.02007, 1.16136, 0.19001, 0.28163],
            (1, 0, 12): [-0.04824, -0.41223, -1.53375, 1.18574, 0.38607, -0.06032],
            (1, 8, 12): [-0.40978, -0.91883, -0.6449, -0.02195, 0.40271, -0.04606],
        },
    ),
    "DINOv2-B-reg": (
        2,
        (2, 126, 182),
        (0.002608, 1.007424, 0.798905),
        {
            (1, 4, 4): [0.42239, 0.67849, -0.25516, -1.71177, -1.82924, 0.55331],
            (1, 0, 12): [-0.54474, 0.1031, -0.81858, -1.35103, -1.81287, 0.50908],
            (1, 8, 12): [-0.83977, 1.19363, -0.06255, -1.36861, 1.47284, 0.44837],
        },
    ),
    "DINOv2-L-reg": (
        2,
        (2, 126, 182),
        (-0.002585, 1.005165, 0.795737),
        {
            (1, 4, 4): [0.97414, -0.82729, -0.08695, 0.47575, -0.66872, -1.09239],
            (1, 0, 12): [0.35183, -0.89385, 0.53415, 0.59207, -1.51455, -1.63249],
            (1, 8, 12): [-1.03645, 0.50547, -0.90448, -0.48623, -1.49176, 0.66092],
        },
    ),
    "DINOv2-g-reg": (
        2,
        (2, 126, 182),
        (0.000636, 1.008924, 0.795974),
        {
            (1, 4, 4): [-0.14199, 0.05265, -2.19218, 0.54511, -1.04276, -0.83958],
            (1, 0, 12): [-0.46973, -0.56173, -1.1065, 0.49894, -0.84242, -0.79872],
            (1, 8, 12): [-0.76859, -0.51831, 2.53183, 1.13039, -1.29861, 0.29724],
        },
    ),
    "DINOv3-B": (
        2,
        (2, 96, 160),
        (0.004129, 1.012151, 0.805062),
        {
            (1, 3, 3): [2.21211, -1.31994, -2.12023, -0.82198, -1.29737, 0.88675],
            (1, 0, 9): [1.76696, -2.2062, 0.57165, 0.85046, 0.98501, -0.98093],
            (1, 5, 9): [2.37589, -0.75112, -1.99141, -0.6815, -1.28965, 0.8807],
        },
    ),
    "PE-Spatial-B": (
        2,
        (2, 96, 160),
        (0.00098, 1.494411, 1.189309),
        {
            (1, 3, 3): [-0.21995, 3.10217, -1.42596, -1.96745, 2.27726, -0.44962],
            (1, 0, 9): [-1.67074, 1.19983, 0.49668, 0.47583, 0.60111, 0.34313],
            (1, 5, 9): [0.32569, 1.39151, -1.60822, -0.80553, 1.34038, -0.99159],
        },
    ),
    "VJEPA2-h": (
        2,
        (4, 96, 160),
        (-0.036552, 1.724297, 1.373274),
        {
            (1, 3, 3): [-0.94845, 0.84667, 0.90006, 2.38941, 2.23442, 2.70744],
            (1, 0, 9): [0.76486, -0.58756, -0.71724, -2.74556, -0.65338, 2.01583],
            (1, 5, 9): [1.58823, 0.10869, 1.77429, -2.78384, 1.26435, 0.95701],
        },
    ),
    "VJEPA2-g": (
        2,
        (4, 96, 160),
        (0.009583, 1.758919, 1.405547),
        {
            (1, 3, 3): [-0.22506, 0.90175, 2.00247, -1.09299, -1.45903, -1.68331],
            (1, 0, 9): [-0.058, 1.92589, 0.14929, 0.33827, 2.16575, 0.61189],
            (1, 5, 9): [0.99413, 0.59956, -1.72362, 0.7041, 2.01484, 3.41831],
        },
    ),
    "VJEPA2.1-B": (
        2,
        (4, 96, 160),
        (-0.014162, 1.851799, 1.481691),
        {
            (1, 3, 3): [-0.62146, 2.081, -0.22972, 0.43547, -1.65192, -3.17866],
            (1, 0, 9): [2.48859, 1.79671, 0.18665, 0.12535, -2.12602, -0.83314],
            (1, 5, 9): [0.75722, -2.12443, 2.66884, 0.8935, 0.67926, 1.44313],
        },
    ),
    "VJEPA2.1-L": (
        2,
        (4, 96, 160),
        (0.033604, 1.887139, 1.506728),
        {
            (1, 3, 3): [-0.62118, -0.6806, -2.02301, 0.5636, -0.01918, -3.11867],
            (1, 0, 9): [0.9577, -2.36544, -2.06575, 0.68412, -0.83435, 0.30103],
            (1, 5, 9): [1.33342, -1.22288, -1.11625, 1.08591, -3.3327, 0.30241],
        },
    ),
    "VideoMAE-H": (
        2,
        (48, 32, 80),
        (0.183489, 1.879260, 1.505294),
        {
            (23, 1, 1): [2.3344, -3.42612, -0.06924, 1.01863, -1.28902, 1.81569],
            (23, 0, 4): [-0.08529, -1.33553, -2.11166, -0.47715, 0.66444, -0.53926],
            (23, 1, 4): [0.52982, -0.09874, 3.16082, -0.27984, -0.60846, -0.00404],
        },
    ),
    "VideoMAEv2-S": (
        12,
        (48, 32, 80),
        (0.309093, 3.719714, 2.987945),
        {
            (23, 1, 1): [2.10908, -4.57286, -3.23596, 3.51564, -2.68132, 0.05706],
            (23, 0, 4): [4.03466, -4.85716, 2.7369, 4.55214, -4.22007, 3.32989],
            (23, 1, 4): [-1.29192, -3.68032, -7.98899, 1.78968, -5.96601, -4.40568],
        },
    ),
    "VideoMAEv2-g": (
        2,
        (48, 28, 70),
        (0.174138, 1.865790, 1.497181),
        {
            (23, 1, 1): [1.02255, -1.29451, -3.50381, 1.65957, -2.04308, 1.78595],
            (23, 0, 4): [-0.07397, -0.54657, -0.81468, -3.28678, -0.43115, 2.82402],
            (23, 1, 4): [0.74103, -2.26377, -0.89942, 0.52889, -1.85671, 1.76251],
        },
    ),
    "VJEPA2.1-g": (
        2,
        (4, 96, 160),
        (0.016676, 1.886464, 1.507917),
        {
            (1, 3, 3): [0.07085, 0.86095, 2.17848, -1.74146, -1.55001, -2.35405],
            (1, 0, 9): [-0.37211, 2.17052, 0.21398, -0.08667, 1.87694, 0.00314],
            (1, 5, 9): [0.30077, 0.084, -1.59267, -0.52058, 1.99384, 2.7621],
        },
    ),
    "VJEPA2.1-G": (
        2,
        (4, 96, 160),
        (-0.020051, 1.869769, 1.491826),
        {
            (1, 3, 3): [-1.46832, 0.3142, 0.4134, 2.28861, -1.74872, 2.17175],
            (1, 0, 9): [1.45229, 1.79161, 1.50066, 0.72137, 0.47451, 3.7456],
            (1, 5, 9): [0.20616, 0.78951, 2.33828, -0.03793, 1.4723, 1.57233],
        },
    ),
    "DINOv3-S": (
        2,
        (2, 96, 160),
        (0.002623, 1.010076, 0.798695),
        {
            (1, 3, 3): [1.22247, 0.58024, -0.20294, 0.4074, -1.16969, -0.20698],
            (1, 0, 9): [1.38558, 0.6643, -2.88543, 1.28283, 0.38019, -1.04846],
            (1, 5, 9): [1.22749, 1.3277, -0.51373, 0.17179, -1.12326, -0.36044],
        },
    ),
    "DINOv3-S+": (
        2,
        (2, 96, 160),
        (0.003756, 1.010110, 0.801088),
        {
            (1, 3, 3): [0.44387, -0.57943, -1.55595, 0.18852, -1.50243, 0.61874],
            (1, 0, 9): [1.06342, -0.14726, -2.05835, 0.92842, -0.27729, -1.33807],
            (1, 5, 9): [0.85206, -0.38183, -1.77375, 0.05546, -1.83239, 0.25612],
        },
    ),
    "DINOv3-L": (
        2,
        (2, 96, 160),
        (-0.001999, 1.008465, 0.798703),
        {
            (1, 3, 3): [0.86727, -1.00764, -0.8957, 1.52507, -0.18123, -2.29046],
            (1, 0, 9): [0.36378, -0.99135, -1.07575, 0.47954, 0.64325, -2.07755],
            (1, 5, 9): [1.64677, -0.74537, -0.88128, 1.91339, 0.18748, -1.68943],
        },
    ),
    "DINOv3-H+": (
        2,
        (2, 96, 160),
        (-0.001080, 1.009661, 0.802910),
        {
            (1, 3, 3): [1.14219, 0.72341, -0.21182, 0.64079, -0.9608, -1.9206],
            (1, 0, 9): [0.39627, 0.76685, 1.55112, -0.09892, 0.51296, 1.09363],
            (1, 5, 9): [1.80032, 0.79172, -0.20989, 0.70212, -1.41729, -2.25533],
        },
    ),
    "PE-Spatial-T": (
        2,
        (2, 96, 160),
        (-0.027269, 1.531091, 1.215924),
        {
            (1, 3, 3): [-1.73434, 2.31065, -0.64925, -0.66283, 1.47558, 1.4875],
            (1, 0, 9): [-1.25562, 1.14045, 3.38551, -1.26245, 0.28654, 0.7672],
            (1, 5, 9): [-1.21985, 0.9055, -0.00377, -2.23793, 1.18165, 0.64162],
        },
    ),
    "PE-Spatial-S": (
        2,
        (2, 96, 160),
        (0.064603, 1.497383, 1.197273),
        {
            (1, 3, 3): [3.04174, -0.00822, 3.76087, -0.36376, -0.69139, -0.53674],
            (1, 0, 9): [1.13594, 2.01361, 0.26601, -1.75533, 0.70496, -1.33016],
            (1, 5, 9): [3.05514, 0.57603, 2.55834, 0.77773, -0.73856, -0.50023],
        },
    ),
    "PE-Spatial-L": (
        2,
        (2, 84, 140),
        (-0.022141, 1.497443, 1.191582),
        {
            (1, 3, 3): [-1.08514, 1.66936, -1.08121, 1.03663, -2.66681, 0.08821],
            (1, 0, 9): [-1.70833, 0.70599, -0.81107, 0.04828, -1.41409, -1.43453],
            (1, 5, 9): [-1.01387, 2.49718, -0.61046, -1.00128, -0.49361, 0.20916],
        },
    ),
}


@pytest.mark.parametrize("model", MORE_REFERENCE)
def test_features_are_those_of_the_authors_code(model, tmp_path):
    depth, (frames, height, width), statistics, figures = MORE_REFERENCE[model]
    spec = at_depth(model, depth, tmp_path)
    torch.save(in_its_file(model, published_state(model, spec)), tmp_path / "weights.pth")
    weights = vfm.read_weights(tmp_path / "weights.pth", vfm.VIDEO_MODELS.get(model, spec))
    (tmp_path / "weights.pth").unlink()
    vit = vfm.build_vit(spec, frames, (height, width), weights)
    feature = vfm.extract_features(vit, spec, pattern_clip(frames, height, width))[0]
    channels = feature.shape[-1]
    assert channels == spec.embed_dim
    for place, expected in figures.items():
        error = (feature[place][:: channels // 6][:6] - torch.tensor(expected)).norm()
        assert error <= 1e-4 * torch.tensor(expected).norm(), f"{model} at {place}"
    measured = torch.stack([feature.mean(), feature.std(), feature.abs().mean()])
    torch.testing.assert_close(measured, torch.tensor(statistics), rtol=1e-4, atol=1e-5)


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


def test_dinov3_with_biases_is_refused(tmp_path):
    spec = at_depth("DINOv3-B", 1, tmp_path)
    state = {name: filled(name, shape) for name, shape in published_shapes("DINOv3-B", spec).items()}
    with pytest.raises(ValueError, match=r"qkv.bias is not zero"):
        vfm.build_vit(spec, 1, (32, 48), state)


SMALL_VIT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 64)])
@pytest.mark.parametrize("layers", [[2], [1, 2]])
def test_a_timm_folder_gives_timm_s_maps(tmp_path, size, layers):
    import timm

    arguments = {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 64}
    model = timm.create_model("vit_base_patch16_siglip_512.v2_webli", **arguments, num_classes=0).eval()
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
    import timm

    model = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=48, num_heads=4, num_classes=0)
    timm.models.save_for_hf(
        model, tmp_path, model_args={"depth": 1, "embed_dim": 48, "num_heads": 4}, safe_serialization=True
    )
    spec = vfm.find_vfm(f"timm:{tmp_path}")
    vit = vfm.build_vit(spec, 1, (224, 224), vfm.read_weights(spec.folder, spec))
    vfm.check_tokens("it", vit, spec, (224, 224), [1])
    assert torch.equal(vit.model.blocks[0].attn.q_bias, model.blocks[0].attn.q_bias)


def saved(folder, kind, **settings):
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SMALL_VIT, **settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def last_block(model, blocks, **inputs):
    """What transformers' own forward pass has after its last block."""
    kept = []
    blocks[-1].register_forward_hook(lambda module, given, out: kept.append(out[0] if isinstance(out, tuple) else out))
    with torch.inference_mode():
        model(**inputs)
    return kept[0]


def test_video_models_of_transformers_are_ours(tmp_path):
    pixels = (pattern_clip(8, 112, 112) / 255 - torch.tensor(vfm.IMAGENET_MEAN)) / torch.tensor(vfm.IMAGENET_STD)
    model = saved(tmp_path / "mae", "VideoMAE", intermediate_size=96, image_size=112, num_frames=8)
    expected = last_block(model, model.encoder.layer, pixel_values=pixels.permute(0, 1, 4, 2, 3))
    spec = vfm.find_vfm(f"hf:{tmp_path}/mae")
    vit = vfm.build_vit(spec, 8, (112, 112), vfm.read_weights(tmp_path / "mae", spec))
    feature = vfm.extract_features(vit, spec, pattern_clip(8, 112, 112))
    torch.testing.assert_close(feature.flatten(1, 3), expected, rtol=1e-4, atol=1e-4)
    small = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    model = saved(tmp_path / "jepa", "VJEPA2", crop_size=64, **small)
    inputs = {"pixel_values_videos": pixels[:, :4, :64, :64].permute(0, 1, 4, 2, 3), "skip_predictor": True}
    expected = last_block(model, model.encoder.layer, **inputs)
    spec = vfm.find_vfm(f"hf:{tmp_path}/jepa")
    vit = vfm.build_vit(spec, 4, (64, 64), vfm.read_weights(tmp_path / "jepa", spec))
    feature = vfm.extract_features(vit, spec, pattern_clip(8, 112, 112)[:, :4, :64, :64])
    torch.testing.assert_close(feature.flatten(1, 3), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 64)])
def test_other_models_of_transformers_give_their_blocks_outputs(tmp_path, size):
    model = saved(tmp_path, "DINOv3ViT", intermediate_size=96, num_register_tokens=4)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    (tmp_path / "README.md").write_text("---\ntags:\n- vision\nlicense: other\nlicense_name: dinov3-license\n---\n")
    spec = vfm.find_vfm(f"hf:{tmp_path}")
    assert (spec.mean, spec.std, spec.license) == ((0.5,) * 3, (0.25,) * 3, "dinov3-license")
    vit = vfm.build_vit(spec, 1, size, vfm.read_weights(tmp_path))
    images = (pattern_clip(1, *size)[0].permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    expected = last_block(model, vit.blocks.__class__(model.model.layer), pixel_values=images)[:, 5:]
    torch.testing.assert_close(vfm.extract_features(vit, spec, pattern_clip(1, *size)).flatten(1, 3), expected)


@pytest.mark.parametrize(
    ("kind", "settings", "size", "message"),
    [
        ("Beit", {"intermediate_size": 96, "image_size": 64}, (64, 96), "may take any grid of its beit for a square"),
        ("DeiT", {"intermediate_size": 96, "image_size": 64}, (64, 64), "gives 18 tokens for a grid of 4 x 4"),
        ("ViTMAE", {"intermediate_size": 96, "image_size": 64, "mask_ratio": 0.0}, (64, 64), "that mask their input"),
        ("Timesformer", {"intermediate_size": 96, "image_size": 64}, (64, 64), "of models of video, or that"),
        ("Bert", {"intermediate_size": 96, "vocab_size": 9}, (64, 64), "no ViT"),
        ("VideoMAE", {"intermediate_size": 96, "hidden_act": "relu"}, (64, 64), "videomae with relu for gelu"),
    ],
)
def test_what_would_be_wrong_is_refused(tmp_path, kind, settings, size, message):
    saved(tmp_path, kind, **settings)
    with pytest.raises(UserError, match=message):
        spec = vfm.find_vfm(f"hf:{tmp_path}")
        vit = vfm.build_vit(spec, 1, size, vfm.read_weights(tmp_path))
        vfm.check_tokens("it", vit, spec, size, [2])


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
    saved(tmp_path / "vit", "ViT", intermediate_size=96, image_size=64)
    name = f"hf:{tmp_path}/vit"
    result, data = extract(name, "--dinov2_resize_h", 32, "--dinov2_resize_w", 48)
    assert result.returncode == 0, result.stderr
    assert vfm.folder_name(name).startswith("hf_") and data["model"] == name
    assert data["feature"].shape == (4, 2, 3, 48)
    assert data["license"] == "unknown" and data["weights"].startswith("sha256:")
    assert "licence unknown" in result.stderr and "ImageNet's are taken" in result.stderr
    assert "layers" not in data["settings"]
    result, both = extract(name, "--dinov2_resize_h", 32, "--dinov2_resize_w", 48, "--layers", 2, 1)
    assert both["settings"]["layers"] == [2, 1]
    assert torch.equal(both["feature"][..., :48], data["feature"])
    _, random = extract(name, "--random_weights", "--dinov2_resize_h", 32, "--dinov2_resize_w", 48, "--overwrite")
    assert random["weights"] == "random"


def test_layers_of_a_video_model_are_its_blocks_outputs(extract):
    _, data = extract("VJEPA2", "--random_weights", "--layers", 1, 2)
    assert data["feature"].shape == (2, 2, 3, 48) and data["license"] == "mit"
    _, last = extract("VJEPA2", "--random_weights")
    assert torch.equal(data["feature"][..., 24:], last["feature"])
    _, first = extract("VJEPA2", "--random_weights", "--layers", 1)
    assert torch.equal(data["feature"][..., :24], first["feature"])


def test_names_in_any_case():
    assert vfm.parse_args(["--models", "dinov3-b", "VJEPA2.1-L", "DINOv3-B", "--random_weights"]).models == [
        "DINOv3-B",
        "VJEPA2.1-L",
    ]


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
    spec = vfm.VFMS["DINOv2-B-reg"]
    state = vfm.build_vit(spec, 1, (28, 42)).model.state_dict()
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
        "download it as they say there and pass it with --weights VJEPA2.1-B=FILE",
        "timm:vit_tiny_patch16_224": "cannot be downloaded from the hub",
        "hf:nobody/nothing": "there is no folder nobody/nothing, and it cannot be downloaded from the hub",
    }
    monkeypatch.setattr(vfm, "hub_answers", lambda: False)
    sizes = ["--dinov2_resize_h", 32, "--dinov2_resize_w", 48]
    for name, text in said.items():
        result, _ = extract(name, *sizes)
        assert result.returncode == 2 and text in result.stderr.splitlines()[-1]
        result, _ = extract(name, *sizes, "--allow_skip_missing")
        assert result.returncode == 1 and f"not run: {name}: " in result.stdout and text in result.stdout
    result, data = extract("timm:vit_tiny_patch16_224", *sizes, "--random_weights")
    assert data["feature"].shape == (4, 2, 3, 192)
    saved(tmp_path / "vit", "ViT", intermediate_size=96, image_size=64)
    (tmp_path / "vit" / "model.safetensors").unlink()
    result, _ = extract(f"hf:{tmp_path}/vit", *sizes)
    assert result.returncode == 2 and "there is no model.safetensors in" in result.stderr
    monkeypatch.setitem(sys.modules, "transformers", None)
    result, _ = extract(f"hf:{tmp_path}/vit", *sizes)
    assert result.returncode == 2 and "the package transformers is missing; install envs/" in result.stderr


def test_a_folder_s_code_is_not_run_and_its_gaps_are_named(tmp_path, extract):
    sizes = ["--dinov2_resize_h", 32, "--dinov2_resize_w", 48]
    saved(tmp_path / "vit", "ViT", intermediate_size=96, image_size=64)
    shutil.copytree(tmp_path / "vit", tmp_path / "code")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (tmp_path / "code" / "config.json").write_text(json.dumps(config))
    (tmp_path / "code" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    result, _ = extract(f"hf:{tmp_path}/code", *sizes)
    assert result.returncode == 2 and "error: --models hf:" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "ran").exists()
    state = load_file(tmp_path / "vit" / "model.safetensors")
    bias = next(name for name in state if "0" in name and name.endswith("bias"))
    save_file({**state, bias: torch.zeros(7)}, tmp_path / "vit" / "model.safetensors")
    result, _ = extract(f"hf:{tmp_path}/vit", *sizes)
    assert result.returncode == 2 and "missing or of another shape: " in result.stderr
    assert result.stderr.count("\n") == 3  # two warnings and the error
    name = next(name for name in state if "1" in name and name.endswith("weight"))
    save_file({key: value for key, value in state.items() if key != name}, tmp_path / "vit" / "model.safetensors")
    result, _ = extract(f"hf:{tmp_path}/vit", *sizes)
    assert result.returncode == 2 and "not the weights of" in result.stderr and "missing" in result.stderr
