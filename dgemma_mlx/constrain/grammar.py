r"""Translation of a grammar in EBNF without recursion into a regular expression.

    answer ::= greeting " " name+ ("!" | ".")?     # the first rule is the whole text
    greeting ::= "Hello" | 'Good ' [a-z]{3,8}
    name ::= [A-Z] [a-z]*

* A rule consists of a name, ``::=`` (or ``=``, or ``:``) and an expression. The next rule or a ``;`` ends it.
* Literals are enclosed in double or single quotes. Their escapes are ``\n``, ``\t``, ``\r``, ``\\``, ``\"``, ``\'``,
  ``\xHH`` and ``\uHHHH``.
* ``[a-z]`` and ``[^...]`` are character classes. ``.`` is any character except a newline.
* ``?``, ``*``, ``+``, ``{3}``, ``{2,}`` and ``{2,5}`` repeat the item before them. ``|`` separates alternatives, and
  parentheses group.
* ``#`` begins a comment, which extends to the end of the line.
* A rule may use rules that are defined after it, but it may not use itself, directly or through other rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from dgemma_mlx.checks import shown
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
_MAX_REGEX_LENGTH = 1_000_000  # characters
_MAX_DEPTH = 100  # of rules within rules, and of parentheses within a rule


class _Lexeme(NamedTuple):
    """A lexeme of a grammar.

    Attributes:
        kind: Name of the group of ``_LEXEME`` that matched: head, name, literal, class, repeat or mark. A head is the
            name of a rule with its ``::=``, ``=`` or ``:``.
        text: The lexeme as written.
        line: Line number in the grammar, from 1.
    """

    kind: str
    text: str
    line: int


def regex_of_grammar(grammar: str) -> str:
    """Return a regular expression for the texts of the grammar's first rule.

    Raises ``DgemmaError`` (exit code 2), which gives the line, when the grammar is malformed or recursive.
    """
    rules = _rules(checked_text(grammar, "a grammar"))
    if not rules:
        raise DgemmaError("the grammar has no rule", 'Write a rule like answer ::= "yes" | "no".', exit_code=2)
    try:
        return _Translator(rules).rule(next(iter(rules)), 1)
    except RecursionError:
        raise DgemmaError("the grammar is nested too deeply", "Use fewer levels.", exit_code=2) from None


def _rules(grammar: str) -> dict[str, list[_Lexeme]]:
    """Split a grammar into rules. Return the lexemes of each rule's expression, by the name of the rule."""
    rules: dict[str, list[_Lexeme]] = {}
    current: list[_Lexeme] | None = None
    for lexeme in _lexemes(grammar):
        if lexeme.kind == "head":
            name = lexeme.text.rstrip(":= \t\r\n")
            if name in rules:
                _reject(lexeme.line, f"{name[:80]} is defined twice", "Combine its expressions with |.")
            current = rules[name] = []
        elif lexeme.text == ";" and lexeme.kind == "mark":
            current = None
        elif current is None:
            _reject(lexeme.line, f"{lexeme.text[:80]} is outside any rule")
        else:
            current.append(lexeme)
    return rules


def _lexemes(grammar: str) -> Iterator[_Lexeme]:
    """Yield the lexemes of a grammar without spaces and comments."""
    position, line = 0, 1
    while position < len(grammar):
        match = _LEXEME.match(grammar, position)
        if match is None:
            _reject(line, f"{shown(grammar[position : position + 20].splitlines()[0])} is not valid syntax")
        if match.lastgroup != "space":
            yield _Lexeme(str(match.lastgroup), match[0], line)
        line += match[0].count("\n")
        position = match.end()


