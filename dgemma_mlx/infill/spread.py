"""Candidates of a fill, spread over several machines that have the whole model.

Each machine encodes the text before the gaps, and denoises some of the canvases that belong together. It tells the
others when one has settled, so that all of them give up the rest after the same step as one machine would. Scores are
computed on rank 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, NamedTuple

from dgemma_mlx.diffusion.edits import Edits
from dgemma_mlx.distributed.channel import Channel, Message
from dgemma_mlx.distributed.tasks import Work
from dgemma_mlx.events import Draft
from dgemma_mlx.generation.cancellation import Cancelled
from dgemma_mlx.generation.model import Model
from dgemma_mlx.generation.options import GenerationOptions
from dgemma_mlx.generation.team import Team, inline_image, options_from, options_message
from dgemma_mlx.infill.fill import Filled, Written, prepare_fill, write_gaps
from dgemma_mlx.infill.layout import Layout, Lengths
from dgemma_mlx.infill.template import Gap, Part
from dgemma_mlx.infill.writer import Patience, Progress, Writer


class _Chunk(NamedTuple):
    """Some of the canvases that belong together.

    Attributes:
        first: The number of the first of them.
        wanted: Their lengths of the gaps.
    """

    first: int
    wanted: list[Lengths]


_Steps = list[tuple[int, list[Written]]]  # the number of each step, and the canvases as it has left them


@dataclass(frozen=True)
class Question:
    """What other machines need to know to encode a text with gaps: arguments of ``prepare_fill``."""

    text: Sequence[Part]
    prompt: str | None
    system: str | None
    raw: bool
    candidates: int
    images: Sequence[Mapping[str, Any]]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``prepare_fill``."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def as_message(self) -> Message:
        """Return the question as JSON. Raises ``DgemmaError`` when an image cannot be read, and for a video."""
        text = [part if isinstance(part, str) else asdict(part) for part in self.text]
        return {**self.arguments(), "text": text, "images": [inline_image(image) for image in self.images]}

    @classmethod
    def from_message(cls, message: Message) -> Question:
        """Return the question of ``as_message``."""
        text = [part if isinstance(part, str) else Gap(**part) for part in message["text"]]
        return cls(**{**message, "text": text})


def fill_together(
    team: Team, question: Question, options: Mapping[str, Any], seed: int | None = None,
    progress: Progress | None = None, cancelled: Callable[[], bool] | None = None,
) -> Filled:
    """Fill the gaps of a text as ``fill`` does, on all machines of a team.

    The result is the one of a single machine, except for rounding. ``options`` are arguments of ``GenerationOptions``
    for all machines. Raises what ``fill`` raises.
    """
    prepared = prepare_fill(team.model, **question.arguments())
    spread = _Spread(team, question, options)
    own = GenerationOptions(**options, cancelled=cancelled)
    return write_gaps(team.model, prepared, seed, own, progress, denoise=spread.write)


class _Spread:
    """Writes the canvases of one fill on all machines of a team."""

    def __init__(self, team: Team, question: Question, options: Mapping[str, Any]) -> None:
        """``options`` are arguments of ``GenerationOptions`` that can be sent."""
        self._pool = team.pool
        self._question, self._options = question, options_message(options)
        self._rounds = 0

    def write(self, writer: Writer, layout: Layout, wanted: list[Lengths]) -> list[Written]:
        """Denoise a canvas for each of the combinations of lengths, and return the last step of each."""
        self._rounds += 1
        number, length, patience = self._rounds, layout.length(wanted), Patience()
        canvases, steps = writer.canvases, writer.steps

        def settled(step: int) -> None:
            self._pool.say({"round": number, "settled": step})

        def do(chunk: _Chunk) -> _Steps:
            return _write(writer, layout, chunk, length, patience, settled, lambda: None)

        def pack(chunk: _Chunk) -> Message:
            return {
                "kind": "gaps", "question": self._question.as_message(), "options": self._options, "seed": writer.seed,
                "round": number, "length": length, "first": chunk.first, "wanted": chunk.wanted,
                "settled": patience.settled_at,
            }  # fmt: skip

        def unpack(chunk: _Chunk, answer: Message) -> _Steps:
            return [(step, [Written(tuple(ids), by) for ids, by in canvases]) for step, canvases in answer["steps"]]

        def hear(chunk: _Chunk, note: Message) -> None:
            patience.note(note["settled"])
            settled(note["settled"])

        found = list(self._pool.results(_chunks(wanted, self._pool.size), Work(do, pack, unpack, hear)))
        end = _last_step(found)
        writer.canvases, writer.steps = canvases + len(wanted), steps + end
        return [canvas for steps in found for canvas in [known for step, known in steps if step <= end][-1]]


def _chunks(wanted: list[Lengths], machines: int) -> list[_Chunk]:
    """Return the canvases in as many parts of nearly the same size as there are machines."""
    bounds = [len(wanted) * part // machines for part in range(machines + 1)]
    return [_Chunk(start, wanted[start:stop]) for start, stop in pairwise(bounds) if start < stop]


def _last_step(chunks: Sequence[_Steps]) -> int:
    """Return the step after which one machine would have ended."""
    patience = Patience()
    for steps in chunks:
        for number, canvases in steps:
            if any(canvas.settled_by for canvas in canvases):
                patience.note(number)
    return int(min(patience.last_step, max(steps[-1][0] for steps in chunks)))


def _write(
    writer: Writer, layout: Layout, chunk: _Chunk, length: int, patience: Patience, settled: Callable[[int], None],
    listen: Callable[[], None],
) -> _Steps:
    """Denoise some canvases (rows, ``length``), and return all steps.

    ``settled`` is told the first step in which one has settled, unless another machine was earlier; ``listen`` notes
    in ``patience`` what other machines have said, after each step.
    """
    steps: _Steps = []

    def watch(drafts: Sequence[Draft]) -> None:
        step = drafts[0].step
        steps.append((step, [Written(draft.tokens, draft.settled_by) for draft in drafts]))
        listen()
        known = patience.settled_at
        if any(draft.settled_by for draft in drafts) and (known is None or step < known):
            settled(step)

    edits = Edits(layout.pins(chunk.wanted, length), layout.barred(chunk.wanted, length, writer.vocab_size))
    writer.write(length, len(chunk.wanted), edits, watch, first=chunk.first, patience=patience)
    return steps


class GapWriter:
    """Does the tasks of ``fill_together`` on another machine, and keeps the encoded text from one to the next."""

    def __init__(self) -> None:
        self._asked = ""
        self._kept: tuple[Writer, Layout] | None = None

    def __call__(self, model: Model, task: Message, channel: Channel) -> Message:
        """Do a task."""
        number, patience = task["round"], Patience()
        if task["settled"] is not None:
            patience.note(task["settled"])

        def listen() -> None:
            while (message := channel.next_message(0, 0)) is not None:
                if message["note"]["round"] == number:
                    patience.note(message["note"]["settled"])

        def settled(step: int) -> None:
            channel.send({"note": {"settled": step}})

        chunk = _Chunk(task["first"], [tuple(lengths) for lengths in task["wanted"]])
        try:
            writer, layout = self._encoded(model, task, channel)
            return {"steps": _write(writer, layout, chunk, task["length"], patience, settled, listen)}
        except Cancelled:  # rank 0 has ended
            return {}

    def _encoded(self, model: Model, task: Message, channel: Channel) -> tuple[Writer, Layout]:
        """Return what writes after the encoded text of a task's question."""
        asked = json.dumps([task["question"], task["options"], task["seed"]])
        if self._kept is None or self._asked != asked:
            self._kept = None  # frees the memory first
            question = Question.from_message(task["question"])
            prepared = prepare_fill(model, **question.arguments())
            options = GenerationOptions(**options_from(task["options"]), cancelled=lambda: not channel.alive)
            self._asked = asked
            self._kept = Writer(model, prepared.ids, prepared.candidates, task["seed"], options), prepared.layout
        return self._kept
