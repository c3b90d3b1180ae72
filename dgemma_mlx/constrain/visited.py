"""The part of a machine that canvases visit, with tokens for its steps: states by number, and where tokens lead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgemma_mlx.constrain.limits import check_time
from dgemma_mlx.constrain.machine import BYTES, Machine
from dgemma_mlx.constrain.paths import Ids, Indices
from dgemma_mlx.constrain.terms import Term
from dgemma_mlx.text.tokenizer import Tokenizer

ENDED = 0  # the state after an end-of-text token
_DEAD, _UNKNOWN = -1, -2
UNSPELLABLE = 1 << 40  # more than any number of tokens
TOO_LONG = 1 << 39  # so is this
_MOST_SPELLED = 200_000  # symbols of a completion; a longer one is too long for any answer
_MAX_BRANCHES = 40  # a state with at most this many next symbols has a token for each of them
_MAX_TOKEN_BYTES = 32  # longest token that ``spelling`` considers, in bytes
_MOST_MOVES = 16_000_000  # known moves, 4 bytes each
_MOST_STATES, _MOST_TOKENS = 20_000, 40_000  # 1 KB and 0.1 KB each


class Spelling:
    """Tokens of a machine's symbols: what a token writes, and which token writes something.

    Attributes:
        eos_ids: Tokens that end a text.
        pad_id: The token after them.
        vocab_size: Number of tokens of the model.
    """

    def __init__(
        self, machine: Machine, tokenizer: Tokenizer, eos_ids: Sequence[int], pad_id: int, vocab_size: int
    ) -> None:
        self.eos_ids, self.pad_id, self.vocab_size = tuple(eos_ids), pad_id, vocab_size
        self._tokenizer = tokenizer
        self._control_ids = [tokenizer.special_ids[name] for name in machine.controls]
        self._symbols = {id: (BYTES + number,) for number, id in enumerate(self._control_ids)}

    def symbols(self, id: int) -> Sequence[int]:
        """Return the symbols that a token writes; none for a token that is not text."""
        return self._symbols.get(id) or self._tokenizer.token_bytes(id)

    def prefixes(self, symbols: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield the tokens that write a prefix of some symbols, shortest first: length and id."""
        if symbols and symbols[0] >= BYTES:
            yield 1, self._control_ids[symbols[0] - BYTES]
            return
        stop = next((n for n, symbol in enumerate(symbols) if symbol >= BYTES), len(symbols))
        text = bytes(symbols[: min(stop, _MAX_TOKEN_BYTES)])
        for length in range(1, len(text) + 1):
            id = self._tokenizer.id_of_bytes(text[:length])
            if id is not None and id < self.vocab_size and id not in self.eos_ids:
                yield length, id