class _Translator:
    """A recursive-descent translator of the rules of one grammar. Each rule is translated once."""

    def __init__(self, rules: dict[str, list[_Lexeme]]) -> None:
        self._rules = rules
        self._translated: dict[str, str] = {}
        self._open_rules: list[str] = []  # rules whose translation has begun, to detect recursion

    def rule(self, name: str, line: int) -> str:
        """Return the regular expression of a rule. ``line`` is the line that uses the rule, for error messages."""
        if name in self._open_rules:
            cycle = " -> ".join([*self._open_rules[self._open_rules.index(name) :], name])
            _reject(line, f"recursion is not supported: {cycle[:200]}", "Write out each level that you need.")
        if name not in self._rules:
            _reject(line, f"rule {name[:80]} does not exist")
        if name not in self._translated:
            self._open_rules.append(name)
            if len(self._open_rules) > _MAX_DEPTH:
                _reject(line, f"rules are nested deeper than {_MAX_DEPTH}", "Use fewer levels.")
            waiting = self._rules[name][::-1]
            self._translated[name] = self._alternatives(waiting, 0)
            if waiting:
                _reject(waiting[-1].line, f"unexpected {waiting[-1].text[:80]}")
            self._open_rules.pop()
        return self._translated[name]

    def _alternatives(self, waiting: list[_Lexeme], depth: int) -> str:
        """Translate alternatives up to a closing parenthesis or the end, within ``depth`` pairs of parentheses.

        ``waiting`` has the next lexeme last. The translated ones are removed from it.
        """
        alternatives: list[list[str]] = [[]]
        size = 0
        while waiting and waiting[-1].text != ")":
            head = waiting.pop()
            if head.kind == "mark" and head.text == "|":
                alternatives.append([])
                continue
            item = self._item(head, waiting, depth)
            while waiting and waiting[-1].kind == "repeat":
                item = f"(?:{item}){waiting.pop().text}"
            alternatives[-1].append(item)
            size += len(item)
            if size > _MAX_REGEX_LENGTH:
                _reject(head.line, "the grammar is too large", "Use smaller repetitions and fewer rules.")
        return any_of(*map("".join, alternatives))

    def _item(self, head: _Lexeme, waiting: list[_Lexeme], depth: int) -> str:
        """Translate one item, which begins with ``head``; the other lexemes are ``waiting``."""
        if head.kind == "name":
            return self.rule(head.text, head.line)
        if head.kind == "literal":
            return quoted(_unescaped(head))
        if head.kind == "class":
            return _class(head)
        if head.text == ".":
            return "."
        if head.text != "(":
            _reject(head.line, f"{head.text[:80]} has no item before it")
        if depth >= _MAX_DEPTH:
            _reject(head.line, f"parentheses are nested deeper than {_MAX_DEPTH}", "Use fewer levels.")
        group = self._alternatives(waiting, depth + 1)
        if not waiting:
            _reject(head.line, "( is not closed")
        waiting.pop()
        return group


def _unescaped(lexeme: _Lexeme) -> str:
    """Return the text of a literal without its quotes and escapes."""
    def character(match: re.Match[str]) -> str:
        code = match[1] or match[2]
        if code is None and match[3] not in _NAMED:
            _reject(lexeme.line, f"{match[0]} is not a valid escape")
        return _NAMED[match[3]] if code is None else checked_text(chr(int(code, 16)), f"{match[0]} in the grammar")

    return _ESCAPE.sub(character, lexeme.text[1:-1])


def _class(lexeme: _Lexeme) -> str:
    """Return a character class in Rust's syntax. Escape what only Rust treats specially: [, &&, -- and ~~."""
    begin = 2 if lexeme.text.startswith("[^") else 1
    inner = re.sub(r"(\\.)|(\[|&&|--|~~)", lambda m: m[1] or "".join("\\" + c for c in m[2]), lexeme.text[begin:-1])
    if not inner:
        _reject(lexeme.line, "a character class is empty")
    return f"{lexeme.text[:begin]}{inner}]"


def _reject(line: int, problem: str, hint: str = "docs/constrained.md describes the syntax.") -> NoReturn:
    """Raise ``DgemmaError`` (exit code 2) for a line of the grammar."""
    raise DgemmaError(f"the grammar, line {line}: {problem}", hint, exit_code=2)
