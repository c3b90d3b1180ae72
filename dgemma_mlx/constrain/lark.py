r"""Reading of the rules of a grammar in the spelling of Lark and of llguidance.

    start: NAME "=" sum
    ?sum: [sum "+"] NUMBER                # rules are lower-case, terminals upper-case
    NAME: /[a-z]+/i
    %import common (NUMBER, WS)
    %ignore WS

What is described here is the set of texts, so everything about trees (``?``, ``!``, ``_``, ``-> alias``) says nothing.
A text belongs to the grammar if it can be divided into terminals in any way, as with Lark's Earley parser and its
lexer ``dynamic_complete``. What is ignored may stand at the beginning and after each terminal of a rule; Lark ignores
the longest text it can, so what could go on in a way that is not ignored itself is refused.
"""

from __future__ import annotations

import re

from dgemma_mlx.checks import shown
from dgemma_mlx.constrain.characters import ranges
from dgemma_mlx.constrain.grammar_reader import Lexeme, RuleReader, lexemes, reject, unescaped
from dgemma_mlx.constrain.leaf import Letters, bytes_of, sets_of, term_of
from dgemma_mlx.constrain.pattern import Begin, Either, End, Pattern, Repeated, Sequence, read_pattern
from dgemma_mlx.constrain.rules import Alternative, Item, Name
from dgemma_mlx.constrain.terms import UNBOUNDED, Term
from dgemma_mlx.errors import DgemmaError

_LARK = re.compile(
    r"""(?P<space>\s+|//[^\n]*|\#[^\n]*)
    |(?P<head>[?!]{0,2}[A-Za-z_][\w-]*(?:\{[^{}\n]*\}|\.-?\d+|\[[^\[\]\n]*\])*\s*:(?!:))
    |(?P<import>%import\s+\.?\w+(?:\.\w+)*(?:[ \t]*->[ \t]*\w+|[ \t]*\([^()]*\))?)|(?P<directive>%\w+)
    |(?P<template>[A-Za-z_][\w-]*\{\s*[A-Za-z_"/][^{}\n]*\})|(?P<name>[A-Za-z_][\w-]*)
    |(?P<range>"(?:[^"\\\n]|\\.)*"\s*\.\.\s*"(?:[^"\\\n]|\\.)*")|(?P<literal>"(?:[^"\\\n]|\\.)*"i?)
    |(?P<regex>/(?:[^/\\\n]|\\.)+/[imslux]*)|(?P<alias>->\s*\w+)
    |(?P<repeat>[?*+]|~\s*\d+(?:\s*\.\.\s*\d+)?|\{\s*(?:\d+\s*(?:,\s*\d*\s*)?|,\s*\d+\s*)\})
    |(?P<mark>\|)|(?P<open>[(\[])|(?P<close>[)\]])|(?P<token><[^<>\n]*>)|(?P<operator>[&~])|(?P<grammar>@\w+)""",
    re.VERBOSE,
)
_MARK = re.compile(r"^[ \t]*(?:%[a-z]+\b|[?!]{0,2}start(?:\.-?\d+|\[[^\]\n]*\])?\s*:(?!:))", re.MULTILINE)
_HEAD = re.compile(r"[?!]*([\w-]+)(.*?)\s*:", re.DOTALL)
_IMPORT = re.compile(r"%import\s+(\.?\w+(?:\.\w+)*)\s*(?:->\s*(\w+)|\(([^()]*)\))?")
_PLAIN = '\\"'  # what a backslash may stand before in a literal
_UNSUPPORTED = {
    "template": "templates are not supported", "token": "tokens are not supported",
    "operator": "the operators & and ~ are not supported", "grammar": "grammars within grammars are not supported",
}
_ATTRIBUTES = {"{": "templates", ".": "priorities", "[": "attributes of rules"}
_SKIP = "(ignored)"  # the rule of what is ignored between terminals

_EXPONENT = "[eE][+-]?[0-9]+"
_FLOAT = rf"[0-9]+{_EXPONENT}|([0-9]+\.[0-9]*|\.[0-9]+)({_EXPONENT})?"
COMMON = {  # the terminals of Lark's ``common``
    "DIGIT": "[0-9]",
    "HEXDIGIT": "[0-9A-Fa-f]",
    "INT": "[0-9]+",
    "SIGNED_INT": "[+-]?[0-9]+",
    "DECIMAL": r"[0-9]+\.[0-9]*|\.[0-9]+",
    "FLOAT": _FLOAT,
    "SIGNED_FLOAT": f"[+-]?({_FLOAT})",
    "NUMBER": f"{_FLOAT}|[0-9]+",
    "SIGNED_NUMBER": f"[+-]?({_FLOAT}|[0-9]+)",
    "ESCAPED_STRING": r'"([^"\\\n]|\\[^\n])*"',
    "LCASE_LETTER": "[a-z]",
    "UCASE_LETTER": "[A-Z]",
    "LETTER": "[A-Za-z]",
    "WORD": "[A-Za-z]+",
    "CNAME": "[A-Za-z_][A-Za-z_0-9]*",
    "WS_INLINE": "[ \\t]+",
    "WS": "[ \\t\\f\\r\\n]+",
    "CR": "\\r",
    "LF": "\\n",
    "NEWLINE": "(\\r?\\n)+",
    "SH_COMMENT": "#[^\\n]*",
    "CPP_COMMENT": "//[^\\n]*",
    "C_COMMENT": r"/\*([^*]|\*+[^*/])*\*+/",
    "SQL_COMMENT": "--[^\\n]*",
}


def is_lark(grammar: str) -> bool:
    """Return whether a grammar has Lark's spelling: a directive such as ``%ignore``, or a rule ``start:``."""
    return _MARK.search(grammar) is not None


