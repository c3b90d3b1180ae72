"""Projection of a canvas onto a constraint, by dynamic programming over the positions of the canvas.

A canvas is a path through the token automaton, with one token per position. The weight of a path is the product of the
probabilities of its tokens. The normaliser of a position is the same for all paths, so unnormalised logits serve as
scores. From these weights the module computes:

* the most probable path, which is the argmax canvas (DINGO, arXiv 2505.23061);
* a sample of whole canvases, drawn in proportion to the weights;
* q, the marginal distribution of each position over all paths, which means given that the whole canvas matches.

The distributions q alone are overconfident. The model predicts each position without knowing what the other positions
will be. Where the predictions do not fit together (the model is uncertain where a name ends, for example), the product
over all positions soon favours one alternative, and the entropy of q is near 0 before the model has seen that decision.
Acceptance and stopping therefore use the larger of two quantities: the cross entropy -sum q log r and the entropy of r.
Here r is the model's own distribution, restricted at each position to the tokens that any matching canvas may have
there. Both quantities are 0 where the model is certain of a token that q selects as well. Elsewhere the position stays
uncertain, and a later step decides it, in which the model sees more of the canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dgemma_mlx.constrain.graph import CanvasGraph
from dgemma_mlx.constrain.paths import FAR, MAX_SCORE, TINY, Floats, Ids, Indices, Paths, pick, weighted
from dgemma_mlx.constrain.vocabulary import TokenAutomaton


class Projected(NamedTuple):
    """One canvas of C positions under a constraint.

    Attributes:
        argmax: (C,) int32. The most probable canvas.
        sample: (C,) int32. A canvas drawn in proportion to the weights of all canvases.
        entropy: (C,) float64, in nats. The uncertainty of each position: the larger of -sum q log r and the entropy of
            r, where q and r are the distributions of the module's description.
        gap: (C,) float64, at least 0. How far the probability of q's most probable token exceeds that of every other
            token, in q or in r, whichever is smaller.
    """

    argmax: Ids
    sample: Ids
    entropy: Floats
    gap: Floats


class Projector:
    """Projects all steps of one canvas onto a constraint.

    The results cover all canvases that begin in one state of the automaton and leave enough room to end the text. What
    does not depend on the scores is computed in the first step, and again after steps with tokens of new classes.

    Attributes:
        skeleton: (S,) int32, sorted. Tokens whose logits a step needs besides the probable ones: the automaton's.
    """

    def __init__(self, automaton: TokenAutomaton, state: int, room: int) -> None:
        """Prepare the projection of canvases that begin in ``state``.

        At most ``room`` tokens may be written from the first position of the canvas on, including the end-of-text
        token. ``room`` must be at least ``automaton.shortest[state]``.
        """
        self._automaton, self._state, self._room = automaton, state, room
        self.skeleton = automaton.skeleton
        self._graph: CanvasGraph | None = None

    def __call__(self, skeleton_scores: Floats, ids: Ids, scores: Floats, uniforms: Floats) -> Projected:
        """Project one canvas of C positions.

        ``skeleton_scores`` (C, S) float64 are logits of the tokens ``skeleton``. ``scores`` (C, k) float64
        are logits of further candidates ``ids`` (C, k) int32, which may repeat tokens of the skeleton. ``uniforms``
        (C,) float64 are random numbers in [0, 1) that determine the sample. C must be the same in all steps.
        """
        classes = self._automaton.classes(ids)
        graph = self._current_graph(len(ids))
        candidates = _Candidates(self._automaton, graph.edges.classes, classes, skeleton_scores, ids, scores)
        paths = _StatePaths(graph, candidates, self._state)
        marginals, possible = paths.marginals()
        q, r = candidates.probabilities(marginals), candidates.restricted_probabilities(possible)  # (C, N)
        sample = candidates.draw(*paths.draw(uniforms))
        return judged(q, r, candidates.most_probable(paths.best()), sample)

    def _current_graph(self, length: int) -> CanvasGraph:
        """Return the graph of the canvas, of ``length`` positions, with all classes that the automaton knows."""
        edges = self._automaton.edges()
        if self._graph is None or self._graph.edges is not edges:
            limit = min(length, self._room)
            allowed = self._automaton.shortest <= self._room - limit
            self._graph = CanvasGraph(edges, self._state, length, limit, allowed)
        return self._graph


def judged(q: Floats, r: Floats, argmax: Ids, sample: Ids) -> Projected:
    """Return a canvas with the uncertainty of each position.

    ``q`` and ``r`` (C, N) are the distributions of the module's description over the candidates of each position.
    """
    surprise = -np.log(np.maximum(r, TINY))
    entropy = np.maximum((q * surprise).sum(axis=1), (r * surprise).sum(axis=1))
    best = q.argmax(axis=1)
    gap = np.minimum(_lead(q, best), _lead(r, best))
    return Projected(argmax, sample, np.maximum(entropy, 0), np.maximum(gap, 0))


def _lead(probability: Floats, best: Indices) -> Floats:
    """Return the probability of the candidate ``best`` (C,) minus the largest of all others: (C, N) -> (C,)."""
    others, rows = probability.copy(), np.arange(len(best))
    others[rows, best] = 0
    lead: Floats = probability[rows, best] - others.max(axis=1)
    return lead


class _Candidates:
    """The candidate tokens of all positions: N candidates per position, which belong to m classes altogether.

    The candidates of a position are the skeleton and the probable tokens. A candidate is unusable if it repeats a token
    of the skeleton or has no transitions. Classes are counted from 0 here, without that of tokens without transitions.

    Attributes:
        ids: (C, N) int32. Token ids.
        cell: (C, N) int64. Index of each candidate's position and class in a flat (C, m) array; class 0 for an unusable
            candidate.
        weights: (C, N) float64. Probability of each candidate relative to the most probable candidate of its class at
            the position; 0 for an unusable candidate.
        largest: (C, m) float64. Largest score in each class, or -inf when the class has no candidate at the position.
        sums: (C, m) float64. Sum of the weights in each class.
        rank: (m,) int64. Numbers that bring the classes into the order in which a sample goes through them, which does
            not depend on what the automaton was used for before.
    """

    def __init__(
        self, automaton: TokenAutomaton, m: int, classes: Ids, skeleton_scores: Floats, ids: Ids, scores: Floats
    ) -> None:
        """Collect the candidates. ``classes`` (C, k) are the automaton's classes of ``ids``, ``m`` at most."""
        C, S = skeleton_scores.shape
        self.ids = np.empty((C, S + ids.shape[1]), np.int32)
        self.ids[:, :S], self.ids[:, S:] = automaton.skeleton, ids
        unusable = (classes == 0) | automaton.in_skeleton(ids)
        self.cell = np.empty(self.ids.shape, np.intp)
        self.cell[:, :S], self.cell[:, S:] = automaton.skeleton_classes - 1, np.where(unusable, 0, classes - 1)
        self.rank = automaton.class_ranks(m, ids, self.cell[:, S:])
        self.cell += m * np.arange(C)[:, None]
        z = np.empty(self.ids.shape)
        z[:, :S], z[:, S:] = skeleton_scores, scores
        np.minimum(np.fmax(z, -MAX_SCORE, out=z), MAX_SCORE, out=z)  # NaN becomes -MAX_SCORE
        z[:, S:][unusable] = -np.inf
        cell = self.cell.ravel()
        largest = np.full(C * m, -np.inf)
        np.maximum.at(largest, cell, z.ravel())
        z -= np.maximum(largest, -MAX_SCORE).take(self.cell)
        self.weights = np.exp(z, out=z)
        self.largest = largest.reshape(C, m)
        self.sums = weighted(cell, z.ravel(), C * m).reshape(C, m)

    def probabilities(self, class_probabilities: Floats) -> Floats:
        """Distribute the probabilities of classes over their candidates: (C, m) -> (C, N)."""
        share = class_probabilities / np.maximum(self.sums, TINY)
        probabilities: Floats = share.take(self.cell)
        probabilities *= self.weights
        return probabilities

    def restricted_probabilities(self, possible: NDArray[np.bool_]) -> Floats:
        """Return the model's own distribution over the candidates of possible classes: (C, m) bool -> (C, N)."""
        scores = np.where(possible, self.largest, -np.inf)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= (shares * self.sums).sum(axis=1, keepdims=True)
        probabilities: Floats = shares.take(self.cell)
        probabilities *= self.weights
        return probabilities

    def most_probable(self, cells: Indices) -> Ids:
        """Return the most probable token of one class per position: (C,) indices like ``cell`` -> (C,) token ids."""
        columns = np.where(self.cell == cells[:, None], self.weights, 0).argmax(axis=1)
        ids: Ids = self.ids[np.arange(len(columns)), columns]
        return ids

    def draw(self, cells: Indices, uniforms: Floats) -> Ids:
        """Draw a token of one class per position: (C,) indices like ``cell`` and (C,) in [0, 1) -> (C,) token ids."""
        cumulative = np.where(self.cell == cells[:, None], self.weights, 0).cumsum(axis=1)
        total = cumulative[:, -1:]
        # The inverse CDF, as in ``pick``.
        columns = np.minimum(
            (cumulative <= uniforms[:, None] * total).sum(axis=1), (cumulative < total).sum(axis=1)
        )
        ids: Ids = self.ids[np.arange(len(columns)), columns]
        return ids


