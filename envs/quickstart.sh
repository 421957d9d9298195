#!/usr/bin/env bash
# From clips to motion embeddings in one command: bash envs/quickstart.sh [VIDEO_DIR]
# Makes an environment in .envs/, draws a few clips if no folder is given, runs the three scripts, lists what they wrote.
set -euo pipefail
[ $# -eq 0 ] || given=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
. envs/environment.sh

if [ $# -eq 0 ]; then
    out="$PWD/.quickstart/drawn"
    videos="$out/videos"
    "$PYTHON" tests/draw_clips.py "$videos"
    captions=(--csv_path "$videos/captions.csv")
else
    videos="$given"
    out="$PWD/.quickstart/${videos//\//_}" # one for each folder of videos, or their features would mix
    captions=()
    [ ! -f "$videos/captions.csv" ] || captions=(--csv_path "$videos/captions.csv")
fi

step() { echo; echo "== $*"; "$PYTHON" "$@"; }
extract() { # further flags
    step vfm_feature.py --video_dir "$videos" "${captions[@]}" --output_root "$out/features" --models VideoMAE "$@" |
        tee "$out/vfm_feature.log"
}
mkdir -p "$out"
random=""
if ! extract --allow_skip_missing; then
    grep -q "cannot be downloaded from the hub" "$out/vfm_feature.log" || exit 1 # it has said what is wrong
    random=yes
    extract --random_weights
fi
step train.py --feature_dir "$out/features/VideoMAE" --save_dir "$out/checkpoints" --batch_size 1 --epochs 3 \
    --num_workers 0 --use_token --overwrite
step encode.py --checkpoint "$out/checkpoints/motion_ae_best.pt" --input "$out/features/VideoMAE" \
    --output "$out/latents/VideoMAE"

echo
echo "What was made:"
describe() { # a pattern below $out, and what such files hold
    find "$out" -path "$out/$1" -type f -not -name '.*' | sort | while read -r file; do echo "  $file: $2"; done
}
describe 'videos/*.mp4' "a drawn clip"
describe 'videos/*.csv' "the captions of the drawn clips"
describe 'features/vfm_dimensions.txt' "shape and channels of each model's features"
describe 'features/VideoMAE/*.pt' "feature [T, H, W, 768], caption, video, model, settings"
describe 'features/VideoMAE/failed_videos.txt' "videos that could not be read, and why"
describe 'checkpoints/motion_ae_best.pt' "the motion autoencoder after its best epoch: the one to use"
describe 'checkpoints/motion_ae_epoch*.pt' "the motion autoencoder after this epoch"
describe 'checkpoints/motion_ae_last.pt' "what train.py --resume goes on from"
describe 'checkpoints/metrics.csv' "the errors, a row an epoch"
describe 'checkpoints/loss_curves.png' "the errors, drawn"
describe 'latents/*.pt' "latent [T, H, W, 192], motion_embedding [T, 192], compression_ratio"
describe 'latents/*.csv' "how well each latent decodes"
if [ -n "$random" ]; then
    echo
    echo "*******************************************************************************"
    echo "*  The pretrained weights could not be downloaded, so the model was RANDOM.   *"
    echo "*  The files above show that everything runs. Their numbers mean NOTHING.     *"
    echo "*******************************************************************************"
fi
