"""Regular expressions as people write them: the same language as Python's ``re``, bounds, messages and Ctrl-C."""

from __future__ import annotations

import os
import random
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dgemma_mlx import Constraint, DgemmaError
from dgemma_mlx.constrain import limits
from dgemma_mlx.constrain.automaton import DEAD, Automaton, automaton_of

BENCHMARK = Path(__file__).parents[2] / "benchmarks/measured/patterns.py"
# Python's re has no \p, and two of the patterns are refused as too large.
PATTERNS = [
    pattern for pattern in runpy.run_path(str(BENCHMARK))["PATTERNS"]
    if r"\p" not in pattern and "{30}" not in pattern[6:] and pattern not in (r"\w{1,100}", "(a?){3000}")
    and "5000" not in pattern
]  # fmt: skip


def a_text(automaton: Automaton, ends: list[bytes], rng: random.Random, printable_only: bool) -> str:
    """Return a text that the automaton accepts, from a random walk that ends the shortest way."""
    state, text = 0, b""
    for _ in range(rng.randrange(40)):
        bytes_on = np.flatnonzero(automaton.table[state] != DEAD).tolist()
        if not bytes_on:
            break
        printable = [byte for byte in bytes_on if 32 <= byte < 127] or bytes_on
        byte = rng.choice(printable if printable_only or rng.random() < 0.8 else bytes_on)
        state, text = int(automaton.table[state, byte]), text + bytes([byte])
    return (text + ends[state]).decode()


LARGE = (r"(\w+ ){50}", r"<think>(?s:.{0,500})</think>\n(yes|no)", r"\w{3,16}")


@pytest.mark.parametrize(
    "pattern", [pytest.param(pattern, marks=pytest.mark.slow) if pattern in LARGE else pattern for pattern in PATTERNS]
)
def test_the_language_is_that_of_python(pattern: str) -> None:
    automaton, rng, matches = Constraint.regex(pattern).automaton, random.Random(pattern), re.compile(pattern).fullmatch
    ends = automaton.completions()
    versions_differ = bool(re.search(r"\\[dws]", pattern, re.IGNORECASE))  # of Unicode, and what \w and \s are
    for _ in range(40):
        text = a_text(automaton, ends, rng, versions_differ)
        assert matches(text), text
        place = rng.randrange(len(text) + 1)
        insert = rng.choice(["", rng.choice(text or "a"), rng.choice("aZ0 -_.:\n\"é日")])
        changed = text[:place] + insert + text[place + rng.randrange(2) :]
        assert automaton.matches(changed.encode()) == bool(matches(changed)), changed


def test_there_are_at_least_43_patterns() -> None:
    assert len(PATTERNS) >= 43


@pytest.mark.parametrize(
    ("regex", "message"),
    [
        ("[z-a]", "'[z-a]' is malformed or not supported, at character 1"),
        (r"ab\b", r"\b is not supported, at character 3"), ("(?=a)", "look-around is not supported"),
        ("(?P=n)", "(?P begins no group that is supported"), ("(?#c)", "(?# begins no group that is supported"),
        (r"a\p{Nothing}", "is malformed or not supported, at character 2"), ("a[^\\s\\S]", "no character matches"),
        pytest.param("(a?){3000}", "more than 1,500,000 moves", marks=pytest.mark.slow),
        ("a{9999999999}", "more than nine digits"),
        ("[" + "".join(map(chr, range(0x4E00, 0x8000))) + "]", "a character class has more than 12,000 characters"),
        ("(a|b)*a(a|b){30}", "more than 20,000 states"), ("((a{99}){99}){99}", "more than 100,000 parts"),
    ],
)  # fmt: skip
def test_the_message_says_which_part_or_which_bound(regex: str, message: str) -> None:
    with pytest.raises(DgemmaError) as caught:
        Constraint.regex(regex)
    assert message in caught.value.message and len(caught.value.message) < 300 and caught.value.exit_code == 2


def test_what_takes_too_long_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_SECONDS", 0.0)
    with pytest.raises(DgemmaError, match="it is too large: it takes more than 0 seconds to compile") as caught:
        automaton_of("never compiled before", "it")
    assert caught.value.exit_code == 2 and caught.value.hint
    limits.check_time()  # the limit ends with the block


INTERRUPTED = """
import sys, threading, time, signal, os
from dgemma_mlx import Constraint
Constraint.regex("[a-z]")  # what is imported on first use
pressed = []
def press():
    time.sleep(0.1)
    pressed.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=press).start()
try:
    while True:
        Constraint.regex(sys.argv[1] + f"x{len(pressed)}")
        Constraint.regex.__func__.__globals__["automaton_of"].cache_clear()
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
