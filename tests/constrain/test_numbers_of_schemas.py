"""Numbers within bounds: exact for decimals of any size, against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma_mlx.constrain.leaf import bytes_of, utf8
from dgemma_mlx.constrain.machine import BYTES, Machine
from dgemma_mlx.constrain.number_terms import Numbers
from dgemma_mlx.constrain.terms import Term, Terms

NUMBERS = Numbers()
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
DECIMALS = st.one_of(
    st.integers(-12, 12).map(Fraction), st.integers(-300, 300).map(lambda n: Fraction(n, 100)),
    st.integers(-(10**6), 10**6).map(lambda n: Fraction(n, 1000)),
)
STEPS = st.sampled_from([Fraction(n) for n in ("1", "3", "7", "0.25", "0.01", "2.5", "10", "997", "0.003")])


def machine_of(term: Term) -> Machine:
    """Return the machine of some texts of numbers."""
    terms = Terms(BYTES)
    return Machine(terms, bytes_of(NUMBERS.letters, term, terms, utf8(terms)))


def shortest(term: Term) -> str:
    """Return a shortest text of a term."""
    machine, text = machine_of(term), b""
    state = machine.start
    while not state.nullable:
        symbol, state = machine.step(state)
        text += bytes([symbol])
    return text.decode()


def is_within(value: Fraction, bounds: dict[str, Fraction]) -> bool:
    judge = {
        "minimum": lambda bound: value >= bound, "maximum": lambda bound: value <= bound,
        "exclusiveMinimum": lambda bound: value > bound, "exclusiveMaximum": lambda bound: value < bound,
        "multipleOf": lambda step: (value / step).denominator == 1,
    }  # fmt: skip
    return all(judge[name](bound) for name, bound in bounds.items())


def texts_of(value: Fraction) -> list[str]:
    """Return ways to write a decimal with up to six decimals; none for one with more."""
    places = next((n for n in range(7) if (value * 10**n).denominator == 1), None)
    if places is None:
        return []
    digits = str(abs(int(value * 10**places))).zfill(places + 1)
    sign = "-" if value < 0 else ""
    plain = f"{sign}{digits[:-places]}.{digits[-places:]}" if places else sign + digits
    longer = plain + ("0" if places else ".0")
    return [plain] if places == 6 else [plain, longer]


@given(st.fixed_dictionaries({}, optional={**dict.fromkeys(BOUNDS, DECIMALS), "multipleOf": STEPS}), st.data())
@settings(max_examples=60)
def test_numbers_are_those_within_the_bounds(bounds: dict[str, Fraction], data: st.DataObject) -> None:
    machine = machine_of(NUMBERS.within(bounds, "#"))
    near = [Fraction(n, 1000) for n in (0, 1, -1, 100, -100, 1000, -1000)]
    values = {bound * data.draw(st.integers(-9, 9)) + delta for bound in bounds.values() for delta in near}
    values |= {bound + delta for bound in bounds.values() for delta in near} | {Fraction(0)}
    for value in values:
        for text in texts_of(value):
            assert machine.matches(text.encode()) == is_within(value, bounds), text


@pytest.mark.parametrize(
    ("bounds", "text"),
    [({"minimum": "0.5", "maximum": "0.9"}, "0.5"), ({"minimum": "-0.5", "maximum": "0.5"}, "0"),
     ({"minimum": "5e-21", "maximum": "9e-21"}, "0.000000000000000000005"), ({"minimum": "1e30"}, "1" + "0" * 29 + "0"),
     ({"minimum": "0.1234567891", "maximum": "0.1234567895"}, "0.1234567891"),
     ({"multipleOf": "1e12", "minimum": "1"}, "1" + "0" * 12),
     ({"minimum": "100000000000000001", "exclusiveMaximum": "100000000000000003"}, "100000000000000001"),
     ({"multipleOf": "123456789", "minimum": "1e12"}, None), ({"multipleOf": "9.97e-7", "minimum": "5"}, None)],
)  # fmt: skip
def test_bounds_of_any_size_have_numbers(bounds: dict[str, str], text: str | None) -> None:
    exact = {name: Fraction(bound) for name, bound in bounds.items()}
    found = shortest(NUMBERS.within(exact, "#"))
    assert is_within(Fraction(found), exact)
    assert text is None or (Fraction(found) >= Fraction(text) and len(found) == len(text))


@pytest.mark.parametrize(
    "bounds", [{"minimum": "1", "maximum": "0"}, {"multipleOf": "1e9", "minimum": "1", "maximum": "999999999"},
               {"exclusiveMinimum": "3", "exclusiveMaximum": "3"},
               {"minimum": "0.4", "maximum": "0.6", "multipleOf": "0.25"}],
)  # fmt: skip
def test_bounds_that_hold_nothing(bounds: dict[str, str]) -> None:
    found = NUMBERS.within({name: Fraction(bound) for name, bound in bounds.items()}, "#")
    assert (found is NUMBERS.terms.none) == ("0.25" not in bounds.values())  # 0.5 is a multiple


@given(value=st.floats(1e-9, 1e8), strict=st.booleans(), above=st.booleans())
@settings(max_examples=60)
def test_a_reader_that_uses_doubles_agrees(value: float, strict: bool, above: bool) -> None:
    name = f"{'exclusive' if strict else ''}{'Minimum' if above else 'Maximum'}"
    name = name if strict else name.lower()
    found = NUMBERS.within({name: Fraction(str(value))}, "#")
    anything = NUMBERS.terms.everything
    read = float(shortest(NUMBERS.terms.every([found, NUMBERS.terms.sequence(anything, NUMBERS.dot, anything)])))
    assert read > value if strict and above else read < value if strict else read >= value if above else read <= value


def test_whole_numbers_have_no_fraction_and_integers_may_have_one_of_zeros() -> None:
    whole, integers = machine_of(NUMBERS.whole), machine_of(NUMBERS.integers)
    texts = (("10", 1, 1), ("-3", 1, 1), ("1.0", 0, 1), ("1.50", 0, 0), ("01", 0, 0), ("1e2", 0, 0))
    for text, is_whole, is_integer in texts:
        assert (whole.matches(text.encode()), integers.matches(text.encode())) == (is_whole, is_integer)
