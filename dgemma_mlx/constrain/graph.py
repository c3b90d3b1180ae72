"""The paths of a canvas through an automaton over tokens, as a graph: what the projection needs besides the scores."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dgemma_mlx.constrain.limits import check_time
from dgemma_mlx.constrain.paths import Indices, Layer


class Edges:
    """The transitions of an automaton, with those that join the same two states merged into P edges.

    An edge carries a set of classes of tokens. Most edges carry one of few sets: each of the G different sets is a kind
    of edge, and what depends on the classes is computed once for each kind. Classes are counted from 0 here.

    Attributes:
        classes: m, the number of classes.
        begin, number, target: (E,) source state, class and target state of each transition, by source state.
        first: Index of the first transition of each state, and E.
        source, end, kind: (P,) source state, target state and kind of each edge, by source state and target state.
        kind_classes: (K,) the classes of each kind, one kind after the other.
        kind_sizes: (G,) the number of classes of each kind.
    """

    def __init__(self, classes: int, number: Indices, source: Indices, target: Indices, states: int) -> None:
        """Merge the transitions of m ``classes``, given as three arrays (E,), of an automaton with ``states`` states.

        The arrays are the class of each transition, its source state and its target state.
        """
        self.classes = classes
        order = np.lexsort((number, target, source))
        self.number, self.target, source = number[order], target[order], source[order]
        self.begin = source
        self.first: list[int] = source.searchsorted(np.arange(states + 1)).tolist()
        firsts = np.flatnonzero(np.diff(source * states + self.target, prepend=-1))  # (P,): of each edge
        self.source, self.end = source[firsts], self.target[firsts]
        kinds: dict[bytes, int] = {}
        sets: list[Indices] = []
        kind = []
        for start, stop in pairwise([*firsts.tolist(), len(source)]):
            check_time()
            members = self.number[start:stop]
            kind.append(kinds.setdefault(members.tobytes(), len(kinds)))
            if len(kinds) > len(sets):
                sets.append(members)
        self.kind = np.array(kind)
        self.kind_classes = np.concatenate(sets)
        self.kind_sizes = np.array([len(members) for members in sets])


class CanvasGraph:
    """All paths of a canvas of C positions through an automaton, as a graph with C + 1 layers.

    The nodes of layer i are the states that a path may be in before position i, whatever tokens are probable. An edge
    leads from a node of layer i to a node of layer i + 1. States that no path reaches have no nodes: at most positions
    that is most of the automaton. Every node before the last layer has an edge, because the skeleton has a token for
    every state. Below, F is the number of all edges.

    Attributes:
        edges: The automaton's edges.
        layers: The C layers before the last.
        ends: The number of nodes of the last layer.
        node: (C + 1, Q + 1) index of each layer's states among all nodes; the number of nodes where there is none.
        degrees: The number of edges of each node before the last layer.
        kind: (F,) index of each edge's position and kind in a flat (C, G) array; C * G for an edge to a state that is
            not allowed.
        cell: (C * K,) index of position and class in a flat (C, m) array, for all positions and classes of kinds.
        cell_kind: (C * K,) the same for position and kind, in a flat (C, G) array.
        kind_first: (C * G,) first of the cells of each position and kind.
    """

    def __init__(self, edges: Edges, state: int, length: int, limit: int, allowed: NDArray[np.bool_]) -> None:
        """Build the graph of the paths that begin in ``state`` and are in an allowed state after ``limit`` positions.

        ``length`` is C. ``allowed`` (Q + 1,) bool says which states are allowed there.
        """
        self.edges = edges
        C, states, (G, K) = length, len(allowed), (len(edges.kind_sizes), len(edges.kind_classes))
        reached = np.zeros((C + 1, states), np.bool_)
        reached[0, state] = True
        used: list[Indices] = []  # the edges of each layer
        for i in range(C):
            used.append(reached[i].take(edges.source).nonzero()[0])
            reached[i + 1, edges.end.take(used[i])] = True
            if i + 1 == limit:
                reached[limit] &= allowed
        counts = np.array([len(layer) for layer in used])
        edge, position = np.concatenate(used), np.arange(C).repeat(counts)
        del used  # an array (F,) has 80 MB for the largest automata
        sizes = reached.sum(axis=1)
        self.node = np.where(reached, (reached.cumsum() - 1).reshape(reached.shape), sizes.sum())
        before = sizes.cumsum() - sizes  # (C + 1,): number of nodes in earlier layers
        node = self.node[position, edges.source.take(edge)]
        self.degrees = np.bincount(node)
        source = np.subtract(node, before.take(position), out=node)
        target = self.node[position + 1, edges.end.take(edge)]
        self.kind = edges.kind.take(edge)
        self.kind += position * G
        del edge
        barred = target == sizes.sum()
        target -= before[1:].take(position)
        self.kind[barred], target[barred] = C * G, 0
        first = self.degrees.cumsum() - self.degrees
        self.ends = int(sizes[-1])
        self.layers = [
            Layer(part, first[nodes] - part.start, source[part], target[part])
            for nodes, part in zip(_slices(sizes[:-1]), _slices(counts), strict=True)
        ]
        positions = np.arange(C)[:, None]
        self.cell = (positions * edges.classes + edges.kind_classes).ravel()
        self.cell_kind = (positions * G + np.arange(G).repeat(edges.kind_sizes)).ravel()
        self.kind_first = (positions * K + edges.kind_sizes.cumsum() - edges.kind_sizes).ravel()


def _slices(counts: Indices) -> list[slice]:
    """Return the consecutive slices of these lengths (n,)."""
    ends = [0, *counts.cumsum().tolist()]
    return [slice(*pair) for pair in pairwise(ends)]
