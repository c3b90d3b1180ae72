"""The task "look": a question about a picture that this module draws with NumPy alone.

A picture shows one coloured shape, one to six dots of a colour, or one coloured digit, somewhere on a pale background.
Of each thing, two of the 21 pairs of colour and size are held out: training never draws the thing so.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from dgemma_mlx.train.tasks.base import Split, reword

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
_Floats = np.ndarray[Any, np.dtype[np.float32]]
_Points = list[tuple[float, float]]

TOPICS = ("colour", "shape", "count", "digit")
PATCH = 16  # side of the demo model's patches, in pixels
# Heights and widths of pictures, in patches: the sizes to which pictures of common proportions are resized.
GRIDS = ((8, 8), (8, 8), (8, 8), (8, 8), (7, 9), (9, 7), (6, 10), (10, 6), (6, 11), (11, 6))

# Each colour varies around some of its usual values.
COLOURS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((255, 0, 0), (220, 30, 30), (200, 20, 45)),
    "orange": ((255, 165, 0), (255, 140, 0), (240, 125, 25)),
    "yellow": ((255, 255, 0), (250, 225, 30), (240, 220, 60)),
    "green": ((0, 128, 0), (0, 200, 0), (50, 165, 70), (0, 255, 0)),
    "blue": ((0, 0, 255), (30, 80, 220), (0, 110, 210)),
    "purple": ((128, 0, 128), (150, 45, 200), (110, 30, 150)),
    "black": ((0, 0, 0), (25, 25, 30)),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
COUNTS = ("1", "2", "3", "4", "5", "6")
DIGITS = tuple("0123456789")
THINGS: tuple[tuple[str, str], ...] = (
    *(("shape", name) for name in SHAPES), *(("count", name) for name in COUNTS), *(("digit", name) for name in DIGITS)
)  # fmt: skip
SIZES = ("small", "middle", "large")
_HELDOUT_PAIRS = 2  # of colour and size, for each thing

_JITTER = 14  # of a colour, in each channel
_CONTRAST = 90  # least difference between a colour and its background, in one channel at least
# Radii of shapes and half heights of digits, as shares of half of the picture's shorter side; radii of dots.
_RADII = {"small": (0.28, 0.45), "middle": (0.45, 0.65), "large": (0.65, 0.88)}
_DOTS = {"small": (0.07, 0.1), "middle": (0.1, 0.14), "large": (0.14, 0.19)}

QUESTIONS: dict[str, tuple[str, ...]] = {
    "colour": (
        "What colour is it?", "What color is it?", "Which colour is it?", "What colour is this?", "What color is this?",
        "What colour do you see?", "Which color do you see?", "Tell me the colour.", "What is the colour?",
    ),
    "shape": (
        "What shape is it?", "Which shape is it?", "What shape is this?", "Which shape is this?",
        "What shape do you see?", "Tell me the shape.", "What is the shape?",
    ),
    "count": (
        "How many dots are there?", "How many dots do you see?", "How many dots?", "Count the dots.",
        "How many dots are in the picture?", "Tell me how many dots there are.",
    ),
    "digit": (
        "What digit is it?", "Which digit is it?", "What digit is this?", "Which digit is this?",
        "What digit do you see?", "What number is it?", "Which number is this?", "Read the digit.",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        kind: The kind of thing: "shape", "count" (dots) or "digit".
        value: Which one: the shape's name, the number of dots, or the digit.
        colour: Name of its colour.
        size: One of ``SIZES``.
    """

    kind: str
    value: str
    colour: str
    size: str

    @property
    def split(self) -> Split:
        """The split that the scene belongs to."""
        pair = list(COLOURS).index(self.colour) * len(SIZES) + SIZES.index(self.size)
        place = (5 * pair + 8 * THINGS.index((self.kind, self.value))) % (len(COLOURS) * len(SIZES))
        return "heldout" if place < _HELDOUT_PAIRS else "train"

    def answer(self, topic: str) -> str:
        """Return the answer to a question about the colour or about the kind of thing that is shown."""
        if topic == "colour":
            return f"It is {self.colour}."
        return f"It is a {self.value}." if topic == "shape" else f"It is {self.value}."


