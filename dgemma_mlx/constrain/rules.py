"""Rules of a context-free grammar, their shortest texts, and left recursion and its removal.

A rule is a list of alternatives, an alternative a sequence of items, and an item an atom that may be repeated. An atom
is the name of a rule, or a term over bytes (``dgemma_mlx.constrain.terms``).

The states of a machine are what may follow, so a rule whose texts may begin with a text of the same rule would ask for
its own row. Such rules are replaced by others that have the same texts, with the left-corner transform (Rosenkrantz and
Lewis 1970; Moore 2000): a sum ``s ::= s "+" p | p`` is read as a ``p`` that more and more is added to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Set
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple

from dgemma_mlx.constrain.limits import check_time
from dgemma_mlx.constrain.terms import UNBOUNDED, Term, Terms

Name = str | tuple[Any, ...]  # a tuple names a rule that ``_LeftCorners`` makes


class Item(NamedTuple):
    """An atom, repeated ``least`` to ``most`` times."""

    atom: Name | Term
    least: int = 1
    most: int = 1


Alternative = tuple[Item, ...]
Rules = dict[Name, tuple[Alternative, ...]]


def lengths(rules: Rules, terms: Terms) -> dict[Name, int]:
    """Return the number of bytes of the shortest text of each rule; ``UNBOUNDED`` for a rule without any text."""

    def length(item: Item) -> int:
        each = terms.least(item.atom) if isinstance(item.atom, Term) else found[item.atom]
        return min(each * item.least, UNBOUNDED)

    users: dict[Name, list[Name]] = {name: [] for name in rules}
    for name, alternatives in rules.items():
        for used in {item.atom for alternative in alternatives for item in alternative}:
            if not isinstance(used, Term):
                users[used].append(name)
    found: dict[Name, int] = dict.fromkeys(rules, UNBOUNDED)
    waiting = deque(reversed(rules))
    while waiting:
        check_time()
        name = waiting.popleft()
        shortest = min((sum(map(length, alternative)) for alternative in rules[name]), default=UNBOUNDED)
        if shortest < found[name]:
            found[name] = shortest
            waiting += users[name]
    return found


def without_left_recursion(rules: Rules, start: Name, nullable: Set[Name], terms: Terms) -> Rules:
    """Return rules in which no text of a rule begins with a text of the same rule.

    The texts of ``start`` stay the same. ``nullable`` are the rules that the empty text belongs to.
    """
    transform = _LeftCorners(rules, nullable, terms)
    return transform.rules_for(start) if transform.recursive else rules


class _LeftCorners:
    """The left-corner transform of some rules.

    Rules whose texts may begin with each other are a group. A text of a rule ``a`` of a group begins with a *start*, a
    text of a rule ``b`` of the group that does not begin with the group; the rest of the text makes an ``a`` of it:

    * ``("full", a)``: the texts of ``a`` apart from the empty one.
    * ``("step", a)``: what makes a longer ``a`` of an ``a``, where the group is ``a`` alone.
    * ``("after", b, a)``: what makes an ``a`` of a ``b``.

    Attributes:
        recursive: The rules that begin with themselves, and those that begin with these.
    """

    def __init__(self, rules: Rules, nullable: Set[Name], terms: Terms) -> None:
        self._rules, self._nullable, self._terms = rules, nullable, terms
        self._begins = {name: set(self._left(alternatives)) for name, alternatives in rules.items()}
        self._groups: dict[Name, list[Name]] = {}
        self._divided: dict[Name, tuple[list[Alternative], dict[Name, list[Alternative]]]] = {}
        self.recursive = set(rules)
        sorter = TopologicalSorter(self._begins)
        try:
            sorter.prepare()
            self.recursive.clear()
        except CycleError:  # the rest can be sorted nevertheless
            while ready := sorter.get_ready():
                self.recursive.difference_update(ready)
                sorter.done(*ready)
        order = {name: number for number, name in enumerate(rules)}
        reached = {name: self._reached(name) for name in self.recursive}
        for name in self.recursive:
            group = [each for each in reached[name] if name in reached[each]]
            self._groups[name] = sorted(group, key=order.__getitem__)

    def rules_for(self, start: Name) -> Rules:
        """Return the rules that the texts of ``start`` need."""
        found: Rules = {}
        waiting = [start]
        while waiting:
            check_time()
            name = waiting.pop()
            if name not in found:
                found[name] = tuple(dict.fromkeys(self._alternatives(name)))
                waiting += [item.atom for each in found[name] for item in each if not isinstance(item.atom, Term)]
        return found

    def _left(self, alternatives: tuple[Alternative, ...]) -> Iterator[Name]:
        """Yield the rules that the texts of alternatives may begin with."""
        for alternative in alternatives:
            for item in alternative:
                if not isinstance(item.atom, Term):
                    yield item.atom
                if not self._is_nullable(item):
                    break

    def _reached(self, name: Name) -> set[Name]:
        """Return the rules that the texts of a rule may begin with, directly or through other rules."""
        found: set[Name] = set()
        waiting = [name]
        while waiting:
            check_time()
            new = (self._begins[waiting.pop()] & self.recursive) - found
            found |= new
            waiting += new
        return found

    def _is_nullable(self, item: Item) -> bool:
        return item.least == 0 or self._has_empty(item.atom)

    def _has_empty(self, atom: Name | Term) -> bool:
        return atom.nullable if isinstance(atom, Term) else atom in self._nullable

    def _alternatives(self, name: Name) -> Iterator[Alternative]:
        """Yield the alternatives of a rule, which may be one that this class makes."""
        if isinstance(name, str):
            if not self._groups.get(name):
                yield from self._rules[name]
            elif name in self._nullable:
                yield from [(Item(("full", name)),), ()]
            else:
                yield from self._of_group(name)
        elif name[0] == "full":
            rule = name[1]
            yield from self._of_group(rule) if self._groups.get(rule) else self._split(self._rules[rule], [])[0]
        elif name[0] == "step":
            yield from self._split(tuple(self._ends(name[1], name[1])), [])[0]
        else:
            yield from self._after(name[1], name[2])

    def _of_group(self, rule: Name) -> Iterator[Alternative]:
        """Yield the texts of a rule of a group apart from the empty one: a start, and what makes the rule of it."""
        group = self._groups[rule]
        for begin in group:
            rest = Item(("step", rule), 0, UNBOUNDED) if len(group) == 1 else Item(("after", begin, rule))
            for start in self._division(begin)[0]:
                yield (*start, rest)

    def _after(self, begin: Name, rule: Name) -> Iterator[Alternative]:
        """Yield what makes a text of ``rule`` of a text of ``begin``."""
        group = self._groups[rule]
        same = [begin]  # the rules that a text of ``begin`` is a text of as it stands
        for each in same:  # grows
            check_time()
            for larger in group:
                if larger not in same and any(all(map(self._is_nullable, end)) for end in self._ends(larger, each)):
                    same.append(larger)
        for each in same:
            if each == rule:
                yield ()
            for larger in group:
                for end in self._split(tuple(self._ends(larger, each)), [])[0]:
                    yield (*end, Item(("after", larger, rule)))

    def _ends(self, rule: Name, begin: Name) -> list[Alternative]:
        """Return what follows ``begin`` in the alternatives of ``rule`` that begin with it."""
        return self._division(rule)[1].get(begin, [])

    def _division(self, rule: Name) -> tuple[list[Alternative], dict[Name, list[Alternative]]]:
        """Return how the texts of a rule of a group begin, as ``_split`` does."""
        if rule not in self._divided:
            self._divided[rule] = self._split(self._rules[rule], self._groups[rule])
        return self._divided[rule]

    def _split(
        self, alternatives: tuple[Alternative, ...], group: list[Name]
    ) -> tuple[list[Alternative], dict[Name, list[Alternative]]]:
        """Divide the texts of alternatives, apart from the empty one, by what they begin with.

        Return those that do not begin with a rule of the group, and, for each rule of the group, what follows it.
        """
        starts: list[Alternative] = []
        ends: dict[Name, list[Alternative]] = {}
        for alternative in alternatives:
            for place, item in enumerate(alternative):
                atom, rest = item.atom, alternative[place + 1 :]
                if item.most > 1:
                    least = 0 if self._has_empty(atom) else max(item.least - 1, 0)
                    rest = (Item(atom, least, item.most if item.most == UNBOUNDED else item.most - 1), *rest)
                if not isinstance(atom, Term) and atom in group:
                    ends.setdefault(atom, []).append(rest)
                else:
                    starts.append((Item(self._full(atom)), *rest))
                if not self._is_nullable(item):
                    break
        return starts, ends

    def _full(self, atom: Name | Term) -> Name | Term:
        """Return an atom for the texts of an atom apart from the empty one."""
        if not self._has_empty(atom):
            return atom
        if isinstance(atom, Term):
            return self._terms.rule(lambda: atom, ("full", atom.number))
        return ("full", atom)
