"""Several machines, each with the whole model, that answer independent requests together.

A team of one machine answers alone, so that commands have one way for both.
"""

from __future__ import annotations

import base64
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dgemma_mlx.checkpoint.config import GenerationConfig, ModelConfig
from dgemma_mlx.checkpoint.hub import resolve
from dgemma_mlx.checks import reason
from dgemma_mlx.constrain.constraint import Constraint
from dgemma_mlx.distributed.channel import Channel, MachineLostError, Message
from dgemma_mlx.distributed.tasks import Pool, Work, do_tasks
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Committed, Done, Draft, Statistics
from dgemma_mlx.generation.api import generate_batch
from dgemma_mlx.generation.identity import fingerprint, require_same
from dgemma_mlx.generation.load import LoadOptions, load_as
from dgemma_mlx.generation.model import Model
from dgemma_mlx.generation.wired import wired_memory
from dgemma_mlx.kernels.dispatch import mode, set_mode
from dgemma_mlx.text.images import is_image
from dgemma_mlx.text.parts import ToolCall

# A "prompt", and what differs from the options that are common to all: "seed", "max_tokens", "system", "tools",
# "tool_choice" and "images".
Request = Mapping[str, Any]

# Does a task of a kind on a model; the function says whether nobody waits for it any more.
Kind = Callable[[Model, Message, Channel], Message]

_EACH = {"seeds": "seed", "max_tokens": "max_tokens", "system": "system", "tools": "tools",
         "tool_choice": "tool_choice", "images": "images"}  # fmt: skip
_VIDEO = "Its frames are read on this machine."


def invite(channel: Channel, options: LoadOptions, work: str = "whole", **more: Any) -> None:
    """Let the other machines load the whole model for some work. Rank 0 then loads it too, at the same time.

    The work "whole" is that of ``attend``, and ``more`` is what others must know.

    From here on a machine that is lost is left out. Raises ``DgemmaError`` when a machine cannot find the model, and
    ends all machines when one has another checkpoint, configuration or adapter.
    """
    channel.tell({"work": work, "options": options.as_message(), "kernels": mode(), **more})
    own = _fingerprint(options)
    for rank, peer in channel.peers.items():
        require_same(channel, peer, channel.receive(rank)["fingerprint"], own)
    channel.tell({"load": True})


def attend(channel: Channel, message: Message, kinds: Mapping[str, Kind]) -> Message:
    """Load the whole model on another machine and do tasks, until rank 0 asks for other work, which is returned.

    ``message`` is the one of ``invite``. Raises ``DgemmaError`` when the model cannot be loaded, and
    ``MachineLostError`` when rank 0 has ended.
    """
    model = accept(channel, message)()
    with wired_memory():
        return do_tasks(channel, lambda task: kinds[task["kind"]](model, task, channel))


def accept(channel: Channel, message: Message) -> Callable[[], Model]:
    """Agree with rank 0 on the model, on another machine, and return a function that loads it.

    ``message`` is the one of ``invite``. Raises ``DgemmaError`` when there is no such model.
    """
    options = LoadOptions.from_message(message["options"])
    set_mode(message["kernels"])
    channel.send({"fingerprint": _fingerprint(options)})
    channel.receive()
    return lambda: load_as(options)


def _fingerprint(options: LoadOptions) -> str:
    folder = resolve(options.model).folder
    return fingerprint(folder, ModelConfig.load(folder), options.adapter)


class Team:
    """The machines that have the same model: this one, and those that ``invite`` has asked.

    Attributes:
        model: The model on this machine.
        pool: What hands out the work.
    """

    def __init__(
        self, model: Model, channel: Channel | None = None, lost: Callable[[MachineLostError], None] = lambda _: None
    ) -> None:
        """``lost`` is told, on any thread, of a machine that is lost."""
        self.model, self.pool = model, Pool(channel, lost)

    def answers(
        self, groups: Sequence[Sequence[Request]], options: Mapping[str, Any]
    ) -> Iterator[list[Done | DgemmaError]]:
        """Answer groups of requests, and yield the answers of each group in order.

        The requests of a group are answered together, on one machine. A request without a seed gets one here, so that
        its answer does not depend on the machine. Where a request fails, its error is in the place of the answer.
        ``options`` are arguments of ``generate_batch`` for all requests.
        """
        common = options_message(options)
        seeded = [[_with_seed(request, options) for request in group] for group in groups]

        def do(group: Sequence[Request]) -> list[Done | DgemmaError]:
            return answer_together(self.model, group, options)

        def pack(group: Sequence[Request]) -> Message:
            return {"kind": "answer", "options": common, "requests": [request_message(request) for request in group]}

        def unpack(group: Sequence[Request], message: Message) -> list[Done | DgemmaError]:
            # What fails there is tried here: there may be more memory, and an error can name the file of an image.
            return [
                do([request])[0] if result is None else done_from(result)
                for request, result in zip(group, message["results"], strict=True)
            ]

        return self.pool.results(seeded, Work(do, pack, unpack))


