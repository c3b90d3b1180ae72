"""What each way of answering cost on each question: the records of ``answers.py`` and ``sampler_peers.py``.

The unit of work is a canvas position that passes through the layers once. Decoder passes are the denoising steps.
Encoder passes are those over canvases: to commit a canvas before the next one, and to verify or repair it. The prompt's
prefill is the same for all ways and is left out. Times are not recorded, because the counts do not depend on a machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Question:
    """A conversation that waits for an answer.

    Attributes:
        task: Name of the task, such as a key of ``dgemma_mlx.train.tasks.TASKS``.
        number: Index among the questions of the task. It is also the seed of the answer.
        messages: The conversation.
        is_right: Return whether a text is a right answer.
    """

    task: str
    number: int
    messages: list[Any]
    is_right: Callable[[str], bool]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What an answer cost.

    Attributes:
        canvases: Number of canvases.
        decoder_passes: Number of decoder passes over a canvas.
        decoder_positions: Number of positions of these passes.
        encoder_passes: Number of encoder passes over a canvas.
        encoder_positions: Number of positions of these passes.
        low_confidence: Number of canvases that were committed while still uncertain, for programs that say so.
        doubted: Number of tokens that the encoder doubts, for programs that ask it.
    """

    canvases: int
    decoder_passes: int
    decoder_positions: int
    encoder_passes: int
    encoder_positions: int
    low_confidence: int = 0
    doubted: int = 0


@dataclass(frozen=True, kw_only=True)
class Cost(Counts):
    """An answer and what it cost.

    Attributes:
        text: The answer.
    """

    text: str


@dataclass(frozen=True, kw_only=True)
class Record(Counts):
    """One way's answer to one question, as ``--output`` keeps it.

    Attributes:
        way: The way of answering, such as a speed mode.
        task: Name of the task.
        number: Index of the question in its task.
        right: Whether the answer is right.
    """

    way: str
    task: str
    number: int
    right: bool

    @property
    def work(self) -> int:
        """Positions that passed through the layers, of decoder and encoder together."""
        return self.decoder_positions + self.encoder_positions


Answerer = Callable[[Question], Cost]  # the seed of an answer is the number of its question


def ask(way: str, answerer: Answerer, asked: Sequence[Question]) -> list[Record]:
    """Answer all questions in one way, and check the answers. Say on stderr how long it took."""
    records, began = [], time.monotonic()
    for question in asked:
        counts = asdict(answerer(question))
        right = question.is_right(counts.pop("text"))
        records.append(Record(way=way, task=question.task, number=question.number, right=right, **counts))
    print(f"{way}: {len(asked)} answers, {time.monotonic() - began:.0f} s", file=sys.stderr)
    return records


def share(asked: Sequence[Question], index: int, of: int) -> list[Question]:
    """Return the questions that process ``index`` of ``of`` answers: an equal part of every task."""
    return [question for question in asked if question.number % of == index]


def in_processes(script: str, arguments: Sequence[str], processes: int) -> list[Record]:
    """Run a script with ``--share INDEX/PROCESSES`` in several processes, and return the records that they print.

    Raises ``CalledProcessError`` when a process fails.
    """
    started = [
        subprocess.Popen(
            [sys.executable, script, *arguments, "--share", f"{index}/{processes}"], stdout=subprocess.PIPE, text=True
        )
        for index in range(processes)
    ]
    printed = [process.communicate()[0] for process in started]
    for process in started:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
    return [record for text in printed for record in parse(json.loads(text))]


def parse(found: list[dict[str, Any]]) -> list[Record]:
    """Return the records of their JSON form."""
    return [Record(**record) for record in found]


def read(path: Path) -> list[Record]:
    """Return the records of a file that ``write`` has written."""
    return parse(json.loads(path.read_text())["records"])


def write(path: Path, records: Sequence[Record], **about: Any) -> None:
    """Write records, one on each line, after what is said ``about`` them."""
    lines = ",\n".join(json.dumps(asdict(record)) for record in records)
    path.write_text(f'{{"about": {json.dumps(about)},\n"records": [\n{lines}\n]}}\n')
