"""The parts that all tasks share: examples, task classes, the split of content, and the rewording of prompts."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dgemma_mlx.train.sudoku import Split as Split

IMPERATIVE_OPENINGS = ("Please ", "Please ", "Can you ", "Could you ", "I want you to ", "Now ")


@dataclass(frozen=True)
class Example:
    """One conversation that ends with a user message, and the answer it asks for.

    Attributes:
        task: Name of the task.
        messages: The conversation; each message has "role" ("user" or "assistant") and "content".
        answer: The text of a correct answer, without control tokens.
        key: The content (operands, solution grid, ...) that decides the split, regardless of the wording.
    """

    task: str
    messages: tuple[dict[str, str], ...]
    answer: str
    key: str


class Task(Protocol):
    """A family of examples with a checker of answers.

    Attributes:
        name: Name of the task, a key of ``TASKS``.
    """

    name: str

    def sample(self, rng: random.Random, split: Split) -> Example:
        """Draw an example whose content belongs to a split."""

    def check(self, example: Example, text: str) -> bool:
        """Return whether a text is a correct answer to an example."""


class ExactTask:
    """Base class of tasks with one correct answer for each example.

    Attributes:
        name: Name of the task.
        heldout_share: Share of the content that is held out from training.
    """

    name: str
    heldout_share = 0.1

    def check(self, example: Example, text: str) -> bool:
        """Return whether a text equals the example's answer, apart from surrounding white space."""
        return text.strip() == example.answer

    def example(self, prompt: str, answer: str, key: str) -> Example:
        """Return an example with a conversation of one user message."""
        return Example(self.name, (user(prompt),), answer, key)


class ContentTask(ExactTask, ABC):
    """Base class of tasks whose split is a hash of the example's key: ``make`` is repeated until the split is right."""

    @abstractmethod
    def make(self, rng: random.Random) -> Example:
        """Draw an example of any split."""

    def sample(self, rng: random.Random, split: Split) -> Example:
        """Draw an example whose content belongs to a split."""
        while True:
            example = self.make(rng)
            if split_of(f"{self.name}:{example.key}", self.heldout_share) == split:
                return example


def user(text: str) -> dict[str, str]:
    """Return a message of the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """Return a message of the assistant."""
    return {"role": "assistant", "content": text}


def split_of(key: str, heldout_share: float) -> Split:
    """Return the split of a content key. It is the same in every process and on every machine."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") < heldout_share * 2**64 else "train"


def lower_first(text: str) -> str:
    """Return a text with a lower-case first letter, unless its first word is 'I' or in capitals like 'JSON'."""
    if text[1:2].isupper() or text[:2] in ("I ", "I'"):
        return text
    return text[:1].lower() + text[1:]


def reword(rng: random.Random, text: str, imperative: bool = False) -> str:
    """Vary a request as users vary it without thinking: politeness, capital letters and final punctuation."""
    if imperative and rng.random() < 0.15:
        text = rng.choice(IMPERATIVE_OPENINGS) + lower_first(text)
    elif rng.random() < 0.05:
        text = text.rstrip(".?:") + rng.choice((" please", ", please", ", please."))
    if rng.random() < 0.25:
        text = text.rstrip(".?!:").rstrip()
    style = rng.random()
    return text.lower() if style < 0.12 else lower_first(text) if style < 0.3 else text


def with_article(noun: str) -> str:
    """Return a noun with the indefinite article before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def joined(rng: random.Random, items: Sequence[object]) -> str:
    """Return a list as people type it: most often separated by spaces or commas."""
    words = [str(item) for item in items]
    style = rng.random()
    if style < 0.45:
        return " ".join(words)
    if style < 0.8:
        return ", ".join(words)
    if style < 0.9:
        return ",".join(words)
    if style < 0.95:
        return "[" + ", ".join(words) + "]"
    return ", ".join(words[:-1]) + " and " + words[-1]