class Visited:
    """The visited states of one machine.

    State 0 is ``ENDED``. Every other state has a *spelling*: tokens that write its completion, the shortest text that
    ends it, and an end-of-text token, as few as possible.

    Attributes:
        lock: Held by a thread that uses it; see ``Machine``.
        spell: (cap,) int64. Number of tokens of each state's spelling; ``UNSPELLABLE`` where the tokenizer has none,
            and ``TOO_LONG`` where it is too long for any answer.
    """

    def __init__(self, machine: Machine, spelling: Spelling) -> None:
        self._machine, self._spelling, self.lock = machine, spelling, machine.lock
        self._numbers: dict[Term, int] = {}
        self._terms: list[Term] = []
        self._table = np.full((256, machine.terms.size), _DEAD, np.int32)
        self._expanded = np.zeros(256, np.bool_)
        self.spell = np.full(256, _UNKNOWN, np.int64)
        self._followers: dict[int, tuple[int, int]] = {}  # first symbol of a state's completion, and the state after it
        self._canonical_tokens, self._canonical_targets = np.zeros(256, np.intp), np.zeros(256, np.intp)
        self._skeletons = np.zeros((2, 1024), np.intp)  # token and target
        self._skeletons_used = 0
        self._skeleton_firsts, self._skeleton_counts = np.zeros(256, np.intp), np.zeros(256, np.intp)
        self._local = np.full(spelling.vocab_size, -1, np.intp)
        self.ids: list[int] = []
        self._lengths = np.zeros(1024, np.int32)
        self._texts = np.zeros((1024, _MAX_TOKEN_BYTES), np.int16)
        # The state that each token leads to from some states: the rows in use, and the row of each state or -1.
        self._moves = np.full((64, 1024), _UNKNOWN, np.int32)
        self._rows_used, self._move_rows = 0, np.full(256, -1, np.intp)
        self.number(machine.terms.none)  # ENDED
        self.spell[ENDED], self._expanded[ENDED] = 0, True
        self._canonical_tokens[ENDED] = self._add_token(spelling.pad_id)

    def __len__(self) -> int:
        """Return the number of states."""
        return len(self._terms)

    @property
    def is_full(self) -> bool:
        """Whether it has grown so much that the next canvas should begin a new one."""
        return len(self._terms) > _MOST_STATES or len(self.ids) > _MOST_TOKENS

    def number(self, state: Term) -> int:
        """Return the number of a state."""
        found = self._numbers.setdefault(state, len(self._terms))
        if found == len(self._terms):
            self._terms.append(state)
            if found == len(self._expanded):
                self._table = _grown(self._table, _DEAD)
                self._expanded = _grown(self._expanded, False)
                self.spell = _grown(self.spell, _UNKNOWN)
                self._move_rows = _grown(self._move_rows, -1)
                self._canonical_tokens = _grown(self._canonical_tokens, 0)
                self._canonical_targets = _grown(self._canonical_targets, 0)
                self._skeleton_firsts = _grown(self._skeleton_firsts, 0)
                self._skeleton_counts = _grown(self._skeleton_counts, 0)
        return found

    def tokens(self, ids: Ids) -> Indices:
        """Return numbers for tokens, in the same shape, which all other methods use in place of ids."""
        found = self._local[ids]
        if (found < 0).any():
            for id in np.unique(ids[found < 0]).tolist():
                self._add_token(id)
            found = self._local[ids]
        return found

    def _add_token(self, id: int) -> int:
        """Number a token."""
        if self._local[id] >= 0:
            return int(self._local[id])
        number = len(self.ids)
        symbols = self._spelling.symbols(id)
        if number == len(self._lengths):
            self._lengths, self._texts = _grown(self._lengths, 0), _grown(self._texts, 0)
        if len(symbols) > self._texts.shape[1]:
            self._texts = np.pad(self._texts, [(0, 0), (0, len(symbols) - self._texts.shape[1])])
        self._lengths[number], self._texts[number, : len(symbols)] = len(symbols), list(symbols)
        self._local[id] = number
        self.ids.append(id)
        return number

    def _expand(self, states: Indices) -> None:
        """Fill the rows of different states."""
        for state in states.tolist():
            row = self._machine.row(self._terms[state])
            targets = np.array([*map(self.number, row.states), _DEAD], np.int32)
            self._table[state], self._expanded[state] = targets[row.place], True

    def moves(self, states: Indices, tokens: Indices) -> NDArray[np.int32]:
        """Return the state that each token (k,) leads to from each state (n,): (n, k), -1 where it leads nowhere."""
        rows = self._rows_of_moves(states, len(self.ids))
        found = self._moves[rows[:, None], tokens]
        if (found == _UNKNOWN).any():
            row, column = (found == _UNKNOWN).nonzero()
            found[row, column] = self._follow(states[row], tokens[column])
            self._moves[rows[:, None], tokens] = found
        return found

    def _rows_of_moves(self, states: Indices, tokens: int) -> Indices:
        """Return the rows of states in the array of moves, which gets room for so many tokens."""
        if self._moves.shape[1] < tokens:
            width = 1 << (tokens - 1).bit_length()
            self._moves = np.pad(
                self._moves, [(0, 0), (0, width - self._moves.shape[1])], constant_values=_UNKNOWN
            )
        new = states[self._move_rows[states] < 0]
        if (self._rows_used + len(new)) * self._moves.shape[1] > _MOST_MOVES:
            self._moves = np.full((64, self._moves.shape[1]), _UNKNOWN, np.int32)
            self._move_rows[:], self._rows_used = -1, 0
            new = states
        if self._rows_used + len(new) > len(self._moves):
            self._moves = _grown(self._moves, _UNKNOWN, self._rows_used + len(new))
        self._move_rows[new] = np.arange(self._rows_used, self._rows_used + len(new))
        self._rows_used += len(new)
        rows: Indices = self._move_rows[states]
        return rows

    def _follow(self, states: Indices, tokens: Indices) -> NDArray[np.int32]:
        """Return the state that a token leads to from a state, for pairs (n,) of them."""
        result = np.full(len(states), _DEAD, np.int32)
        self._follow_ends(states, tokens, result)
        lengths = self._lengths[tokens]
        pair = (lengths > 0).nonzero()[0]
        state, token = states[pair], tokens[pair]
        position = 0
        while len(pair):
            check_time()
            new = state[~self._expanded.take(state)]
            if len(new):
                self._expand(np.unique(new))
            state = self._table[state, self._texts[token, position]]
            live = (state >= 0).nonzero()[0]
            pair, state, token = pair[live], state[live], token[live]
            position += 1
            going = self._lengths[token] > position
            done = (~going).nonzero()[0]
            if len(done):
                result[pair[done]] = state[done]
                rest = going.nonzero()[0]
                pair, state, token = pair[rest], state[rest], token[rest]
        return result

    def _follow_ends(self, states: Indices, tokens: Indices, result: NDArray[np.int32]) -> None:
        """Do the same for end-of-text tokens and padding."""
        for id in (*self._spelling.eos_ids, self._spelling.pad_id):
            for pair in (tokens == self._local[id]).nonzero()[0].tolist() if self._local[id] >= 0 else ():
                state = int(states[pair])
                ends = state == ENDED or (id in self._spelling.eos_ids and self._terms[state].nullable)
                result[pair] = ENDED if ends else _DEAD

    def spell_out(self, states: Indices) -> None:
        """Compute the spellings of states that have none yet."""
        for state in states[self.spell[states] == _UNKNOWN].tolist():
            self._spell_out(state)

    def _spell_out(self, state: int) -> None:
        """Compute the spellings along the completion of one state, from its end to its beginning."""
        if self._machine.terms.least(self._terms[state]) > _MOST_SPELLED:
            self.spell[state] = TOO_LONG
            return
        chain, symbols = [state], []
        known = 0  # states at the end of the chain whose spellings are known: no token is longer
        while not self._terms[chain[-1]].nullable and known < _MAX_TOKEN_BYTES:
            symbol, following = self._completion_step(chain[-1])
            symbols.append(symbol)
            chain.append(following)
            check_time()
            known = known + 1 if self.spell[following] >= 0 else 0
        for place in range(len(chain) - 1, -1, -1):
            here = chain[place]
            if self.spell[here] >= 0:
                continue
            if self._terms[here].nullable:
                self.spell[here], self._canonical_tokens[here] = 1, self._add_token(self._spelling.eos_ids[0])
                continue
            self.spell[here] = UNSPELLABLE
            for length, id in self._spelling.prefixes(symbols[place : place + _MAX_TOKEN_BYTES]):
                if place + length < len(chain) and self.spell[chain[place + length]] < self.spell[here]:
                    self.spell[here] = self.spell[chain[place + length]] + 1
                    self._canonical_tokens[here] = self._add_token(id)
                    self._canonical_targets[here] = chain[place + length]

    def _completion_step(self, state: int) -> tuple[int, int]:
        """Return the first symbol of a state's completion and the state after it."""
        if state not in self._followers:
            symbol, after = self._machine.step(self._terms[state])
            self._followers[state] = symbol, self.number(after)
        return self._followers[state]

    def canonical(self, states: Indices) -> tuple[Indices, Indices]:
        """Return the first token of the spelling of each state (n,), and the states after them."""
        return self._canonical_tokens[states], self._canonical_targets[states]

    def skeletons(self, states: Indices) -> tuple[Indices, Indices, Indices]:
        """Return tokens that states (n,) need besides the probable ones.

        Each has the first token of its spelling; where few symbols follow, the shortest and the longest token of the
        shortest text after each of them; and where a text may end, all end-of-text tokens. Return three arrays (E,):
        the index of the state, the token, and the state that it leads to.
        """
        for state in states[self._skeleton_counts[states] == 0].tolist():
            tokens = self._skeleton(state)
            first, self._skeletons_used = self._skeletons_used, self._skeletons_used + len(tokens)
            if self._skeletons_used > self._skeletons.shape[1]:
                self._skeletons = _grown(self._skeletons.T, 0, self._skeletons_used).T.copy()
            self._skeletons[:, first : self._skeletons_used] = list(tokens), list(tokens.values())
            self._skeleton_firsts[state], self._skeleton_counts[state] = first, len(tokens)
        counts = self._skeleton_counts.take(states)
        source = np.arange(len(states)).repeat(counts)
        firsts = self._skeleton_firsts.take(states)
        token, target = self._skeletons[:, (firsts + counts - counts.cumsum()).repeat(counts) + np.arange(len(source))]
        return source, token, target

    def _skeleton(self, state: int) -> dict[int, int]:
        """Return the tokens of one state, and the states that they lead to."""
        found = {int(self._canonical_tokens[state]): int(self._canonical_targets[state])}
        term = self._terms[state]
        if state == ENDED or term.nullable:
            found |= {self._add_token(id): ENDED for id in self._spelling.eos_ids}
        if state != ENDED:
            row = self._machine.row(term)
            symbols = (row.place >= 0).nonzero()[0].tolist()
            for symbol in symbols if len(symbols) <= _MAX_BRANCHES else ():
                found |= self._branch(symbol, self.number(row.states[row.place[symbol]]))
        return found

    def _branch(self, symbol: int, state: int) -> dict[int, int]:
        """Return the shortest and the longest token of a symbol and the completion of the state after it."""
        symbols, chain = [symbol], [state]
        while not self._terms[chain[-1]].nullable and len(symbols) < _MAX_TOKEN_BYTES:
            following = self._completion_step(chain[-1])
            symbols.append(following[0])
            chain.append(following[1])
        tokens = list(self._spelling.prefixes(symbols))
        return {self._add_token(id): chain[length - 1] for length, id in (tokens[:1] + tokens[-1:])}


def _grown(array: NDArray[Any], fill: int, least: int = 0) -> NDArray[Any]:
    """Return a copy of an array with twice as many rows, or more."""
    rows = np.full((max(len(array), least - len(array)), *array.shape[1:]), fill, array.dtype)
    return np.concatenate([array, rows])
