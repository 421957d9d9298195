#!/usr/bin/env bash
# From clips to motion embeddings in one command: bash envs/quickstart.sh [VIDEO_DIR]
# Makes an environment in .envs/, draws two clips if no folder is given, runs the three scripts, says what to open.
set -euo pipefail
if [ $# -gt 0 ] && [ ! -d "$1" ]; then
    echo "quickstart.sh: $1 is no folder; give the folder of your clips, or nothing for two drawn ones" >&2
    exit 2
fi
[ $# -eq 0 ] || videos=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
    out=.quickstart/drawn
    videos="$out/videos"
    next="bash envs/quickstart.sh FOLDER_OF_YOUR_CLIPS"
else
    out=".quickstart/${videos//\//_}" # one for each folder of videos, or their features would mix
    next="section 1 of README.md: the three stages, one by one, with the flags that you need"
fi
failed="$out/features/VideoMAEv2/failed_videos.txt"
published=VideoREPA/ckpt/VideoMAEv2/vit_b_k710_dl_from_giant.pth

state() { # changes when the videos, the scripts or the weights do
    { ls -lR "$videos" ./*.py envs "$published" "../$published" 2>/dev/null || true; } | cksum
}
if [ "$(head -n 1 "$out/done" 2>/dev/null)" = "$(state)" ]; then
    echo "All is there already."
    tail -n +2 "$out/done"
    exit
fi

echo "This takes 2 minutes on 2 cores, 25 seconds for each clip of yours without a GPU, and 0.5 GB in .quickstart/."
. envs/environment.sh
mkdir -p "$out"

echo "Looking for the weights of VideoMAEv2, here and on the Hugging Face hub (0.4 GB to download)."
for weights in "$published" "../$published" ""; do [ ! -f "$weights" ] || break; done
[ -n "$weights" ] || weights=$("$PYTHON" - <<'END'
import sys
from vfm_feature import download_weights, find_vfm
try:
    print(download_weights("VideoMAEv2", find_vfm("VideoMAEv2")))
except FileNotFoundError as error:
    print(error, file=sys.stderr)
END
)
if [ -n "$weights" ]; then model=(--videomaev2_ckpt "$weights"); else model=(--random_weights); fi

if [ $# -eq 0 ]; then
    echo "Drawing two clips."
    "$PYTHON" tests/draw_clips.py "$videos"
fi
[ ! -f "$videos/captions.csv" ] || model+=(--csv_path "$videos/captions.csv")
made_of=$(state)

step() { # a script and its flags; what it prints goes to a log, what it warns of to the terminal
    echo
    echo "python $*"
    "$PYTHON" "$@" >"$out/${1%.py}.log" || { echo "It failed; $out/${1%.py}.log has what it printed." >&2 && exit 1; }
}
step vfm_feature.py --video_dir "$videos" --output_root "$out/features" --models VideoMAEv2 "${model[@]}" --preview
step train.py --feature_dir "$out/features/VideoMAEv2" --save_dir "$out/checkpoints" --epochs 1 --num_workers 0 \
    --use_token --overwrite
step encode.py --checkpoint "$out/checkpoints/motion_ae_best.pt" --input "$out/features/VideoMAEv2" \
    --output "$out/latents/VideoMAEv2" --preview

say_what_is_there() {
    local pictures=("$out"/features/VideoMAEv2/*.png) latents=("$out"/latents/VideoMAEv2/*.png)
    grep "some repeat" "$out/vfm_feature.log" || true
    [ ! -f "$failed" ] || echo "Failed: $(wc -l <"$failed") of the videos; $failed says why"
    if [ -n "$weights" ]; then
        "$PYTHON" - "$out/checkpoints/metrics.csv" <<'END'
import sys
import pandas
last = pandas.read_csv(sys.argv[1]).iloc[-1]
ours, theirs = (
    f"{1 - last[f'{code}_reconstruction_error']:.1%} of the features' variance and "
    f"{1 - last[f'{code}_motion_error']:.1%} of their changes" for code in ("val", "pca")
)
print(f"The latent, a quarter of the size, keeps {ours}; PCA of that size {theirs}.")
END
    else
        echo "The weights of VideoMAEv2 were not found, so the model is RANDOM: the pictures show the layout alone."
        echo "Put ${published##*/} of huggingface.co/OpenGVLab/VideoMAE2 (folder distill) into ${published%/*}/, run again."
    fi
    echo "Files:  $out/: features, checkpoints, latents, and a log of each script"
    echo "Open:   ${pictures[0]} (features), ${latents[0]} (latent)"
    echo "Next:   $next"
}
{ echo "$made_of" && say_what_is_there; } >"$out/done.part"
echo
tail -n +2 "$out/done.part"
[ -f "$failed" ] || mv "$out/done.part" "$out/done" # else the next run tries again
