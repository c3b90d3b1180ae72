"""The canvas that a constraint allows: dynamic programming over positions.

A canvas is a path through the token automaton, one token a position; its weight is the product of the tokens'
probabilities. The most probable path is the argmax canvas (DINGO, arXiv 2505.23061). Sums over all paths give a sample
of whole canvases, and each position's distribution q, given that the whole canvas matches. Positions' normalisers are
the same for all paths, so scores may be logits.

q alone is too sure of itself. The model says what it thinks of each position without knowing of the others; where that
does not fit together (it wavers where a name ends), the product of all soon decides, and the entropy of q is near 0
before the model has seen the decision. So acceptance and stopping go by -sum q log r, the cross entropy with r, the
model's own distribution over what any matching canvas may have at the position, or by the entropy of r where that is
higher. Both are 0 where the model agrees; where it does not, the position is left to be decided again, by a model that
sees more.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dgemma_mlx.constrain.vocabulary import Ids, TokenAutomaton

Floats = NDArray[np.float64]
_LARGEST = 1e6  # of a score: sums over a canvas stay finite, and above -_FAR
_FAR = 1e12
_TINY = 1e-300
_BELOW_ONE = 1 - 2.0**-53


class Projected(NamedTuple):
    """A canvas under the constraint."""

    argmax: Ids
    """(C,): the most probable canvas"""
    sample: Ids
    """(C,): a canvas drawn from all"""
    entropy: Floats
    """(C,) nats: how sure each position is, see above"""
    gap: Floats
    """(C,) how far a position's most probable token is ahead of all others, in the less clear of the two; 0 or more"""


def project(
    tokens: TokenAutomaton, state: int, room: int, skeleton_scores: Floats, ids: Ids, scores: Floats, uniforms: Floats
) -> Projected:
    """The canvases from ``state`` on that can be ended within ``room`` tokens, counted from the canvas' first.

    ``skeleton_scores`` (C, S) are logits of ``tokens.skeleton``, ``scores`` (C, k) those of other candidates ``ids``
    (C, k), which may be among the skeleton; ``uniforms`` (C,) in [0, 1) draw the sample. ``room`` has to be at least
    ``tokens.shortest[state]``.
    """
    table = _Candidates(tokens, skeleton_scores, ids, scores)
    limit = min(len(ids), room)
    paths = _Paths(tokens, table, state, limit, tokens.shortest <= room - limit)
    with np.errstate(divide="ignore"):  # log(0) is what is meant
        transitions, alive = paths.transitions()
    marginals, possible = paths.marginals(transitions, alive)
    probability, own = table.probabilities(marginals), table.own(possible)  # (C, N)
    surprise = -np.log(np.maximum(own, _TINY))
    entropy = np.maximum((probability * surprise).sum(axis=1), (own * surprise).sum(axis=1))
    first = probability.argmax(axis=1)[:, None]
    gap = np.minimum(_lead(probability, first), _lead(own, first))
    return Projected(paths.best(), paths.draw(transitions, uniforms), np.maximum(entropy, 0), np.maximum(gap, 0))


def _lead(probability: Floats, first: NDArray[np.int64]) -> Floats:
    """(C, N), (C, 1) -> (C,): how far a candidate is ahead of all others."""
    others = probability.copy()
    np.put_along_axis(others, first, 0, axis=1)
    lead: Floats = np.take_along_axis(probability, first, axis=1)[:, 0] - others.max(axis=1)
    return lead


class _Candidates:
    """The candidate tokens of all positions, by class. N candidates a position, m classes among them."""

    def __init__(self, tokens: TokenAutomaton, skeleton_scores: Floats, ids: Ids, scores: Floats) -> None:
        C, S = skeleton_scores.shape
        skeleton = np.broadcast_to(tokens.skeleton, (C, S))
        self.ids = np.concatenate([skeleton, ids], axis=1)  # (C, N)
        classes = tokens.classes(self.ids)
        known = np.zeros(int(self.ids.max()) + 1, np.bool_)
        known[tokens.skeleton] = True
        usable = np.concatenate([np.ones((C, S), np.bool_), ~known[ids] & (classes[:, S:] > 0)], axis=1)
        z = np.nan_to_num(np.concatenate([skeleton_scores, scores], axis=1), nan=-_LARGEST)
        z = np.where(usable, np.clip(z, -_LARGEST, _LARGEST), -np.inf)
        self.classes = np.unique(classes[usable])
        numbers = np.zeros(int(self.classes[-1]) + 1, np.int64)
        numbers[self.classes] = np.arange(len(self.classes))
        self.number = np.where(usable, numbers[np.where(usable, classes, 0)], 0)  # (C, N)
        m = len(self.classes)
        place = (self.number + m * np.arange(C)[:, None]).ravel()
        largest = np.full(C * m, -np.inf)
        np.maximum.at(largest, place, z.ravel())
        with np.errstate(invalid="ignore"):
            self.weights = np.where(usable, np.exp(z - largest[place].reshape(z.shape)), 0)  # (C, N)
        self.largest = largest.reshape(C, m)
        self.sums = np.bincount(place, self.weights.ravel(), C * m).reshape(C, m)
        """of the weights in a class: relative to its most probable token"""

    def probabilities(self, of_classes: Floats) -> Floats:
        """Of classes (C, m) -> of candidates (C, N)."""
        share = np.divide(of_classes, self.sums, out=np.zeros_like(of_classes), where=self.sums > 0)
        probabilities: Floats = np.take_along_axis(share, self.number, axis=1) * self.weights
        return probabilities

    def own(self, possible: NDArray[np.bool_]) -> Floats:
        """(C, m): which classes are possible -> (C, N): the model's probabilities of candidates among these."""
        scores = np.where(possible, self.largest, -np.inf)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= (shares * self.sums).sum(axis=1, keepdims=True)
        probabilities: Floats = np.take_along_axis(shares, self.number, axis=1) * self.weights
        return probabilities

    def most_probable(self, numbers: NDArray[np.int64]) -> Ids:
        """(C,) the most probable token of a class, one at each position."""
        places = np.where(self.number == numbers[:, None], self.weights, 0).argmax(axis=1)
        tokens: Ids = np.take_along_axis(self.ids, places[:, None], axis=1)[:, 0]
        return tokens

    def pick(self, position: int, number: int, uniform: float) -> int:
        """A token of a class at a position, drawn by inverse CDF."""
        weights = np.where(self.number[position] == number, self.weights[position], 0)
        return int(self.ids[position, _pick(weights, uniform)[0]])


