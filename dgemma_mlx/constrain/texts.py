"""Terms over characters for the strings and numbers of one JSON schema: lengths, patterns, formats, bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from dgemma_mlx.constrain import pattern as p
from dgemma_mlx.constrain.characters import ALL, Ranges, ranges, without
from dgemma_mlx.constrain.leaf import Letters, sets_of, term_of
from dgemma_mlx.constrain.pattern import read_pattern
from dgemma_mlx.constrain.terms import UNBOUNDED, Term

_BYTE = r"(?:[0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
_DATE = (
    r"[0-9]{3}[1-9]-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:[Zz]|[+\-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL}){{0,8}}"
_URI_TAIL = r"[A-Za-z0-9\-._~!$&'()*+,;=:@/%20]*"
_PCHAR = r"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/]|%[0-9A-Fa-f]{2})"
_AUTHORITY = rf"(?:[A-Za-z0-9\-._~]+@)?{_HOST}(?::[0-9]{{1,5}})?"
_QUERY = rf"(?:\?(?:{_PCHAR}|\?)*)?(?:#(?:{_PCHAR}|\?)*)?"
_H16 = "[0-9a-fA-F]{1,4}"
FORMATS = {
    "date": _DATE, "time": _TIME, "date-time": f"{_DATE}[Tt]{_TIME}",
    "uuid": r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "ipv6": rf"(?:{_H16}:){{7}}{_H16}|(?:{_H16}:){{1,6}}:{_H16}|(?:{_H16}:){{1,7}}:|::(?:{_H16}:){{0,5}}{_H16}|::",
    "email": rf"[A-Za-z0-9_+\-]{{1,64}}(?:\.[A-Za-z0-9_+\-]{{1,30}}){{0,3}}@{_HOST}",
    "hostname": _HOST,
    "uri": rf"[A-Za-z][A-Za-z0-9+\-.]*:(?://{_AUTHORITY}(?:/{_PCHAR}*)?|/?(?:[A-Za-z0-9\-._~]{_PCHAR}*)?){_QUERY}",
    "uri-reference": rf"(?:[A-Za-z][A-Za-z0-9+\-.]*://{_AUTHORITY}(?:/{_PCHAR}*)?|/?(?:[A-Za-z0-9\-._~][A-Za-z0-9\-._~/]*)?){_QUERY}",
    "duration": r"P(?:[0-9]+W|(?:[0-9]+Y)?[0-9]+M(?:[0-9]+D)?|[0-9]+Y|[0-9]+D)|P(?:[0-9]+D)?T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S)",
    "json-pointer": r"(?:/(?:[^~/]|~[01])*)*",
    "relative-json-pointer": r"(?:0|[1-9][0-9]*)(?:#|(?:/(?:[^~/]|~[01])*)*)",
    "regex": r"[A-Za-z0-9 _\-]*",
}
FORMATS["iri"], FORMATS["iri-reference"], FORMATS["idn-email"], FORMATS["idn-hostname"] = (
    FORMATS["uri"], FORMATS["uri-reference"], FORMATS["email"], FORMATS["hostname"])

_AGREED = {"d": ranges([(48, 57)]), "w": ranges([(48, 57), (65, 90), (95, 95), (97, 122)]), "s": ranges([(32, 32)])}


def search(pattern: str) -> str:
    return f"(?s:.)*(?:{pattern})(?s:.)*"


class Strings:
    """Terms for the strings of a schema, over the characters that its patterns, formats and texts tell apart."""

    def __init__(self, patterns: Iterable[str], formats: Iterable[str], texts: Iterable[str]) -> None:
        self._trees: dict[str, p.Pattern | ValueError] = {}
        sets: set[Ranges] = {ALL}
        for source in [*(FORMATS[name] for name in formats if name in FORMATS), *map(search, patterns)]:
            try:
                self._trees[source] = read_pattern(ecma(source))
                sets |= sets_of(self._trees[source])
            except ValueError as error:
                self._trees[source] = error
        sets |= {ranges([(ord(c), ord(c))]) for text in texts for c in text}
        self.letters = Letters(sets)
        self.terms = self.letters.terms
        self.everything = self.terms.repeat(self.letters.one(ALL), 0)
        self._one = {c: self.letters.one(ranges([(ord(c), ord(c))])) for text in texts for c in text}
        self._known: dict[str, Term] = {}

    def lengths(self, least: int, most: int) -> Term:
        return self.terms.repeat(self.letters.one(ALL), least, most)

    def text(self, text: str) -> Term:
        return self.terms.sequence(*(self._one[c] for c in text))

    def pattern(self, pattern: Any, path: str) -> Term:
        return self.searched(pattern, path)[0]

    def searched(self, pattern: Any, path: str) -> tuple[Term, Term]:
        from dgemma_mlx.constrain.document import reject

        if not isinstance(pattern, str):
            reject(path, "a pattern must be text")
        found = self._term(search(pattern))
        if isinstance(found, ValueError):
            reject(path, f"the pattern cannot be read: {found}")
        return found, found

    def format(self, name: Any) -> Term:
        return self._term(FORMATS[name]) if isinstance(name, str) and name in FORMATS else self.everything

    def _term(self, source: str) -> Any:
        tree = self._trees[source]
        if isinstance(tree, ValueError):
            return tree
        if source not in self._known:
            self._known[source] = term_of(self.letters, tree)
        return self._known[source]


def ecma(pattern: str) -> str:
    """Return an ECMAScript pattern in the syntax that is read here."""
    import re

    out, place, inside = [], 0, False
    token = re.compile(r"\\u([0-9A-Fa-f]{4})|\\u\{([0-9A-Fa-f]+)\}|\\x([0-9A-Fa-f]{2})|\\c([A-Za-z])|\\([dDwWsS])|\\(/|[^A-Za-z0-9])|\\0|.", re.DOTALL)
    agreed = {"d": "0-9", "w": "A-Za-z0-9_", "s": r"\t\n\x0B\f\r\ "}
    for m in token.finditer(pattern):
        t = m[0]
        if m[1] or m[2] or m[3]:
            out.append(f"\\x{{{(m[1] or m[2] or m[3])}}}")
        elif m[5]:
            k = m[5]
            if inside:
                out.append(agreed[k] if k in agreed else f"[^{agreed[k.lower()]}]")
            else:
                out.append(f"[{agreed[k]}]" if k in agreed else f"[^{agreed[k.lower()]}]")
        elif m[6]:
            out.append(t if m[6] in r"\.+*?()|[]{}^$#&-~" else ("\\" + m[6] if not m[6].isalnum() and m[6].isascii() and not m[6].isspace() and m[6] in "-/" and False else m[6]))
        elif t == "[":
            out.append("\\[" if inside else "[")
            inside = True
        elif t == "]":
            out.append(t)
            inside = False
        elif t == "{" and not inside and not re.match(r"\{\d+(?:,\d*)?\}", pattern[m.start():]):
            out.append("\\{")
        elif t == "}" and not inside and not re.search(r"\{\d+(?:,\d*)?$", pattern[: m.start()]):
            out.append("\\}")
        elif inside and t in "&~":
            out.append("\\" + t)
        elif inside and t == "-" and pattern[m.start() - 1 : m.start()] == "-":
            out.append("\\-")
        else:
            out.append(t)
    return "".join(out)


class Numbers:
    """Terms for the texts of numbers."""

    def __init__(self) -> None:
        point = {c: ranges([(ord(c), ord(c))]) for c in "0123456789.-+eE"}
        self.letters = Letters(point.values())
        t = self.terms = self.letters.terms
        self._one = {c: self.letters.one(each) for c, each in point.items()}
        self.digit = t.either(self._one[c] for c in "0123456789")
        self.minus, self.dot = self._one["-"], self._one["."]
        nonzero = t.either(self._one[c] for c in "123456789")
        self.natural = t.either([self._one["0"], t.sequence(nonzero, t.repeat(self.digit, 0, 17))])
        sign = t.repeat(self.minus, 0, 1)
        exponent = t.sequence(t.either([self._one["e"], self._one["E"]]), t.repeat(t.either([self._one["+"], self.minus]), 0, 1), t.repeat(self.digit, 1, 2))
        self.number = t.sequence(sign, self.natural, t.repeat(t.sequence(self.dot, t.repeat(self.digit, 1, 17)), 0, 1), t.repeat(exponent, 0, 1))
        small = t.either([self._one["0"], t.sequence(nonzero, t.repeat(self.digit, 0, 8))])
        zeros = t.repeat(t.sequence(self.dot, self._one["0"]), 0, 1)
        self.whole = t.sequence(sign, self.natural)  # without a fraction
        self.integers = t.sequence(self.whole, zeros)
        self.decimals = t.either([self.integers, t.sequence(sign, small, t.repeat(t.sequence(self.dot, t.repeat(self.digit, 1, 6)), 0, 1))])

    def text(self, text: str) -> Term:
        return self.terms.sequence(*(self._one[c] for c in text))

    def equal(self, value: int | float, path: str) -> Term:
        from dgemma_mlx.constrain.document import reject

        if isinstance(value, float) and not math.isfinite(value):
            reject(path, "NaN and infinity are not valid JSON", "Use finite numbers.")
        import json

        texts = {json.dumps(value)}
        if value == int(value) and abs(value) < 10**18:
            texts |= {str(int(value)), f"{int(value)}.0"}
        return self.terms.either(self.text(text) for text in sorted(texts))

    def within(self, bounds: Mapping[str, Fraction], path: str) -> Term:
        t = self.terms
        parts = [self.decimals]
        for name, bound in bounds.items():
            if name == "multipleOf":
                parts.append(self.multiples(bound, path))
            elif name.endswith("inimum"):
                parts.append(self.at_least(bound, name == "exclusiveMinimum"))
            else:
                parts.append(self.at_most(bound, name == "exclusiveMaximum"))
        found = t.every(parts)
        return found if t.least(found) < UNBOUNDED else t.none

    def at_least(self, bound: Fraction, strict: bool) -> Term:
        """Return the decimals of at least a bound, or above it."""
        t = self.terms
        if bound > 0 or (bound == 0 and strict):
            return self._magnitude(bound, strict, above=True)
        zero = self._zero() if not strict or bound < 0 else t.none
        return t.either([self._positive(), zero, t.sequence(self.minus, self._magnitude(-bound, strict, above=False))])

    def at_most(self, bound: Fraction, strict: bool) -> Term:
        t = self.terms
        if bound < 0 or (bound == 0 and strict):
            return t.sequence(self.minus, self._magnitude(-bound, strict, above=True))
        zero = t.either([self._zero()]) if not strict or bound > 0 else t.none
        return t.either([t.sequence(self.minus, self._unsigned()), zero, self._magnitude(bound, strict, above=False)])

    def _unsigned(self) -> Term:
        return self.terms.sequence(self.terms.repeat(self.digit, 1), self.terms.repeat(self.terms.sequence(self.dot, self.terms.repeat(self.digit, 1)), 0, 1))

    def _positive(self) -> Term:
        return self._unsigned()

    def _zero(self) -> Term:
        t = self.terms
        return t.sequence(t.repeat(self.minus, 0, 1), self._one["0"], t.repeat(t.sequence(self.dot, t.repeat(self._one["0"], 1)), 0, 1))

    def _magnitude(self, bound: Fraction, strict: bool, *, above: bool) -> Term:
        """Return the unsigned decimals that are above or below a bound that is not negative, or equal to it."""
        t = self.terms
        whole, fraction = divmod(bound, 1)
        digits, rest = [], fraction
        while rest and len(digits) < 30:
            digit, rest = divmod(rest * 10, 1)
            digits.append(int(digit))
        any_fraction = t.repeat(t.sequence(self.dot, t.repeat(self.digit, 1)), 0, 1)
        same = t.sequence(self.text(str(whole)), self._fraction(digits, bool(rest), strict, above))
        return t.either([t.sequence(self._natural(int(whole), above), any_fraction), same])

    def _natural(self, bound: int, above: bool) -> Term:
        """Return the natural numbers above or below a bound, without it."""
        t, text = self.terms, str(bound)
        options = []
        for n, character in enumerate(text):
            digits = range(int(character) + 1, 10) if above else range(1 if n == 0 and len(text) > 1 else 0, int(character))
            options.append(t.sequence(self.text(text[:n]), t.either(self._one[str(d)] for d in digits), t.repeat(self.digit, len(text) - n - 1, len(text) - n - 1)))
        nonzero = t.either(self._one[c] for c in "123456789")
        if above:
            options.append(t.sequence(nonzero, t.repeat(self.digit, len(text))))
        elif len(text) > 1:
            options.append(t.either([self._one["0"], t.sequence(nonzero, t.repeat(self.digit, 0, len(text) - 2))]))
        return t.either(options)

    def _fraction(self, digits: list[int], more: bool, strict: bool, above: bool) -> Term:
        """Return the fractions, with their point or empty, that compare so with the digits of a bound's fraction."""
        t = self.terms
        any_digits = t.repeat(self.digit, 0)
        zeros = t.repeat(self._one["0"], 0)
        # after all digits of the bound are equal: above needs a digit that is not 0 if strict; below allows only zeros
        nonzero = t.either(self._one[c] for c in "123456789")
        if above:
            end = t.sequence(zeros, nonzero, any_digits) if strict or more else any_digits
        else:
            end = t.none if strict and not more else zeros
        tail, ends = end, [end]
        for digit in reversed(digits):
            others = range(digit + 1, 10) if above else range(digit)
            options = [t.sequence(t.either(self._one[str(d)] for d in others), any_digits), t.sequence(self._one[str(digit)], tail)]
            if not above:
                options.append(t.empty)  # the digits that are missing are zeros, and the bound's are not all zeros
            tail = t.either(options)
        options = [t.sequence(self.dot, t.every([tail, t.repeat(self.digit, 1)]))]
        is_zero = not any(digits) and not more
        if above:
            options += [t.empty] if is_zero and not strict else []
        else:
            options += [t.empty] if not is_zero or not strict else []
        return t.either(options)

    def multiples(self, step: Fraction, path: str) -> Term:
        """Return the decimals that are multiples of a step."""
        from dgemma_mlx.constrain.document import reject

        t = self.terms
        if step <= 0:
            reject(f"{path}/multipleOf", "multipleOf must be above 0")
        places = 0
        while (step * 10**places).denominator != 1:
            places += 1
            if places > 6:
                reject(f"{path}/multipleOf", "multipleOf has more than six decimals")
        unit = int(step * 10**places)
        if unit > 2000:
            reject(f"{path}/multipleOf", "multipleOf has too many remainders")
        whole = places == 0

        def after(rest: int, left: int, started: bool) -> Term:
            """``rest``: the remainder of the digits so far; ``left``: decimals to come, -1 before the point."""
            def body() -> Term:
                options = []
                if left != 0:
                    by = {}
                    for d in range(10):
                        by.setdefault((rest * 10 + d) % unit, []).append(self._one[str(d)])
                    for to, digits in by.items():
                        options.append(t.sequence(t.either(digits), after(to, left - 1 if left > 0 else -1, True)))
                elif left == 0:
                    options.append(t.sequence(self._one["0"], after(rest, 0, True)))
                if left == -1 and started:
                    options.append(t.sequence(self.dot, point(rest)))
                if started and nullable(rest, left):
                    options.append(t.empty)
                return t.either(options)
            return t.rule(body, ("m", unit, places, rest, left, started), started and nullable(rest, left))

        def nullable(rest: int, left: int) -> bool:
            return rest * 10 ** (places if left == -1 else left) % unit == 0

        def point(rest: int) -> Term:
            def body() -> Term:
                if places == 0:
                    return t.sequence(self._one["0"], after(rest, 0, True))
                by = {}
                for d in range(10):
                    by.setdefault((rest * 10 + d) % unit, []).append(self._one[str(d)])
                return t.either(t.sequence(t.either(digits), after(to, places - 1, True)) for to, digits in by.items())
            return t.rule(body, ("p", unit, places, rest))

        return t.sequence(t.repeat(self.minus, 0, 1), after(0, -1, False))
