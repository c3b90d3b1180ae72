"""Events of a generation without an engine: random drafts that become a given answer."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

from dgemma_mlx.events import Committed, Done, Draft, Event, Statistics
from dgemma_mlx.text import Tokenizer
from dgemma_mlx.text.parts import Parts, PartsParser

EOS, PAD = 1, 0
EOS_IDS = (EOS, 106)
MAX_STEPS = 48
Events = Iterator[Event]


def draft(
    tokens: Sequence[int], entropy: float | Sequence[float] = 0.01, *, step: int = 1, canvas: int = 0,
    finished: bool = False,
) -> Draft:
    entropies = (entropy,) * len(tokens) if isinstance(entropy, float) else tuple(entropy)
    accepted = tuple(e < 1 for e in entropies)
    return Draft(canvas, step, MAX_STEPS, tuple(tokens), accepted, entropies, finished)


def answer(
    tokenizer: Tokenizer, ids: Iterable[int], seed: int = 0, *, canvas_length: int = 32, steps: int = 4,
    noise: int = 450,
) -> Events:
    """Yield the events of an answer with these ids. Unsettled positions hold random ids below ``noise``."""
    rng = random.Random(seed)
    todo = [*ids, EOS]
    parser, parts, canvas = PartsParser(tokenizer), Parts(), 0
    tokens: tuple[int, ...] = ()
    while todo:
        kept, todo = todo[:canvas_length], todo[canvas_length:]
        final = kept + [PAD] * (canvas_length - len(kept))
        for step in range(1, steps):
            right = [rng.random() < step / steps for _ in final]
            now = [a if ok else rng.randrange(noise) for a, ok in zip(final, right, strict=True)]
            yield draft(now, [rng.random() * (0.2 if ok else 6) for ok in right], step=step, canvas=canvas)
        yield draft(final, step=steps, canvas=canvas, finished=True)
        new = parser.feed(kept) if todo else parser.feed(kept) + parser.finish()
        parts += new
        tokens += tuple(kept)
        yield Committed(canvas, tuple(kept), new.text, new.thinking, new.tool_calls, steps)
        canvas += 1
    statistics = Statistics(1, 0, len(tokens), canvas, canvas * steps, 1.0, 0.0, 1.0, 1.0, 0)
    yield Done(parts.text, parts.thinking, parts.tool_calls, tokens, "stop", seed, statistics)
