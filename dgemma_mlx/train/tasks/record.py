"""The task "json": write the facts of a sentence as a JSON object."""

from __future__ import annotations

import json
import random

from dgemma_mlx.train.tasks.base import ContentTask, Example, reword
from dgemma_mlx.train.tasks.words import city, person

SENTENCES = (
    "{name} is {age} years old and lives in {city}.",
    "{name} is {age} and lives in {city}.",
    "{name} lives in {city} and is {age} years old.",
    "{name} lives in {city} and is {age}.",
    "{name}, {age}, lives in {city}.",
    "{name}, {age}, {city}",
    "{name} from {city} is {age} years old.",
    "{name} from {city} is {age}.",
    "{name}, who is {age}, lives in {city}.",
    "{name} is {age} years old. {name} lives in {city}.",
    "My name is {name}, I am {age} years old and I live in {city}.",
    "I am {name}, {age} years old, from {city}.",
    "In {city} lives {name}, who is {age} years old.",
    "At the age of {age}, {name} lives in {city}.",
)
BEFORE = (
    "Fill in the JSON:",
    "Fill in the JSON object:",
    "JSON:",
    "As JSON:",
    "Make JSON:",
    "Make a JSON object:",
    "Write this as JSON:",
    "Turn this into JSON:",
    "Convert to JSON:",
    "Convert this to JSON:",
    "Extract JSON:",
    "Extract name, age and city:",
    "Extract the name, age and city as JSON:",
    "Give me JSON for this:",
    "Fill in name, age and city:",
)
AFTER = (
    "Write this as JSON.",
    "Turn this into JSON.",
    "Convert this to JSON.",
    "Fill in the JSON.",
    "Make a JSON object.",
    "Give me the name, age and city as JSON.",
    "Extract name, age and city.",
    "JSON?",
    "As JSON.",
)


class Record(ContentTask):
    """Write the name, the age and the city of a sentence as a JSON object. The split is by the three values."""

    name = "json"

    def make(self, rng: random.Random) -> Example:
        """Draw an example of any split."""
        record = {"name": person(rng), "age": rng.randint(1, 99), "city": city(rng)}
        sentence = rng.choice(SENTENCES).format(**record)
        if rng.random() < 0.65:
            request = reword(rng, rng.choice(BEFORE), imperative=True)
            prompt = request + rng.choice((" ", " ", " ", "\n")) + sentence
        else:
            gap = rng.choice((" ", "\n"))
            prompt = sentence + gap + reword(rng, rng.choice(AFTER), imperative=True)
        answer = json.dumps(record)
        return self.example(prompt, answer, answer)
