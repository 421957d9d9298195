"""Draw two clips of a small world that look like videos, and their captions: python tests/draw_clips.py FOLDER

A ray caster on the CPU: textured ground, columns, trees, balls that roll and bounce, shadows, haze, a moving camera.
"""

from __future__ import annotations

import csv
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

CAPTIONS = [
    "a striped ball rolls to the right along a colonnade, another one bounces behind it; the camera walks along",
    "三顆球在草地上彈跳，鏡頭繞著它們轉",
]
SUN = np.float32([0.48, 0.72, -0.5])  # its direction, of length 1
SKY, HAZE = np.float32([0.86, 0.60, 0.36]), np.float32([0.90, 0.84, 0.76])  # all colours are BGR, 0 to 1
STONE, MORTAR, BARK = np.float32([0.62, 0.72, 0.78]), np.float32([0.30, 0.33, 0.36]), np.float32([0.16, 0.24, 0.34])
GRASS, LEAVES, DRY = np.float32([0.20, 0.52, 0.34]), np.float32([0.14, 0.42, 0.20]), np.float32([0.36, 0.64, 0.66])
WHITE = np.float32([0.92, 0.96, 0.97])


class Ball(NamedTuple):
    centre: np.ndarray  # [3]: right, up, away
    radius: float
    colour: np.ndarray
    turn: float | None  # how far it has rolled, radians; None: the crown of a tree


class Column(NamedTuple):
    foot: np.ndarray  # [3], on the ground
    radius: float
    height: float
    colour: np.ndarray


class World(NamedTuple):
    camera: np.ndarray  # [3], where it is
    target: np.ndarray  # [3], what it looks at
    balls: list[Ball]
    columns: list[Column]
    paved: bool


def point(right: float, up: float, away: float) -> np.ndarray:
    return np.float32([right, up, away])


def colonnade(time: float, random: np.random.Generator) -> World:
    """A ball rolls to the right, one bounces behind it, and the camera walks along two rows of columns."""
    colours = random.uniform(0.1, 0.9, (2, 3)).astype(np.float32)
    rolled, hop = 7.5 * time - 4.0, 1.3 * abs(np.sin(3.5 * np.pi * time))
    balls = [
        Ball(point(rolled, 0.65, -1.2), 0.65, colours[0], rolled / 0.65),
        Ball(point(2.5 - 3.0 * time, 0.5 + hop, 3.0), 0.5, colours[1], 4.0 * time),
    ]
    columns = [Column(point(3.2 * column, 0, row), 0.42, 3.6, STONE) for row in (1.0, 5.0) for column in range(-2, 4)]
    return World(point(3.5 * time - 2.5, 1.7, -6.5 + time), point(2.6 * time - 1.3, 1.15, 1.0), balls, columns, True)


def meadow(time: float, random: np.random.Generator) -> World:
    """Three balls bounce on the grass between trees, and the camera circles them."""
    balls, columns = [], []
    for index, colour in enumerate(random.uniform(0.1, 0.9, (3, 3)).astype(np.float32)):
        around, radius = 2.1 * index + 1.5 * time, 0.45 + 0.15 * index
        hop = (1.8 - 0.4 * index) * abs(np.sin(np.pi * (2 + index) * time + index))
        balls.append(Ball(point(1.5 * np.cos(around), radius + hop, 1.5 * np.sin(around)), radius, colour, 5.0 * time))
    for angle in np.linspace(0, 2 * np.pi, 7, endpoint=False) + random.uniform(0, 0.6, 7):
        foot = point(8.0 * np.cos(angle), 0, 8.0 * np.sin(angle))
        columns.append(Column(foot, 0.2, 2.4, BARK))
        balls.append(Ball(foot + point(0, 3.2, 0), 1.5, LEAVES, None))
    angle = 1.0 * time - 1.9
    camera = point(5.2 * np.cos(angle), 1.9 + 0.5 * time, 5.2 * np.sin(angle))
    return World(camera, point(0, 1.1, 0), balls, columns, False)


