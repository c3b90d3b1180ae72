"""JSON texts of the values that a schema allows, as terms over bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import permutations
from typing import Any

from dgemma_mlx.constrain.document import Document, reject
from dgemma_mlx.constrain.hints import warn
from dgemma_mlx.constrain.normal import Normalizer
from dgemma_mlx.constrain.spelling import JsonSpelling
from dgemma_mlx.constrain.terms import UNBOUNDED, Term, Terms
from dgemma_mlx.constrain.texts import Numbers, Strings
from dgemma_mlx.constrain.values import ANYTHING, NOTHING, Algebra, Array, Node, Object, TooManyShapesError, complement
from dgemma_mlx.constrain.wellformed import check
from dgemma_mlx.errors import DgemmaError
_PROSE = frozenset({"$comment", "$ref", "$schema", "description", "format", "pattern", "title"})


class Writer:
    """The texts of one document's values."""

    def __init__(self, schema: Any, spelling: type[JsonSpelling] = JsonSpelling) -> None:
        """Write the values of a schema, which is given as parsed JSON, as ``spelling`` spells them."""
        patterns, formats, texts = strings_in(schema)
        self.strings, self.numbers = Strings(patterns | spelling.patterns, formats, texts), Numbers()
        self.spelling = spelling(self.strings, self.numbers)
        self.algebra = Algebra(self.strings.terms, self.numbers.terms, self.numbers.number, self.strings.text)
        # all strings are strings of characters, not of any symbols
        self.document = Document(schema)
        check(self.document)
        warn(self.document, stacklevel=4)
        self.normal = Normalizer(self.document, self.algebra, self.strings, self.numbers)
        self.bytes, self.literal, self.comma, self.colon, self._string = (
            self.spelling.terms, self.spelling.literal, self.spelling.comma, self.spelling.colon, self.spelling.string,
        )  # fmt: skip
        self._bodies: dict[Node, Term] = {}
        self._rules: dict[Node, Term] = {}
        self._extra: list[tuple[Term, Term]] = []
        self._waiting: list[Node] = []
        self.start = self.value(self.document.start)
        self._settle()

    def value(self, node: Node) -> Term:
        """Return the texts of a node's values."""
        if node not in self._rules:
            self._rules[node] = self.bytes.rule(lambda: self._bodies[node], ("value", node))
            self._waiting.append(node)
        return self._rules[node]

    def _settle(self) -> None:
        """Write all nodes, and find those that have no value."""
        for node in self._waiting:  # grows
            try:
                self._bodies[node] = self._body(node)
            except TooManyShapesError:
                reject("#", "the alternatives of the schema multiply beyond the limit", "Use fewer anyOf and oneOf.")
            if len(self._bodies) > 20000:
                reject("#", "the schema is too large")
        bodies = [*((self._rules[node], body) for node, body in self._bodies.items()), *self._extra][::-1]
        for rule, _ in bodies:
            rule.least = UNBOUNDED
        changed = True
        while changed:
            changed = False
            known: dict[Term, int] = {}
            for rule, body in bodies:
                found = self._weigh(body, known)
                if found < rule.least:
                    rule.least = found
                    changed = True

    def _weigh(self, term: Term, known: dict[Term, int]) -> int:
        if term.kind == "rule":
            return term.least if term.least is not None else self.bytes.least(term)
        if term in known:
            return known[term]
        waiting = [term]
        while waiting:
            t = waiting[-1]
            parts = t.parts if t.kind in ("both", "any") else t.parts[:1] if t.kind == "repeat" else ()
            open_ = [q for q in parts if q.kind in ("both", "any", "repeat") and q not in known]
            if open_:
                waiting += open_
                continue
            waiting.pop()
            w = [self._weigh(q, known) if q.kind == "rule" else known[q] if q in known else self.bytes.least(q) for q in parts]
            if t.kind == "both":
                known[t] = min(sum(w), UNBOUNDED)
            elif t.kind == "any":
                known[t] = min(w)
            elif t.kind == "repeat":
                known[t] = min(w[0] * t.parts[1], UNBOUNDED)
            else:
                known[t] = self.bytes.least(t)
        return known[term]

    def _body(self, node: Node) -> Term:
        b, values = self.bytes, self.normal.values(node)
        options = [self.literal("null")] if values.null else []
        options += [self.literal("true" if each else "false") for each in sorted(values.booleans)]
        options.append(self.spelling.number(values.numbers))
        options.append(self._string(values.strings))
        options += [self._array(shape) for shape in values.arrays]
        options += [self._object(shape) for shape in values.objects]
        return b.either(options)

    def _array(self, shape: Array) -> Term:
        b = self.bytes
        most = min(shape.most, len(shape.prefix)) if shape.items == NOTHING else shape.most
        for n, node in enumerate(shape.prefix):
            if node == NOTHING:
                most = min(most, n)
                break
        if shape.unique and most > 1:
            unique = self._unique(shape, most)
            if unique is not None:
                return unique
            most = 1
        if shape.least > most:
            return b.none
        if shape.contains:
            return self._containing(shape, most)
        whole = len(shape.prefix)
        tail = b.empty if most <= whole else self._rest(shape, most, whole)
        for n in range(min(whole, most) - 1, -1, -1):
            item = self.value(shape.prefix[n])
            tail = b.sequence(*([self.comma] if n else []), item, tail)
            if shape.least <= n:
                tail = b.either([tail, b.empty])
        return b.sequence(self.literal("["), tail, self.literal("]"))

    def _rest(self, shape: Array, most: int, whole: int) -> Term:
        b, item = self.bytes, self.value(shape.items)
        least = max(shape.least - whole, 0)
        most = most if most == UNBOUNDED else most - whole
        more = b.sequence(self.comma, item)
        if whole:
            return b.repeat(more, least, most)
        if most == 0:
            return b.empty
        some = b.sequence(item, b.repeat(more, max(least - 1, 0), most if most == UNBOUNDED else most - 1))
        return some if least else b.either([b.empty, some])

    def _unique(self, shape: Array, most: int) -> Term | None:
        """Return arrays of different items out of few, in the order of the schema; None when there are many."""
        if shape.prefix or shape.contains:
            return None
        values = self.normal.values(shape.items)
        texts = self._enumerated(values)
        if texts is None or not texts:
            return None
        b = self.bytes
        if len(texts) <= 5:
            orders = [order for n in range(shape.least, min(most, len(texts)) + 1) for order in permutations(texts, n)]
            return b.either(b.sequence(self.literal("["), *(part for n, text in enumerate(order) for part in ([self.comma] if n else []) + [text]), self.literal("]")) for order in orders)
        tails: dict[tuple[int, int], Term] = {}

        def tail(n: int, count: int) -> Term:
            if (n, count) not in tails:
                if n == len(texts) or count == most:
                    tails[n, count] = b.empty if count >= shape.least else b.none
                else:
                    taken = b.sequence(*([self.comma] if count else []), texts[n], tail(n + 1, count + 1))
                    tails[n, count] = b.either([taken, tail(n + 1, count)])
            return tails[n, count]

        return b.sequence(self.literal("["), tail(0, 0), self.literal("]"))

    def _enumerated(self, values: Any) -> list[Term] | None:
        if values.arrays or values.objects:
            return None
        found = [self.literal("null")] if values.null else []
        found += [self.literal(text) for text, each in (("false", False), ("true", True)) if each in values.booleans]
        for term, terms, wrap in ((values.numbers, self.numbers.terms, lambda w: None), (values.strings, self.strings.terms, self._string)):
            parts = term.parts if term.kind == "any" else () if term is terms.none else (term,)
            for part in parts:
                if wrap(part) is None or not _is_word(part):
                    return None
                found.append(wrap(part))
        return found if len(found) <= 60 else None

    def _containing(self, shape: Array, most: int) -> Term:
        b = self.bytes
        (node, least, limit), *others = shape.contains
        if others or max(shape.least, least, len(shape.prefix)) > 20 or (limit < UNBOUNDED and limit > 20):
            if len(others) and max(shape.least, len(shape.prefix)) <= 20:
                node = frozenset().union(*(each for each, _, _ in shape.contains))
                least, limit = max(low for _, low, _ in shape.contains), UNBOUNDED
                if any(high < UNBOUNDED for _, _, high in shape.contains):
                    return b.none
            else:
                return b.none
        cap_items = max(shape.least, len(shape.prefix)) if most == UNBOUNDED else most
        if cap_items > 60:
            return b.none
        known: dict[tuple[int, int], Term] = {}

        def after(place: int, count: int) -> Term:
            """The rest of the array after ``place`` items of which ``count`` are contained."""
            place_, count_ = min(place, cap_items + 1 if most == UNBOUNDED else place), min(count, max(least, 0 if limit == UNBOUNDED else limit))
            key = (place_, count_)
            if key in known:
                return known[key]
            ends = place_ >= shape.least and count_ >= least
            rule = known[key] = b.rule(lambda: body(place_, count_), ("contains", id(shape), shape, key), ends)
            return rule

        def body(place: int, count: int) -> Term:
            options = [b.empty] if place >= shape.least and count >= least else []
            if place < most:
                inner = shape.item(place)
                comma = [self.comma] if place else []
                if count < limit:
                    options.append(b.sequence(*comma, self.value(inner | node), after(place + 1, count + 1)))
                if limit == UNBOUNDED:
                    if count < least or True:
                        options.append(b.sequence(*comma, self.value(inner), after(place + 1, count)))
                else:
                    outside = complement(node) if len(node) == 1 else NOTHING
                    options.append(b.sequence(*comma, self.value(inner | outside), after(place + 1, count)))
            return b.either(options)

        start = after(0, 0)
        waiting, seen = [start], {start}
        bodies = {}
        # all states are few: write them now, so that what they need is written too
        todo = [(0, 0)]
        done = set()
        while todo:
            key = todo.pop()
            if key in done:
                continue
            done.add(key)
            before = set(known)
            bodies[key] = body(*key)
            todo += [each for each in known if each not in done]
        for key in done:
            rule = known[key]
            rule.parts = (*rule.parts[:-1], lambda key=key: bodies[key])
            self._extra.append((rule, bodies[key]))
        return b.sequence(self.literal("["), start, self.literal("]"))

    def _object(self, shape: Object) -> Term:
        b = self.bytes
        if shape.some:
            return b.none
        names = shape.names()
        required = [name for name in shape.required if name not in names]
        properties = [(name, node) for name, (node, _) in names.items()]
        properties += [(name, self.algebra.applied(shape, name)[0]) for name in sorted(required)]
        if any(node == NOTHING and name in shape.required for name, node in properties):
            return b.none
        all_names = [name for name, _ in properties]
        written = [(name, node) for name, node in properties if node != NOTHING]
        if self.spelling.sorts_names:
            written.sort(key=lambda pair: pair[0].lower())
        other_names = self.strings.terms.other(self.strings.terms.either(self.strings.text(name) for name in all_names))
        free = []
        for region in shape.regions:
            term = self.strings.terms.every([region.names, other_names])
            if region.node != NOTHING:
                key = self.spelling.names(term)
                if key is not b.none:
                    free.append(b.sequence(key, self.colon, self.value(region.node)))
        member = b.either(free)
        most = shape.most
        if shape.least > len(shape.required) and member is not b.none:
            # Names that are free might repeat, so they do not count.
            pass
        counts = shape.least > len(shape.required) or most < UNBOUNDED
        T: dict[tuple[int, int], Term] = {}
        size = len(written)
        top = max(shape.least, 0)

        def key_of(count: int) -> int:
            if most < UNBOUNDED:
                return count
            return min(count, max(top, 1))

        def tail(n: int, count: int) -> Term:
            raise NotImplementedError

        # from the last property to the first
        limit = size if most == UNBOUNDED else min(most, size)
        for n in range(size, -1, -1):
            for count in range(min(n, max(top, 1)) if most == UNBOUNDED else min(n, most), -1, -1):
                if n == size:
                    left = UNBOUNDED if most == UNBOUNDED else most - count
                    enough = count >= top
                    more = b.sequence(self.comma, member)
                    if enough:
                        T[n, count] = b.empty if left == 0 else b.repeat(more, 0, left) if count else (
                            b.either([b.empty, b.sequence(member, b.repeat(more, 0, left if left == UNBOUNDED else left - 1))]))
                    elif count + 1 >= top and left > 0:  # one free name is never a repetition
                        T[n, count] = b.sequence(*([self.comma] if count else []), member, b.repeat(more, 0, left if left == UNBOUNDED else left - 1))
                    else:
                        T[n, count] = self._distinct(shape, count, top, left, other_names)
                    continue
                name, node = written[n]
                options = []
                if count < most:
                    text = self.spelling.name(name)
                    options.append(b.sequence(*([self.comma] if count else []), text, self.colon, self.value(node), T[n + 1, key_of(count + 1)]))
                if name not in shape.required:
                    options.append(T[n + 1, count])
                T[n, count] = b.either(options)
        return b.sequence(self.literal("{"), T[0, 0], self.literal("}"))

    def _distinct(self, shape: Object, count: int, top: int, left: int, other_names: Term) -> Term:
        """Return several free members whose names differ in length, so that they are different."""
        b, s = self.bytes, self.strings
        needed = top - count
        if needed > 12 or left < needed:
            return b.none
        longest = s.terms
        parts = []
        for n in range(needed):
            options = []
            for region in shape.regions:
                if region.node == NOTHING:
                    continue
                lengths = s.lengths(2 * n + 1, 2 * n + 2) if n + 1 < needed else s.lengths(2 * n + 1, UNBOUNDED)
                key = self.spelling.names(s.terms.every([region.names, other_names, lengths]))
                if key is not b.none:
                    options.append(b.sequence(key, self.colon, self.value(region.node)))
            parts += ([self.comma] if count or n else []) + [b.either(options)]
        return b.sequence(*parts)


def _is_word(term: Term) -> bool:
    while term.kind == "both":
        if term.parts[0].kind != "set":
            return False
        term = term.parts[1]
    return term.kind in ("set", "empty")


def strings_in(schema: Any) -> tuple[set[str], set[str], set[str]]:
    """Return the patterns, the formats and the texts that a schema names, which may be JSON of any form."""
    patterns: set[str] = set()
    formats: set[str] = set()
    texts: set[str] = set()
    waiting = [(schema, False)]
    while waiting:
        part, is_value = waiting.pop()  # is_value: whether it stands within an enum or a const
        if isinstance(part, str):
            texts.add(part)
        elif isinstance(part, list):
            waiting += [(each, is_value) for each in part]
        elif isinstance(part, dict):
            texts.update(part)
            if isinstance(part.get("patternProperties"), dict):
                patterns.update(part["patternProperties"])
            for key, value in part.items():
                if key in ("pattern", "format") and isinstance(value, str):
                    (patterns if key == "pattern" else formats).add(value)
                if is_value or key not in _PROSE or not isinstance(value, str):
                    waiting.append((value, is_value or key in ("enum", "const")))
    return patterns, formats, texts

