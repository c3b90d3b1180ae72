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

from bisect import bisect_left, bisect_right
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dgemma_mlx.constrain.vocabulary import Ids, Indices, TokenAutomaton

Floats = NDArray[np.float64]
_MAX_SCORE = 1e6  # scores are clipped to +-1e6, so that sums over a canvas stay finite and above -_FAR
_FAR = 1e12
_TINY = 1e-300
_BELOW_ONE = 1 - 2.0**-53


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
    marginals, possible = paths.marginals()
    q, r = candidates.probabilities(marginals), candidates.restricted_probabilities(possible)  # (C, N)
    surprise = -np.log(np.maximum(r, _TINY))
    entropy = np.maximum((q * surprise).sum(axis=1), (r * surprise).sum(axis=1))
    best = q.argmax(axis=1)
    gap = np.minimum(_lead(q, best), _lead(r, best))
    sample = candidates.draw(*paths.draw(uniforms))
    return Projected(
        candidates.most_probable(paths.best()), sample, np.maximum(entropy, 0), np.maximum(gap, 0)
    )


def _lead(probability: Floats, best: Indices) -> Floats:
    """Return the probability of the candidate ``best`` (C,) minus the largest of all others: (C, N) -> (C,)."""
    others, rows = probability.copy(), np.arange(len(best))
    others[rows, best] = 0
    lead: Floats = probability[rows, best] - others.max(axis=1)
    return lead


class _Candidates:
    """The candidate tokens of all positions: N candidates per position, which belong to m classes altogether.

    The candidates of a position are the skeleton and the probable tokens. A candidate is unusable if it repeats a token
    of the skeleton or has no transitions. Classes are numbered from 0 to m - 1 here: first those of the skeleton, then
    the others in the order of their smallest ids, so that no number depends on what the automaton was used for before.

    Attributes:
        ids: (C, N) int32. Token ids.
        classes: (m,) int32. The class in the token automaton for each class number.
        cell: (C, N) int64. Index of each candidate's position and class number in a flat (C, m) array; class number 0
            for an unusable candidate.
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
        usable = np.concatenate([np.ones((C, S), np.bool_), (classes[:, S:] > 0) & ~automaton.in_skeleton(ids)], axis=1)
        z = np.concatenate([skeleton_scores, scores], axis=1)
        z = np.where(usable, np.minimum(np.fmax(z, -_MAX_SCORE), _MAX_SCORE), -np.inf)  # NaN becomes -_MAX_SCORE
        self.classes = automaton.ordered_classes(ids, classes[:, S:])
        m = len(self.classes)
        numbers = np.zeros(int(classes.max()) + 1, np.int64)
        numbers[self.classes] = np.arange(m)
        self.cell = np.where(usable, numbers[classes], 0) + m * np.arange(C)[:, None]
        largest = np.full(C * m, -np.inf)
        np.maximum.at(largest, self.cell.ravel(), z.ravel())
        with np.errstate(invalid="ignore"):
            self.weights = np.where(usable, np.exp(z - largest.take(self.cell)), 0)
        self.largest = largest.reshape(C, m)
        sums = np.bincount(self.cell.ravel(), self.weights.ravel(), C * m)
        self.sums: Floats = sums.astype(np.float64, copy=False).reshape(C, m)

    def probabilities(self, class_probabilities: Floats) -> Floats:
        """Distribute the probabilities of classes over their candidates: (C, m) -> (C, N)."""
        share = np.divide(class_probabilities, self.sums, out=np.zeros_like(class_probabilities), where=self.sums > 0)
        probabilities: Floats = share.take(self.cell) * self.weights
        return probabilities

    def restricted_probabilities(self, possible: NDArray[np.bool_]) -> Floats:
        """Return the model's own distribution over the candidates of possible classes: (C, m) bool -> (C, N)."""
        scores = np.where(possible, self.largest, -np.inf)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= (shares * self.sums).sum(axis=1, keepdims=True)
        probabilities: Floats = shares.take(self.cell) * self.weights
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
        # The inverse CDF, as in ``_pick``.
        columns = np.minimum(
            (cumulative <= uniforms[:, None] * total).sum(axis=1), (cumulative < total).sum(axis=1)
        )
        ids: Ids = self.ids[np.arange(len(columns)), columns]
        return ids