@cache
def noise_table() -> np.ndarray:
    """[1024, 1024] of mean 0 and rms 1: noise of six octaves, the coarse ones large; it repeats at its borders."""
    table = np.zeros((1024, 1024), np.float32)
    for cells in (4, 8, 16, 32, 64, 128):
        grid = np.random.default_rng(cells).standard_normal((cells, cells)).astype(np.float32)
        three = cv2.resize(np.tile(grid, (3, 3)), (3072, 3072), interpolation=cv2.INTER_CUBIC)
        table += three[1024:2048, 1024:2048] / cells
    return (table - table.mean()) / table.std()


def noise(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The table at u, v [R], which repeat every 1."""
    return noise_table()[(v % 1 * 1023).astype(np.int32), (u % 1 * 1023).astype(np.int32)]


def mix(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Colours [R, 3]: `share` [R] of the second, the rest of the first."""
    return first + (second - first) * np.clip(share, 0, 1)[:, None]


def sky(rays: np.ndarray) -> np.ndarray:
    up = np.maximum(rays[:, 1], 0.02)
    clouds = noise(0.06 * rays[:, 0] / up + 0.3, 0.06 * rays[:, 2] / up)
    return mix(mix(HAZE, SKY, 2.5 * up), np.float32(1), (0.5 * clouds + 0.2) * np.minimum(4 * up, 1))


def ground(points: np.ndarray, paved: bool) -> np.ndarray:
    fine, coarse = noise(points[:, 0] / 3, points[:, 2] / 3), noise(points[:, 0] / 23, points[:, 2] / 23)
    if not paved:
        return mix(GRASS, DRY, 0.35 + 0.3 * coarse) * (1 + 0.2 * fine)[:, None]
    across, along = points[:, 0] % 1.5, points[:, 2] % 1.5
    joint = (np.minimum(across, along) < 0.05).astype(np.float32)
    slab = noise(np.floor(points[:, 0] / 1.5) * 0.37, np.floor(points[:, 2] / 1.5) * 0.73)
    return mix(STONE * (0.9 + 0.12 * slab + 0.1 * fine)[:, None], MORTAR, joint)


def see_ball(ball: Ball, camera: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Distance [R] at which each ray meets the ball; NaN where it passes it."""
    to_centre = ball.centre - camera
    along = rays @ to_centre
    return along - np.sqrt(ball.radius**2 - to_centre @ to_centre + along**2)


def see_column(column: Column, camera: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """The same: a circle when seen from above, cut off at the column's height."""
    to_foot, length = (column.foot - camera) * point(1, 0, 1), np.hypot(rays[:, 0], rays[:, 2])
    along = rays @ to_foot / length
    distance = (along - np.sqrt(column.radius**2 - to_foot @ to_foot + along**2)) / length
    return np.where(np.abs(camera[1] + distance * rays[:, 1] - column.height / 2) < column.height / 2, distance, np.nan)


def paint_ball(ball: Ball, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours and normals [R, 3] of points on its surface."""
    normals = (points - ball.centre) / ball.radius
    if ball.turn is None:
        leaves = noise(np.arctan2(normals[:, 2], normals[:, 0]) / np.pi, normals[:, 1])
        return ball.colour * (1 + 0.35 * leaves)[:, None], normals
    cosine, sine = np.cos(ball.turn), np.sin(ball.turn)
    right, up = cosine * normals[:, 0] - sine * normals[:, 1], sine * normals[:, 0] + cosine * normals[:, 1]
    stripes = np.sin(3 * np.arctan2(up, right)) > 0
    return mix(ball.colour, WHITE, stripes) * (1 + 0.05 * noise(right, up))[:, None], normals


def paint_column(column: Column, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    normals = (points - column.foot) * point(1, 0, 1) / column.radius
    angle = np.arctan2(normals[:, 2], normals[:, 0])
    rough = noise(angle / 3, points[:, 1] / 4)
    return column.colour * (0.9 + 0.12 * rough + 0.08 * np.cos(14 * angle))[:, None], normals


def shadow(world: World, points: np.ndarray) -> np.ndarray:
    """[R], 0 to 1: how much of the sun the balls and columns hide from each point."""
    hidden = np.zeros(len(points), np.float32)
    to_sun, away = points @ SUN, (points**2) @ np.ones(3, np.float32)
    for ball in world.balls:
        along = ball.centre @ SUN - to_sun
        beside = np.sqrt(np.maximum(away - points @ (2 * ball.centre) + ball.centre @ ball.centre - along**2, 0))
        hidden = np.maximum(hidden, (1.1 - beside / ball.radius) / 0.3 * (along > 0))
    flat = SUN * point(1, 0, 1) / np.hypot(SUN[0], SUN[2])
    for column in world.columns:
        along = column.foot @ flat - points @ flat
        beside = np.abs(points @ np.cross(flat, point(0, 1, 0)) - column.foot @ np.cross(flat, point(0, 1, 0)))
        behind = (along > column.radius) & (points[:, 1] + along * SUN[1] / (SUN @ flat) < column.height)
        hidden = np.maximum(hidden, (1.1 - beside / column.radius) / 0.3 * behind)
    return np.minimum(hidden, 1)


def look(world: World, height: int, width: int) -> np.ndarray:
    """The direction of each pixel's ray from the camera, of length 1: float32 [height * width, 3]."""
    forward = world.target - world.camera
    forward /= np.linalg.norm(forward)
    right = np.cross(point(0, 1, 0), forward)
    right /= np.linalg.norm(right)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = (x + 0.5 - width / 2) / height, (y + 0.5 - height / 2) / height
    rays = forward + 1.1 * (x[..., None] * right - y[..., None] * np.cross(forward, right))
    return (rays / np.linalg.norm(rays, axis=-1, keepdims=True)).reshape(-1, 3).astype(np.float32)


@np.errstate(invalid="ignore", divide="ignore")  # the square root of a ray that passes a thing, a ray along the ground
def render(world: World, height: int, width: int) -> np.ndarray:
    """BGR, 0 to 1, float32 [height, width, 3]."""
    rays = look(world, height, width)
    things = [*world.balls, *world.columns]
    nearest = world.camera[1] / np.maximum(-rays[:, 1], 0)  # to the ground
    which = np.full(len(rays), len(things))
    for index, thing in enumerate(things):
        distance = (see_ball if isinstance(thing, Ball) else see_column)(thing, world.camera, rays)
        closer = (distance > 0) & (distance < nearest)
        nearest[closer], which[closer] = distance[closer], index

    picture = sky(rays)
    solid = nearest < 200  # what is farther away is all haze
    rays, nearest, which = rays[solid], nearest[solid], which[solid]
    points = world.camera + rays * nearest[:, None]
    colours, normals = ground(points, world.paved), np.tile(point(0, 1, 0), (len(points), 1))
    for index, thing in enumerate(things):
        own = which == index
        colours[own], normals[own] = (paint_ball if isinstance(thing, Ball) else paint_column)(thing, points[own])
    light = np.maximum(normals @ SUN, 0) * (1 - 0.85 * shadow(world, points))
    picture[solid] = mix(colours * (0.38 + 0.7 * light)[:, None], HAZE, 1 - np.exp(-nearest / 30))
    return picture.reshape(height, width, 3)


def draw_frame(scene: int, time: float, height: int = 240, width: int = 360) -> np.ndarray:
    """BGR uint8 [height, width, 3] of clip `scene` at `time` in 0..1: even ones in a colonnade, odd ones on a meadow,
    each with balls of its own colours. Rendered at 1.5 times the size, for smooth edges."""
    world = (colonnade, meadow)[scene % 2](time, np.random.default_rng(scene))
    picture = render(world, height * 3 // 2, width * 3 // 2)
    picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    return (255 * np.clip(picture, 0, 1)).round().astype(np.uint8)


def write_video(path: Path, frames: list[np.ndarray], codec: str = "mp4v", fps: float = 16) -> None:
    """Write BGR uint8 frames of one size; raises `OSError` where OpenCV cannot."""
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, (width, height))
    if not writer.isOpened():
        raise OSError(f"OpenCV cannot write {path} as {codec}")
    for frame in frames:
        writer.write(frame)
    writer.release()


def draw_clips(folder: Path, num_frames: int = 50, height: int = 240, width: int = 360) -> None:
    """One clip a caption, 0000.mp4 and on, and captions.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [("video", "caption")]
    for scene, caption in enumerate(CAPTIONS):
        frames = [draw_frame(scene, index / (num_frames - 1), height, width) for index in range(num_frames)]
        write_video(folder / f"{scene:04d}.mp4", frames)
        rows.append((f"{scene:04d}.mp4", caption))
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


if __name__ == "__main__":
    draw_clips(Path(sys.argv[1]))
