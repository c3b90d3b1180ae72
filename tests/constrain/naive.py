"""Random context-free grammars, what they look like in each spelling, and a recogniser that tries everything.

A grammar is a dict of rules. A rule is a list of alternatives, an alternative a list of items, and an item a pair of an
atom and how often it occurs: "", "?", "*", "+", or a pair of counts. An atom is a text, the name of a rule ("@s"), a
set of characters ("[ab]"), or a list of alternatives.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Grammar = dict[str, list[list[tuple[Any, Any]]]]

_COUNTS = {"": (1, 1), "?": (0, 1), "*": (0, 99), "+": (1, 99)}


@st.composite
def grammars(draw: st.DrawFn) -> Grammar:
    """Draw a grammar of one to four rules over the letters a, b and é, the first rule being ``root``."""
    names = ["root", "s", "t", "u"][: draw(st.integers(1, 4))]
    texts = st.sampled_from(["a", "b", "a", "b", "ab", "é", "", "[ab]", "[aé]"])
    leaf = st.sampled_from([f"@{name}" for name in names]) | texts
    counts = st.sampled_from(["", "", "", "", "?", "*", "+", (2, 2), (0, 2), (1, 2)])

    def alternatives(atom: st.SearchStrategy[Any]) -> st.SearchStrategy[list[list[tuple[Any, Any]]]]:
        return st.lists(st.lists(st.tuples(atom, counts), max_size=3), min_size=1, max_size=3)

    return {name: draw(alternatives(leaf | leaf | leaf | alternatives(leaf))) for name in names}


def written(grammar: Grammar, lark: bool) -> str:
    """Write a grammar as EBNF, which is GBNF, or in Lark's spelling."""
    mark = ":" if lark else " ::="
    return "\n".join(f"{_name(name, lark)}{mark} {_body(rule, lark)}" for name, rule in grammar.items())


def _name(name: str, lark: bool) -> str:
    return "start" if lark and name == "root" else name


def _body(alternatives: list[list[tuple[Any, Any]]], lark: bool) -> str:
    return " | ".join(" ".join(_item(*item, lark) for item in each) for each in alternatives)


def _item(atom: Any, count: Any, lark: bool) -> str:
    if isinstance(atom, list):
        text = f"({_body(atom, lark)})"
    elif atom[:1] == "@":
        text = _name(atom[1:], lark)
    elif atom[:1] == "[":
        text = f"/{atom}/" if lark else atom
    else:
        text = f'"{atom}"'
    if isinstance(count, str):
        return text + count
    least, most = count
    return text + (f"~{least}..{most}" if lark else f"{{{least},{most}}}")


class Recogniser:
    """The ends of all texts of each rule within a text, from each place on, until nothing more is found."""

    def __init__(self, grammar: Grammar, text: str) -> None:
        self._grammar, self._text = grammar, text
        places = range(len(text) + 1)
        self._ends: dict[tuple[str, int], set[int]] = {(name, place): set() for name in grammar for place in places}
        grown = True
        while grown:
            grown = False
            for name, place in self._ends:
                found = self._alternatives(grammar[name], place)
                grown |= not found <= self._ends[name, place]
                self._ends[name, place] |= found

    def matches(self) -> bool:
        """Return whether the whole text belongs to ``root``."""
        return len(self._text) in self._ends["root", 0]

    def _alternatives(self, alternatives: list[list[tuple[Any, Any]]], place: int) -> set[int]:
        found = set()
        for items in alternatives:
            ends = {place}
            for atom, count in items:
                ends = {after for end in ends for after in self._repeated(atom, count, end)}
            found |= ends
        return found

    def _repeated(self, atom: Any, count: Any, place: int) -> set[int]:
        least, most = _COUNTS[count] if isinstance(count, str) else count
        ends, found = {place}, set() if least else {place}
        for number in range(1, min(most, least + len(self._text) + 1) + 1):
            ends = {after for end in ends for after in self._atom(atom, end)}
            found |= ends if number >= least else set()
        return found

    def _atom(self, atom: Any, place: int) -> set[int]:
        if isinstance(atom, list):
            return self._alternatives(atom, place)
        if atom[:1] == "@":
            return self._ends[atom[1:], place]
        if atom[:1] == "[":
            return {place + 1} if self._text[place : place + 1] in list(atom[1:-1]) else set()
        return {place + len(atom)} if self._text.startswith(atom, place) else set()


def rules_without_text(grammar: Grammar) -> set[str]:
    """Return the rules from which no text can be derived."""
    empty = set(grammar)

    def possible(alternatives: list[list[tuple[Any, Any]]]) -> bool:
        return any(all(_optional(count) or atom_possible(atom) for atom, count in items) for items in alternatives)

    def atom_possible(atom: Any) -> bool:
        return possible(atom) if isinstance(atom, list) else atom[:1] != "@" or atom[1:] not in empty

    while found := {name for name in empty if possible(grammar[name])}:
        empty -= found
    return empty


def _optional(count: Any) -> bool:
    return count in ("?", "*") or count[:1] == (0,)
