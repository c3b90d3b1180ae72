"""Regular expressions for JSON strings: any string, strings that match a pattern, strings in a format.

The expressions match the written form of a string, with its quotes and escapes. They allow no ``\\u`` escapes, so they
exclude the characters that need one. Patterns and formats are narrowed to what all readers agree on (``\\d`` is 0 to 9;
a date in February has a day up to 28), so that every string that is written validates.
"""

from __future__ import annotations

import json
import re

from dgemma_mlx.constrain.regex import any_of, quoted, repeated, without_anchors

# A character that JSON writes without an escape, and any character as JSON writes it.
_PLAIN = r'[^"\\\x00-\x1F\x7F-\x9F]'
CHARACTER = any_of(_PLAIN, r'\\["\\/bfnrt]')
STRING = f'"{CHARACTER}*"'

_DATE = (
    r"[0-9]{3}[1-9]-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+\-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = r"(?:[0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
_LABEL = r"[a-z0-9](?:[a-z0-9\-]{0,20}[a-z0-9])?"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "email": rf"[a-z0-9_+\-]{{1,20}}(?:\.[a-z0-9_+\-]{{1,20}}){{0,2}}@{_LABEL}(?:\.{_LABEL}){{1,3}}",
}

_ATOM = re.compile(
    r"""(?P<class>\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\])|(?P<group>\((?:\?:)?)|(?P<escape>\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|.))
    |(?P<repeat>[*+?]\??|\{\d+(?:,\d*)?\}\??)|(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_CONTROL_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "f": "\f"}
# The characters that ECMAScript, Python and Rust all treat as a digit, word character or space, ...
_AGREED = {"d": "0-9", "w": "A-Za-z0-9_", "s": r"\ "}
# ... and characters that none of them treats as one.
_AGREED_NOT = {"D": r"\ -/:-~\p{L}", "W": r"\ -/:-@\[-\^`{-~", "S": r"!-~\p{L}"}


def string_of_lengths(least: int, most: int | None) -> str:
    """Match strings of ``least`` to ``most`` characters. A ``most`` of None means any number."""
    return f'"{repeated(CHARACTER, least, most)}"'


def string_of_pattern(pattern: str) -> str:
    """Match strings that contain a match of the pattern, an ECMAScript regular expression from a JSON schema.

    ``^`` and ``$`` anchor the pattern at the beginning and end of the string. Raises ``ValueError``, which names the
    feature, when the pattern uses a feature that is not supported.
    """
    bare_pattern = without_anchors(pattern)
    begins, ends = pattern.startswith("^"), bare_pattern != pattern.removeprefix("^")
    body, alternatives = _translated(bare_pattern)
    if alternatives and begins + ends:
        raise ValueError("an anchor next to alternatives outside a group, as in ^a|b$ instead of ^(?:a|b)$,")
    anything = f"{CHARACTER}*"
    return f'"{"" if begins else anything}(?:{body}){"" if ends else anything}"'


def _translated(pattern: str) -> tuple[str, bool]:
    """Translate a pattern for the content of a string into a pattern for its written form.

    Return the translated pattern, and whether it has alternatives outside all groups.
    """
    parts: list[str] = []
    depth, alternatives = 0, False
    for match in _ATOM.finditer(pattern):
        atom = match[0]
        if match["class"]:
            parts.append(_class(atom))
        elif match["group"]:
            parts.append("(?:")
            depth += 1
            if pattern.startswith("?", match.end()):
                raise ValueError(f"groups that begin with {pattern[match.start() : match.end() + 2]}")
        elif match["escape"]:
            parts.append(_escape(atom[1:]))
        elif match["repeat"] or atom in "|)":
            parts.append(atom)
            depth -= atom == ")"
            alternatives |= atom == "|" and depth == 0
        elif atom == ".":
            parts.append(_PLAIN)
        elif atom in "^$":
            raise ValueError(f"{atom} inside the pattern")
        elif atom in "[]{}":
            raise ValueError(f"an unescaped {atom}")
        else:
            parts.append(_literal(atom))
    return "".join(parts), alternatives


def _literal(character: str) -> str:
    """Match one character as JSON writes it."""
    return f"(?:{quoted(json.dumps(character, ensure_ascii=False)[1:-1])})"


def _escape(name: str) -> str:
    """Translate an escape outside character classes. ``name`` is the escape without its backslash."""
    if name[0] in "xu" and len(name) > 1:
        return _literal(chr(int(name[1:], 16)))
    if name in _CONTROL_ESCAPES:
        return _literal(_CONTROL_ESCAPES[name])
    if name in _AGREED:
        return f"[{_AGREED[name]}]"
    if name in _AGREED_NOT:
        return f"[[{_AGREED_NOT[name]}]&&{_PLAIN}]"
    if name.isalnum():
        raise ValueError(f"\\{name}")
    return _literal(name)


def _class(text: str) -> str:
    """Translate a character class. Characters that JSON escapes are excluded from it."""
    negated = text.startswith("[^")
    inner = text[2:-1] if negated else text[1:-1]
    if not inner or "[" in re.sub(r"\\.", "", inner):
        raise ValueError(f"the class {text}")
    within = {_PLAIN}  # classes that the result is intersected with

    def escape(match: re.Match[str]) -> str:
        name = match[1]
        if negated and name in _AGREED:
            within.add(f"[{_AGREED_NOT[name.upper()]}]")
        if name in _AGREED:
            return _AGREED[name]
        if name in _AGREED_NOT:
            return f"[^{_AGREED[name.lower()]}]" if negated else _AGREED_NOT[name]
        if name in (*_CONTROL_ESCAPES, "x", "u") or not name.isalnum():
            return match[0]
        raise ValueError(f"\\{name} in the class {text}")

    plain = re.sub(r"&&|--|~~", lambda match: "".join("\\" + mark for mark in match[0]), inner)
    own = re.sub(r"\\(.)", escape, plain)
    return f"[[{'^' if negated else ''}{own}]&&{'&&'.join(sorted(within))}]"
