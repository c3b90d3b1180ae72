"""``generate --batch``: answer many prompts with one loaded model. Input and output have one JSON value per line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma_mlx.checks import LARGEST_SEED, is_text, is_whole, shown
from dgemma_mlx.cli.image_options import check_file
from dgemma_mlx.cli.images import kept_image
from dgemma_mlx.cli.log.keep import Keeper
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.cli.settings import fits
from dgemma_mlx.cli.tools import check_choice
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import parse_json

if TYPE_CHECKING:
    from dgemma_mlx.generation.team import Team

_HINT = 'A line is a JSON string, or an object like {"prompt": "...", "images": ["cat.png"], "id": "a", "seed": 1}.'
NO_ANSWER = "the model gave no answer"


def _check_prompt(value: Any) -> bool:
    """Return whether the value is a text that is not blank, or a list of messages. Raises as ``conversation`` does."""
    if isinstance(value, list) and value:
        from dgemma_mlx.text.messages import conversation

        conversation(value)
        return True
    return is_text(value) and bool(value.strip())


def _check_tools(value: Any) -> bool:
    """Return whether the value is a list of tools. Raises as ``declarations`` does."""
    from dgemma_mlx.text.tools import declarations

    return value is not None and declarations(value) is not None


def _check_images(value: Any) -> bool:
    """Return whether the value is a list of paths. Raises as ``check_file`` does."""
    if not isinstance(value, list) or not all(is_text(item) and item for item in value):
        return False
    for item in value:
        check_file(Path(item), "images")
    return True


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "prompt": _check_prompt,
    "images": _check_images,
    "id": lambda value: is_text(value) or is_whole(value),
    "system": partial(fits, "system"),
    "seed": partial(fits, "seed"),
    "max_tokens": lambda value: fits("max_tokens", value) and value <= LARGEST_SEED,
    "tools": _check_tools,
    "tool_choice": lambda value: is_text(value) or isinstance(value, dict),
}


def read_batch(
    path: Path, tools: Any = None, tool_choice: str | None = None, budget: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """Read and check all lines of a batch file. Blank lines are skipped.

    ``tools`` and ``tool_choice`` are for the lines that have none of their own. ``budget`` is what is added to every
    image, which then is a part of a message's content. Raises `DgemmaError` that names the first bad line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DgemmaError(f"cannot read {path}: {error.strerror}", "--batch names the file of the prompts.") from None
    except UnicodeDecodeError as error:
        raise DgemmaError(f"{path} is not UTF-8 text (byte {error.start})", _HINT, exit_code=2) from None
    requests = [
        _request(line, f"{path}, line {number}", {"tools": tools, "tool_choice": tool_choice})
        for number, line in enumerate(lines, 1) if line.strip()
    ]  # fmt: skip
    for request in requests:
        if "images" in request:
            request["images"] = [{"type": "image", "path": name, **(budget or {})} for name in request["images"]]
    if not requests:
        raise DgemmaError(f"{path} holds no prompt", _HINT, exit_code=2)
    return requests


def _request(line: str, place: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the request of one line. ``place`` says in error messages which line it is.

    ``defaults`` are the tools and the tool_choice for a line without its own.
    """
    try:
        value = parse_json(line)
    except ValueError as error:
        raise DgemmaError(f"{place} is not JSON: {error}", _HINT, exit_code=2) from None
    request = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(request, dict) or "prompt" not in request:
        raise DgemmaError(f"{place} has no prompt", _HINT, exit_code=2)
    for name, item in request.items():
        if name not in _CHECKS:
            raise DgemmaError(f"{place}: unknown key {shown(name)}", _HINT, exit_code=2)
        try:
            is_right = _CHECKS[name](item)
        except DgemmaError as error:
            raise DgemmaError(f"{place}: {error.message}", error.hint, exit_code=2) from None
        if not is_right:
            raise DgemmaError(f"{place}: {name} cannot be {json.dumps(item)[:80]}", _HINT, exit_code=2)
    offered = {**defaults, **request}
    try:
        check_choice(offered["tools"], offered["tool_choice"])
    except DgemmaError as error:
        raise DgemmaError(f"{place}: {error.message}", error.hint, exit_code=2) from None
    return request


def answer_batch(
    team: Team, requests: Sequence[Mapping[str, Any]], options: Mapping[str, Any], size: int, keeper: Keeper
) -> None:
    """Answer the requests, ``size`` at a time on each machine, and print one JSON object for each, in order.

    An object has ``index`` (from 0), the request's ``id`` if there is one, and the answer. A request that fails gets an
    object with ``error``, and the others are answered all the same. A line on stderr says how many answers were cut
    off. ``keeper`` keeps the answers. Raises `DgemmaError` at the end when any failed.
    """
    from dgemma_mlx.cli.render.visible import json_line
    from dgemma_mlx.events import Done

    failed = cut = 0
    model = team.model
    groups = [requests[first : first + size] for first in range(0, len(requests), size)]
    for place, (group, results) in enumerate(zip(groups, team.answers(groups, options), strict=True)):
        for number, (request, result) in enumerate(zip(group, results, strict=True), place * size):
            record: dict[str, Any] = {"index": number, **({"id": request["id"]} if "id" in request else {})}
            if isinstance(result, DgemmaError):
                record["error"] = result.message
                failed += 1
            else:
                if result.is_blank and options["constraint"] is None:
                    record["error"] = NO_ANSWER
                    failed += 1
                record |= {"model": model.name, **asdict(result)}
                cut += result.finish_reason == "length" and not result.is_blank
            print(json_line(record), flush=True)
            if "error" not in record and isinstance(result, Done):
                messages = _messages(request["prompt"], request.get("images"))
                session = Session(messages, request.get("system", options["system"]))
                keeper.keep_answer(session, "batch", result, model.name)
    if cut:
        print(f"dgemma-mlx: {cut} of {len(requests)} answers were cut off, by -n, by the model's limit or by padding",
              file=sys.stderr)  # fmt: skip
    if failed:
        message = f"{failed} of {len(requests)} prompts could not be answered"
        raise DgemmaError(message, 'Their lines have the key "error".')


def _messages(
    prompt: str | list[dict[str, Any]], images: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Return the messages of a request's prompt as the log keeps them."""
    from dgemma_mlx.text.images import is_image, with_images

    def kept(message: Mapping[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if message["role"] == "tool" or not isinstance(content, list):
            return dict(message)
        text = "".join(part["text"] for part in content if not is_image(part))
        shown_images = [kept_image(part) for part in content if is_image(part)]
        return {**message, "content": text, **({"images": shown_images} if shown_images else {})}

    return [kept(message) for message in with_images(prompt, images)]