class _StatePaths:
    """The paths of a canvas's graph, weighed by the scores of the candidates. F is the number of the graph's edges."""

    def __init__(self, graph: CanvasGraph, candidates: _Candidates, state: int) -> None:
        """Follow all paths, which begin in ``state``, from the last layer back to the first."""
        self._graph, self._candidates, self._state = graph, candidates, state
        # The transitions of each state in the order of the classes, (E,).
        rank = candidates.rank
        order = (graph.edges.begin * (int(rank.max()) + 1) + rank.take(graph.edges.number)).argsort()
        self._number, self._target = graph.edges.number.take(order), graph.edges.target.take(order)
        # A kind of edge at a position: its best class, and its weight and its classes' weights relative to that.
        scores = candidates.largest.take(graph.cell)
        best = np.maximum.reduceat(scores, graph.kind_first)
        scores -= np.maximum(best, -FAR).take(graph.cell_kind)
        self._weights = np.exp(scores) * candidates.sums.take(graph.cell)
        self._sums = np.add.reduceat(self._weights, graph.kind_first)
        sums = np.append(self._sums, 0).take(graph.kind)
        self._paths = Paths(graph.layers, graph.degrees, graph.ends, np.append(best, -np.inf).take(graph.kind), sums)
        # The last of the nodes is that of states without one. Both are (C + 1, Q + 1).
        self._best: Floats = np.append(self._paths.potential, -np.inf).take(graph.node)
        self._logarithm: Floats = np.append(self._paths.logarithm, -np.inf).take(graph.node)

    def marginals(self) -> tuple[Floats, NDArray[np.bool_]]:
        """Compute the distribution over classes at each position.

        Return (C, m) float64, the probability of each class, and (C, m) bool, whether any matching canvas has the class
        at the position.
        """
        graph, sums = self._graph, self._candidates.sums
        flows = weighted(graph.kind, self._paths.taken(), len(self._sums) + 1)  # of each position and kind
        through = flows.take(graph.cell_kind)
        size = sums.size
        possible = (weighted(graph.cell, through, size) > 0).reshape(sums.shape) & (sums > 0)
        through *= self._weights
        through /= np.maximum(self._sums, TINY).take(graph.cell_kind)
        return weighted(graph.cell, through, size).reshape(sums.shape), possible

    def best(self) -> Indices:
        """Return the most probable path (Viterbi's algorithm), as indices (C,) into a flat (C, m) array."""
        first, state, path = self._graph.edges.first, self._state, []
        for scores, ahead in zip(self._candidates.largest, self._best[1:], strict=True):
            leaving = slice(first[state], first[state + 1])
            whole = scores.take(self._number[leaving])
            whole += ahead.take(self._target[leaving])
            path.append(leaving.start + int(whole.argmax()))
            state = int(self._target[path[-1]])
        return self._cells(path)

    def draw(self, uniforms: Floats) -> tuple[Indices, Floats]:
        """Draw a path in proportion to its weight. ``uniforms`` (C,) are in [0, 1).

        Return its indices (C,) into a flat (C, m) array, and numbers (C,) in [0, 1) that are uniform again.
        """
        candidates = self._candidates
        first, state, path, rest = self._graph.edges.first, self._state, [], []
        logarithms = candidates.largest + np.log(np.maximum(candidates.sums, TINY))
        for i, uniform in enumerate(uniforms.tolist()):
            leaving = slice(first[state], first[state + 1])
            weights = logarithms[i].take(self._number[leaving])
            weights += self._logarithm[i + 1].take(self._target[leaving])
            weights -= self._best[i, state]
            offset, left = pick(np.exp(weights, out=weights), uniform)
            path.append(leaving.start + offset)
            rest.append(left)
            state = int(self._target[path[-1]])
        return self._cells(path), np.array(rest)

    def _cells(self, path: Sequence[int]) -> Indices:
        """Return the classes of one transition per position, as indices (C,) into a flat (C, m) array."""
        cells: Indices = self._number.take(path) + self._graph.edges.classes * np.arange(len(path))
        return cells
