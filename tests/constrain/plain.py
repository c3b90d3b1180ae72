"""The projection in its plain form: every position visits every transition, and all sums are sums of logarithms."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dgemma_mlx.constrain.paths import Floats, Ids
from dgemma_mlx.constrain.projection import Projected
from dgemma_mlx.constrain.vocabulary import TokenAutomaton

_MAX_SCORE = 1e6  # scores are clipped to +-1e6, so that sums over a canvas stay finite and above -_FAR
_FAR = 1e12
_TINY = 1e-300
_BELOW_ONE = 1 - 2.0**-53


def project(
    automaton: TokenAutomaton,
    state: int,
    room: int,
    skeleton_scores: Floats,
    ids: Ids,
    scores: Floats,
    uniforms: Floats,
) -> Projected:
    """Project one canvas of C positions onto a constraint.

    The result covers all canvases that begin in ``state`` of the automaton and leave enough room to end the text. At
    most ``room`` tokens may be written from the first position of the canvas on, including the end-of-text token.
    ``room`` must be at least ``automaton.shortest[state]``.

    ``skeleton_scores`` (C, S) float64 are logits of the tokens ``automaton.skeleton``. ``scores`` (C, k) float64 are
    logits of further candidates ``ids`` (C, k) int32, which may repeat tokens of the skeleton. ``uniforms`` (C,)
    float64 are random numbers in [0, 1) that determine the sample.
    """
    candidates = _Candidates(automaton, skeleton_scores, ids, scores)
    limit = min(len(ids), room)
    paths = _Paths(automaton, candidates, state, limit, automaton.shortest <= room - limit)
    with np.errstate(divide="ignore"):  # log(0) = -inf is intended
        transitions, alive = paths.transitions()
    marginals, possible = paths.marginals(transitions, alive)
    q, r = candidates.probabilities(marginals), candidates.restricted_probabilities(possible)  # (C, N)
    surprise = -np.log(np.maximum(r, _TINY))
    entropy = np.maximum((q * surprise).sum(axis=1), (r * surprise).sum(axis=1))
    best = q.argmax(axis=1)[:, None]
    gap = np.minimum(_lead(q, best), _lead(r, best))
    return Projected(paths.best(), paths.draw(transitions, uniforms), np.maximum(entropy, 0), np.maximum(gap, 0))


def _lead(probability: Floats, best: NDArray[np.int64]) -> Floats:
    """Return the probability of the candidate ``best`` (C, 1) minus the largest of all others: (C, N) -> (C,)."""
    others = probability.copy()
    np.put_along_axis(others, best, 0, axis=1)
    lead: Floats = np.take_along_axis(probability, best, axis=1)[:, 0] - others.max(axis=1)
    return lead


class _Candidates:
    """The candidate tokens of all positions: N candidates per position, which belong to m classes altogether.

    The candidates of a position are the skeleton and the probable tokens. A candidate is unusable if it repeats a token
    of the skeleton or has no transitions. Classes are numbered from 0 to m - 1 here.

    Attributes:
        ids: (C, N) int32. Token ids.
        classes: (m,) int32. The class in the token automaton for each class number.
        number: (C, N) int64. Class number of each candidate; 0 for an unusable candidate.
        weights: (C, N) float64. Probability of each candidate relative to the most probable candidate of its class at
            the position; 0 for an unusable candidate.
        largest: (C, m) float64. Largest score in each class, or -inf when the class has no candidate at the position.
        sums: (C, m) float64. Sum of the weights in each class.
    """

    def __init__(self, automaton: TokenAutomaton, skeleton_scores: Floats, ids: Ids, scores: Floats) -> None:
        C, S = skeleton_scores.shape
        skeleton = np.broadcast_to(automaton.skeleton, (C, S))
        self.ids = np.concatenate([skeleton, ids], axis=1)
        classes = automaton.classes(self.ids)
        in_skeleton = np.zeros(int(self.ids.max()) + 1, np.bool_)
        in_skeleton[automaton.skeleton] = True
        usable = np.concatenate([np.ones((C, S), np.bool_), ~in_skeleton[ids] & (classes[:, S:] > 0)], axis=1)
        z = np.nan_to_num(np.concatenate([skeleton_scores, scores], axis=1), nan=-_MAX_SCORE)
        z = np.where(usable, np.clip(z, -_MAX_SCORE, _MAX_SCORE), -np.inf)
        further = np.setdiff1d(classes[:, S:], [0, *classes[0, :S]])
        smallest = [ids[classes[:, S:] == number].min() for number in further]
        self.classes = np.concatenate([np.unique(classes[0, :S]), further[np.argsort(smallest)]])
        numbers = np.zeros(int(self.classes.max()) + 1, np.int64)
        numbers[self.classes] = np.arange(len(self.classes))
        self.number = np.where(usable, numbers[np.where(usable, classes, 0)], 0)
        m = len(self.classes)
        cell = (self.number + m * np.arange(C)[:, None]).ravel()  # index into a flat (C, m) array
        largest = np.full(C * m, -np.inf)
        np.maximum.at(largest, cell, z.ravel())
        with np.errstate(invalid="ignore"):
            self.weights = np.where(usable, np.exp(z - largest[cell].reshape(z.shape)), 0)
        self.largest = largest.reshape(C, m)
        self.sums = np.bincount(cell, self.weights.ravel(), C * m).reshape(C, m)

    def probabilities(self, class_probabilities: Floats) -> Floats:
        """Distribute the probabilities of classes over their candidates: (C, m) -> (C, N)."""
        share = np.divide(class_probabilities, self.sums, out=np.zeros_like(class_probabilities), where=self.sums > 0)
        probabilities: Floats = np.take_along_axis(share, self.number, axis=1) * self.weights
        return probabilities

    def restricted_probabilities(self, possible: NDArray[np.bool_]) -> Floats:
        """Return the model's own distribution over the candidates of possible classes: (C, m) bool -> (C, N)."""
        scores = np.where(possible, self.largest, -np.inf)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= (shares * self.sums).sum(axis=1, keepdims=True)
        probabilities: Floats = np.take_along_axis(shares, self.number, axis=1) * self.weights
        return probabilities

    def most_probable(self, numbers: NDArray[np.int64]) -> Ids:
        """Return the most probable token of one class per position: (C,) class numbers -> (C,) token ids."""
        columns = np.where(self.number == numbers[:, None], self.weights, 0).argmax(axis=1)
        ids: Ids = np.take_along_axis(self.ids, columns[:, None], axis=1)[:, 0]
        return ids

    def pick(self, position: int, number: int, uniform: float) -> int:
        """Draw a token of the class with this number at a position, by inverse CDF."""
        weights = np.where(self.number[position] == number, self.weights[position], 0)
        return int(self.ids[position, _pick(weights, uniform)[0]])