@dataclass(frozen=True)
class Look:
    """A question about a picture.

    Attributes:
        scene: What the picture shows.
        topic: What the question asks for.
        pixels: The picture, (height, width, 3) uint8, RGB.
        question: The question.
        answer: Its only correct answer.
    """

    scene: Scene
    topic: str
    pixels: Pixels
    question: str
    answer: str


def draw_scene(rng: random.Random, split: Split, kind: str | None = None) -> Scene:
    """Draw what a picture of a split shows; of the given ``kind``, unless it is None."""
    while True:
        chosen = kind or rng.choice(("shape", "count", "digit"))
        value = rng.choice({"shape": SHAPES, "count": COUNTS, "digit": DIGITS}[chosen])
        scene = Scene(chosen, value, rng.choice(list(COLOURS)), rng.choice(SIZES))
        if scene.split == split:
            return scene


def ask(rng: random.Random, scene: Scene, topic: str) -> tuple[str, str]:
    """Return a question on a topic about a scene, in one of its wordings, and the answer."""
    return reword(rng, rng.choice(QUESTIONS[topic])), scene.answer(topic)


def look(rng: random.Random, split: Split, topic: str, grid: tuple[int, int] = (8, 8)) -> Look:
    """Draw a question on a topic about a picture of a split. ``grid`` is the picture's height and width in patches."""
    kind = topic if topic != "colour" else None
    scene = draw_scene(rng, split, kind)
    question, answer = ask(rng, scene, topic)
    return Look(scene, topic, draw(rng, scene, grid[0] * PATCH, grid[1] * PATCH), question, answer)


def draw(rng: random.Random, scene: Scene, height: int = 8 * PATCH, width: int = 8 * PATCH) -> Pixels:
    """Draw a scene, (height, width, 3) uint8, at a random place, with the colour and the background varied."""
    colour, paper = _colours(rng, scene.colour)
    numbers = np.random.default_rng(rng.getrandbits(64))
    image = np.empty((height, width, 3), np.float32)
    image[:] = paper
    half = min(height, width) / 2
    if rng.random() < 0.3:  # light from a side
        slope = np.linspace(-1, 1, width, dtype=np.float32)[None, :] * rng.uniform(-12, 12)
        slope = slope + np.linspace(-1, 1, height, dtype=np.float32)[:, None] * rng.uniform(-12, 12)
        image += slope[..., None]
    soft = rng.uniform(1, 2.2)
    for rows, columns, distance in _distances(rng, scene, height, width, half):
        covered = np.clip(0.5 - distance / soft, 0, 1)[..., None]
        part = image[rows, columns]
        part += covered * (colour - part)
    if rng.random() < 0.5:
        image += numbers.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(1, 8))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _colours(rng: random.Random, name: str) -> tuple[_Floats, _Floats]:
    """Return a colour and one for the background, (3,) float32 each."""
    anchor = rng.choice(COLOURS[name])
    jitter = 0 if rng.random() < 0.2 else _JITTER
    colour = [min(255, max(0, value + rng.randint(-jitter, jitter))) for value in anchor]
    while True:
        least = rng.choice((255, 255, 225, 225, 180))
        level = rng.randint(least, 255)
        spread = 0 if least == 255 else 20
        paper = [min(255, max(0, level + rng.randint(-spread, spread))) for _ in range(3)]
        if max(abs(a - b) for a, b in zip(colour, paper, strict=True)) >= _CONTRAST:
            return np.array(colour, np.float32), np.array(paper, np.float32)


_Region = tuple[slice, slice, _Floats]  # rows, columns, and there the distance from the drawn area, negative inside


def _distances(rng: random.Random, scene: Scene, height: int, width: int, half: float) -> list[_Region]:
    """Return the regions of a picture in which something is drawn. ``half`` is half of its shorter side."""
    if scene.kind == "count":
        return [_shape("circle", x, y, r, 0.0, rng) for x, y, r in _dots(rng, scene, height, width, half)]
    low, high = _RADII[scene.size]
    radius = half * rng.uniform(low, high)
    margin = radius + 2
    x, y = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
    if scene.kind == "digit":
        return [_strokes(rng, scene.value, x, y, radius)]
    turn = rng.uniform(-0.25, 0.25)
    if scene.value == "cross" and rng.random() < 0.35:
        turn += math.pi / 4
    return [_shape(scene.value, x, y, radius, turn, rng)]


