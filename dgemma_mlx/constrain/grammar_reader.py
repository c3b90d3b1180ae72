r"""Reading of the rules of a grammar: what all spellings share, and the spelling of EBNF and of llama.cpp (GBNF).

    answer ::= greeting " " name+ ("!" | ".")?     # a comment
    greeting ::= "Hello" | 'Good ' [a-z]{3,8}
    name ::= [A-Z] [a-z]*

* A rule consists of a name, ``::=`` (or ``=``, or ``:``) and an expression. The next rule or a ``;`` ends it.
* Literals are enclosed in double or single quotes. Their escapes are ``\n``, ``\t``, ``\r``, ``\f``, ``\\``, ``\"``,
  ``\'``, ``\[``, ``\]``, ``\xHH``, ``\uHHHH`` and ``\UHHHHHHHH``.
* ``[a-z]`` and ``[^...]`` are character classes, with the same escapes, ``\d``, ``\w``, ``\s``, ``\D``, ``\W``, ``\S``
  and ``\p{...}``. ``.`` is any character except a newline.
* ``?``, ``*``, ``+``, ``{3}``, ``{2,}`` and ``{2,5}`` repeat the item before them. ``|`` separates alternatives, which
  may be empty, and parentheses group.
* ``#`` begins a comment, which extends to the end of the line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, NoReturn

from dgemma_mlx.checks import shown
from dgemma_mlx.constrain.characters import ALL, Ranges, ranges, without
from dgemma_mlx.constrain.leaf import utf8
from dgemma_mlx.constrain.limits import check_time
from dgemma_mlx.constrain.pattern import characters_of
from dgemma_mlx.constrain.rules import Alternative, Item, Name, Rules
from dgemma_mlx.constrain.terms import UNBOUNDED, Term, Terms
from dgemma_mlx.errors import DgemmaError

_HEX = r"x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}"
_ESCAPE = re.compile(rf"\\(?:({_HEX})|(.))", re.DOTALL)
_NAMED = {"n": "\n", "t": "\t", "r": "\r", "f": "\f"}
_CLASS_CHARACTER = rf"\\(?:{_HEX}|[pP]\{{[^{{}}]*\}}|[pP]\w|.)|[^\\]"
_CLASS_RANGE = re.compile(rf"({_CLASS_CHARACTER})(?:-({_CLASS_CHARACTER}))?", re.DOTALL)
_REPEAT = re.compile(r"[{~]\s*(\d*)\s*(,|\.\.)?\s*(\d*)\s*\}?")
_MOST_DIGITS = 9  # of a count


class Lexeme(NamedTuple):
    """A lexeme of a grammar.

    Attributes:
        kind: What it is; the name of a group of the spelling's regular expression.
        text: The lexeme as written.
        line: Line number in the grammar, from 1.
    """

    kind: str
    text: str
    line: int


def lexemes(grammar: str, spelling: re.Pattern[str]) -> Iterator[Lexeme]:
    """Yield the lexemes of a grammar without spaces and comments, which are the group ``space`` of ``spelling``."""
    position, line = 0, 1
    while position < len(grammar):
        check_time()
        match = spelling.match(grammar, position)
        if match is None:
            reject(line, f"{shown(grammar[position : position + 20].splitlines()[0])} is not valid syntax")
        if match.lastgroup != "space":
            yield Lexeme(str(match.lastgroup), match[0], line)
        line += match[0].count("\n")
        position = match.end()


def reject(line: int, problem: str, hint: str = "docs/constrained.md describes the syntax.") -> NoReturn:
    """Raise ``DgemmaError`` (exit code 2) for a line of the grammar."""
    raise DgemmaError(f"the grammar, line {line}: {problem}", hint, exit_code=2)


class _Group(NamedTuple):
    """Alternatives that are being read, and the lexeme that begins them."""

    head: Lexeme
    alternatives: list[list[Item]]

    def closed(self) -> tuple[Alternative, ...]:
        """Return the alternatives."""
        return tuple(map(tuple, self.alternatives))


class RuleReader:
    """A reader of rules, whatever their spelling. A group in parentheses that is not trivial becomes a rule.

    Attributes:
        rules: What was read so far.
        lines: The first line that uses each rule.
        ignored: The rule of a text that may stand between terminals, if the spelling has such texts.
    """

    def __init__(self, terms: Terms) -> None:
        """Create a reader that makes terms over bytes."""
        self.rules: Rules = {}
        self.lines: dict[Name, int] = {}
        self.ignored: Name | None = None
        self._terms, self._encode = terms, utf8(terms)
        self._made: dict[tuple[Alternative, ...], str] = {}

    def define(self, head: Lexeme, name: str, body: Iterable[Lexeme]) -> None:
        """Read a rule: its name, as found in the lexeme ``head``, and its expression."""
        self.declare(head, name)
        self.rules[name] = self.expression(head, body)

    def declare(self, head: Lexeme, name: str) -> None:
        """Add a rule that ``head`` defines, without alternatives. Its place is before the rules of its groups."""
        if name in self.rules:
            reject(head.line, f"{shown(name)} is defined twice", "Combine its expressions with |.")
        self.rules[name] = ()

    def expression(self, head: Lexeme, body: Iterable[Lexeme]) -> tuple[Alternative, ...]:
        """Read an expression that follows the lexeme ``head``."""
        groups = [_Group(head, [[]])]
        for lexeme in body:
            check_time()
            items = groups[-1].alternatives[-1]
            if lexeme.kind == "open":
                groups.append(_Group(lexeme, [[]]))
            elif lexeme.kind == "close":
                group = groups.pop()
                if not groups or group.head.text + lexeme.text not in ("()", "[]"):
                    reject(lexeme.line, f"unexpected {lexeme.text}")
                item = self._atom_of(group.closed())
                groups[-1].alternatives[-1].append(self._repeated(item, 0, 1) if lexeme.text == "]" else item)
            elif lexeme.text == "|":
                groups[-1].alternatives.append([])
            elif lexeme.kind == "repeat":
                if not items:
                    reject(lexeme.line, f"{lexeme.text} has no item before it")
                items.append(self._repeated(items.pop(), *_counts(lexeme)))
            else:
                items.append(Item(self.atom(lexeme)))
        if len(groups) > 1:
            reject(groups[-1].head.line, f"{groups[-1].head.text} is not closed")
        return groups[0].closed()

    def atom(self, lexeme: Lexeme) -> Name | Term:
        """Read what a lexeme other than a mark stands for."""
        raise NotImplementedError

    def use(self, name: str, line: int) -> str:
        """Note that a line uses a rule, and return its name."""
        self.lines.setdefault(name, line)
        return name

    def literal(self, text: str) -> Term:
        """Return the term of one text."""
        return self._terms.word(text.encode())

    def one_of(self, characters: Ranges, lexeme: Lexeme) -> Term:
        """Return the term of one character out of a set, which ``lexeme`` describes."""
        if not characters:
            reject(lexeme.line, f"{shown(lexeme.text)} matches no character")
        return self._encode(characters)

    def _atom_of(self, alternatives: tuple[Alternative, ...]) -> Item:
        """Return an item for a group."""
        if len(alternatives) == 1 and len(alternatives[0]) == 1:
            return alternatives[0][0]
        return Item(self.made(alternatives))

    def made(self, alternatives: tuple[Alternative, ...]) -> str:
        """Return the name of a rule with these alternatives, which is made for them."""
        name = self._made.setdefault(alternatives, f"({len(self._made)})")  # no written name has parentheses
        self.rules[name] = alternatives
        return name

    def _repeated(self, item: Item, least: int, most: int) -> Item:
        """Return a repetition of an item."""
        if most == 0:
            return Item(self._terms.empty)
        if (item.least, item.most) != (1, 1):
            item = Item(self.made(((item,),)))
        return Item(item.atom, least, most)


def _counts(lexeme: Lexeme) -> tuple[int, int]:
    """Return how often an item may be repeated."""
    if lexeme.text in "?*+":
        return int(lexeme.text == "+"), 1 if lexeme.text == "?" else UNBOUNDED
    match = _REPEAT.fullmatch(lexeme.text)
    assert match is not None
    if max(len(match[1]), len(match[3])) > _MOST_DIGITS:
        reject(lexeme.line, f"the count {shown(lexeme.text)} is too large", "Use smaller repetitions.")
    least = int(match[1] or 0)
    most = least if match[2] is None else int(match[3]) if match[3] else UNBOUNDED
    if most < least:
        reject(lexeme.line, f"the count {lexeme.text} ends before it begins")
    return least, most


def unescaped(text: str, line: int, plain: str) -> str:
    """Return a text without its escapes. ``plain`` are the characters that stand for themselves after a backslash."""

    def character(match: re.Match[str]) -> str:
        if match[1] is None:
            if match[2] not in plain and match[2] not in _NAMED:
                reject(line, f"{shown(match[0])} is not a valid escape")
            return _NAMED.get(match[2], match[2])
        code = int(match[1][1:], 16)
        if code > ALL[-1][1] or 0xD800 <= code < 0xE000:
            reject(line, f"{match[0]} is not a character of Unicode")
        return chr(code)

    return _ESCAPE.sub(character, text)


def read_class(lexeme: Lexeme) -> Ranges:
    """Return the characters of a class such as ``[^a-z]``."""
    negated = lexeme.text.startswith("[^")
    found: list[tuple[int, int]] = []
    for first, last in _CLASS_RANGE.findall(lexeme.text[2 if negated else 1 : -1]):
        if first[0] == "\\" and first[1] in "dDwWsSpP":
            if last:
                reject(lexeme.line, f"{shown(first)} cannot begin a range", "Escape the hyphen.")
            try:
                found += characters_of(first)
            except ValueError:
                reject(lexeme.line, f"{shown(first)} is not a set of characters")
            continue
        begin, end = (ord(unescaped(each, lexeme.line, _PUNCTUATION)) for each in (first, last or first))
        if begin > end:
            reject(lexeme.line, f"the range {shown(f'{first}-{last}')} ends before it begins")
        found.append((begin, end))
    if not found:
        reject(lexeme.line, "a character class is empty")
    return without(ALL, ranges(found)) if negated else without(ranges(found), ((0xD800, 0xDFFF),))


_PUNCTUATION = "".join(chr(code) for code in range(33, 127) if not chr(code).isalnum()) + " "
_EBNF = re.compile(
    r"""(?P<space>\s+|\#[^\n]*)|(?P<head>[A-Za-z0-9_][\w-]*\s*(?:::=|=|:))|(?P<name>[A-Za-z0-9_][\w-]*)
    |(?P<literal>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|(?P<class>\[\^?\]?(?:[^\]\\\n]|\\.)*\])
    |(?P<repeat>[?*+]|\{\s*\d+\s*(?:,\s*\d*\s*)?\})|(?P<any>\.)|(?P<mark>[|;])|(?P<open>\()|(?P<close>\))
    |(?P<token>!?<[^<>\n]*>)""",
    re.VERBOSE,
)


class EbnfReader(RuleReader):
    """A reader of EBNF and GBNF."""

    def read(self, grammar: str) -> str:
        """Read all rules. Return the one of the whole text: ``root``, as in GBNF, or else the first one."""
        head: Lexeme | None = None
        body: list[Lexeme] = []
        for lexeme in [*lexemes(grammar, _EBNF), Lexeme("mark", ";", 0)]:
            if lexeme.kind != "head" and lexeme.text != ";":
                if head is None:
                    reject(lexeme.line, f"{shown(lexeme.text)} is outside any rule")
                body.append(lexeme)
                continue
            if head is not None:
                self.define(head, head.text.rstrip(":= \t\r\n"), body)
            head, body = lexeme if lexeme.kind == "head" else None, []
        names = [name for name in self.rules if isinstance(name, str) and name[0] != "("]
        if not names:
            raise DgemmaError("the grammar has no rule", 'Write a rule like answer ::= "yes" | "no".', exit_code=2)
        if "root" in names[1:] and "root" in self.lines:
            reject(self.lines["root"], "the rule root is used, but it is not the first rule",
                   "Put the rule of the whole text first.")
        return "root" if "root" in names else names[0]

    def atom(self, lexeme: Lexeme) -> Name | Term:
        """Read what a lexeme stands for."""
        if lexeme.kind == "name":
            return self.use(lexeme.text, lexeme.line)
        if lexeme.kind == "literal":
            return self.literal(unescaped(lexeme.text[1:-1], lexeme.line, "\\\"'[]"))
        if lexeme.kind == "token":
            reject(lexeme.line, "tokens are not supported", "Write the text instead.")
        return self.one_of(without(ALL, ((10, 10),)) if lexeme.kind == "any" else read_class(lexeme), lexeme)
