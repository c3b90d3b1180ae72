"""The task "question": questions about a small closed table of facts, and small talk."""

from __future__ import annotations

import random
from typing import NamedTuple

from dgemma_mlx.train.tasks.base import ContentTask, Example, Split, reword, with_article
from dgemma_mlx.train.tasks.words import listed

DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = listed("January February March April May June July August September October November December")
THING_COLOURS = {
    "the sky": "blue", "grass": "green", "snow": "white", "blood": "red", "a banana": "yellow",
    "coal": "black",
    "a lemon": "yellow", "a carrot": "orange", "milk": "white", "the sun": "yellow", "a frog": "green",
    "chocolate": "brown",
}  # fmt: skip
SOUNDS = {
    "dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack", "sheep": "baa", "pig": "oink",
    "horse": "neigh", "mouse": "squeak", "lion": "roar", "bee": "buzz", "snake": "hiss", "owl": "hoot",
}  # fmt: skip
LEGS = {
    "dog": 4, "cat": 4, "spider": 8, "bird": 2, "ant": 6, "bee": 6, "horse": 4, "fish": 0, "snake": 0,
    "duck": 2,
}  # fmt: skip
BABIES = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "horse": "foal", "sheep": "lamb", "duck": "duckling",
    "bear": "cub", "hen": "chick",
}  # fmt: skip
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "England": "London",
    "Japan": "Tokyo",
    "Norway": "Oslo", "Portugal": "Lisbon", "Greece": "Athens", "Austria": "Vienna", "Egypt": "Cairo",
    "Ireland": "Dublin",
    "Peru": "Lima", "Finland": "Helsinki", "Russia": "Moscow", "China": "Beijing",
}  # fmt: skip
OPPOSITES = listed(
    "hot cold,big small,old new,day night,black white,good bad,fast slow,high low,happy sad,open closed,"
    "full empty,wet dry,hard soft,light dark,left right,up down,early late,rich poor,long short,strong weak",
    ",",
)


class Fact(NamedTuple):
    """One fact of the table.

    Attributes:
        key: Kind and subject of the fact, for example "capital France".
        wordings: Questions that ask for the fact.
        answer: The answer to all of these questions.
    """

    key: str
    wordings: tuple[str, ...]
    answer: str


CAPITAL_WORDINGS = (
    "What is the capital of {x}?",
    "What's the capital of {x}?",
    "Capital of {x}?",
    "The capital of {x}?",
    "Which city is the capital of {x}?",
    "Name the capital of {x}.",
    "Tell me the capital of {x}.",
    "What is the capital city of {x}?",
)
COLOUR_WORDINGS = (
    "What colour is {x}?",
    "What color is {x}?",
    "Which colour is {x}?",
    "Which color does {x} have?",
    "What colour does {x} have?",
    "What is the colour of {x}?",
    "Tell me the color of {x}.",
)
SOUND_WORDINGS = (
    "What sound does {a_x} make?",
    "What does {a_x} say?",
    "Which sound does {a_x} make?",
    "What noise does {a_x} make?",
    "How does {a_x} sound?",
    "Tell me what {a_x} says.",
)
OPPOSITE_WORDINGS = (
    "What is the opposite of {x}?",
    "What's the opposite of {x}?",
    "Opposite of {x}?",
    "The opposite of {x}?",
    "Name the opposite of {x}.",
    "Tell me the opposite of {x}.",
    "Which word is the opposite of {x}?",
)
LEG_WORDINGS = (
    "How many legs does {a_x} have?",
    "How many legs has {a_x}?",
    "How many legs are there on {a_x}?",
    "What number of legs does {a_x} have?",
    "Tell me how many legs {a_x} has.",
)
BABY_WORDINGS = (
    "What is a baby {x} called?",
    "What do you call a baby {x}?",
    "What is a young {x} called?",
    "Name a baby {x}.",
    "What is the name for a baby {x}?",
)
AFTER_WORDINGS = (
    "What comes after {x}?",
    "What {unit} comes after {x}?",
    "Which {unit} comes after {x}?",
    "Which {unit} follows {x}?",
    "What {unit} is after {x}?",
    "Tell me the {unit} after {x}.",
    "What is the {unit} after {x}?",
)
BEFORE_WORDINGS = (
    "What comes before {x}?",
    "What {unit} comes before {x}?",
    "Which {unit} comes before {x}?",
    "What {unit} is before {x}?",
    "Tell me the {unit} before {x}.",
    "What is the {unit} before {x}?",
)
SMALL_TALK = {
    "Hello! How can I help you?": (
        "Hello", "Hello!", "Hi", "Hi!", "Hey", "Hello there", "Hi there!", "Good day", "Good morning",
    ),
    "I am a small demo model.": (
        "Who are you?", "What are you?", "What is your name?", "Are you a robot?", "Tell me about yourself.",
        "What's your name?", "Are you an AI?", "What model are you?",
    ),
    "I can solve Sudoku, sort, reverse, add, count and fill in JSON.": (
        "What can you do?", "Help", "Help me", "How can you help me?", "What do you know?",
        "What can I ask you?", "Can you help me?", "What are you able to do?", "What else can you do?",
    ),
    "You are welcome.": (
        "Thank you", "Thanks", "Thank you!", "Thanks a lot", "Thank you very much", "Thanks!",
    ),
    "Goodbye!": (
        "Bye", "Goodbye", "Bye bye", "See you", "See you later", "Good night",
    ),
    "I am fine, thank you.": (
        "How are you?", "How are you doing?", "How do you do?", "How is it going?", "Are you well?",
    ),
}  # fmt: skip


