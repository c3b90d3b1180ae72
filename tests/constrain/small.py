"""Helpers for tests: tokenizers of a few pieces, enumeration of all canvases, random accepted texts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dgemma_mlx.constrain.automaton import Automaton, automaton_of
from dgemma_mlx.constrain.languages import of_regex
from dgemma_mlx.constrain.machine import Machine
from dgemma_mlx.text.tokenizer import Tokenizer

PAD, EOS, TURN = 0, 1, 2
# Expressions whose canvases are few enough to enumerate, and pieces that their tokenizers may have besides "a" and "b".
REGEXES = ("a*", "(ab|ba)*", "a?b{0,2}", "b+a", "aab|bba?", "(a|bb)*b", "[ab]{2,4}", "(aaa)*", "", "ab*|ba*")
EXTRA = ("ab", "ba", "aa", "abb", "bab")
_CONTROL = {"<pad>": PAD, "<eos>": EOS, "<turn|>": TURN}


class _Pieces:
    """A tokenizer backend for a list of pieces. It cannot encode text."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self._pieces = [*_CONTROL, *pieces]
        self.vocab_size = len(self._pieces)

    def control_tokens(self) -> dict[str, int]:
        return dict(_CONTROL)

    def find(self, token: str) -> int | None:
        return self._pieces.index(token) if token in self._pieces else None

    def token(self, id: int) -> str:
        return self._pieces[id] if 0 <= id < len(self._pieces) else ""

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    spell = encode


def tokenizer_of(*pieces: str) -> Tokenizer:
    """Return a tokenizer with padding (id 0), two end-of-text tokens (ids 1 and 2) and these pieces."""
    return Tokenizer(_Pieces(pieces), {})


def canvases(
    automaton: Automaton, tokenizer: Tokenizer, text: bytes, length: int, room: int, needed: dict[int, int]
) -> Iterator[tuple[int, ...]]:
    """Yield every canvas of ``length`` tokens after ``text`` that matches.

    A canvas matches if it ends the text within ``room`` tokens, or leaves enough room to end it. ``needed`` maps each
    state to the number of tokens that end a text from there.
    """
    for canvas in itertools.product(range(tokenizer.vocab_size), repeat=length):
        end = next((position for position, id in enumerate(canvas) if id in (EOS, TURN)), length)
        if any(id in (PAD, EOS, TURN) for id in canvas[:end]) or any(id > TURN for id in canvas[end:]):
            continue
        state = automaton.after(0, text + b"".join(tokenizer.token_bytes(id) for id in canvas[:end]))
        if state < 0:
            continue
        if (end < room and automaton.accepting[state]) if end < length else needed[state] <= room - length:
            yield canvas


def shares(found: list[tuple[int, ...]], logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the probability of each canvas among the given ones, in proportion to exp of its summed logits (C, V)."""
    scores = np.array([logits[np.arange(len(canvas)), list(canvas)].sum() for canvas in found])
    weights = np.exp(scores - scores.max())
    return np.asarray(weights / weights.sum())


def automaton_of_regex(regex: str) -> Automaton:
    """Return all states of a regular expression's machine."""
    return automaton_of(of_regex(regex), 20_000)[0]


def marginals_of(
    every: list[tuple[int, ...]], logits: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return q and r (C, V) of a projection, and its entropy (C,), from all canvases that match."""
    positions = np.arange(len(logits))
    q, possible = np.zeros(logits.shape), np.zeros(logits.shape, bool)
    for canvas, weight in zip(every, shares(every, logits), strict=True):
        q[positions, canvas] += weight
        possible[positions, canvas] = True
    scores = np.where(possible, logits, -np.inf)
    r = np.exp(scores - scores.max(axis=1, keepdims=True))
    r /= r.sum(axis=1, keepdims=True)
    surprise = -np.log(np.maximum(r, 1e-300))
    return q, r, np.maximum((q * surprise).sum(axis=1), (r * surprise).sum(axis=1))


def text_of(machine: Machine, rng: np.random.Generator, steps: int = 60) -> bytes:
    """Return a text that the machine accepts.

    It is a random walk of up to ``steps`` bytes, followed by the shortest way to an accepting state.
    """
    text, state = [], machine.start
    for _ in range(int(rng.integers(1, steps + 1))):
        row = machine.row(state)
        if not row.states or (state.nullable and rng.random() < 0.1):
            break
        ends = rng.random() < 0.2 and not state.nullable  # otherwise strings would hardly ever end
        text.append(machine.step(state)[0] if ends else int(rng.choice((row.place >= 0).nonzero()[0])))
        state = row.states[row.place[text[-1]]]
    while not state.nullable:
        symbol, state = machine.step(state)
        text.append(symbol)
    return bytes(text)