def _dots(rng: random.Random, scene: Scene, height: int, width: int, half: float) -> list[tuple[float, float, float]]:
    """Return centres and radii of dots that do not touch."""
    low, high = _DOTS[scene.size]
    while True:
        radius = half * rng.uniform(low, high)
        found: list[tuple[float, float, float]] = []
        for _ in range(60):
            r = radius * rng.uniform(0.9, 1.1)
            x, y = rng.uniform(r + 2, width - r - 2), rng.uniform(r + 2, height - r - 2)
            if all(math.hypot(x - a, y - b) > r + c + 4 for a, b, c in found):
                found.append((x, y, r))
            if len(found) == int(scene.value):
                return found


def _plane(x: float, y: float, reach: float) -> tuple[slice, slice, _Floats, _Floats]:
    """Return the rows and columns within ``reach`` of a point, and the coordinates there from the point."""
    top, left = max(0, int(y - reach)), max(0, int(x - reach))
    rows, columns = slice(top, int(y + reach) + 2), slice(left, int(x + reach) + 2)
    # The picture ends before these slices do, at most by the margin that all things keep from it.
    v = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + np.float32(0.5 - y)
    u = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] + np.float32(0.5 - x)
    return rows, columns, u, v


def _shape(name: str, x: float, y: float, radius: float, turn: float, rng: random.Random) -> _Region:
    """Return the region of a shape around (x, y)."""
    rows, columns, u, v = _plane(x, y, radius + 1)
    if name == "circle":
        return rows, columns, np.hypot(u, v) - np.float32(radius)
    c, s = np.float32(math.cos(turn) / radius), np.float32(math.sin(turn) / radius)
    a, b = c * u + s * v, c * v - s * u  # in units of the radius, turned
    if name == "square":
        distance = np.maximum(np.abs(a), np.abs(b)) - 0.78
    elif name == "cross":
        thin = rng.uniform(0.2, 0.34)
        a, b = np.abs(a), np.abs(b)
        distance = np.minimum(np.maximum(a - thin, b - 0.97), np.maximum(a - 0.97, b - thin))
    elif name == "triangle":
        sides = [math.radians(angle) for angle in (90, 210, 330)]  # directions of the sides' normals
        distance = np.max([a * math.cos(t) + b * math.sin(t) for t in sides], axis=0) - 0.5
    else:  # a star of five points: in each fifth, a line from the outer to the inner corner
        inner = rng.uniform(0.38, 0.5)
        fifth = 2 * math.pi / 5
        angle = np.abs((np.arctan2(b, a) + math.pi / 2 + fifth / 2) % fifth - fifth / 2)
        r = np.hypot(a, b)
        dx, dy = inner * math.cos(fifth / 2) - 1, inner * math.sin(fifth / 2)
        norm = math.hypot(dx, dy)
        distance = ((r * np.cos(angle) - 1) * dy - r * np.sin(angle) * dx) / norm
    return rows, columns, (distance * radius).astype(np.float32)


def _arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> _Points:
    """Return points on an arc around (x, y), from one angle to another, in degrees clockwise from the right."""
    count = max(4, int(abs(end - start) / 30) + 1)
    angles = [math.radians(start + (end - start) * i / (count - 1)) for i in range(count)]
    return [(x + rx * math.cos(t), y + ry * math.sin(t)) for t in angles]


