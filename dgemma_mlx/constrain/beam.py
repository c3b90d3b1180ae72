"""Projection of a canvas onto a constraint whose states are too many to consider all of them: a beam.

The graph of a canvas is built anew in each step, from the first position to the last. Of the states that the paths may
be in after a position, those with the best paths so far are kept (the beam). With each state that is kept, the state
after the first token of its spelling is kept for the next position, so every state keeps a path to the end of the text:
whatever the beam drops, the canvas matches and the text ends within the room. Everything else is as in
``dgemma_mlx.constrain.projection``, over the paths of this graph.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dgemma_mlx.constrain.paths import MAX_SCORE, Floats, Ids, Indices, Layer, Paths, pick, weighted
from dgemma_mlx.constrain.projection import Projected, judged
from dgemma_mlx.constrain.terms import Term
from dgemma_mlx.constrain.visited import ENDED, Visited

WIDTH = 24  # states of the beam at each position
_MOST_SKELETON = 1024
_FIRST_STATES = 256  # states around the first one whose skeletons are known before the first step
_SHORTFALL = 4.0  # how far a token whose logit was not gathered is below the least probable one that was


class _Layer(NamedTuple):
    """What leads from the states of one position to those of the next.

    Attributes:
        source, column, target: (E,) index of each edge's source state, column of its token among the candidates of the
            position, and index of its target state; sorted by source.
        states: The states of the next position, by number.
        full: How many of them belong to the beam; the others, after them, are only kept to end the text.
        scores: Best score of a path to each of them.
    """

    source: Indices
    column: Indices
    target: Indices
    states: Indices
    full: int
    scores: Floats


class BeamProjector:
    """Projects all steps of one canvas onto a constraint.

    Attributes:
        skeleton: (S,) int32, sorted. Tokens whose logits the next step needs besides the probable ones.
    """

    def __init__(self, visited: Visited, state: Term, room: int, width: int = WIDTH) -> None:
        """Prepare the projection of canvases that begin in ``state``.

        At most ``room`` tokens may be written from the first position of the canvas on, including the end-of-text
        token. ``room`` must be at least the number of tokens of the state's spelling. ``width`` is that of the beam.
        """
        self._visited, self._room, self._width = visited, room, width
        self._start = visited.number(state)
        self._scratch = np.zeros(0, np.intp)
        visited.spell_out(np.array([self._start]))
        self.skeleton = self._ids_of(self._near())

    def _near(self) -> Indices:
        """Return the first state and those that skeletons lead to from there, the nearest ones."""
        found = {self._start: None, ENDED: None}
        for state in (waiting := [self._start]):  # grows
            targets = self._visited.skeletons(np.array([state]))[2]
            self._visited.spell_out(targets)
            for target in targets.tolist():
                if target not in found and self._visited.spell[target] <= self._room and len(found) < _FIRST_STATES:
                    found[target] = None
                    waiting.append(target)
        return np.array(list(found))

    def _ids_of(self, states: Indices) -> Ids:
        """Return the ids of the skeletons of these states; those of the first ones, where they are many."""
        tokens = list(dict.fromkeys(self._visited.skeletons(states)[1].tolist()))
        return np.array(sorted(self._visited.ids[token] for token in tokens[:_MOST_SKELETON]), np.int32)

    def __call__(self, skeleton_scores: Floats, ids: Ids, scores: Floats, uniforms: Floats) -> Projected:
        """Project one canvas of C positions.

        ``skeleton_scores`` (C, S) float64 are logits of the tokens ``skeleton``, and ``scores`` (C, k) float64 those of
        further candidates ``ids`` (C, k) int32, which may repeat tokens of the skeleton. ``uniforms`` (C,) float64 are
        random numbers in [0, 1) that determine the sample.
        """
        with self._visited.lock:
            candidates = _Columns(self._visited, self.skeleton, skeleton_scores, ids, scores)
            layers = self._layers(candidates)
            self._remember(layers)
        z = candidates.scores
        C, N = z.shape
        counts = np.array([len(layer.source) for layer in layers])
        ends = counts.cumsum()
        cell = np.concatenate([layer.column for layer in layers]) + np.arange(C).repeat(counts) * N
        degrees = [np.bincount(layer.source) for layer in layers]
        graph = [
            Layer(slice(end - len(layer.source), end), degree.cumsum() - degree, layer.source, layer.target)
            for end, degree, layer in zip(ends.tolist(), degrees, layers, strict=True)
        ]
        paths = Paths(graph, np.concatenate(degrees), len(layers[-1].states), z.take(cell), np.ones(len(cell)))
        q = weighted(cell, paths.taken(), C * N).reshape(C, N)
        r = np.where(q > 0, z, -np.inf)
        r = np.exp(r - r.max(axis=1, keepdims=True))
        r /= r.sum(axis=1, keepdims=True)
        best, drawn = _followed(paths, z.take(cell), uniforms)
        return judged(q, r, candidates.ids_at(cell.take(best) % N), candidates.ids_at(cell.take(drawn) % N))

    def _remember(self, layers: list[_Layer]) -> None:
        """Have the next step gather the skeletons of the states of this one."""
        states = dict.fromkeys([self._start, ENDED])
        for layer in layers:
            states.update(dict.fromkeys(layer.states[: layer.full].tolist()))
        self.skeleton = self._ids_of(np.array(list(states)))

    def _layers(self, candidates: _Columns) -> list[_Layer]:
        """Build the graph of a canvas, layer by layer."""
        layers = []
        states, full, scores = np.array([self._start]), 1, np.zeros(1)
        for position in range(candidates.length):
            layer = self._layer(candidates, position, states, full, scores)
            states, full, scores = layer.states, layer.full, layer.scores
            layers.append(layer)
        return layers

    def _layer(
        self, candidates: _Columns, position: int, states: Indices, full: int, scores: Floats
    ) -> _Layer:
        """Build one layer. ``states``, ``full`` and ``scores`` are those of the layer before (``_Layer``)."""
        visited = self._visited
        source, column, target = candidates.skeleton_edges(position, states, full)
        if len(states) > 1 or states[0] != ENDED:  # end-of-text tokens and padding are the skeleton of ``ENDED``
            moves = visited.moves(states[:full], candidates.tokens[position])
            row, probable = (moves >= 0).nonzero()
            source, column = np.concatenate([source, row]), np.concatenate([column, probable])
            target = np.concatenate([target, moves[row, probable]])
        unique, place = self._numbered(target)
        best = np.full(len(unique), -np.inf)
        np.maximum.at(best, place, scores[source] + candidates.scores[position].take(column))
        order = self._fitting(unique, (-best).argsort(kind="stable"), position)
        is_thin = np.zeros(len(unique), np.bool_)
        is_thin[self._scratch[visited.canonical(states)[1]]] = True
        is_thin[order] = False
        kept = np.concatenate([order, is_thin.nonzero()[0]])
        numbers = np.full(len(unique), -1)
        numbers[kept] = np.arange(len(kept))
        target = numbers[place]
        edges = (target >= 0).nonzero()[0]
        edges = edges[source[edges].argsort(kind="stable")]
        return _Layer(source[edges], column[edges], target[edges], unique[kept], len(order), best[kept])

    def _fitting(self, states: Indices, order: Indices, position: int) -> Indices:
        """Return the first of ``order`` (n,), indices of states (n,), that leave room to end the text: up to the width.

        After the last token that may be written the text has ended.
        """
        left, width = max(self._room - position - 1, 0), self._width
        for part in (order[: 2 * width], order):  # spellings cost time, and most states fit
            self._visited.spell_out(states[part])
            fitting = part[self._visited.spell[states[part]] <= left]
            if len(fitting) >= width:
                break
        return fitting[:width]

    def _numbered(self, states: Indices) -> tuple[Indices, Indices]:
        """Return the different states among states (E,), and the index of each state among them.

        ``self._scratch`` then holds the same indices, by state.
        """
        if len(self._scratch) < len(self._visited):
            self._scratch = np.zeros(2 * len(self._visited), np.intp)
        each = np.arange(len(states))
        self._scratch[states] = each
        unique = states[self._scratch[states] == each]
        self._scratch[unique] = np.arange(len(unique))
        return unique, self._scratch[states]


class _Columns:
    """The candidate tokens of all positions: first the probable tokens, then the skeleton's.

    Tokens of skeletons whose logits were not gathered get columns of their own, with a low score.

    Attributes:
        length: The number of positions, C.
        tokens: (C, k) The probable tokens, by number.
        scores: (C, N) float64, the score of each column.
    """

    def __init__(self, visited: Visited, skeleton: Ids, skeleton_scores: Floats, ids: Ids, scores: Floats) -> None:
        self._visited = visited
        self.length, k = ids.shape
        self.tokens = visited.tokens(ids)
        own = visited.tokens(skeleton)
        z = np.concatenate([scores, skeleton_scores], axis=1)
        self.scores = np.minimum(np.fmax(z, -MAX_SCORE), MAX_SCORE)  # NaN becomes -MAX_SCORE
        self._least = self.scores[:, :k].min(axis=1, keepdims=True) - _SHORTFALL
        self._ids = ids
        self._numbers = own.tolist()  # the tokens of the columns after the first k
        # The column of each token after the first k, and its column among the first k at each position; -1 without one.
        self._column = np.full(len(visited.ids), -1)
        self._column[own] = np.arange(k, k + len(own))
        self._probable = np.full((self.length, len(visited.ids)), -1, np.int16)
        self._probable[np.arange(self.length)[:, None], self.tokens] = np.arange(k)

    def skeleton_edges(self, position: int, states: Indices, full: int) -> tuple[Indices, Indices, Indices]:
        """Return edges by the skeletons of ``full`` states and by the first tokens of the spellings of the others.

        A token of a full state that is a probable one is left out, except for ``ENDED`` alone: ``Visited.moves`` has
        its edge. The arrays (E,) are as in
        ``_Layer``, with target states by number.
        """
        source, token, target = self._visited.skeletons(states[:full])
        others, following = self._visited.canonical(states[full:])
        source = np.concatenate([source, np.arange(full, len(states))])
        token, target = np.concatenate([token, others]), np.concatenate([target, following])
        if len(self._visited.ids) > len(self._column) or self._column.take(token).min() < 0:
            self._make_room(token)
        probable = self._probable[position].take(token)
        column = np.where(probable < 0, self._column.take(token), probable)
        if len(states) == 1 and states[0] == ENDED:
            return source, column, target
        kept = ((probable < 0) | (source >= full)).nonzero()[0]
        return source.take(kept), column.take(kept), target.take(kept)

    def _make_room(self, tokens: Indices) -> None:
        """Add columns for tokens that have none."""
        more = len(self._visited.ids) - len(self._column)
        if more:
            self._column = np.pad(self._column, (0, more), constant_values=-1)
            self._probable = np.pad(self._probable, [(0, 0), (0, more)], constant_values=-1)
        new = np.unique(tokens[self._column[tokens] < 0])
        if len(new):
            self._column[new] = np.arange(self.scores.shape[1], self.scores.shape[1] + len(new))
            self._numbers += new.tolist()
            self.scores = np.concatenate([self.scores, self._least.repeat(len(new), axis=1)], axis=1)

    def ids_at(self, columns: Indices) -> Ids:
        """Return the token id of one column of each position (C,)."""
        k = self._ids.shape[1]
        later = np.array([self._visited.ids[number] for number in self._numbers], np.int32)
        probable = self._ids[np.arange(self.length), np.minimum(columns, k - 1)]
        found: Ids = np.where(columns < k, probable, later[np.maximum(columns - k, 0)])
        return found


def _followed(paths: Paths, scores: Floats, uniforms: Floats) -> tuple[Indices, Indices]:
    """Return the edges (C,) of the best path, and of a path drawn in proportion to its weight."""
    best, drawn = [], []
    node = other = 0  # index of a node in its layer
    before = 0  # nodes in the layers so far
    for layer, uniform in zip(paths.layers, uniforms.tolist(), strict=True):
        bounds = [*layer.first.tolist(), layer.edges.stop - layer.edges.start]
        before += len(layer.first)
        edges = slice(layer.edges.start + bounds[node], layer.edges.start + bounds[node + 1])
        ahead = paths.potential.take(layer.target[bounds[node] : bounds[node + 1]] + before)
        best.append(edges.start + int((scores[edges] + ahead).argmax()))
        node = int(layer.target[best[-1] - layer.edges.start])
        edges = slice(layer.edges.start + bounds[other], layer.edges.start + bounds[other + 1])
        drawn.append(edges.start + pick(paths.probability[edges], uniform)[0])
        other = int(layer.target[drawn[-1] - layer.edges.start])
    return np.array(best), np.array(drawn)
