"""Automata over the tokens of a tokenizer, derived from automata over bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from threading import Lock
from weakref import proxy

import numpy as np
from numpy.typing import NDArray

from dgemma_mlx.constrain.automaton import DEAD, Automaton, equal_columns, steps_to
from dgemma_mlx.constrain.graph import Edges
from dgemma_mlx.constrain.limits import TooLargeError, check_time
from dgemma_mlx.constrain.paths import Ids, Indices
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.text.tokenizer import Tokenizer

_MAX_BRANCHES = 40  # a state with at most this many next bytes has a skeleton token for each of them
_MAX_TOKEN_BYTES = 32  # longest skeleton token in bytes
# Pairs of states that a token of the skeleton joins. A canvas of 256 with this many takes 0.5 GB.
_MAX_EDGES = 20_000
_GROUP_PAIRS = 100_000  # of a text and a source state that are followed at once, some 10 MB
_UNREACHABLE = 1 << 40  # larger than any number of tokens


class TokenAutomaton:
    """An automaton whose transitions are tokens: a token leads where its bytes lead in an automaton over bytes.

    It has the Q states of the automaton over bytes and one more state, ``end``. End-of-text tokens lead from every
    accepting state to ``end``. There only end-of-text tokens and padding follow, and they stay in ``end``.

    Tokens with the same transitions (pairs of a source state and a target state) form a class. A typical constraint
    divides 262,144 tokens into one or two hundred classes, so code that visits all transitions works with classes.
    Class 0 contains the tokens without transitions. The class of a token is computed on first use.

    Attributes:
        end: The state after an end-of-text token, Q.
        skeleton: (S,) int32. A small set of tokens that suffices to end a text from every state: the tokens that spell
            the shortest way from each state to an accepting state, the shortest way after each next byte of a state
            with few next bytes, and all end-of-text tokens and padding.
        skeleton_classes: (S,) int32. The classes of these tokens: all from 1 to some number.
        shortest: (Q + 1,) int64. The smallest number of skeleton tokens that lead from each state to ``end``, including
            the end-of-text token.
    """

    def __init__(
        self, automaton: Automaton, tokenizer: Tokenizer, eos_ids: Sequence[int], pad_id: int, vocab_size: int
    ) -> None:
        """Derive an automaton over tokens.

        ``eos_ids`` are the tokens that end a text, and ``pad_id`` is the token after them. ``vocab_size`` is the
        model's vocabulary size; it may be smaller than the tokenizer's. Raises ``DgemmaError`` (exit code 2) when the
        vocabulary lacks the tokens to end a text from some state, and ``TooLargeError``.
        """
        # A weak reference: what is kept for a tokenizer must not keep the tokenizer.
        self._automaton, self._tokenizer, self._vocab_size = automaton, proxy(tokenizer), vocab_size
        self._lock = Lock()  # threads share automata, and classes are added to them
        self.end = automaton.size
        self._eos_ids = frozenset(eos_ids)
        self._class_of_id = np.full(vocab_size, -1, np.int32)  # -1: not computed yet
        # The transitions of each class: (n, 2) int32 with source states in column 0 and target states in column 1.
        self._transitions: list[Ids] = [np.zeros((0, 2), np.int32)]
        self._class_of_transitions = {b"": 0}  # the bytes of an array in _transitions -> class
        # Bytes with the same effect in every state have the same number. Texts that are equal after translation to
        # these numbers have the same transitions, so only one of them has to be followed.
        self._byte_numbers = bytes(equal_columns(automaton.table)[1].astype(np.uint8))
        self._class_of_text: dict[bytes, int] = {}  # translated text -> class
        self._sources_of_byte = [
            np.flatnonzero(automaton.table[:, byte] != DEAD).astype(np.int32) for byte in range(256)
        ]
        self._add_end_tokens(pad_id)
        self.skeleton: Ids = np.array(sorted({*self._spelling_ids(), *self._eos_ids, pad_id}), np.int32)
        self._in_skeleton = np.zeros(vocab_size, np.bool_)
        self._in_skeleton[self.skeleton] = True
        self.skeleton_classes = self.classes(self.skeleton)
        self._edges = self._merged()
        if len(self._edges.source) > _MAX_EDGES:
            raise TooLargeError(f"it has {len(self._edges.source):,} transitions; the limit is {_MAX_EDGES:,}")
        self.shortest = self._distances(self._edges.source, self._edges.end)
        if (self.shortest >= _UNREACHABLE).any():
            raise DgemmaError(
                "this model's tokenizer lacks tokens for bytes that the constraint needs",
                "Leave out characters that the tokenizer cannot encode.", exit_code=2,
            )

    def classes(self, ids: Ids) -> Ids:
        """Return the class of each token id, as an int32 array of the same shape as ``ids``."""
        found = self._class_of_id[ids]
        if (found < 0).any():
            with self._lock:
                self._compute_classes(np.unique(ids[found < 0]))
            found = self._class_of_id[ids]
        return found

    def in_skeleton(self, ids: Ids) -> NDArray[np.bool_]:
        """Return whether each token belongs to the skeleton, as an array of the same shape as ``ids``."""
        found: NDArray[np.bool_] = self._in_skeleton[ids]
        return found

    def class_ranks(self, m: int, ids: Ids, classes: Indices) -> Indices:
        """Return ranks (m,), less than ``m + vocab_size``, of the first ``m`` classes with transitions, counted from 0.

        ``classes`` (...) are the classes of the tokens ``ids`` (...), also counted from 0. Classes of the skeleton come
        first, then the others in the order of their smallest ids. Class numbers would be no such order: they depend on
        the tokens that the automaton was asked for before.
        """
        ranks = np.arange(m)
        ranks[int(self.skeleton_classes.max()) :] = m + self._vocab_size - 1
        np.minimum.at(ranks, classes.ravel(), m + ids.ravel().astype(np.intp))  # the dtypes are fast
        return ranks

    def transitions(self, classes: NDArray[np.integer]) -> tuple[Indices, Indices, Indices]:
        """Return all transitions of the classes (m,), as three arrays (E,), sorted by source state and then by index.

        The arrays are the index of the transition's class in ``classes``, its source state and its target state.
        """
        each = [self._transitions[number] for number in classes.tolist()]
        index = np.repeat(np.arange(len(each)), [len(pairs) for pairs in each])
        source, target = np.concatenate(each).T
        order = source.argsort(kind="stable")
        return index[order], source[order].astype(np.intp), target[order].astype(np.intp)

    def edges(self) -> Edges:
        """Return the transitions of all classes known so far, merged.

        The result is the same object until there are more classes.
        """
        with self._lock:
            if self._edges.classes < len(self._transitions) - 1:
                self._edges = self._merged()
            return self._edges

    def _merged(self) -> Edges:
        """Return the transitions of all classes known so far."""
        classes = np.arange(1, len(self._transitions))
        return Edges(len(classes), *self.transitions(classes), self.end + 1)

    def _add_end_tokens(self, pad_id: int) -> None:
        """Set the classes of end-of-text tokens and padding."""
        stay = np.array([[self.end, self.end]], np.int32)
        finish = [(state, self.end) for state in np.flatnonzero(self._automaton.accepting).tolist()]
        self._class_of_id[pad_id] = self._class_with(stay)
        self._class_of_id[list(self._eos_ids)] = self._class_with(np.concatenate([np.array(finish, np.int32), stay]))

    def _class_with(self, pairs: Ids) -> int:
        """Return the class with these transitions (n, 2). Create it if it does not exist."""
        number = self._class_of_transitions.setdefault(pairs.tobytes(), len(self._transitions))
        if number == len(self._transitions):
            self._transitions.append(pairs)
        return number

    def _compute_classes(self, ids: Ids) -> None:
        """Compute and store the classes of tokens (n,)."""
        texts = {id: self._tokenizer.token_bytes(id) for id in ids.tolist()}
        keys = [text.translate(self._byte_numbers) for text in texts.values()]
        new = {key: text for key, text in zip(keys, texts.values(), strict=True) if key not in self._class_of_text}
        for group in self._groups(new):
            check_time()
            self._follow(group)
        self._class_of_id[ids] = [self._class_of_text[key] for key in keys]

    def _groups(self, new: Mapping[bytes, bytes]) -> Iterator[dict[bytes, bytes]]:
        """Yield the texts in groups that ``_follow`` needs little memory for, and so little time."""
        group: dict[bytes, bytes] = {}
        pairs = 0
        for key, text in new.items():
            group[key] = text
            pairs += len(self._sources_of_byte[text[0]]) if text else 0
            if pairs > _GROUP_PAIRS:
                yield group
                group, pairs = {}, 0
        if group:
            yield group

    def _follow(self, new: Mapping[bytes, bytes]) -> None:
        """Compute and store the classes of texts, given as translated text -> text.

        All texts are followed from all states at once, byte by byte. Pairs of a text and a source state that reach
        ``DEAD`` are removed on the way.
        """
        texts = list(new.values())
        firsts = [self._sources_of_byte[text[0]] if text else self._sources_of_byte[0][:0] for text in texts]
        token = np.repeat(np.arange(len(texts)), [len(states) for states in firsts])
        source = np.concatenate(firsts)
        table = self._automaton.table
        lengths = np.array([len(text) for text in texts])
        joined = np.frombuffer(b"".join(texts), np.uint8)
        begin = np.cumsum(lengths) - lengths
        state = source
        for position in range(int(lengths.max(initial=0))):
            going = lengths[token] > position
            byte = joined[np.where(going, begin[token] + position, 0)]
            state = np.where(going, table[state, byte], state)
            live = state != DEAD
            token, source, state = token[live], source[live], state[live]
        pairs = np.stack([source, state], axis=1).astype(np.int32)
        raw, width = pairs.tobytes(), pairs.itemsize * 2
        ends = np.searchsorted(token, np.arange(len(texts)), side="right")
        start = 0
        for key, end in zip(new, ends.tolist(), strict=True):
            number = self._class_of_transitions.get(raw[start * width : end * width])
            self._class_of_text[key] = self._class_with(pairs[start:end].copy()) if number is None else number
            start = end

    def _spelling_ids(self) -> set[int]:
        """Return the ids of all tokens that are prefixes of a spelling text.

        The spelling texts are the shortest text from each state to an accepting state and, for a state with at most
        ``_MAX_BRANCHES`` next bytes, the shortest text after each of these bytes.
        """
        table, completions = self._automaton.table, self._automaton.completions(_MAX_TOKEN_BYTES)
        texts = set(completions)
        for state in range(self._automaton.size):
            check_time()
            following = np.flatnonzero(table[state] != DEAD).tolist()
            if len(following) <= _MAX_BRANCHES:
                texts |= {bytes([byte]) + completions[table[state, byte]] for byte in following}
        prefixes = {text[:length] for text in texts for length in range(1, min(len(text), _MAX_TOKEN_BYTES) + 1)}
        found = (self._tokenizer.id_of_bytes(text) for text in prefixes)
        return {id for id in found if id is not None and id < self._vocab_size and id not in self._eos_ids}

    def _distances(self, source: Indices, target: Indices) -> NDArray[np.int64]:
        """Return the number of transitions (Q + 1,) from each state to ``end``, or ``_UNREACHABLE``.

        Only the given transitions (E,) are used.
        """
        steps = steps_to(source, target, np.arange(self.end + 1) == self.end).astype(np.int64)
        return np.where(steps < 0, _UNREACHABLE, steps)