# Digits as strokes in a box of width and height 1; some in several ways.
_STROKES: dict[str, tuple[tuple[_Points, ...], ...]] = {
    "0": ((_arc(0.5, 0.5, 0.5, 0.5, 0, 360),),),
    "1": (
        ([(0.2, 0.25), (0.6, 0), (0.6, 1)],), ([(0.5, 0), (0.5, 1)],),
        ([(0.2, 0.25), (0.55, 0), (0.55, 1)], [(0.15, 1), (0.95, 1)]),
    ),
    "2": (
        ([*_arc(0.5, 0.28, 0.47, 0.28, -170, 40), (0.03, 1), (1, 1)],),
        ([*_arc(0.48, 0.25, 0.45, 0.25, -170, 60), (0.0, 1), (1, 1)],),
    ),
    "3": (
        ([*_arc(0.45, 0.25, 0.45, 0.25, -160, 90)], [*_arc(0.45, 0.74, 0.53, 0.26, -90, 160)]),
        ([(0.05, 0), (0.9, 0), (0.4, 0.42)], [*_arc(0.42, 0.71, 0.53, 0.29, -95, 155)]),
    ),
    "4": (
        ([(0.75, 1), (0.75, 0), (0, 0.68), (1, 0.68)],), ([(0.2, 0), (0.05, 0.6), (1, 0.6)], [(0.75, 0.3), (0.75, 1)]),
    ),
    "5": (([(0.92, 0), (0.17, 0), (0.1, 0.45)], [(0.1, 0.45), *_arc(0.45, 0.68, 0.53, 0.32, -120, 150)]),),
    "6": (([(0.78, 0), (0.4, 0.2), (0.12, 0.48), (0.03, 0.7)], _arc(0.5, 0.7, 0.47, 0.3, 0, 360)),),
    "7": (([(0, 0), (1, 0), (0.35, 1)],), ([(0, 0), (1, 0), (0.35, 1)], [(0.3, 0.5), (0.88, 0.5)])),
    "8": ((_arc(0.5, 0.24, 0.41, 0.24, 0, 360), _arc(0.5, 0.74, 0.5, 0.26, 0, 360)),),
    "9": (([(0.97, 0.3), (0.9, 0.6), (0.65, 0.85), (0.3, 1)], _arc(0.5, 0.3, 0.47, 0.3, 0, 360)),),
}  # fmt: skip
# The same digits on a display of seven segments: top, upper left, upper right, middle, lower left, lower right, bottom.
_SEGMENTS: tuple[_Points, ...] = (
    [(0, 0), (1, 0)], [(0, 0), (0, 0.5)], [(1, 0), (1, 0.5)], [(0, 0.5), (1, 0.5)],
    [(0, 0.5), (0, 1)], [(1, 0.5), (1, 1)], [(0, 1), (1, 1)],
)  # fmt: skip
_LIT = ("1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010", "1111111", "1111011")


def _strokes(rng: random.Random, digit: str, x: float, y: float, half: float) -> _Region:
    """Return the region of a digit around (x, y). ``half`` is half of its height."""
    if rng.random() < 0.25:
        lines: tuple[_Points, ...] = tuple(
            line for line, lit in zip(_SEGMENTS, _LIT[int(digit)], strict=True) if lit == "1"
        )
        shake = 0.0
    else:
        lines, shake = rng.choice(_STROKES[digit]), 0.025
    thick = half * rng.uniform(0.09, 0.22)
    tall, slant, turn = half - thick, rng.uniform(-0.12, 0.22), rng.uniform(-0.12, 0.12)
    wide = tall * rng.uniform(0.5, 0.72)

    def placed(point: tuple[float, float]) -> tuple[float, float]:
        b = (2 * (point[1] + rng.uniform(-shake, shake)) - 1) * tall
        a = (2 * (point[0] + rng.uniform(-shake, shake)) - 1) * wide - slant * b
        return a * math.cos(turn) - b * math.sin(turn), a * math.sin(turn) + b * math.cos(turn)

    rows, columns, u, v = _plane(x, y, half + 1)
    nearest = np.full((v.shape[0], u.shape[1]), 1e9, np.float32)
    for line in lines:
        points = [placed(point) for point in line]
        for (ax, ay), (bx, by) in pairwise(points):
            dx, dy = np.float32(bx - ax), np.float32(by - ay)
            length = max(dx * dx + dy * dy, np.float32(1e-6))
            a, b = u - np.float32(ax), v - np.float32(ay)
            along = np.clip((a * dx + b * dy) / length, 0, 1)
            np.minimum(nearest, (a - along * dx) ** 2 + (b - along * dy) ** 2, out=nearest)
    return rows, columns, np.sqrt(nearest) - np.float32(thick)