def capitalised(text: str) -> str:
    """Return a text with a capital first letter."""
    return text[:1].upper() + text[1:]


def build_facts() -> list[Fact]:
    """Return the whole table of facts."""
    facts = []

    def add(kind: str, wordings: tuple[str, ...], x: str, answer: str, unit: str = "") -> None:
        texts = tuple(wording.format(x=x, a_x=with_article(x), unit=unit) for wording in wordings)
        facts.append(Fact(f"{kind} {x}", texts, answer))

    for unit, names in (("day", DAYS), ("month", MONTHS)):
        for first, second in zip(names, names[1:] + names[:1], strict=True):
            add("after", AFTER_WORDINGS, first, f"{second} comes after {first}.", unit)
            add("before", BEFORE_WORDINGS, second, f"{first} comes before {second}.", unit)
    for thing, colour in THING_COLOURS.items():
        add("colour", COLOUR_WORDINGS, thing, f"{capitalised(thing)} is {colour}.")
    for animal, sound in SOUNDS.items():
        add("sound", SOUND_WORDINGS, animal, f"{capitalised(with_article(animal))} says {sound}.")
    for animal, legs in LEGS.items():
        add("legs", LEG_WORDINGS, animal, f"{capitalised(with_article(animal))} has {legs} legs.")
    for animal, baby in BABIES.items():
        add("baby", BABY_WORDINGS, animal, f"A baby {animal} is a {baby}.")
    for country, capital in CAPITALS.items():
        add("capital", CAPITAL_WORDINGS, country, f"The capital of {country} is {capital}.")
    for pair in OPPOSITES:
        one, other = pair.split()
        for word, opposite in ((one, other), (other, one)):
            add("opposite", OPPOSITE_WORDINGS, word, f"The opposite of {word} is {opposite}.")
    return facts


class Question(ContentTask):
    """Ask for a fact in one of its wordings.

    The split is by fact and wording, so training sees every fact. Small talk is never held out, because nothing in 'Hi'
    says how to answer 'Hello'.

    Attributes:
        facts: The table of facts.
    """

    name = "question"
    heldout_share = 0.15

    def __init__(self) -> None:
        self.facts = build_facts()

    def sample(self, rng: random.Random, split: Split) -> Example:
        """Draw a question of a split; in training, some of them are small talk."""
        if split == "train" and rng.random() < 0.12:
            answer = rng.choice(list(SMALL_TALK))
            prompt = rng.choice(SMALL_TALK[answer])
            return self.example(reword(rng, prompt), answer, f"small talk: {prompt}")
        return super().sample(rng, split)

    def make(self, rng: random.Random) -> Example:
        """Draw a question of any split."""
        fact = rng.choice(self.facts)
        wording = rng.choice(fact.wordings)
        return self.example(reword(rng, wording), fact.answer, f"{fact.key}: {wording}")
