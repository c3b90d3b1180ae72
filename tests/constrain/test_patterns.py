"""Regular expressions as people write them: the same language as Python's ``re``, bounds, messages and Ctrl-C."""

from __future__ import annotations

import itertools
import os
import random
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma_mlx import Constraint, DgemmaError
from dgemma_mlx.constrain import limits
from dgemma_mlx.constrain.languages import of_regex
from tests.constrain.small import automaton_of_regex, text_of

BENCHMARK = Path(__file__).parents[2] / "benchmarks/measured/patterns.py"
PATTERNS = [  # Python's re has no \p
    pattern for pattern in runpy.run_path(str(BENCHMARK))["PATTERNS"] if r"\p" not in pattern
]  # fmt: skip
BACKTRACKING = ("(a?){3000}", "(a?){30}a{30}", "(x+x+)+y", "(.*)(.*)(.*)(.*)z", "(.*a){12}", "(a{1,1000}){1,1000}")


@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS if pattern not in BACKTRACKING])
def test_the_language_is_that_of_python(pattern: str) -> None:
    constraint, rng, numbers = Constraint.regex(pattern), random.Random(pattern), np.random.default_rng(0)
    matches = re.compile(pattern).fullmatch
    versions_differ = bool(re.search(r"\\[dws]", pattern, re.IGNORECASE))  # of Unicode, and what \w and \s are
    for _ in range(20):
        text = text_of(constraint.machine, numbers, 40).decode()
        if text.isascii() or not versions_differ:
            assert matches(text), text
        place = rng.randrange(len(text) + 1)
        insert = rng.choice(["", rng.choice(text or "a"), rng.choice("aZ0 -_.:\n\"é日")])
        changed = text[:place] + insert + text[place + rng.randrange(2) :]
        if changed.isascii() or not versions_differ:
            assert constraint.matches(changed) == bool(matches(changed)), changed


def test_there_are_at_least_43_patterns() -> None:
    assert len(PATTERNS) >= 43


@pytest.mark.parametrize(
    ("pattern", "states"),
    [(r"[A-Z]{1,22}", 23), (r".{1,18}", 145), (r"(- [^\n]{1,60}\n){2,5}", 2416), ("[0-9]{4}-[0-9]{2}-[0-9]{2}", 11),
     (r".{1,300}", 2401), (r"[\w.+-]+@[\w-]+\.[\w.]+", 951), ("(?i)(yes|no)", 6), (r"https?://[^\s/$.?#][^\s]*", 24),
     pytest.param("(a|b)*a(a|b){12}", 8192, marks=pytest.mark.slow),
     pytest.param(r"\w{3,16}", 5057, marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_states_are_those_of_the_minimal_automaton(pattern: str, states: int) -> None:
    assert automaton_of_regex(pattern).size == states  # counted with another compiler, by subsets and Moore's algorithm


ATOMS = st.sampled_from(["a", "b", "[ab]", "c", ".", "^", "$", "a", "b"])
TREES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{0,2}", "{2,}"])).map(
            lambda parts: f"(?:{parts[0]}){parts[1]}"
        ),
    ),
    max_leaves=10,
)
LOOKING = st.tuples(TREES, st.sampled_from(["(?=", "(?!"]), TREES, TREES).map(
    lambda parts: f"(?:{parts[0]}){parts[1]}{parts[2]})(?:{parts[3]})"
)
WORDS = ["".join(word) for length in range(5) for word in itertools.product("abc", repeat=length)]


@given(pattern=st.one_of(TREES, LOOKING, st.tuples(LOOKING, LOOKING).map(lambda pair: f"(?:{pair[0]}|{pair[1]})b*")))
@settings(max_examples=150)
def test_random_expressions_with_anchors_and_look_aheads_match_as_in_python(pattern: str) -> None:
    matches, machine = re.compile(pattern.replace("$", r"\Z")).fullmatch, of_regex(pattern)
    for word in WORDS:
        assert machine.matches(word.encode()) == bool(matches(word)), word


@pytest.mark.parametrize(
    ("pattern", "fits", "does_not"),
    [("^71$|^72$", ["71", "72"], ["7", "712"]), ("(^a$|^b$)", ["a", "b"], ["ab", ""]), ("(?i)^yes$", ["yEs"], ["ye"]),
     (r"\Ayes\z", ["yes"], ["Ayesz"]), ("a(?x) b # c", ["ab"], ["a b"]), ("a(?:$|b)", ["a", "ab"], ["aa"]),
     ("^(?=.*[0-9])(?=.*[a-z]).{8,}$", ["abcdefg1"], ["abcdefgh", "abc1"]), ("(?!foo)[a-z]+", ["fo", "bar"], ["food"]),
     ("(?:(?=ab)a|c)[a-z]", ["ab", "cz"], ["ac"]), ("a(?!.*--).*(?<n>z)", ["a-z"], ["a--z"])],
)  # fmt: skip
def test_assertions_inside_an_expression(pattern: str, fits: list[str], does_not: list[str]) -> None:
    constraint = Constraint.regex(pattern)
    assert all(map(constraint.matches, fits)) and not any(map(constraint.matches, does_not))


