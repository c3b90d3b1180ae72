"""The task "sentence": write a short sentence of a small grammar about a given noun."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from dgemma_mlx.train.tasks.base import ContentTask, Example, reword, with_article
from dgemma_mlx.train.tasks.words import listed

# Words that are tokens of their own: where a word may be one token or several, no position's token is sure before all
# words to the left of it are.
ANIMALS = listed("cat dog bird horse mouse rabbit fish frog cow")
PEOPLE = listed("man woman boy girl king queen friend child")
THINGS = listed("book ball car boat house tree apple hat circle square triangle star cross")
VERBS = {  # subject -> verbs that fit it, the most frequent first
    **dict.fromkeys(ANIMALS, ("sits", "sleeps", "plays", "eats", "waits")),
    **dict.fromkeys(PEOPLE, ("sits", "works", "waits", "stands", "reads")),
    **dict.fromkeys(THINGS, ("is", "lies", "stands")),
}
PREPOSITIONS = ("near", "behind", "beside", "by")
PLACES = listed("house tree river garden bridge school market lake wall door park station")
PLACE_ADJECTIVES = ("old", "small", "big", "new", "green", "white")
ADJECTIVES = listed("small big old young happy kind little good")
THING_ADJECTIVES = ("small", "big", "new", "red", "blue", "green", "yellow", "orange", "purple", "black", "white")
PATTERN = re.compile(
    r"The (?P<adjective>\w+) (?P<noun>\w+) (?P<verb>\w+) (?:near|behind|beside|by) "
    r"the (?:(?P<place_adjective>\w+) )?(?P<place>\w+)\."
)
WORDS = sorted({
    *ANIMALS, *PEOPLE, *THINGS, *PLACES, *PREPOSITIONS, *PLACE_ADJECTIVES, *ADJECTIVES, *THING_ADJECTIVES,
    *(verb for verbs in VERBS.values() for verb in verbs),
})  # fmt: skip

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


def frequent_first(rng: random.Random, words: Sequence[str]) -> str:
    """Draw a word; the n-th is drawn in proportion to 1 / n, roughly as the words of a language are (Zipf's law)."""
    return rng.choices(words, [1 / n for n in range(1, len(words) + 1)])[0]


class Sentence(ContentTask):
    """Write a sentence about a cat. Any sentence of the grammar that has the requested words is correct.

    The split is by the requested words: a noun, possibly an adjective, and possibly a place.
    """

    name = "sentence"

    def make(self, rng: random.Random) -> Example:
        """Draw an example of any split."""
        noun = rng.choice(list(VERBS))
        form = rng.random()
        is_adjective_asked, is_place_asked = form < 0.3, form >= 0.7
        places = [place for place in PLACES if place != noun]
        adjectives = adjectives_of(noun)
        adjective = rng.choice(adjectives) if is_adjective_asked else frequent_first(rng, adjectives)
        place = rng.choice(places) if is_place_asked else frequent_first(rng, places)
        where = f"{frequent_first(rng, PLACE_ADJECTIVES)} {place}" if rng.random() < 0.25 else place
        verb, preposition = frequent_first(rng, VERBS[noun]), frequent_first(rng, PREPOSITIONS)
        answer = f"The {adjective} {noun} {verb} {preposition} the {where}."
        wording = rng.choice(WITH_PLACE if is_place_asked else ABOUT)
        asked = with_article(f"{adjective} {noun}" if is_adjective_asked else noun)
        request = wording.format(a=asked, b=with_article(place))
        prompt = reword(rng, request, imperative=wording.startswith("W"))
        key = f"{noun},{adjective if is_adjective_asked else ''},{place if is_place_asked else ''}"
        return self.example(prompt, answer, key)

    def check(self, example: Example, text: str) -> bool:
        """Return whether a text is a sentence of the grammar with the requested words."""
        found = PATTERN.fullmatch(text.strip())
        if found is None or found["noun"] not in VERBS:
            return False
        noun, asked_adjective, asked_place = example.key.split(",")
        return (
            found["noun"] == noun
            and found["verb"] in VERBS[noun]
            and found["adjective"] in ((asked_adjective,) if asked_adjective else adjectives_of(noun))
            and found["place"] in ((asked_place,) if asked_place else PLACES)
            and found["place_adjective"] in (None, *PLACE_ADJECTIVES)
        )
