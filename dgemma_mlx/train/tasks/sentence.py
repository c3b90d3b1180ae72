"""The task "sentence": write a short sentence of a small grammar about a given noun."""

from __future__ import annotations

import random
import re

from dgemma_mlx.train.tasks.base import ContentTask, Example, reword, with_article
from dgemma_mlx.train.tasks.words import COLOURS, listed

ANIMALS = listed("cat dog bird horse mouse rabbit fish frog cow duck fox bear")
PEOPLE = listed("man woman child teacher king queen boy girl friend baker")
THINGS = listed("book ball car boat house tree flower chair lamp cup apple hat")
VERBS = {  # subject -> verbs that fit it
    **dict.fromkeys(ANIMALS, ("sleeps", "sits", "waits", "plays", "eats", "hides", "rests")),
    **dict.fromkeys(PEOPLE, ("works", "sits", "waits", "sings", "reads", "stands", "walks")),
    **dict.fromkeys(THINGS, ("stands", "lies", "is")),
}
PREPOSITIONS = ("near", "behind", "beside", "in front of")
PLACES = listed("house tree river garden bridge school market lake wall door park station")
PLACE_ADJECTIVES = ("old", "small", "big", "new", "green", "white")
ADJECTIVES = listed("small big old young happy quiet brave kind little good")
THING_ADJECTIVES = ("small", "big", "old", "new", "little", "good", *COLOURS)
PATTERN = re.compile(
    r"The (?:(?P<adjective>\w+) )?(?P<noun>\w+) (?P<verb>\w+) (?:near|behind|beside|in front of) "
    r"the (?:(?P<place_adjective>\w+) )?(?P<place>\w+)\."
)

ABOUT = (
    "Write a sentence about {a}.",
    "Write a sentence about {a}.",
    "Write a short sentence about {a}.",
    "Write one sentence about {a}.",
    "Make a sentence about {a}.",
    "Give me a sentence about {a}.",
    "Tell me a sentence about {a}.",
    "Say a sentence about {a}.",
    "A sentence about {a}.",
    "I need a sentence about {a}.",
)
WITH_PLACE = tuple(wording.replace("{a}.", "{a} and {b}.") for wording in ABOUT)


def adjectives_of(noun: str) -> tuple[str, ...]:
    """Return the adjectives that fit a noun."""
    return THING_ADJECTIVES if noun in THINGS else tuple(ADJECTIVES)


class Sentence(ContentTask):
    """Write a sentence about a cat. Any sentence of the grammar that has the requested words is correct.

    The split is by the requested words: a noun, possibly an adjective, and possibly a place.
    """

    name = "sentence"

    def make(self, rng: random.Random) -> Example:
        """Draw an example of any split."""
        noun = rng.choice(list(VERBS))
        adjective = rng.choice(adjectives_of(noun))
        place = rng.choice([place for place in PLACES if place != noun])
        place_adjective = rng.choice(("", "", *PLACE_ADJECTIVES))
        form = rng.random()
        asked_adjective = adjective if form < 0.3 else ""
        asked_place = place if form >= 0.7 else ""
        said = f"{adjective} {noun}" if asked_adjective or rng.random() < 0.7 else noun
        where = f"the {place_adjective} {place}" if place_adjective else f"the {place}"
        answer = f"The {said} {rng.choice(VERBS[noun])} {rng.choice(PREPOSITIONS)} {where}."
        wording = rng.choice(WITH_PLACE if asked_place else ABOUT)
        asked = with_article(f"{asked_adjective} {noun}".strip())
        request = wording.format(a=asked, b=with_article(place))
        prompt = reword(rng, request, imperative=wording.startswith("W"))
        return self.example(prompt, answer, f"{noun},{asked_adjective},{asked_place}")

    def check(self, example: Example, text: str) -> bool:
        """Return whether a text is a sentence of the grammar with the requested words."""
        found = PATTERN.fullmatch(text.strip())
        if found is None or found["noun"] not in VERBS:
            return False
        noun, asked_adjective, asked_place = example.key.split(",")
        adjectives = (asked_adjective,) if asked_adjective else (None, *adjectives_of(noun))
        return (
            found["noun"] == noun
            and found["verb"] in VERBS[noun]
            and found["adjective"] in adjectives
            and found["place"] in ((asked_place,) if asked_place else PLACES)
            and found["place_adjective"] in (None, *PLACE_ADJECTIVES)
        )
