"""Draw the pictures of docs/pictures/, about which `make demo` and the documentation ask the demo model.

    python scripts/demo_pictures.py FOLDER

They show what no picture in the model's training shows: held-out combinations of a thing, its colour and its size.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from dgemma_mlx.train.score import png
from dgemma_mlx.train.tasks.look import COLOURS, SIZES, Scene, draw

SIDE = 256
MOST_BYTES = 4000
PICTURES = {"shape": ("shape", "triangle"), "dots": ("count", "5"), "digit": ("digit", "7")}


def main(folder: Path) -> None:
    """Write the pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (kind, value) in PICTURES.items():
        rng = random.Random(name)
        scenes = [Scene(kind, value, colour, size) for colour in COLOURS for size in SIZES]
        heldout = [scene for scene in scenes if scene.split == "heldout"]
        while True:  # until the background has no noise, which takes space
            scene = rng.choice(heldout)
            data = png(draw(rng, scene, SIDE, SIDE))
            if len(data) <= MOST_BYTES:
                break
        (folder / f"{name}.png").write_bytes(data)
        print(f"{name}.png: {scene}, {len(data):,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