class _Paths:
    """All paths of a canvas through the automaton, as a graph with C + 1 layers.

    The nodes of layer i are the states that a path may be in before position i. An edge leads from a node of layer i to
    a node of layer i + 1, by one class that has candidates at position i. States that no path reaches have no nodes: at
    most positions that is most of the automaton. Every node before the last layer has an edge, because the skeleton has
    a token for every state.

    Nodes are numbered by layer and state, and edges by layer, source and class number, so the nodes and edges of a
    layer and the edges of a node are consecutive. Below, Nodes is the number of all nodes and F that of all edges.
    """

    def __init__(
        self, automaton: TokenAutomaton, candidates: _Candidates, state: int, limit: int, allowed: NDArray[np.bool_]
    ) -> None:
        """Build the graph of the paths that begin in ``state`` and are in an allowed state after ``limit`` positions.

        ``allowed`` (Q + 1,) bool says which states are allowed there.
        """
        number, source, target = automaton.transitions(candidates.classes)
        (C, m), states = candidates.sums.shape, len(allowed)
        present = candidates.sums > 0  # (C, m)
        reached = np.zeros((C + 1, states), np.bool_)
        reached[0, state] = True
        used: list[Indices] = []  # the transitions that are edges of each layer
        for i in range(C):
            used.append((reached[i].take(source) & present[i].take(number)).nonzero()[0])
            reached[i + 1, target.take(used[i])] = True
            if i + 1 == limit:
                reached[limit] &= allowed
        transition, counts = np.concatenate(used), np.array([len(layer) for layer in used])
        position = np.arange(C).repeat(counts)
        self._shape = C, m
        self._cell = position * m + number.take(transition)  # (F,): index of position and class in a flat (C, m) array
        # Numbers of the source and the target within their layers, (F,). An edge to a state that is not allowed leads
        # to node 0, and has no weight.
        node = (reached.cumsum(axis=1) - 1).ravel()
        self._source = node.take(position * states + source.take(transition))
        ends = (position + 1) * states + target.take(transition)
        barred = ~reached.take(ends)
        self._target = np.where(barred, 0, node.take(ends))
        changes = (self._source[1:] != self._source[:-1]) | (position[1:] != position[:-1])
        first = np.concatenate([[0], changes.nonzero()[0] + 1])  # (Nodes,): first edge of each node
        self._first = [*first.tolist(), len(position)]
        self._nodes = _slices(reached[:-1].sum(axis=1))
        self._edges = _slices(counts)
        self._best = np.where(barred, -np.inf, candidates.largest.take(self._cell))
        self._probability = self._weigh(first, candidates.sums.take(self._cell))

    def _weigh(self, first: Indices, sums: Floats) -> Floats:
        """Follow all paths from the last layer back to the first.

        ``_best`` (F,) are the largest scores in the edges' classes. Add the best score of a path from the edge's target
        to the last layer. ``sums`` (F,) are the weights of the classes, relative to the largest score. Return the
        probability (F,) of each edge, given its source and that the rest of the canvas matches.
        """
        layers = [
            (nodes, edges, first[nodes] - edges.start, self._target[edges])
            for nodes, edges in zip(reversed(self._nodes), reversed(self._edges), strict=True)
        ]
        last = np.zeros(int(self._target[self._edges[-1]].max()) + 1)
        potential = np.zeros(len(first))  # best score of a path from each node to the last layer
        ahead = last
        for nodes, edges, begin, target in layers:
            scores = self._best[edges]
            scores += ahead.take(target)
            potential[nodes] = ahead = np.maximum.reduceat(scores, begin)
        degrees = np.diff(self._first)
        # Weights relative to the best path from the source: the largest of a node is at least 1.
        weights = np.exp(self._best - np.maximum(potential, -_FAR).repeat(degrees)) * sums
        totals = np.zeros(len(first))  # sum over all paths from each node to the last layer, relative to the best one
        ahead = last + 1
        for i, (nodes, edges, begin, target) in enumerate(layers):
            scores = weights[edges]
            scores *= ahead.take(target)
            totals[nodes] = ahead = np.add.reduceat(scores, begin)
            if i % 16 == 15:
                ahead = np.maximum(ahead / ahead.max(), _TINY)
        probability: Floats = weights / np.maximum(totals, _TINY).repeat(degrees)
        return probability

    def marginals(self) -> tuple[Floats, NDArray[np.bool_]]:
        """Compute the distribution over classes at each position, forwards from the first state.

        Return (C, m) float64, the probability of each class, and (C, m) bool, whether any matching canvas has the class
        at the position.
        """
        taken = self._probability.copy()
        occupancy: Floats = np.ones(1)  # probability of each node of a layer
        for edges in self._edges:
            target, layer = self._target[edges], taken[edges]
            layer *= occupancy.take(self._source[edges])
            occupancy = np.bincount(target, layer).astype(np.float64, copy=False)
        size = self._shape[0] * self._shape[1]
        possible = np.zeros(size, np.bool_)
        possible[self._cell[self._best > -np.inf]] = True
        marginals: Floats = np.bincount(self._cell, taken, size).astype(np.float64, copy=False).reshape(self._shape)
        return marginals, possible.reshape(self._shape)

    def best(self) -> Indices:
        """Return the most probable path (Viterbi's algorithm), as indices (C,) into a flat (C, m) array."""
        node, path = 0, []
        for nodes in self._nodes:
            first, last = self._first[nodes.start + node : nodes.start + node + 2]
            path.append(first + int(self._best[first:last].argmax()))
            node = int(self._target[path[-1]])
        cells: Indices = self._cell.take(path)
        return cells

    def draw(self, uniforms: Floats) -> tuple[Indices, Floats]:
        """Draw a path in proportion to its weight. ``uniforms`` (C,) are in [0, 1).

        Return its indices (C,) into a flat (C, m) array, and numbers (C,) in [0, 1) that are uniform again.
        """
        node, path, rest = 0, [], []
        for nodes, uniform in zip(self._nodes, uniforms.tolist(), strict=True):
            first, last = self._first[nodes.start + node : nodes.start + node + 2]
            offset, left = _pick(self._probability[first:last], uniform)
            path.append(first + offset)
            rest.append(left)
            node = int(self._target[path[-1]])
        return self._cell.take(path), np.array(rest)


def _slices(counts: Indices) -> list[slice]:
    """Return the consecutive slices of these lengths (n,)."""
    ends = [0, *counts.cumsum().tolist()]
    return [slice(*pair) for pair in pairwise(ends)]


def _pick(weights: Floats, uniform: float) -> tuple[int, float]:
    """Draw an index in proportion to ``weights`` (n,) by inverse CDF. An index with weight 0 is never drawn.

    Return the index, and a number in [0, 1) that is uniform again, for one more draw.
    """
    cumulative: list[float] = weights.cumsum().tolist()
    target = uniform * cumulative[-1]
    index = min(bisect_right(cumulative, target), bisect_left(cumulative, cumulative[-1]))
    weight = float(weights[index])
    rest = (target - cumulative[index] + weight) / weight
    return index, min(max(rest, 0.0), _BELOW_ONE)