class _Paths:
    """All paths of a canvas through the automaton.

    The automaton has the same E transitions at each position, of one class each. They are sorted by source state, so
    the transitions that leave a state are consecutive.
    """

    def __init__(
        self, automaton: TokenAutomaton, candidates: _Candidates, state: int, limit: int, allowed: NDArray[np.bool_]
    ) -> None:
        """Prepare the paths that begin in ``state`` and are in an allowed state after ``limit`` positions.

        ``allowed`` (Q + 1,) bool says which states are allowed there.
        """
        number, source, target = automaton.transitions(candidates.classes)
        order = np.argsort(source, kind="stable")
        self._candidates, self._state = candidates, state
        self._number, self._source, self._target = number[order], source[order], target[order]  # (E,)
        # The states with transitions, the index of the first transition of each, and how many each has.
        self._left, self._first, counts = np.unique(self._source, return_index=True, return_counts=True)
        self._segment = np.repeat(np.arange(len(self._left)), counts)  # (E,): index of the source state in _left
        self._bounds = np.zeros(automaton.end + 2, np.int64)  # transitions of state s: _bounds[s] to _bounds[s + 1]
        self._bounds[self._left + 1] = counts
        self._bounds = np.cumsum(self._bounds)
        self._final = np.where(allowed, 0.0, -np.inf)
        self._limit = limit

    def best(self) -> Ids:
        """Return the tokens (C,) of the most probable path (Viterbi's algorithm)."""
        candidates, scores = self._candidates, self._candidates.largest[:, self._number]
        ahead: Floats = np.zeros(len(self._final))  # best score of a path from each state to the end of the canvas
        for i in range(len(scores) - 1, -1, -1):
            scores[i] += self._continuation(i, ahead)
            ahead = np.full(len(ahead), -np.inf)
            ahead[self._left] = np.maximum.reduceat(scores[i], self._first)
        path: NDArray[np.int64] = np.zeros(len(scores), np.int64)
        state = self._state
        for i in range(len(scores)):
            edge = self._bounds[state] + scores[i, self._bounds[state] : self._bounds[state + 1]].argmax()
            path[i], state = self._number[edge], int(self._target[edge])
        return candidates.most_probable(path)

    def transitions(self) -> tuple[Floats, NDArray[np.bool_]]:
        """Compute the probability of each transition by summing over all paths backwards.

        Return (C, E) float64, the probability of the transition given its source state and that the rest of the canvas
        matches, and (C, E) bool, whether a matching canvas may take the transition from its source state.
        """
        result: Floats = (self._candidates.largest + np.log(self._candidates.sums))[:, self._number]
        alive = np.zeros(result.shape, np.bool_)
        ahead: Floats = np.zeros(len(self._final))  # log of the sum over all paths from each state to the end
        for i in range(len(result) - 1, -1, -1):
            scores = result[i] + self._continuation(i, ahead)
            largest = np.maximum(np.maximum.reduceat(scores, self._first), -_FAR)
            weights = np.exp(scores - largest[self._segment])
            sums = np.add.reduceat(weights, self._first)
            ahead = np.full(len(ahead), -np.inf)
            ahead[self._left] = largest + np.log(sums)
            result[i] = weights / np.maximum(sums, _TINY)[self._segment]
            alive[i] = scores > -np.inf
        return result, alive

    def marginals(self, transitions: Floats, alive: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.bool_]]:
        """Compute the distribution over classes at each position, forwards from the first state.

        The arguments are the results of ``transitions``. Return (C, m) float64, the probability of each class, and
        (C, m) bool, whether any matching canvas has the class at the position.
        """
        C, m = self._candidates.sums.shape
        result, possible = np.zeros((C, m)), np.zeros((C, m), np.bool_)
        occupancy: Floats = np.zeros(len(self._final))  # (Q + 1,): probability of each state before the position
        occupancy[self._state] = 1
        reached = occupancy > 0
        for i in range(C):
            taken = occupancy[self._source] * transitions[i]
            result[i] = np.bincount(self._number, taken, m)
            occupancy = np.bincount(self._target, taken, len(occupancy)).astype(np.float64)
            live = alive[i] & reached[self._source]
            possible[i, self._number[live]] = True
            reached = np.zeros(len(occupancy), np.bool_)
            reached[self._target[live]] = True
        return result, possible

    def draw(self, transitions: Floats, uniforms: Floats) -> Ids:
        """Draw a path in proportion to its weight and return its tokens (C,). ``uniforms`` (C,) are in [0, 1)."""
        state, ids = self._state, np.zeros(len(uniforms), np.int32)
        for i, uniform in enumerate(uniforms.tolist()):
            first, last = self._bounds[state], self._bounds[state + 1]
            offset, rest = _pick(transitions[i, first:last], uniform)
            ids[i] = self._candidates.pick(i, int(self._number[first + offset]), rest)
            state = int(self._target[first + offset])
        return ids

    def _continuation(self, i: int, ahead: Floats) -> Floats:
        """Return what each transition at position i adds to a score: ``ahead`` (Q + 1,) of its target state, (E,).

        It is -inf where the target state is not allowed after ``limit`` positions.
        """
        return (ahead + self._final if i + 1 == self._limit else ahead)[self._target]


def _pick(weights: Floats, uniform: float) -> tuple[int, float]:
    """Draw an index in proportion to ``weights`` (n,) by inverse CDF. An index with weight 0 is never drawn.

    Return the index, and a number in [0, 1) that is uniform again, for one more draw.
    """
    cumulative = weights.cumsum()
    target = uniform * cumulative[-1]
    index = min(np.searchsorted(cumulative, target, side="right"), np.searchsorted(cumulative, cumulative[-1]))
    rest = (target - cumulative[index] + weights[index]) / weights[index]
    return int(index), float(min(max(rest, 0.0), _BELOW_ONE))
