"""What a task is, how content is split into train and held out, and how prompts are reworded."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Split = Literal["train", "heldout"]
IMPERATIVE_OPENINGS = ("Please ", "Please ", "Can you ", "Could you ", "I want you to ", "Now ")


@dataclass(frozen=True)
class Example:
    """One conversation that ends with a user message, and the answer it asks for.

    ``messages`` are dicts with "role" ("user" or "assistant") and "content"; ``answer`` holds no control
    token. ``key`` names the content (operands, solution grid, ...) that decides the split, in any wording.
    """

    task: str
    messages: tuple[dict[str, str], ...]
    answer: str
    key: str


class Task(Protocol):
    """A family of examples with a checker."""

    name: str

    def sample(self, rng: random.Random, split: Split) -> Example:
        """Draw an example whose content belongs to ``split``."""

    def check(self, example: Example, text: str) -> bool:
        """Whether ``text`` answers ``example``."""


class ExactTask:
    """What tasks share: one right text for each example, compared without the white space around it."""

    name: str
    heldout_share = 0.1

    def check(self, example: Example, text: str) -> bool:
        return text.strip() == example.answer

    def example(self, prompt: str, answer: str, key: str) -> Example:
        """A conversation of one user turn."""
        return Example(self.name, (user(prompt),), answer, key)


class ContentTask(ExactTask, ABC):
    """A task split by hashing the content key: ``make`` is drawn until the key falls in the wanted split."""

    @abstractmethod
    def make(self, rng: random.Random) -> Example:
        """Draw an example of either split."""

    def sample(self, rng: random.Random, split: Split) -> Example:
        while True:
            example = self.make(rng)
            if split_of(f"{self.name}:{example.key}", self.heldout_share) == split:
                return example


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def split_of(key: str, heldout_share: float) -> Split:
    """The split of a content key; the same in every process and on every machine."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") < heldout_share * 2**64 else "train"


def lower_first(text: str) -> str:
    """Lower the first letter, except where the first word is 'I' or all capitals (JSON)."""
    if text[1:2].isupper() or text[:2] in ("I ", "I'"):
        return text
    return text[:1].lower() + text[1:]


def reword(rng: random.Random, text: str, imperative: bool = False) -> str:
    """Change what users change without thinking: politeness, first capital, final punctuation."""
    if imperative and rng.random() < 0.15:
        text = rng.choice(IMPERATIVE_OPENINGS) + lower_first(text)
    elif rng.random() < 0.05:
        text = text.rstrip(".?:") + rng.choice((" please", ", please", ", please."))
    if rng.random() < 0.25:
        text = text.rstrip(".?!:").rstrip()
    style = rng.random()
    return text.lower() if style < 0.12 else lower_first(text) if style < 0.3 else text


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def joined(rng: random.Random, items: Sequence[object]) -> str:
    """A list as people type it: mostly separated by spaces or commas."""
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
