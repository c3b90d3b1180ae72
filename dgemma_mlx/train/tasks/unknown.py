"""The task "unknown": questions and requests about anything else, whose answer is 'I do not know that.'"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from dgemma_mlx.train.tasks.base import ExactTask, Example, Split, reword, split_of, with_article
from dgemma_mlx.train.tasks.facts import CAPITALS, OPPOSITES
from dgemma_mlx.train.tasks.scripts import foreign_prompt
from dgemma_mlx.train.tasks.words import NAMES, NOUNS, listed, made_up_word

ANSWER = "I do not know that."

COUNTRIES = [
    country
    for country in listed(
        "Albania,Angola,Argentina,Australia,Bangladesh,Belgium,Bolivia,Brazil,Bulgaria,Cambodia,Canada,Chad,"
        "Chile,Colombia,Croatia,Cuba,Cyprus,Denmark,Ecuador,Estonia,Ethiopia,Fiji,Ghana,Haiti,Hungary,"
        "Iceland,India,Indonesia,Iran,Iraq,Israel,Jamaica,Jordan,Kenya,Laos,Latvia,Lebanon,Libya,Malaysia,"
        "Mali,Malta,Mexico,Mongolia,Morocco,Nepal,Niger,Nigeria,Pakistan,Panama,Paraguay,Poland,Romania,"
        "Rwanda,Senegal,Serbia,Slovakia,Somalia,South Africa,Sudan,Sweden,Switzerland,Syria,Thailand,Tunisia,"
        "Turkey,Uganda,Ukraine,Uruguay,Venezuela,Vietnam,Yemen,Zambia,the Netherlands,the United States,"
        "Texas,California,Ohio,Florida,Mars,Africa,Europe",
        ",",
    )
    if country not in CAPITALS
]
LANGUAGES = listed(
    "French,German,Spanish,Italian,Latin,Greek,Chinese,Japanese,Russian,Arabic,Dutch,Polish,Turkish,Swedish,"
    "Korean,Hindi",
    ",",
)
OTHER_ANIMALS = listed(
    "zebra giraffe penguin eagle shark whale camel goat kangaroo octopus lizard dolphin elephant tiger crab "
    "lobster turtle camel penguin worm mosquito"
)
VERBS = listed(
    "bake boil break build buy catch change choose clean climb close cook cut dance draw drive eat find fix "
    "fly fold grow install kill learn make move open paint pay play protect remove repair sell send start "
    "stop store study swim teach train use wash wear win"
)
QUALITIES = listed(
    "heavy expensive important famous dangerous useful strange beautiful rare loud deep fragile complicated "
    "popular ugly boring funny cheap round sharp slippery noisy healthy delicious clever angry tired"
)

# Slots: {n} noun, {a_n} noun with its article, {m} another noun, {name}, {country}, {language}, {animal}, {verb},
# {q} quality, {w} word that is not in the table of opposites, {i} number from 100, {j} number from 2 to 500,
# {s} and {t} numbers from 1 to 99, {g} gibberish.
TEMPLATES = (
    "What is {a_n}?", "What is the {n}?", "What is {n}?", "What are {n}s?", "What is {a_n} made of?",
    "What is {a_n} used for?", "What does {a_n} cost?", "What does {a_n} look like?", "What does {n} mean?",
    "What is inside {a_n}?", "What is better, {a_n} or {a_m}?", "What is the history of the {n}?",
    "What is the weight of {a_n}?", "What is the best {n}?", "What is the largest {n} in the world?",
    "What is the price of {a_n} in {country}?", "What is the difference between {a_n} and {a_m}?",
    "What happens if I {verb} {a_n}?", "What do you think about the {n}?", "What can I do with {a_n}?",
    "What should I {verb} today?", "What makes {a_n} {q}?", "Who invented the {n}?",
    "Who made the first {n}?", "Who wrote the book about the {n}?", "Who is {name}?",
    "Who is the best {n} player?", "Who sells {n}s?", "Who discovered {country}?",
    "Who was the first person to {verb} {a_n}?", "Who is the president of {country}?",
    "Who won the {n} game?", "Who owns the {n}?", "Who painted the {n}?", "Where is the {n}?",
    "Where is {country}?", "Where can I buy {a_n}?", "Where can I find a {q} {n}?",
    "Where does {n} come from?", "Where do {n}s live?", "Where did {name} {verb} the {n}?",
    "Where is the nearest {n}?", "Where was {name} born?", "When was the {n} invented?",
    "When is the next {n}?", "When does the {n} open?", "When did {country} start?",
    "When should I {verb} my {n}?", "When was {name} born?", "When did the {n} begin?", "Why is the {n} {q}?",
    "Why are {n}s {q}?", "Why do people {verb} {n}s?", "Why does {a_n} {verb}?", "Why should I {verb} {a_n}?",
    "Why is {name} {q}?", "Why do we need {a_n}?", "Why did the {n} {verb} the {m}?", "How does {a_n} work?",
    "How do I {verb} {a_n}?", "How do you {verb} {a_n}?", "How big is {a_n}?", "How old is the {n}?",
    "How old is {name}?", "How much does {a_n} weigh?", "How much is {a_n}?", "How many {n}s are there?",
    "How many {n}s are in {a_m}?", "How many people live in {country}?", "How far is it to {country}?",
    "How long does it take to {verb} {a_n}?", "How fast is {a_n}?", "How can I {verb} {a_n} at home?",
    "How is {n} made?", "How deep is the {n}?", "How tall is {name}?", "Is {a_n} {q}?",
    "Is the {n} {q} or not?", "Is there {a_n} in {country}?", "Is {a_n} bigger than {a_m}?",
    "Is {name} a {q} person?", "Are {n}s {q}?", "Are there {n}s in {country}?", "Do you like {n}s?",
    "Do you have {a_n}?", "Do {n}s {verb}?", "Do you know {name}?", "Does {name} like {n}s?",
    "Does {a_n} {verb} {a_m}?", "Did you see the {n}?", "Have you ever seen {a_n}?", "Can {a_n} {verb}?",
    "Can I {verb} the {n}?", "Can you {verb} {a_n}?", "Can I put {a_n} in {a_m}?",
    "Could {name} {verb} {a_n}?", "Should I buy {a_n} or {a_m}?", "Should I {verb} my {n}?",
    "Will it rain in {country}?", "Will {name} {verb} the {n}?", "Would you {verb} {a_n}?",
    "Which {n} is the most {q}?", "Which {n} should I {verb}?", "Which country has the most {n}s?",
    "Which is more {q}, {a_n} or {a_m}?", "Tell me about the {n}.", "Tell me about {country}.",
    "Tell me a joke about {a_n}.", "Tell me a story about {a_n}.", "Tell me a joke.",
    "Tell me who {name} is.", "Tell me how to {verb} {a_n}.", "Tell me something {q}.", "Explain {n} to me.",
    "Explain how {a_n} works.", "Explain why {n}s are {q}.", "Describe {a_n}.",
    "Describe the {n} in {country}.", "Define {n}.", "Give me a recipe for {n}.",
    "Give me advice about {n}s.", "Give me a list of {n}s.", "Give me three {q} {n}s.", "Show me {a_n}.",
    "Show me a picture of {a_n}.", "Write a poem about {a_n}.", "Write a poem about {country}.",
    "Write a story about {a_n} and {a_m}.", "Write an essay about {n}.", "Write a song about {name}.",
    "Write a letter to {name}.", "Write a letter to the {n}.", "Write code for {a_n}.",
    "Write a Python program that can {verb} {a_n}.", "Write an email to {name} about the {n}.",
    "Translate {n} to {language}.", "Translate '{n}' into {language}.", "How do you say {n} in {language}?",
    "Say {n} in {language}.", "What is {n} in {language}?", "Speak {language} to me.",
    "Do you speak {language}?", "Translate this text into {language}: the {n} is {q}.",
    "What is the capital of {country}?", "What's the capital of {country}?", "Capital of {country}?",
    "Name the capital of {country}.", "Which city is the capital of {country}?",
    "Tell me the capital of {country}.", "What is the flag of {country}?",
    "What language do they speak in {country}?", "What is the weather in {country}?",
    "How is the weather in {country} today?", "Name a river in {country}.",
    "What do people eat in {country}?", "Is {country} a {q} place?", "Plan a trip to {country}.",
    "What sound does {a_animal} make?", "How many legs does {a_animal} have?",
    "What is a baby {animal} called?", "What does {a_animal} eat?", "Where does {a_animal} live?",
    "How fast can {a_animal} run?", "What color is {a_animal}?", "What colour is my {n}?",
    "What is the opposite of {w}?", "Opposite of {w}?", "Name the opposite of {w}.", "What rhymes with {w}?",
    "How do you spell {w}?", "What is another word for {w}?", "Use {w} in a question.", "What does {w} mean?",
    "What is {i} + {j}?", "What is {i} plus {j}?", "Add {i} and {j}.", "{i} + {j}", "What is {i} times {j}?",
    "What is {s} times {t}?", "{s} x {t}", "{s} * {t}", "{s} - {t}", "{s} / {t}", "{s} minus {t}",
    "What is {s} minus {t}?", "What is {s} divided by {t}?", "Multiply {s} by {t}.", "Subtract {s} from {t}.",
    "Divide {i} by {t}.", "What is the square root of {i}?", "Is {i} a prime number?", "What is half of {i}?",
    "What is {s} percent of {i}?", "What happened in the year {i}?", "How many days are {i} hours?",
    "What time is it?", "What day is it today?", "What is the date?", "What is the news?",
    "What is the meaning of life?", "What is my name?", "Where do I live?", "How old am I?", "Who am I?",
    "What pet do I have?", "What is my favourite colour?", "{g}", "{g} {g}", "{g}?", "{g} {n}", "{n}",
    "{n} {m}", "{n}?", "{q} {n}", "the {n}", "{verb} the {n}", "{name}", "{country}",
    "Hey, what about the {n}?", "And the {n}?", "Please {verb} the {n}.", "Buy me {a_n}.", "Call {name}.",
    "Open the {n}.", "Play some {n} music.", "Turn on the {n}.", "Find {a_n} near me.",
    "Book a {n} for {name}.", "Remind me to {verb} the {n}.", "Summarize the book about the {n}.",
    "Fix my {n}.", "I want {a_n}.", "I need help with my {n}.", "I like {n}s.", "My {n} is {q}.",
    "The {n} is {q}.", "{name} has {a_n}.", "There is {a_n} in the {m}.", "I think {name} is {q}.",
    "We went to {country}.", "Let's {verb} {a_n}.", "You are a {q} {n}.", "Recommend a {q} movie.",
    "Who is the king of {country}?", "Are you {q}?", "Draw {a_n}.", "Sing a song about {a_n}.",
    "Compare {a_n} with {a_m}.", "Name five {n}s.", "Guess what is in my {n}.",
)  # fmt: skip

SLOT = re.compile(r"\{(\w+)\}")
TABLE_WORDS = {word for pair in OPPOSITES for word in pair.split()}


def gibberish(rng: random.Random) -> str:
    """Return a made-up word, or letters typed at random."""
    if rng.random() < 0.5:
        return made_up_word(rng)
    return "".join(rng.choice("asdfghjklqwertyuiopzxcvbnm") for _ in range(rng.randint(3, 7)))


FILLERS: dict[str, Callable[[random.Random], str]] = {
    "n": lambda rng: rng.choice(NOUNS),
    "m": lambda rng: rng.choice(NOUNS),
    "name": lambda rng: rng.choice(NAMES) if rng.random() < 0.5 else made_up_word(rng).capitalize(),
    "country": lambda rng: rng.choice(COUNTRIES) if rng.random() < 0.85 else made_up_word(rng).capitalize(),
    "language": lambda rng: rng.choice(LANGUAGES),
    "animal": lambda rng: rng.choice(OTHER_ANIMALS),
    "verb": lambda rng: rng.choice(VERBS),
    "q": lambda rng: rng.choice(QUALITIES),
    "w": lambda rng: rng.choice(NOUNS) if rng.random() < 0.7 else rng.choice(QUALITIES),
    "i": lambda rng: str(rng.randint(100, 2000)),
    "j": lambda rng: str(rng.randint(2, 500)),
    "s": lambda rng: str(rng.randint(1, 99)),
    "t": lambda rng: str(rng.randint(1, 99)),
    "g": gibberish,
}
# Slots whose fillers decide the split as well. Fillers of the other slots occur in both splits.
CONTENT = ("n", "m", "name", "country", "animal", "w", "i", "s", "g")


class Unknown(ExactTask):
    """Answer questions, requests, sums out of range and nonsense with 'I do not know that.'

    The split is by template and by filler: a held-out prompt has a held-out template and held-out content words.
    """

    name = "unknown"
    heldout_share = 0.15

    def sample(self, rng: random.Random, split: Split) -> Example:
        """Draw an example whose template and content words belong to a split."""
        while True:
            template = rng.choice(TEMPLATES)
            if split_of(f"unknown template: {template}", self.heldout_share) == split:
                break
        slots = {slot.removeprefix("a_") for slot in SLOT.findall(template)}
        fillers = {slot: self.draw(rng, slot, split) for slot in FILLERS if slot in slots}
        articles = {f"a_{slot}": with_article(filler) for slot, filler in fillers.items()}
        prompt = reword(rng, template.format(**fillers, **articles))
        key = "|".join((template, *(value for slot, value in fillers.items() if slot in CONTENT)))
        return self.example(prompt, ANSWER, key)

    def foreign(self, rng: random.Random, split: Split) -> Example:
        """Draw an example in another script. ``sample`` draws none: the demo's tokenizer is built from its examples."""
        prompt = foreign_prompt(rng, split)
        return self.example(prompt, ANSWER, prompt)

    def draw(self, rng: random.Random, slot: str, split: Split) -> str:
        """Draw a filler of a slot, from the split if the slot has content words."""
        while True:
            filler = FILLERS[slot](rng)
            if slot == "w" and filler in TABLE_WORDS:
                continue
            if slot not in CONTENT or split_of(f"unknown filler: {filler}", self.heldout_share) == split:
                return filler
