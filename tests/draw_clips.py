"""Draw a few clips of moving shapes and their captions: python tests/draw_clips.py FOLDER"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import cv2
import numpy as np

CAPTIONS = [
    "a red ball moves to the right, slowly",
    "a green square falls",
    "a blue ball circles the centre, fast",
    "一個黃色方塊向上移動",
]


def draw_frame(shape: int, time: float, height: int = 240, width: int = 360) -> np.ndarray:
    """BGR uint8 [height, width, 3] of clip `shape` at `time` in 0..1: a shape over a still gradient."""
    y, x = np.mgrid[:height, :width]
    frame = np.stack([40 + 60 * y / height, 70 + 50 * x / width, 90 + 0 * x], axis=-1).astype(np.uint8)
    angle = 4 * np.pi * time
    centre, colour, is_ball = [
        ((0.1 + 0.8 * time, 0.5), (40, 40, 230), True),
        ((0.5, 0.1 + 0.8 * time), (60, 200, 60), False),
        ((0.5 + 0.3 * np.cos(angle), 0.5 + 0.3 * np.sin(angle)), (220, 80, 40), True),
        ((0.4, 0.9 - 0.8 * time), (40, 220, 230), False),
    ][shape]
    column, row = int(centre[0] * width), int(centre[1] * height)
    if is_ball:
        cv2.circle(frame, (column, row), 30, colour, -1)
    else:
        cv2.rectangle(frame, (column - 28, row - 28), (column + 28, row + 28), colour, -1)
    return frame


def write_video(path: Path, frames: list[np.ndarray], codec: str = "mp4v", fps: float = 16) -> None:
    """Write BGR uint8 frames of one size; raises `OSError` where OpenCV cannot."""
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, (width, height))
    if not writer.isOpened():
        raise OSError(f"OpenCV cannot write {path} as {codec}")
    for frame in frames:
        writer.write(frame)
    writer.release()


def draw_clips(folder: Path, num_frames: int = 64) -> None:
    """One clip a caption, 0000.mp4 and on, and captions.csv, whose rows are in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for shape in range(len(CAPTIONS)):
        frames = [draw_frame(shape, index / (num_frames - 1)) for index in range(num_frames)]
        write_video(folder / f"{shape:04d}.mp4", frames)
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["caption"], *([caption] for caption in CAPTIONS)])


if __name__ == "__main__":
    draw_clips(Path(sys.argv[1]))
