r"""A grammar in EBNF without recursion -> a regular expression.

    answer ::= greeting " " name+ ("!" | ".")?     # the first rule is the whole text
    greeting ::= "Hello" | 'Good ' [a-z]{3,8}
    name ::= [A-Z] [a-z]*

A rule is a name, ``::=`` (or ``=``, or ``:``) and an expression, which goes on until the next rule or a ``;``.
Literals stand in either quotes, with ``\n``, ``\t``, ``\r``, ``\\``, ``\"``, ``\'``, ``\xHH`` and ``\uHHHH``. ``[a-z]``
and ``[^...]`` are classes of characters, ``.`` is any but a newline. ``?``, ``*``, ``+``, ``{3}``, ``{2,}`` and
``{2,5}`` repeat what stands before them, ``#`` begins a comment. A rule may be used before it is written, but not
within itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from dgemma_mlx.constrain.regex import any_of, checked_text, quoted
from dgemma_mlx.errors import DgemmaError

_LEXEME = re.compile(
    r"""(?P<space>\s+|\#[^\n]*)|(?P<head>[A-Za-z_][\w-]*\s*(?:::=|=|:))|(?P<name>[A-Za-z_][\w-]*)
    |(?P<literal>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|(?P<class>\[\^?\]?(?:[^\]\\\n]|\\.)*\])
    |(?P<repeat>[?*+]|\{\d+(?:,\d*)?\})|(?P<mark>[()|.;])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|(.))")
_NAMED = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'"}
_MOST = 1_000_000  # characters of a regular expression


class _Lexeme(NamedTuple):
    kind: str
    text: str
    line: int


def regex_of_grammar(grammar: str) -> str:
    """The texts of the first rule; ``DgemmaError`` (exit code 2) with a line for what is malformed or recursive."""
    rules = _rules(checked_text(grammar, "a grammar"))
    if not rules:
        raise DgemmaError("the grammar has no rule", 'A rule is like answer ::= "yes" | "no"', exit_code=2)
    return _Grammar(rules).rule(next(iter(rules)), 1)


def _rules(grammar: str) -> dict[str, list[_Lexeme]]:
    """The lexemes of each rule."""
    rules: dict[str, list[_Lexeme]] = {}
    current: list[_Lexeme] | None = None
    for lexeme in _lexemes(grammar):
        if lexeme.kind == "head":
            name = lexeme.text.rstrip(":= \t\r\n")
            if name in rules:
                _refuse(lexeme.line, f"{name} has two rules")
            current = rules[name] = []
        elif lexeme.text == ";" and lexeme.kind == "mark":
            current = None
        elif current is None:
            _refuse(lexeme.line, f"{lexeme.text} stands in no rule")
        else:
            current.append(lexeme)
    return rules


def _lexemes(grammar: str) -> Iterator[_Lexeme]:
    place, line = 0, 1
    while place < len(grammar):
        match = _LEXEME.match(grammar, place)
        if match is None:
            _refuse(line, f"{grammar[place : place + 20].splitlines()[0]!r} is not understood")
        if match.lastgroup != "space":
            yield _Lexeme(str(match.lastgroup), match[0], line)
        line += match[0].count("\n")
        place = match.end()


class _Grammar:
    """Recursive descent over the lexemes of a rule, and of those that it uses."""

    def __init__(self, rules: dict[str, list[_Lexeme]]) -> None:
        self._rules = rules
        self._done: dict[str, str] = {}
        self._open: list[str] = []

    def rule(self, name: str, line: int) -> str:
        if name in self._open:
            way = " -> ".join([*self._open[self._open.index(name) :], name])
            _refuse(line, f"recursion is not supported: {way}", "Write the levels that you need out.")
        if name not in self._rules:
            _refuse(line, f"there is no rule {name}")
        if name not in self._done:
            self._open.append(name)
            lexemes = [*self._rules[name]]
            self._done[name], rest = self._alternatives(lexemes)
            if rest:
                _refuse(rest[0].line, f"{rest[0].text} is one too many")
            self._open.pop()
        return self._done[name]

    def _alternatives(self, lexemes: list[_Lexeme]) -> tuple[str, list[_Lexeme]]:
        """A group of alternatives from the beginning of lexemes, and the lexemes behind it."""
        alternatives = [""]
        while lexemes and lexemes[0].text != ")":
            head, *lexemes = lexemes
            if head.kind == "mark" and head.text == "|":
                alternatives.append("")
                continue
            item, lexemes = self._item(head, lexemes)
            while lexemes and lexemes[0].kind == "repeat":
                item, lexemes = f"(?:{item}){lexemes[0].text}", lexemes[1:]
            alternatives[-1] += item
            if len(alternatives[-1]) > _MOST:
                _refuse(head.line, "the grammar is too large")
        return any_of(*alternatives), lexemes

    def _item(self, head: _Lexeme, lexemes: list[_Lexeme]) -> tuple[str, list[_Lexeme]]:
        if head.kind == "name":
            return self.rule(head.text, head.line), lexemes
        if head.kind == "literal":
            return quoted(_unescaped(head)), lexemes
        if head.kind == "class":
            return _class(head), lexemes
        if head.text == ".":
            return ".", lexemes
        if head.text != "(":
            _refuse(head.line, f"there is nothing before {head.text}")
        group, lexemes = self._alternatives(lexemes)
        if not lexemes:
            _refuse(head.line, "( is not closed")
        return group, lexemes[1:]


def _unescaped(lexeme: _Lexeme) -> str:
    def character(match: re.Match[str]) -> str:
        code = match[1] or match[2]
        if code is None and match[3] not in _NAMED:
            _refuse(lexeme.line, f"there is no escape {match[0]}")
        return _NAMED[match[3]] if code is None else checked_text(chr(int(code, 16)), f"{match[0]} in the grammar")

    return _ESCAPE.sub(character, lexeme.text[1:-1])


def _class(lexeme: _Lexeme) -> str:
    """The class without what Rust understands and EBNF does not."""
    begin = 2 if lexeme.text.startswith("[^") else 1
    inner = re.sub(r"(\\.)|(\[|&&|--|~~)", lambda m: m[1] or "".join("\\" + c for c in m[2]), lexeme.text[begin:-1])
    if not inner:
        _refuse(lexeme.line, "a class without characters")
    return f"{lexeme.text[:begin]}{inner}]"


def _refuse(line: int, problem: str, hint: str = "docs/constrained.md describes the syntax.") -> NoReturn:
    raise DgemmaError(f"the grammar, line {line}: {problem}", hint, exit_code=2)
