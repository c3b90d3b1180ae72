"""The tasks "sort", "reverse", "add" and "count", on numbers and lists."""

from __future__ import annotations

import random

from dgemma_mlx.train.tasks.base import ContentTask, Example, joined, lower_first, reword
from dgemma_mlx.train.tasks.words import ITEMS

ASCENDING = (
    "in ascending order",
    "ascending",
    "from small to large",
    "from smallest to largest",
    "from low to high",
    "from lowest to highest",
    "in increasing order",
    "smallest first",
)
DESCENDING = (
    "in descending order",
    "descending",
    "from large to small",
    "from largest to smallest",
    "from high to low",
    "from highest to lowest",
    "in decreasing order",
    "largest first",
)
NUMBER_LISTS = (
    "these numbers",
    "the numbers",
    "these",
    "this list",
    "the list",
    "this",
    "the following numbers",
)
SORT_VERBS = ("Sort", "Sort", "Sort", "Order", "Arrange")
REVERSE_VERBS = ("Reverse", "Reverse", "Reverse", "Turn around", "Flip")
ITEM_LISTS = ("this list", "the list", "this", "these", "these items", "the order of", "the following")
BACKWARDS = (
    "Write {items} backwards",
    "Say {items} backwards",
    "Write this backwards: {items}",
    "Backwards: {items}",
    "Write this in reverse order: {items}",
    "List these in reverse order: {items}",
    "Put {items} in reverse order",
    "{items} in reverse order",
    "{items} backwards",
    "Read this list from the end: {items}",
)
ADD_WORDINGS = (
    "{a} + {b}",
    "{a}+{b}",
    "{a} + {b} =",
    "{a}+{b}=",
    "{a} + {b} = ?",
    "{a} plus {b}",
    "What is {a} + {b}?",
    "What is {a}+{b}?",
    "What is {a} plus {b}?",
    "What's {a} + {b}?",
    "How much is {a} + {b}?",
    "How much is {a} plus {b}?",
    "What is the sum of {a} and {b}?",
    "What do you get if you add {a} and {b}?",
    "What is {a} added to {b}?",
    "The sum of {a} and {b}",
    "Add {a} and {b}.",
    "Add {a} to {b}.",
    "Add {a} + {b}.",
    "Sum {a} and {b}.",
    "Calculate {a} + {b}.",
    "Calculate {a} plus {b}.",
    "Compute {a} + {b}.",
    "Compute the sum of {a} and {b}.",
    "Find the sum of {a} and {b}.",
    "Give me the sum of {a} and {b}.",
    "Tell me what {a} + {b} is.",
    "Solve {a} + {b}.",
)
COUNT_WORDINGS = (
    "Count from {a} to {b}.",
    "Count from {a} to {b}.",
    "Count from {a} up to {b}.",
    "Count up from {a} to {b}.",
    "Count {a} to {b}.",
    "List the numbers from {a} to {b}.",
    "List all numbers from {a} to {b}.",
    "Write the numbers from {a} to {b}.",
    "Write down the numbers {a} to {b}.",
    "Give me the numbers from {a} to {b}.",
    "Say the numbers from {a} to {b}.",
    "Show the numbers from {a} to {b}.",
    "Start at {a} and count to {b}.",
    "Start counting at {a} and stop at {b}.",
    "Count to {b} from {a}.",
    "Count to {b}, starting at {a}.",
)
MAX_COUNT_DIGITS = 62  # with the end-of-turn token, this fits into two canvases of 32 tokens


def spaced(items: list[int] | list[str]) -> str:
    """Return items separated by spaces."""
    return " ".join(str(item) for item in items)


