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
    return _Translator(rules).rule(next(iter(rules)), 1)


def _rules(grammar: str) -> dict[str, list[_Lexeme]]:
    """Split a grammar into rules. Return the lexemes of each rule's expression, by the name of the rule."""
    rules: dict[str, list[_Lexeme]] = {}
    current: list[_Lexeme] | None = None
    for lexeme in _lexemes(grammar):
        if lexeme.kind == "head":
            name = lexeme.text.rstrip(":= \t\r\n")
            if name in rules:
                _reject(lexeme.line, f"{name} is defined twice", "Combine its expressions with |.")
            current = rules[name] = []
        elif lexeme.text == ";" and lexeme.kind == "mark":
            current = None
        elif current is None:
            _reject(lexeme.line, f"{lexeme.text} is outside any rule")
        else:
            current.append(lexeme)
    return rules


def _lexemes(grammar: str) -> Iterator[_Lexeme]:
    """Yield the lexemes of a grammar without spaces and comments."""
    position, line = 0, 1
    while position < len(grammar):
        match = _LEXEME.match(grammar, position)
        if match is None:
            _reject(line, f"{grammar[position : position + 20].splitlines()[0]!r} is not valid syntax")
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
            _reject(line, f"recursion is not supported: {cycle}", "Write out each level that you need.")
        if name not in self._rules:
            _reject(line, f"rule {name} does not exist")
        if name not in self._translated:
            self._open_rules.append(name)
            lexemes = [*self._rules[name]]
            self._translated[name], rest = self._alternatives(lexemes)
            if rest:
                _reject(rest[0].line, f"unexpected {rest[0].text}")
            self._open_rules.pop()
        return self._translated[name]

    def _alternatives(self, lexemes: list[_Lexeme]) -> tuple[str, list[_Lexeme]]:
        """Translate alternatives up to a closing parenthesis or the end.

        Return the regular expression and the remaining lexemes.
        """
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
            if len(alternatives[-1]) > _MAX_REGEX_LENGTH:
                _reject(head.line, "the grammar is too large", "Use smaller repetitions and fewer rules.")
        return any_of(*alternatives), lexemes

    def _item(self, head: _Lexeme, lexemes: list[_Lexeme]) -> tuple[str, list[_Lexeme]]:
        """Translate one item, which begins with ``head``. Return the regular expression and the remaining lexemes."""
        if head.kind == "name":
            return self.rule(head.text, head.line), lexemes
        if head.kind == "literal":
            return quoted(_unescaped(head)), lexemes
        if head.kind == "class":
            return _class(head), lexemes
        if head.text == ".":
            return ".", lexemes
        if head.text != "(":
            _reject(head.line, f"{head.text} has no item before it")
        group, lexemes = self._alternatives(lexemes)
        if not lexemes:
            _reject(head.line, "( is not closed")
        return group, lexemes[1:]


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
