"""An automaton over bytes, walked by the tokens of a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dgemma_mlx.constrain.automaton import DEAD, Automaton
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.text.tokenizer import Tokenizer

_NARROW = 40  # bytes: a state with no more ways on has each of them spelled out
_LONGEST = 32  # bytes of a token that is looked for
_FAR = 1 << 40

Ids = NDArray[np.int32]


class TokenAutomaton:
    """States are the automaton's and one more, ``end``: behind an end-of-text token, where padding follows.

    Tokens that lead from the same states to the same states are one class; class 0 leads nowhere. A token's class is
    worked out when it is first asked for. ``skeleton`` (S,) are tokens that keep every state alive: those that spell
    the shortest way to an accepting state and, where few bytes may follow, the shortest way behind each of these;
    end-of-text tokens and padding. ``shortest`` (Q + 1,) says how many of them it takes to come from a state to the
    end, the end-of-text token included.
    """

    def __init__(
        self, automaton: Automaton, tokenizer: Tokenizer, eos_ids: Sequence[int], pad_id: int, vocab_size: int
    ) -> None:
        """``eos_ids`` end the text; ``vocab_size`` is the model's, which may be smaller than the tokenizer's."""
        self._automaton, self._tokenizer, self._vocab_size = automaton, tokenizer, vocab_size
        self.end = automaton.size
        self._eos_ids = frozenset(eos_ids)
        self._classes = np.full(vocab_size, -1, np.int32)
        self._pairs: list[Ids] = [np.zeros((0, 2), np.int32)]
        """of each class: from which state (n, 0) to which (n, 1)"""
        self._numbers = {b"": 0}
        self._alike = bytes(np.unique(automaton.table, axis=1, return_inverse=True)[1].astype(np.uint8).ravel())
        """bytes that do the same in every state have the same number"""
        self._known: dict[bytes, int] = {}
        """the classes of texts, written in these numbers"""
        self._starts = [np.flatnonzero(automaton.table[:, byte] != DEAD).astype(np.int32) for byte in range(256)]
        self._add_ends(pad_id)
        self.skeleton: Ids = np.array(sorted({*self._spelling(), *self._eos_ids, pad_id}), np.int32)
        _, source, target = self.pairs(np.unique(self.classes(self.skeleton)))
        self.shortest = self._distances(source, target)
        if (self.shortest >= _FAR).any():
            raise DgemmaError("this model's tokenizer lacks tokens for bytes that the constraint needs", exit_code=2)

    def classes(self, ids: Ids) -> Ids:
        """The class of each token, in the shape of ``ids``."""
        found = self._classes[ids]
        if (found < 0).any():
            self._learn(np.unique(ids[found < 0]))
            found = self._classes[ids]
        return found

    def pairs(self, classes: Ids) -> tuple[Ids, Ids, Ids]:
        """All transitions of some classes: the place of the class in ``classes``, from, to."""
        each = [self._pairs[number] for number in classes.tolist()]
        place = np.repeat(np.arange(len(each), dtype=np.int32), [len(pairs) for pairs in each])
        both = np.concatenate(each)
        return place, both[:, 0], both[:, 1]

    def advance(self, state: int, ids: Iterable[int]) -> int:
        """The state behind these tokens, or ``DEAD``."""
        for id in ids:
            if state == self.end:
                break
            if id in self._eos_ids:
                state = self.end if self._automaton.accepting[state] else DEAD
            else:
                text = self._tokenizer.token_bytes(id)
                state = self._automaton.after(state, text) if text else DEAD
            if state == DEAD:
                break
        return state

    def _add_ends(self, pad_id: int) -> None:
        """End-of-text tokens lead from accepting states to the end; there they and padding stay."""
        stay = np.array([[self.end, self.end]], np.int32)
        finish = [(state, self.end) for state in np.flatnonzero(self._automaton.accepting).tolist()]
        self._classes[pad_id] = self._class_of(stay)
        self._classes[list(self._eos_ids)] = self._class_of(np.concatenate([np.array(finish, np.int32), stay]))

    def _class_of(self, pairs: Ids) -> int:
        """The number of the class with these pairs, a new one where there is none yet."""
        number = self._numbers.setdefault(pairs.tobytes(), len(self._pairs))
        if number == len(self._pairs):
            self._pairs.append(pairs)
        return number

    def _learn(self, ids: Ids) -> None:
        """Finds the classes of new tokens (n,)."""
        texts = {id: self._tokenizer.token_bytes(id) for id in ids.tolist()}
        keys = [text.translate(self._alike) for text in texts.values()]
        new = {key: text for key, text in zip(keys, texts.values(), strict=True) if key not in self._known}
        if new:
            self._follow(new)
        self._classes[ids] = [self._known[key] for key in keys]

    def _follow(self, new: Mapping[bytes, bytes]) -> None:
        """Follows texts from all states, all at once, byte by byte; what has died on the way is left out."""
        texts = list(new.values())
        firsts = [self._starts[text[0]] if text else self._starts[0][:0] for text in texts]
        token = np.repeat(np.arange(len(texts)), [len(states) for states in firsts])
        source = np.concatenate(firsts)
        table = self._automaton.table
        lengths = np.array([len(text) for text in texts])
        joined = np.frombuffer(b"".join(texts), np.uint8)
        begin = np.cumsum(lengths) - lengths
        state = source
        for place in range(int(lengths.max(initial=0))):
            going = lengths[token] > place
            byte = joined[np.where(going, begin[token] + place, 0)]
            state = np.where(going, table[state, byte], state)
            live = state != DEAD
            token, source, state = token[live], source[live], state[live]
        pairs = np.stack([source, state], axis=1).astype(np.int32)
        raw, width = pairs.tobytes(), pairs.itemsize * 2
        ends = np.searchsorted(token, np.arange(len(texts)), side="right")
        start = 0
        for key, end in zip(new, ends.tolist(), strict=True):
            number = self._numbers.get(raw[start * width : end * width])
            self._known[key] = self._class_of(pairs[start:end].copy()) if number is None else number
            start = end

    def _spelling(self) -> set[int]:
        """The tokens that texts behind each state begin with."""
        table, shortest = self._automaton.table, self._automaton.completions()
        texts = set(shortest)
        for state in range(self._automaton.size):
            following = np.flatnonzero(table[state] != DEAD).tolist()
            if len(following) <= _NARROW:
                texts |= {bytes([byte]) + shortest[table[state, byte]][:_LONGEST] for byte in following}
        beginnings = {text[:length] for text in texts for length in range(1, min(len(text), _LONGEST) + 1)}
        found = (self._tokenizer.id_of_bytes(text) for text in beginnings)
        return {id for id in found if id is not None and id < self._vocab_size and id not in self._eos_ids}

    def _distances(self, source: Ids, target: Ids) -> NDArray[np.int64]:
        """(Q + 1,) tokens from each state to the end, along these transitions; ``_FAR`` where there is no way."""
        distance = np.full(self.end + 1, _FAR, np.int64)
        distance[self.end] = 0
        while True:
            shorter = distance.copy()
            np.minimum.at(shorter, source, np.minimum(distance[target] + 1, _FAR))
            if (shorter == distance).all():
                return distance
            distance = shorter
