"""Terms over characters for the numbers of a JSON schema: bounds and multiples, exact for decimals of any size.

A number without bounds may have an exponent. Under bounds, it is an integer of up to 18 digits, or it has up to 15
significant digits: different decimals of 15 digits are different doubles, so a reader that uses doubles finds them on
the same side of a bound. Only where the bounds ask for larger integers or smaller fractions, they may be longer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

from dgemma_mlx.constrain.characters import single
from dgemma_mlx.constrain.document import reject
from dgemma_mlx.constrain.leaf import Letters
from dgemma_mlx.constrain.terms import UNBOUNDED, Term

_DIGITS = 18  # of an integer
_SIGNIFICANT = 15  # digits of a number with a fraction
_DECIMALS = 6  # digits of a fraction, unless the bounds ask for more
_EXACT = 2**53  # all integers up to here are doubles
_OF_DOUBLE = 17  # significant digits that doubles are written with


class Numbers:
    """Terms for the texts of numbers.

    Attributes:
        letters: The alphabet.
        terms: Its algebra.
        number: Numbers without bounds.
        whole: Integers as they are usually written.
        any_whole: The same, of any size.
        integers: Texts of ``decimals`` that have the value of an integer: ``1.0`` is one.
        decimals: The numbers that are compared with bounds.
        digit, minus, dot: Parts of texts.
    """

    def __init__(self) -> None:
        self.letters = Letters([single(character) for character in "0123456789.-+eE"])
        t = self.terms = self.letters.terms
        self._one = {character: self.letters.one(single(character)) for character in "0123456789.-+eE"}
        self.digit = self._digits(range(10))
        self.minus, self.dot = self._one["-"], self._one["."]
        self._sign, self._any_digits = t.repeat(self.minus, 0, 1), t.repeat(self.digit, 0)
        exponent = t.sequence(
            t.either([self._one["e"], self._one["E"]]), t.repeat(t.either([self._one["+"], self.minus]), 0, 1),
            t.repeat(self.digit, 1, 2),
        )
        natural = self._naturals(_DIGITS)
        self.number = t.sequence(self._sign, natural, self._perhaps_point(1, 17), t.repeat(exponent, 0, 1))
        self.whole = t.either([natural, t.sequence(self.minus, natural)])
        self.any_whole = t.sequence(self._sign, self._naturals(UNBOUNDED))
        zeros = t.repeat(t.sequence(self.dot, t.repeat(self._one["0"], 1)), 0, 1)
        self.integers = t.sequence(self._sign, natural, zeros)
        self.decimals = t.either([self.whole, self._fractions(_DECIMALS)])

    def text(self, text: str) -> Term:
        """Return one text, which consists of characters of numbers."""
        return self.terms.sequence(*(self._one[character] for character in text))

    def equal(self, value: int | float, path: str) -> Term:
        """Return the texts of one number: as JSON writes it, and an integer also with a fraction of zero.

        Raises ``DgemmaError``, which gives ``path``, for NaN and infinity.
        """
        if isinstance(value, float) and not math.isfinite(value):
            reject(path, "NaN and infinity are not valid JSON", "Use finite numbers.")
        texts = {json.dumps(value)}
        if value == int(value) and abs(value) < 10**_DIGITS:
            texts |= {str(int(value)), f"{int(value)}.0"}
        return self.terms.either(map(self.text, sorted(texts)))

    def within(self, bounds: Mapping[str, Fraction], path: str) -> Term:
        """Return the numbers within bounds, a mapping from names of keywords: ``minimum``, ``multipleOf``, ....

        The result is ``terms.none`` when there is none. Raises ``DgemmaError``, which gives ``path``, for a step that
        is not above 0 or has more than 14 decimals.
        """
        t = self.terms
        whole, fractional = self._written(bounds)
        found: list[Term] = []
        for options, fraction in ((whole, False), (fractional, True)):
            digits = _SIGNIFICANT - _DECIMALS if fraction else max(option.longest for option in options)
            if not _may_hold(bounds, 10**digits, whole=not fraction):
                continue
            parts = [t.either(options)]
            for name, bound in bounds.items():
                if name == "multipleOf":
                    parts.append(self._multiples(bound, path))
                else:
                    above = name in ("minimum", "exclusiveMinimum")
                    parts.append(self._beyond(bound, name.startswith("exclusive"), above=above, fraction=fraction))
            found.append(t.every(parts))
        return t.either(each for each in found if t.least(each) < UNBOUNDED)

    def _written(self, bounds: Mapping[str, Fraction]) -> tuple[list[Term], list[Term]]:
        """Return the texts that the bounds choose from: some without and some with a fraction."""
        t, whole, fractional = self.terms, [self.whole], [self._fractions(_DECIMALS)]
        for name, bound in bounds.items():
            if abs(bound) >= 10**_DIGITS and (bound > 0) == (name in ("minimum", "exclusiveMinimum", "multipleOf")):
                whole.append(t.sequence(self._sign, self._naturals(len(str(int(abs(bound)))) + 1)))
            places = _places(bound)
            zeros = places - len(str(abs(bound.numerator * 10**places // bound.denominator)))  # 3 of 0.00012
            if places >= _DECIMALS:
                fractional.append(self._fractions(min(places + 1, _SIGNIFICANT - 1)))
            if zeros > 2:
                tail = t.repeat(self.digit, 1, _SIGNIFICANT)
                fractional.append(t.sequence(self._sign, self.text("0." + "0" * zeros), tail))
        return whole, fractional

    def _digits(self, digits: Iterable[int]) -> Term:
        return self.terms.either(self._one[str(digit)] for digit in digits)

    def _naturals(self, most: int) -> Term:
        """Return the natural numbers of up to ``most`` digits; ``UNBOUNDED`` is no limit."""
        t, more = self.terms, most if most >= UNBOUNDED else most - 1
        return t.either([self._one["0"], t.sequence(self._digits(range(1, 10)), t.repeat(self.digit, 0, more))])

    def _fractions(self, decimals: int) -> Term:
        """Return the numbers with up to as many decimals, and up to 15 digits."""
        fraction = self.terms.sequence(self.dot, self.terms.repeat(self.digit, 1, decimals))
        return self.terms.sequence(self._sign, self._naturals(_SIGNIFICANT - decimals), fraction)

    def _perhaps_point(self, least: int, most: int) -> Term:
        """Return nothing, or a point and digits."""
        return self.terms.repeat(self.terms.sequence(self.dot, self.terms.repeat(self.digit, least, most)), 0, 1)

    def _beyond(self, bound: Fraction, strict: bool, *, above: bool, fraction: bool) -> Term:
        """Return the decimals above or below a bound, or equal to it unless ``strict``.

        Without ``fraction``, these are the whole ones.
        """
        t = self.terms
        # A reader that uses doubles sees another bound, if this one was written as a double.
        if _EXACT <= abs(bound) < 10**308 and len(str(abs(bound)).rstrip("0")) <= _OF_DOUBLE:
            double = Fraction(float(bound))
            bound = max(bound, double) if above else min(bound, double)
        near, far = (self.minus, t.empty) if above else (t.empty, self.minus)  # signs
        zero = t.sequence(self._sign, self._one["0"], t.repeat(t.sequence(self.dot, t.repeat(self._one["0"], 1)), 0, 1))
        if bound and (bound > 0) == above:
            return t.sequence(far, self._magnitudes(abs(bound), strict, above=True, fraction=fraction))
        if not bound:
            found = t.sequence(far, self._magnitudes(bound, strict, above=True, fraction=fraction))
            return found if strict else t.either([found, zero])
        nearer = t.sequence(near, self._magnitudes(abs(bound), strict, above=False, fraction=fraction))
        unsigned = t.sequence(t.repeat(self.digit, 1), self._perhaps_point(1, UNBOUNDED) if fraction else t.empty)
        return t.either([t.sequence(far, unsigned), zero, nearer])

    def _magnitudes(self, bound: Fraction, strict: bool, *, above: bool, fraction: bool) -> Term:
        """Return the decimals without a sign above or below a bound of at least 0, or equal to it unless ``strict``."""
        t = self.terms
        whole, rest = divmod(bound, 1)
        places = _places(rest)
        decimals = str(rest * 10**places).zfill(places) if places else ""
        point = self._perhaps_point(1, UNBOUNDED) if fraction else t.empty
        same = t.sequence(self.text(str(whole)), self._same_whole(decimals, strict, above, fraction))
        return t.either([t.sequence(self._other_wholes(str(whole), above), point), same])

    def _other_wholes(self, bound: str, above: bool) -> Term:
        """Return the natural numbers above or below one that is given in digits."""
        t, nonzero = self.terms, self._digits(range(1, 10))
        found = t.none  # of the digits from a place on, those that make the number larger or smaller
        for place in reversed(range(len(bound))):
            digit, rest = int(bound[place]), len(bound) - 1 - place
            lowest = 1 if place == 0 and rest else 0
            others = self._digits(range(digit + 1, 10) if above else range(lowest, digit))
            found = t.either([
                t.sequence(others, t.repeat(self.digit, rest, rest)), t.sequence(self._one[bound[place]], found),
            ])  # fmt: skip
        if above:
            return t.either([found, t.sequence(nonzero, t.repeat(self.digit, len(bound)))])
        return t.either([found, self._naturals(len(bound) - 1)]) if len(bound) > 1 else found

    def _same_whole(self, decimals: str, strict: bool, above: bool, fraction: bool) -> Term:
        """Return what may follow the whole part of a bound: nothing, or a point and decimals that compare so.

        ``decimals`` are those of the bound, of which the last one is not 0.
        """
        t, zeros = self.terms, self.terms.repeat(self._one["0"], 0)
        if above:  # after the decimals of the bound
            tail = t.sequence(zeros, self._digits(range(1, 10)), self._any_digits) if strict else self._any_digits
        else:
            tail = t.none if strict else zeros
        for decimal in reversed(decimals):
            others = range(int(decimal) + 1, 10) if above else range(int(decimal))
            options = [t.sequence(self._digits(others), self._any_digits), t.sequence(self._one[decimal], tail)]
            tail = t.either(options if above else [*options, t.empty])  # what is missing are zeros: it is smaller
        may_end = (not strict and not decimals) if above else (not strict or bool(decimals))
        if not fraction:
            return t.empty if may_end else t.none
        point = t.sequence(self.dot, t.every([tail, t.repeat(self.digit, 1)]))
        return t.either([point, t.empty] if may_end else [point])

    def _multiples(self, step: Fraction, path: str) -> Term:
        """Return the decimals that are multiples of a step."""
        places = _places(step) if step > 0 else 0
        if step <= 0 or places >= _SIGNIFICANT:
            reject(f"{path}/multipleOf", "multipleOf must be above 0 and have at most 14 decimals")
        return self.terms.sequence(self._sign, _Multiples(self, int(step * 10**places), places).after(0, None, False))


class _Multiples:
    """Texts of digits and a point that are multiples of ``unit`` / 10^``places``.

    What may follow depends on the remainder of the digits so far, and on how many decimals are left. There may be many
    remainders, so a rule stands for each, which is opened when a text comes to it.
    """

    def __init__(self, numbers: Numbers, unit: int, places: int) -> None:
        self._numbers, self._unit, self._places = numbers, unit, places

    def after(self, rest: int, left: int | None, ended: bool) -> Term:
        """Return what may follow digits with the remainder ``rest``.

        ``left`` is the number of decimals to come that count, None before the point; ``ended`` says whether a digit
        stands right before, so that the text may end if it is a multiple.
        """
        nullable = ended and self._is_multiple(rest, self._places if left is None else left)
        name = ("multiples", self._unit, self._places, rest, left, ended)
        weight = self._weight(rest, left, ended)
        return self._numbers.terms.rule(lambda: self._body(rest, left, ended), name, nullable, lambda _: weight, weight)

    def _is_multiple(self, rest: int, left: int) -> bool:
        return rest * int(10**left) % self._unit == 0

    def _body(self, rest: int, left: int | None, ended: bool) -> Term:
        t, options = self._numbers.terms, []
        if left == 0:
            options.append(t.sequence(self._numbers.text("0"), self.after(rest, 0, True)))
        else:
            following: dict[int, list[str]] = {}
            for digit in range(10):
                following.setdefault((rest * 10 + digit) % self._unit, []).append(str(digit))
            for to, digits in following.items():
                one = t.either(map(self._numbers.text, digits))
                options.append(t.sequence(one, self.after(to, None if left is None else left - 1, True)))
        if left is None and ended:
            options.append(t.sequence(self._numbers.dot, self.after(rest, self._places, False)))
        if ended and self._is_multiple(rest, self._places if left is None else left):
            options.append(t.empty)
        return t.either(options)

    def _weight(self, rest: int, left: int | None, ended: bool) -> int:
        """Return the fewest characters that complete the digits to a multiple; ``UNBOUNDED`` if none do."""
        least = 0 if ended else 1
        counts = range(least, len(str(self._unit)) + 2) if left is None else range(least, max(left, 1) + 1)
        found = [n for n in counts if self._completes(rest, n, self._places if left is None else max(left - n, 0))]
        if left == 0:
            found = [least] if rest == 0 else []
        if left is None and ended and not (found and found[0] == 0):
            found += [1 + n for n in range(1, self._places + 1) if self._completes(rest, n, self._places - n)]
        return min(found, default=UNBOUNDED)

    def _completes(self, rest: int, digits: int, left: int) -> bool:
        """Return whether some digits make a multiple, if ``left`` zeros are added to them."""
        unit = self._unit // math.gcd(self._unit, 10**left)
        return -rest * int(10**digits) % unit < int(10**digits)


def _may_hold(bounds: Mapping[str, Fraction], largest: int, *, whole: bool) -> bool:
    """Return whether a number, or a whole one, up to ``largest`` is within the bounds, some of which may be strict.

    A search would find that out, too, but it may be a long one where there are none.
    """
    least = max(bounds.get("minimum", -largest), bounds.get("exclusiveMinimum", -largest), -largest)
    most = min(bounds.get("maximum", largest), bounds.get("exclusiveMaximum", largest), largest)
    step = bounds.get("multipleOf", Fraction(0))
    if whole:
        step = Fraction(max(step.numerator, 1))
    return least <= most and (step <= 0 or math.ceil(least / step) * step <= most)


def _places(value: Fraction) -> int:
    """Return the number of decimals of a decimal fraction."""
    places, denominator = 0, value.denominator
    while denominator > 1:
        denominator //= math.gcd(denominator, 10)
        places += 1
    return places