def answer_task(model: Model, task: Message, channel: Channel) -> Message:
    """Do a task of ``Team.answers`` on another machine."""
    options = options_from(task["options"]) | {"cancelled": lambda: not channel.alive}
    results = answer_together(model, task["requests"], options)
    return {"results": [asdict(result) if isinstance(result, Done) else None for result in results]}


def answer_together(
    model: Model, requests: Sequence[Request], options: Mapping[str, Any]
) -> list[Done | DgemmaError]:
    """Answer the requests together. When that fails, answer each half by itself.

    So only the faulty requests fail, and a batch that exceeds the memory limit is answered in parts that fit. A failure
    costs little, because ``generate_batch`` checks everything before it begins.
    """
    common = {name: value for name, value in options.items() if name not in _EACH.values()}
    merged = [{**dict.fromkeys(_EACH.values()), **options, **request} for request in requests]
    own: dict[str, Any] = {name: [request[key] for request in merged] for name, key in _EACH.items()}
    try:
        return [*generate_batch(model, [request["prompt"] for request in merged], **own, **common)]
    except DgemmaError as error:
        if len(requests) == 1:
            return [error]
        half = len(requests) // 2
        return [
            *answer_together(model, requests[:half], options), *answer_together(model, requests[half:], options)
        ]  # fmt: skip


def _with_seed(request: Request, options: Mapping[str, Any]) -> Request:
    """Return a request with a seed: its own, that of the options, or a new one."""
    seed = request.get("seed", options.get("seed"))
    return {**request, "seed": secrets.randbits(32) if seed is None else seed}


def request_message(request: Request) -> Message:
    """Return a request as JSON, with the bytes of the images that it names.

    Raises ``DgemmaError`` when an image cannot be read, and for a video.
    """
    prompt = request["prompt"]
    if not isinstance(prompt, str):
        prompt = [
            {**message, "content": [inline_image(part) for part in message["content"]]}
            if isinstance(message.get("content"), list) and message.get("role") != "tool" else message
            for message in prompt
        ]  # fmt: skip
    images = {} if request.get("images") is None else {"images": [inline_image(part) for part in request["images"]]}
    return {**request, "prompt": prompt, **images}


def inline_image(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a part of a message's content, with the bytes of an image as text.

    Raises ``DgemmaError`` when its file cannot be read, and for a video.
    """
    if not is_image(part) or "base64" in part:
        return part
    if part["type"] == "video":
        raise DgemmaError("a video is not sent to other machines", _VIDEO)
    rest = {name: value for name, value in part.items() if name not in ("path", "bytes")}
    try:
        data = part["bytes"] if "bytes" in part else Path(part["path"]).read_bytes()
    except OSError as error:
        raise DgemmaError(f"cannot read {part['path']}: {reason(error)}", "Name a picture that can be read.") from None
    return {**rest, "base64": base64.b64encode(data).decode()}


def options_message(options: Mapping[str, Any]) -> Message:
    """Return arguments of ``generate_batch`` as JSON."""
    found = dict(options)
    if isinstance(found.get("generation"), GenerationConfig):
        found["generation"] = asdict(found["generation"])
    if isinstance(found.get("constraint"), Constraint):
        found["constraint"] = found["constraint"].source
    return found


def options_from(message: Message) -> dict[str, Any]:
    """Return the arguments of ``options_message``."""
    found = dict(message)
    if (config := found.get("generation")) is not None:
        found["generation"] = GenerationConfig(**{**config, "eos_token_ids": tuple(config["eos_token_ids"])})
    if (source := found.get("constraint")) is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rank 0 has said it
            found["constraint"] = Constraint.from_source(*source)
    return found


def draft_from(message: Message) -> Draft:
    """Return a ``Draft`` that was a dict of its fields, and then JSON."""
    return Draft(**message | {name: tuple(message[name]) for name in ("tokens", "accepted_mask", "entropy")})


def committed_from(message: Message) -> Committed:
    """Return a ``Committed`` that was a dict of its fields, and then JSON."""
    calls = tuple(ToolCall(**call) for call in message["tool_calls"])
    lists = {name: tuple(message[name]) for name in ("tokens", "doubted")}
    return Committed(**message | lists | {"tool_calls": calls})


def done_from(message: Message) -> Done:
    """Return a ``Done`` that was a dict of its fields, and then JSON."""
    calls = tuple(ToolCall(**call) for call in message["tool_calls"])
    statistics = Statistics(**message["statistics"])
    return Done(**{**message, "tool_calls": calls, "tokens": tuple(message["tokens"]), "statistics": statistics})