class LarkReader(RuleReader):
    """A reader of Lark's spelling."""

    def read(self, grammar: str) -> str:
        """Read all rules. Return the one of the whole text, which consists of ``start`` and what may be ignored."""
        parts: list[tuple[Lexeme, list[Lexeme]]] = []
        for lexeme in lexemes(grammar, _LARK):
            if lexeme.kind == "directive" and lexeme.text != "%ignore":
                reject(lexeme.line, f"{lexeme.text} is not supported", "Only %import and %ignore are.")
            if lexeme.kind in ("head", "directive", "import"):
                parts.append((lexeme, []))
            elif lexeme.kind in _UNSUPPORTED:
                reject(lexeme.line, _UNSUPPORTED[lexeme.kind])
            elif not parts or parts[-1][0].kind == "import":
                reject(lexeme.line, f"{shown(lexeme.text)} is outside any rule")
            elif lexeme.kind != "alias":
                parts[-1][1].append(lexeme)
        self._skips = any(head.text == "%ignore" for head, _ in parts)
        ignored: list[Alternative] = []
        for head, body in parts:
            self._in_rule = False
            if head.kind == "import":
                self._import(head)
            elif head.kind == "head":
                name = self._name(head)
                self._in_rule = not _is_terminal(name)
                self.define(head, name, body)
            else:
                ignored += self.expression(head, body)
        if "start" not in self.rules:
            raise DgemmaError("the grammar has no rule start", 'Write a rule like start: "yes" | "no".', exit_code=2)
        if not self._skips:
            return "start"
        line = next(head.line for head, _ in parts if head.text == "%ignore")
        self.ignored = self.use(self.made(tuple(ignored)), line)
        self.rules[_SKIP] = ((Item(self.ignored, 0, UNBOUNDED),),)
        return self.made(((Item(_SKIP), Item("start")),))

    def atom(self, lexeme: Lexeme) -> Name | Term:
        """Read what a lexeme stands for. In a rule, what is ignored may follow a terminal."""
        if lexeme.kind == "name" and not _is_terminal(lexeme.text):
            if not self._in_rule:
                reject(lexeme.line, f"{shown(lexeme.text)} is a rule, which a terminal cannot contain",
                       "Write the names of terminals in upper case.")
            return self.use(lexeme.text, lexeme.line)
        terminal = self._terminal(lexeme)
        return self.made(((Item(terminal), Item(_SKIP)),)) if self._in_rule and self._skips else terminal

    def _terminal(self, lexeme: Lexeme) -> Name | Term:
        """Read a terminal."""
        if lexeme.kind == "name":
            return self.use(lexeme.text, lexeme.line)
        if lexeme.kind == "regex":
            text, _, flags = lexeme.text[1:].rpartition("/")
            return self._regex(f"(?{flags}){text}" if flags else text, lexeme)
        texts = [unescaped(each, lexeme.line, _PLAIN) for each in re.findall(r'"((?:[^"\\\n]|\\.)*)"', lexeme.text)]
        if lexeme.kind == "literal":
            return self._regex(f"(?i){re.escape(texts[0])}", lexeme) if lexeme.text[-1] == "i" else self.literal(*texts)
        if any(len(text) != 1 for text in texts) or texts[0] > texts[1]:
            reject(lexeme.line, f"{shown(lexeme.text)} is not a range of characters")
        return self.one_of(ranges([(ord(texts[0]), ord(texts[1]))]), lexeme)

    def _regex(self, text: str, lexeme: Lexeme) -> Term:
        """Return the term of a regular expression, which ``lexeme`` describes."""
        try:
            tree = read_pattern(text)
        except ValueError as error:
            reject(lexeme.line, f"{shown(lexeme.text)} cannot be compiled: {error}")
        if _has_anchor(tree):
            reject(lexeme.line, f"{shown(lexeme.text)} has an anchor", "A terminal can stand anywhere in the text.")
        letters = Letters(sets_of(tree))
        return bytes_of(letters, term_of(letters, tree), self._terms, self._encode)

    def _name(self, head: Lexeme) -> str:
        """Return the name of the rule that a lexeme begins."""
        match = _HEAD.fullmatch(head.text)
        assert match is not None
        if match[2]:
            reject(head.line, f"{_ATTRIBUTES[match[2][0]]} are not supported: {shown(match[1] + match[2])}")
        return match[1]

    def _import(self, lexeme: Lexeme) -> None:
        """Define the terminals that a directive imports."""
        match = _IMPORT.fullmatch(lexeme.text)
        assert match is not None
        module, _, name = match[1].rpartition(".")
        if match[3] is not None:
            module, names = match[1], re.findall(r"\w+", match[3])
        else:
            names = [name]
        for each in names:
            if module != "common" or each not in COMMON:
                reject(lexeme.line, f"{shown(f'{module}.{each}')} cannot be imported",
                       "Terminals of Lark's common can, such as common.NUMBER.")
            self.declare(lexeme, match[2] or each)
            self.rules[match[2] or each] = ((Item(self._regex(COMMON[each], lexeme)),),)


def _is_terminal(name: str) -> bool:
    return name.lstrip("_")[:1].isupper()


def _has_anchor(tree: Pattern) -> bool:
    """Return whether a regular expression asserts where the text begins or ends."""
    waiting = [tree]
    for node in waiting:  # grows
        if isinstance(node, Sequence):
            waiting += node.items
        elif isinstance(node, Either):
            waiting += node.branches
        elif isinstance(node, Repeated):
            waiting.append(node.item)
        elif isinstance(node, (Begin, End)):
            return True
    return False