@pytest.mark.parametrize(
    ("pattern", "fits", "does_not"),
    [("(a|b)*a(a|b){30}", "ab" * 50 + "a" + "b" * 30, "ab" * 50 + "b" * 31), ("(a{1,1000}){1,1000}", "a" * 300, "b"),
     (r"[\w\W]{1,5000}", "é\n" * 300, ""), ("(a?){3000}", "a" * 3000, "a" * 3001),
     ("a?" * 300 + "a" * 300, "a" * 300, "a" * 299),
     ("(.*a){12}", "xa" * 12, "xa" * 11), ("(x+x+)+y", "x" * 200 + "y", "x" * 200),
     (r"(\w+ ){50}", "ab " * 50, "ab " * 49),
     ("(日|本)*日(日|本){30}", "日" * 60, "本" * 60), ("(?:" * 249 + "a?" + ")*" * 249, "aaaa", "b"),
     ("x" * 5000, "x" * 5000, "x" * 4999), ("a" + "{1,2}" * 5000, "a" * 500, "b"),
     ("((a{99}){99}){99}", None, "a")],
)  # fmt: skip
def test_what_explodes_costs_what_is_visited(pattern: str, fits: str | None, does_not: str) -> None:
    constraint = Constraint.regex(pattern)
    assert (fits is None or constraint.matches(fits)) and not constraint.matches(does_not)
    # a term for each visited state, some for the encoding of characters, and no others
    assert len(constraint.machine.terms) < 30_000


def test_forgetting_frees_what_was_visited() -> None:
    machine = of_regex(r"(a|b)*c[\w\W]{1,2000}forgotten")
    first = len(machine.terms)
    assert machine.matches(b"abc" + b"x" * 1000 + b"forgotten")
    visited = len(machine.terms)
    machine.forget()
    assert first < visited > 1000 > 2 * len(machine.terms)
    assert machine.matches(b"abc" + b"x" * 1000 + b"forgotten")


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching")
def test_threads_match_while_another_forgets() -> None:
    machine = of_regex(r"(?:(a|b)*a(a|b){8}c|[\w\W]{30,90}z)?shared")

    def match(seed: int) -> bool:
        texts = ["".join(random.Random(seed).choices("ab", k=30)) for seed in range(20 * seed, 20 * seed + 20)]
        return all(machine.matches(f"{text}zshared".encode()) for text in texts)

    with ThreadPoolExecutor(2) as pool:
        matching = [pool.submit(match, seed) for seed in range(2)]
        while not all(each.done() for each in matching):
            machine.forget()
        assert all(each.result() for each in matching)


@pytest.mark.parametrize(
    ("regex", "message"),
    [
        ("[z-a]", "'[z-a]' is malformed or not supported, or matches no character, at character 1"),
        (r"ab\b", r"\b is not supported, at character 3"), ("(?<=a)", "(?<= begins no group that is supported"),
        ("(?P=n)", "(?P= begins no group that is supported"), ("(?#c)", "(?#c begins no group that is supported"),
        (r"a\p{Nothing}", "matches no character, at character 2"), ("a[^\\s\\S]", "matches no character"),
        ("a{9999999999}", "more than nine digits"), ("(?:(?=a)b)*", "a look-ahead within a repetition"),
        ("[" + "".join(map(chr, range(0x4E00, 0x8000))) + "]", "a character class has more than 12,000 characters"),
        ("(?=" * 50 + ")" * 50, "nested deeper than 40"), ("a$b", "matches no text at all"),
    ],
)  # fmt: skip
def test_the_message_says_which_part_or_which_bound(regex: str, message: str) -> None:
    with pytest.raises(DgemmaError) as caught:
        Constraint.regex(regex)
    assert message in caught.value.message and len(caught.value.message) < 300 and caught.value.exit_code == 2


def test_what_takes_too_long_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_SECONDS", 0.0)
    with pytest.raises(DgemmaError, match="it takes more than 0 seconds to compile") as caught:
        Constraint.regex("never compiled before")
    assert caught.value.exit_code == 2 and caught.value.hint
    limits.check_time()  # the limit ends with the block


INTERRUPTED = """
import sys, threading, time, signal, os
from dgemma_mlx import Constraint
from dgemma_mlx.constrain import languages
Constraint.regex("[a-z]")  # what is imported on first use
pressed = []
def press():
    time.sleep(0.1)
    pressed.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=press).start()
try:
    while True:
        Constraint.regex(sys.argv[1] + f"x{len(pressed)}").machine.explore(20_000)
        languages.of_regex.cache_clear()
except KeyboardInterrupt:
    print(time.monotonic() - pressed[0])
"""


@pytest.mark.slow  # it measures time
@pytest.mark.parametrize("regex", [r"\w{3,16}", r"(\w+ ){50}", "(a|b)*a(a|b){12}", "[^\n]{1,2000}"])
def test_ctrl_c_stops_the_compiler_at_once(regex: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, regex], capture_output=True, text=True, timeout=60, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.2
