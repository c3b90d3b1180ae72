"""Sums over the paths of a canvas, by dynamic programming over its positions.

A graph has C + 1 layers of nodes, and edges that lead from a layer to the next. An edge has a weight, so a path has the
product of its edges' weights. All sums are over the paths that end in any node of the last layer.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ids = NDArray[np.int32]
Indices = NDArray[np.intp]  # numpy indexes with 64 bits much faster than with 32
MAX_SCORE = 1e6  # scores are clipped to +-1e6, so that sums over a canvas stay finite and above -FAR
FAR = 1e12  # above the sum of the scores of a canvas
TINY = 1e-300
LEAST = 1e-30  # floor of the probability of an edge that a path may take
_BELOW_ONE = 1 - 2.0**-53


class Layer(NamedTuple):
    """The edges that leave one layer of a graph, one for each position.

    Attributes:
        edges: The layer's edges among all edges of the graph.
        first: The first edge of each node, as an index into the layer's edges.
        source, target: The source of each edge, as an index into the layer's nodes, and its target in the next layer.
    """

    edges: slice
    first: Indices
    source: Indices
    target: Indices


class Paths:
    """The paths of a graph of F edges, all of which have nodes with edges in every layer but the last.

    Attributes:
        alive: (F,) bool. Whether a path to the last layer begins with the edge.
        probability: (F,) Probability of each edge, given its source and that the rest of the canvas matches.
        potential: (n,) Best score of a path from each node to the last layer.
        logarithm: (n,) Logarithm of the sum of the weights of the paths from each node to the last layer.
    """

    def __init__(
        self, layers: Sequence[Layer], degrees: Indices, ends: int, scores: Floats, sums: Floats
    ) -> None:
        """Follow all paths from the last layer back to the first.

        ``degrees`` are the numbers of edges of the nodes before the last layer, and ``ends`` is the number of nodes of
        the last layer. ``scores`` (F,) are the edges' best scores (logarithms), which are overwritten, and ``sums``
        (F,) their weights relative to these.
        """
        self.layers = layers
        ahead = np.zeros(ends)
        bests = [ahead]  # best score of a path from each node to the last layer, layer by layer
        for edges, first, _, target in reversed(layers):
            part = scores[edges]
            part += ahead.take(target)
            ahead = np.maximum.reduceat(part, first)
            bests.append(ahead)
        self.potential = np.concatenate(bests[::-1])
        self.alive = scores > -np.inf
        # Weights relative to the best path from the source: the largest of a node is at least 1.
        scores -= np.maximum(self.potential[: len(self.potential) - ends], -FAR).repeat(degrees)
        weights = np.exp(scores, out=scores)
        weights *= sums
        ahead = np.ones(ends)
        sums_ahead = [ahead]  # sum over all paths from each node to the last layer, relative to the best one
        for i, (edges, first, _, target) in enumerate(reversed(layers)):
            part = weights[edges]
            part *= ahead.take(target)
            ahead = np.add.reduceat(part, first)
            sums_ahead.append(ahead)
            if i % 16 == 15:
                ahead = np.maximum(ahead / ahead.max(), TINY)
        totals = np.maximum(np.concatenate(sums_ahead[::-1]), TINY)
        weights /= totals[: len(totals) - ends].repeat(degrees)
        self.probability = weights
        self.logarithm = self.potential + np.log(totals)

    def taken(self) -> Floats:
        """Return the probability (F,) that a path takes each edge, forwards from the only node of the first layer.

        What a path may take is above 0: floors are 1e-30 for an edge, and 1e-60 for a node after every eighth position.
        """
        taken: Floats = np.maximum(self.probability, LEAST) * self.alive
        occupancy: Floats = np.ones(1)  # probability of each node of a layer
        for i, (edges, _, source, target) in enumerate(self.layers):
            layer = taken[edges]
            layer *= occupancy.take(source)
            occupancy = weighted(target, layer)
            if i % 8 == 7:
                occupancy = np.maximum(occupancy, LEAST**2 * (occupancy > 0))
        return taken


def weighted(index: Indices, weights: Floats, size: int = 0) -> Floats:
    """Return the sum of the weights (n,) with each index, as an array of at least this size."""
    return cast("Floats", np.bincount(index, weights, size))


def pick(weights: Floats, uniform: float) -> tuple[int, float]:
    """Draw an index in proportion to ``weights`` (n,) by inverse CDF. An index with weight 0 is never drawn.

    Return the index, and a number in [0, 1) that is uniform again, for one more draw.
    """
    cumulative: list[float] = weights.cumsum().tolist()
    target = uniform * cumulative[-1]
    index = min(bisect_right(cumulative, target), bisect_left(cumulative, cumulative[-1]))
    weight = float(weights[index])
    rest = (target - cumulative[index] + weight) / weight
    return index, min(max(rest, 0.0), _BELOW_ONE)
