"""The task "recall": the user tells a fact about themselves and asks for it later in the conversation."""

from __future__ import annotations

import random
from typing import NamedTuple

from dgemma_mlx.train.tasks.base import ContentTask, Example, Task, assistant, lower_first, reword, user
from dgemma_mlx.train.tasks.words import COLOURS, PETS, city, person


class Kind(NamedTuple):
    """A kind of fact about the user. In its texts, {v} stands for the value.

    Attributes:
        told: Sentences in which the user tells the fact.
        noted: The assistant's reply to them.
        asked: Questions in which the user asks for the fact.
        recalled: The assistant's answer to them.
    """

    told: tuple[str, ...]
    noted: str
    asked: tuple[str, ...]
    recalled: str


KINDS = {
    "name": Kind(
        (
            "My name is {v}.", "My name is {v}.", "My name's {v}.", "I am {v}.", "I'm {v}.",
            "I am called {v}.", "Call me {v}.", "You can call me {v}.", "Hello, my name is {v}.",
            "Hi, I am {v}.", "Hi! I'm {v}.",
        ),
        "Nice to meet you, {v}.",
        (
            "What is my name?", "What is my name?", "What's my name?", "Do you know my name?", "Who am I?",
            "Tell me my name.", "What am I called?", "Do you remember my name?", "Say my name.",
            "And what is my name?", "What was my name?",
        ),
        "Your name is {v}.",
    ),
    "city": Kind(
        (
            "I live in {v}.", "I live in {v}.", "I come from {v}.", "I am from {v}.", "My home is in {v}.",
            "My city is {v}.", "I now live in {v}.",
        ),
        "{v} is a nice place.",
        (
            "Where do I live?", "Where do I live?", "Which city do I live in?", "What is my city?",
            "Where is my home?", "Do you know where I live?", "Where am I from?", "Tell me where I live.",
            "What city am I from?",
        ),
        "You live in {v}.",
    ),
    "colour": Kind(
        (
            "My favourite colour is {v}.", "My favorite color is {v}.", "I like the colour {v}.",
            "I love the color {v}.", "The colour I like best is {v}.",
        ),
        "{v} is a nice colour.",
        (
            "What is my favourite colour?", "What is my favorite color?", "What's my favorite color?",
            "Which colour do I like?", "What color do I like?", "Do you know my favourite colour?",
            "Tell me my favorite color.", "Which color do I like best?",
        ),
        "Your favourite colour is {v}.",
    ),
    "pet": Kind(
        (
            "I have a {v}.", "My pet is a {v}.", "I own a {v}.", "I have a pet {v}.", "At home I have a {v}.",
        ),
        "A {v} is a good friend.",
        (
            "What pet do I have?", "Which pet do I have?", "What is my pet?", "Which animal do I have?",
            "What animal do I own?", "Do you know my pet?", "Tell me what pet I have.",
            "What kind of pet do I have?",
        ),
        "You have a {v}.",
    ),
    "age": Kind(
        (
            "I am {v} years old.", "I'm {v} years old.", "My age is {v}.", "I am {v}.", "I turned {v}.",
        ),
        "{v} is a good age.",
        (
            "How old am I?", "How old am I?", "What is my age?", "What's my age?", "Do you know my age?",
            "Tell me my age.", "Do you know how old I am?",
        ),
        "You are {v} years old.",
    ),
}  # fmt: skip
WEIGHTS = {"name": 5, "city": 2, "colour": 1, "pet": 1, "age": 1}


def draw_value(rng: random.Random, kind: str) -> str:
    """Draw a value of a kind of fact."""
    if kind == "name":
        name = person(rng, 0.5)
        return name.lower() if rng.random() < 0.1 else name
    if kind == "city":
        return city(rng, 0.5)
    if kind == "age":
        return str(rng.randint(1, 99))
    return rng.choice(COLOURS if kind == "colour" else PETS)


def fill(template: str, value: str) -> str:
    """Return a template with its value filled in. A sentence that begins with the value gets a capital first letter."""
    text = template.format(v=value)
    return text[0].upper() + text[1:] if template.startswith("{v}") else text


class Recall(ContentTask):
    """Answer 'What is my name?' after 'My name is Ana.' The split is by the values that the user tells.

    Attributes:
        others: Tasks whose training questions come in between or follow.
    """

    name = "recall"

    def __init__(self, others: tuple[Task, ...]) -> None:
        self.others = others

    def make(self, rng: random.Random) -> Example:
        """Draw an example of any split."""
        kinds = self.draw_kinds(rng)
        values = {kind: draw_value(rng, kind) for kind in kinds}
        key = " ".join(sorted(f"{kind}={value.lower()}" for kind, value in values.items()))
        form = rng.random()
        if form < 0.2:  # the conversation ends with a told fact, which the answer acknowledges
            *history, (told, answer) = self.tell(rng, values)
        else:
            history = self.tell(rng, values)
            if form < 0.4 and len(history) == 1:
                history.insert(rng.randint(0, len(history)), self.aside(rng))
            told, answer = self.ask(rng, values, form)
        turns = [message for said, reply in history for message in (user(said), assistant(reply))]
        return Example(self.name, (*turns, user(told)), answer, key)

    def draw_kinds(self, rng: random.Random) -> list[str]:
        """Draw one kind of fact, or two different kinds in random order."""
        kinds = rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=2)
        return kinds if kinds[0] != kinds[1] and rng.random() < 0.35 else kinds[:1]

    def tell(self, rng: random.Random, values: dict[str, str]) -> list[tuple[str, str]]:
        """Return turns (said, reply) in which the user tells the values: two values in one sentence or in two turns."""
        said = [reword_told(rng, fill(rng.choice(KINDS[kind].told), value)) for kind, value in values.items()]
        noted = [fill(KINDS[kind].noted, value) for kind, value in values.items()]
        if len(said) == 2 and rng.random() < 0.6:
            return [(f"{said[0].rstrip('.')} and {lower_first(said[1])}", noted[0])]
        return list(zip(said, noted, strict=True))

    def aside(self, rng: random.Random) -> tuple[str, str]:
        """Return a turn (said, reply) of another task."""
        other = rng.choice(self.others).sample(rng, "train")
        return other.messages[-1]["content"], other.answer

    def ask(self, rng: random.Random, values: dict[str, str], form: float) -> tuple[str, str]:
        """Return the last question and its answer.

        Most questions ask for a told value, some for a value that was not told, and some belong to another task.
        """
        if form > 0.92:
            return self.aside(rng)
        if form > 0.86:
            missing = rng.choice([kind for kind in KINDS if kind not in values])
            return reword(rng, rng.choice(KINDS[missing].asked)), "I do not know that."
        kind = rng.choice(list(values))
        return reword(rng, rng.choice(KINDS[kind].asked)), fill(KINDS[kind].recalled, values[kind])


def reword_told(rng: random.Random, text: str) -> str:
    """Vary the final full stop and the first letter of a sentence in which the user tells a fact."""
    text = text.rstrip(".") if rng.random() < 0.25 else text
    return lower_first(text) if rng.random() < 0.25 else text