class _Paths:
    """All paths of a canvas, E transitions a position, in the order of the states that they leave."""

    def __init__(
        self, tokens: TokenAutomaton, table: _Candidates, state: int, limit: int, allowed: NDArray[np.bool_]
    ) -> None:
        """Paths from ``state`` that are in one of the ``allowed`` (Q + 1,) states behind ``limit`` positions."""
        number, source, target = tokens.pairs(table.classes)
        order = np.argsort(source, kind="stable")
        self._table, self._state = table, state
        self._number, self._source, self._target = number[order], source[order], target[order]
        self._left, self._first, counts = np.unique(self._source, return_index=True, return_counts=True)
        self._segment = np.repeat(np.arange(len(self._left)), counts)  # (E,)
        self._bounds = np.zeros(tokens.end + 2, np.int64)  # of each state's transitions
        self._bounds[self._left + 1] = counts
        self._bounds = np.cumsum(self._bounds)
        self._final = np.where(allowed, 0.0, -np.inf)
        self._limit = limit

    def best(self) -> Ids:
        """(C,) the tokens of the most probable path."""
        table, scores = self._table, self._table.largest[:, self._number]
        ahead: Floats = np.zeros(len(self._final))  # the best score from each state to the end of the canvas
        for i in range(len(scores) - 1, -1, -1):
            scores[i] += self._behind(i, ahead)
            ahead = np.full(len(ahead), -np.inf)
            ahead[self._left] = np.maximum.reduceat(scores[i], self._first)
        path: NDArray[np.int64] = np.zeros(len(scores), np.int64)
        state = self._state
        for i in range(len(scores)):
            place = self._bounds[state] + scores[i, self._bounds[state] : self._bounds[state + 1]].argmax()
            path[i], state = self._number[place], int(self._target[place])
        return table.most_probable(path)

    def transitions(self) -> tuple[Floats, NDArray[np.bool_]]:
        """(C, E) the probability of each transition, given the state that it leaves, and all that has to follow; and
        (C, E) whether a matching canvas may take it."""
        result: Floats = (self._table.largest + np.log(self._table.sums))[:, self._number]
        alive = np.zeros(result.shape, np.bool_)
        ahead: Floats = np.zeros(len(self._final))  # the logarithm of the sum over all paths from each state
        for i in range(len(result) - 1, -1, -1):
            scores = result[i] + self._behind(i, ahead)
            largest = np.maximum(np.maximum.reduceat(scores, self._first), -_FAR)
            weights = np.exp(scores - largest[self._segment])
            sums = np.add.reduceat(weights, self._first)
            ahead = np.full(len(ahead), -np.inf)
            ahead[self._left] = largest + np.log(sums)
            result[i] = weights / np.maximum(sums, _TINY)[self._segment]
            alive[i] = scores > -np.inf
        return result, alive

    def marginals(self, transitions: Floats, alive: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.bool_]]:
        """(C, m): how probable each class is at each position, and whether any matching canvas has it there."""
        C, m = self._table.sums.shape
        result, possible = np.zeros((C, m)), np.zeros((C, m), np.bool_)
        there: Floats = np.zeros(len(self._final))
        there[self._state] = 1
        reached = there > 0
        for i in range(C):
            taken = there[self._source] * transitions[i]
            result[i] = np.bincount(self._number, taken, m)
            there = np.bincount(self._target, taken, len(there)).astype(np.float64)
            live = alive[i] & reached[self._source]
            possible[i, self._number[live]] = True
            reached = np.zeros(len(there), np.bool_)
            reached[self._target[live]] = True
        return result, possible

    def draw(self, transitions: Floats, uniforms: Floats) -> Ids:
        """(C,) the tokens of a path, drawn from all."""
        state, tokens = self._state, np.zeros(len(uniforms), np.int32)
        for i, uniform in enumerate(uniforms.tolist()):
            first, last = self._bounds[state], self._bounds[state + 1]
            place, rest = _pick(transitions[i, first:last], uniform)
            tokens[i] = self._table.pick(i, int(self._number[first + place]), rest)
            state = int(self._target[first + place])
        return tokens

    def _behind(self, i: int, ahead: Floats) -> Floats:
        """(E,) of the states behind position i, by what is known of them, where they are allowed."""
        return (ahead + self._final if i + 1 == self._limit else ahead)[self._target]


def _pick(weights: Floats, uniform: float) -> tuple[int, float]:
    """A place with a weight above 0, drawn by inverse CDF; and the number in [0, 1) that is left to draw within it."""
    cumulative = weights.cumsum()
    target = uniform * cumulative[-1]
    place = min(np.searchsorted(cumulative, target, side="right"), np.searchsorted(cumulative, cumulative[-1]))
    rest = (target - cumulative[place] + weights[place]) / weights[place]
    return int(place), float(min(max(rest, 0.0), _BELOW_ONE))