class Sort(ContentTask):
    """Sort 3 to 8 numbers from 0 to 99, most often in ascending order. The split is by the multiset of numbers."""

    name = "sort"

    def make(self, rng: random.Random) -> Example:
        """Draw an example of any split."""
        highest = 99 if rng.random() < 0.85 else 9
        numbers = [rng.randint(0, highest) for _ in range(rng.randint(3, 8))]
        descending = rng.random() < 0.25
        answer = sorted(numbers, reverse=descending)
        key = spaced(sorted(numbers))
        return self.example(self.prompt(rng, joined(rng, numbers), descending), spaced(answer), key)

    def prompt(self, rng: random.Random, numbers: str, descending: bool) -> str:
        """Return a request to sort ``numbers``."""
        verb, what = rng.choice(SORT_VERBS), rng.choice(NUMBER_LISTS)
        order = " " + rng.choice(DESCENDING if descending else ASCENDING)
        if not descending and rng.random() < 0.65:
            order = " in order" if verb == "Arrange" else ""
        layout = rng.random()
        if layout < 0.4:
            return reword(rng, f"{verb} {what}{order}", imperative=True) + f": {numbers}"
        if layout < 0.65:
            return reword(rng, f"{verb} {numbers}{order}", imperative=True) + rng.choice(("", "", "."))
        if layout < 0.75:
            return reword(rng, f"{verb}{order}", imperative=True) + f": {numbers}"
        if layout < 0.85:
            return reword(rng, f"Put {what}{order or ' in order'}", imperative=True) + f": {numbers}"
        if layout < 0.93:
            return f"{numbers}\n" + reword(rng, f"{verb} {what}{order}.", imperative=True)
        return f"{numbers} sorted{order}" if order else f"{numbers}, {lower_first(verb)} {what}"


class Reverse(ContentTask):
    """Reverse 3 to 8 numbers or words. A sequence and its reverse are in the same split."""

    name = "reverse"

    def make(self, rng: random.Random) -> Example:
        """Draw an example of any split."""
        count = rng.randint(3, 8)
        words = rng.random() < 0.45
        items = [rng.choice(ITEMS) if words else str(rng.randint(0, 99)) for _ in range(count)]
        key = min(spaced(items), spaced(items[::-1]))
        return self.example(self.prompt(rng, joined(rng, items)), spaced(items[::-1]), key)

    def prompt(self, rng: random.Random, items: str) -> str:
        """Return a request to reverse ``items``."""
        verb, what = rng.choice(REVERSE_VERBS), rng.choice(ITEM_LISTS)
        layout = rng.random()
        if layout < 0.3:
            return reword(rng, f"{verb} {what}", imperative=True) + f": {items}"
        if layout < 0.6:
            return reword(rng, f"{verb} {items}", imperative=True) + rng.choice(("", "", "."))
        if layout < 0.7:
            return reword(rng, verb, imperative=True) + f": {items}"
        if layout < 0.8:
            return f"{items}\n" + reword(rng, "Reverse this list.", imperative=True)
        return reword(rng, rng.choice(BACKWARDS), imperative=False).format(items=items)


class Add(ContentTask):
    """Add two numbers from 0 to 99. The split is by the unordered pair."""

    name = "add"

    def make(self, rng: random.Random) -> Example:
        """Draw an example of any split."""
        a, b = rng.randint(0, 99), rng.randint(0, 99 if rng.random() < 0.85 else 9)
        if rng.random() < 0.5:
            a, b = b, a
        prompt = reword(rng, rng.choice(ADD_WORDINGS)).format(a=a, b=b)
        return self.example(prompt, str(a + b), f"{min(a, b)} {max(a, b)}")


class Count(ContentTask):
    """Count from a to b, 0 <= a < b <= 60, in at most two canvases of 32 tokens. The split is by (a, b)."""

    name = "count"

    def make(self, rng: random.Random) -> Example:
        """Draw an example of any split."""
        while True:
            a, b = sorted(rng.sample(range(61), 2))
            numbers = list(range(a, b + 1))
            if sum(len(str(number)) for number in numbers) <= MAX_COUNT_DIGITS:
                break
        wording = "Count to {b}." if a == 1 and rng.random() < 0.4 else rng.choice(COUNT_WORDINGS)
        prompt = reword(rng, wording, imperative=True).format(a=a, b=b)
        return self.example(prompt, spaced(numbers), f"{a} {b}")
