"""The options that show images and videos to the model."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from dgemma_mlx.checkpoint.vision_config import BUDGETS, VisionConfig
from dgemma_mlx.cli.images import image_size
from dgemma_mlx.cli.parameters import prompt_option
from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.cli.stdin import read_stdin_bytes
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import size

_STDIN = Path("-")
_URL = re.compile(r"(https?|ftp|file|data):", re.IGNORECASE)
_CHOICES = ", ".join(map(str, BUDGETS))

Images = Annotated[
    list[Path] | None,
    prompt_option("--image", metavar="FILE",
                  help="Show the model this picture; `-` is standard input. May be given several times."),
]  # fmt: skip
ImageBudget = Annotated[
    int | None,
    prompt_option("--image-budget", metavar="TOKENS", show_default="the checkpoint's, 280 as published",
                  help=f"Tokens that a picture becomes, about: {_CHOICES}. More tokens show smaller details."),
]  # fmt: skip
Videos = Annotated[
    list[Path] | None,
    prompt_option("--video", metavar="FILE",
                  help="Show the model up to 32 frames of this video. May be given several times."),
]  # fmt: skip


@dataclass(frozen=True)
class ImageOptions:
    """The options about the images in the prompt."""

    image: Images = None
    image_budget: ImageBudget = None

    @property
    def takes_stdin(self) -> bool:
        """Whether standard input is one of the images."""
        return _STDIN in (self.image or ())

    @property
    def budget(self) -> dict[str, int]:
        """What the option adds to an image of a message: its budget, or nothing."""
        return {} if self.image_budget is None else {"budget": self.image_budget}

    def check(self, *, prompt_on_stdin: bool, raw: bool = False, batch: bool = False) -> None:
        """Raise `DgemmaError` (exit code 2) for options that exclude each other, and for an unknown budget.

        Args:
            prompt_on_stdin: Whether standard input is the prompt, the text or a file.
            raw: Whether the prompt has no chat template.
            batch: Whether the prompts are in a file, with their own images.
        """
        check_budget(self.image_budget)
        if self.image_budget is not None and not self.image and not batch:
            raise DgemmaError("--image-budget needs --image", "It is the size of a picture in tokens.", exit_code=2)
        if raw and self.files:
            hint = "Images have their place in the chat template; leave out --raw."
            raise DgemmaError(f"--raw cannot be combined with {self._given}", hint, exit_code=2)
        if batch and self.files:
            hint = 'A line of the file may have "images": ["cat.png"].'
            raise DgemmaError(f"--batch cannot be combined with {self._given}", hint, exit_code=2)
        if (self.image or []).count(_STDIN) > 1:
            raise DgemmaError("--image - can be given once", "Name the other images as files.", exit_code=2)
        if self.takes_stdin and prompt_on_stdin:
            hint = "Give the text as an argument or as a file, or name the image as a file."
            raise DgemmaError("standard input cannot be the image and the text at once", hint, exit_code=2)

    @property
    def files(self) -> list[Path]:
        """The files of the options, in the order in which the model sees them."""
        return list(self.image or ())

    @property
    def _given(self) -> str:
        return "--image" if self.image else "--video"

    def read(self) -> list[Mapping[str, Any]]:
        """Return the images as parts of a message's content.

        Raises `DgemmaError` (exit code 2) for a URL, for what is not a picture that can be read, and when the library
        that reads it is missing.
        """
        return [self._part(path) for path in self.image or ()]

    def _part(self, path: Path) -> Mapping[str, Any]:
        from dgemma_mlx.vision.pixels import read_picture

        if path == _STDIN:
            data = read_stdin_bytes("--image -")
            read_picture(data, VisionConfig(), BUDGETS[0], "standard input")
            return {"type": "image", "bytes": data, **self.budget}
        check_file(path, "--image")
        read_picture(path, VisionConfig(), BUDGETS[0], str(path))  # before a model is loaded, which may take long
        return {"type": "image", "path": str(path), **self.budget}


@dataclass(frozen=True)
class MediaOptions(ImageOptions):
    """The options about the images and videos in the prompt."""

    video: Videos = None

    @property
    def files(self) -> list[Path]:
        """The files of the options, in the order in which the model sees them."""
        return [*(self.image or ()), *(self.video or ())]

    def read(self) -> list[Mapping[str, Any]]:
        """Return the images, then the videos, as parts of a message's content. Raises as ``ImageOptions.read``."""
        if self.video:
            from dgemma_mlx.vision.video import require_pyav

            require_pyav()
        found = super().read()
        for path in self.video or ():
            if path == _STDIN:
                raise DgemmaError("--video cannot read standard input", "Name a file.", exit_code=2)
            check_file(path, "--video")
            found.append({"type": "video", "path": str(path)})
        return found


def check_budget(budget: int | None) -> None:
    """Raise `DgemmaError` (exit code 2) for a value of ``--image-budget`` that is not one of ``BUDGETS``."""
    if budget not in (None, *BUDGETS):
        raise DgemmaError(f"--image-budget cannot be {budget}", f"It is one of {_CHOICES}.", exit_code=2)


def check_file(path: Path, what: str) -> None:
    """Raise `DgemmaError` (exit code 2) for a URL, and for what is not a file that can be read.

    ``what`` begins the message and says where the path comes from.
    """
    if _URL.match(str(path)) and not os.path.exists(path):
        address = str(path).replace(":/", "://", 1)  # as it was, before it became a path
        hint = "Download it first, for example with curl -O URL."
        raise DgemmaError(f"{what}: {address} is an address, not a file", hint, exit_code=2)
    from dgemma_mlx.vision.pixels import regular_file

    with regular_file(path, f"{what}: {path}", "Name a file that can be read."):
        pass


def show_images(images: Iterable[Mapping[str, Any]], *, draw: bool = True) -> None:
    """Print the name and the size of each image to stderr if it is a terminal, and a thumbnail where one can be drawn.

    With ``draw`` off there are no thumbnails.
    """
    if not sys.stderr.isatty():
        return
    from dgemma_mlx.cli.render.thumbnail import thumbnail

    for image in images:
        name = image.get("path", "standard input")
        length = size(len(image["bytes"]) if "bytes" in image else os.stat(name).st_size)
        if image["type"] == "image":
            data = image["bytes"] if "bytes" in image else Path(name).read_bytes()
            if draw:
                sys.stderr.write(thumbnail(data, sys.stderr))
            if (shape := image_size(data)) is not None:
                length = f"{shape[0]}x{shape[1]}"
        print(f"{visible(name)}  {length}", file=sys.stderr)
