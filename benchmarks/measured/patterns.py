"""Regular expressions as people write them, and what it takes to compile each and to project a first canvas onto it."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from dgemma_mlx import Constraint, DgemmaError
from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.constrain.canvas import CANDIDATES
from dgemma_mlx.text.tokenizer import Tokenizer, load_tokenizer

CANVAS, MAX_TOKENS, VOCABULARY_SIZE = 256, 4096, 262_144
PATTERNS = (
    r"[A-Z]{1,22}", r".{1,18}", r"\w{3,16}", r"(- [^\n]{1,60}\n){2,5}", r".{1,300}", r"(a|b)*a(a|b){12}",
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}", r"(0[1-9]|[12]\d|3[01])/(0[1-9]|1[0-2])/\d{4}",
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)", r"(January|February|March) \d{1,2}, \d{4}",
    r"([01]?[0-9]|2[0-3]):[0-5][0-9]( ?[ap]m)?", r"[a-zA-Z0-9._%+-]+@[a-zA-Z0-9.-]+\.[a-zA-Z]{2,}",
    r"[a-zA-Z0-9._%+-]{1,64}@[a-z0-9-]{1,63}(\.[a-z]{2,10}){1,3}", r"https?://[^\s/$.?#].[^\s]*",
    r"https?://(www\.)?[-a-zA-Z0-9@:%._+~#=]{1,256}\.[a-z]{1,6}(/[^ ]*)?",
    r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", r"[0-9a-fA-F]{40}", r"#[0-9a-f]{3,8}",
    r"\+?[0-9]{1,3}[ -]?(\([0-9]{2,5}\)|[0-9]{2,5})([ -]?[0-9]{2,4}){2,4}", r"\(\d{3}\) \d{3}-\d{4}",
    r"((25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(25[0-5]|2[0-4]\d|1?\d?\d)", r"([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}",
    r"([0-9A-F]{2}:){5}[0-9A-F]{2}", r"(- .+\n)+", r"([0-9]+\. .+\n){1,10}", r"#{1,6} [^\n]+\n\n([^\n]+\n)+",
    r"\| ([^|\n]+ \| ){2,5}\n", r"```[a-z]*\n(?s:.*)\n```", r"[A-Za-z_][A-Za-z0-9_]*", r"[a-z][a-z0-9]*(_[a-z0-9]+)*",
    r"([a-z]+/)*[a-z]+\.(py|ts|rs|md)", r"v?(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?",
    r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?", r"\$[1-9][0-9]{0,2}(,[0-9]{3})*\.[0-9]{2}",
    r"[A-Z]{2}\d{2}( ?[A-Z0-9]{4}){3,7}", r"(?i)yes|no|maybe", r"(?i:select) [a-z_]+(, [a-z_]+)* (?i:from) [a-z_]+;",
    r"(?i)[a-zäöüß]{1,40}", r"\p{Lu}\p{Ll}+( \p{Lu}\p{Ll}+){1,3}", r"\p{Greek}{3,20}", r"[\p{Han}\p{Hiragana}]{1,40}",
    r"[^aeiou]{5,20}", r"\s*\S+(\s+\S+){0,9}\s*", r"[01]{1,64}", r"([^,\n]*,){3}[^,\n]*\n",
    r"<(b|i|p)>[^<>]*</(b|i|p)>",
    r"\{\"name\": \"[^\"\\]{1,40}\", \"age\": [0-9]{1,3}\}", r"<think>(?s:.{0,500})</think>\n(yes|no)",
    r"(a?){30}a{30}", r"(x+x+)+y", r"(.*)(.*)(.*)(.*)z", r"(.*a){12}", r"[^\n]{1,1000}", r"\w{1,100}", r"(\w+ ){50}",
    r"(a|b)*a(a|b){30}", r"(a?){3000}", r"[\w\W]{1,5000}",
)  # fmt: skip


def patterns(vocabulary: Path) -> bool:
    """Print a row for each pattern, which is compiled in a process of its own, and return True.

    ``vocabulary`` is a folder with a tokenizer.json.
    """
    tokenizer = load_tokenizer(vocabulary)
    print(f"{'pattern':45} {'terms':>6} {'bytes':>7} {'tokens':>7} {'canvas':>7} {'next':>7} {'MB':>5}", flush=True)
    for pattern in PATTERNS:
        child = multiprocessing.get_context("fork").Process(target=_row, args=(pattern, tokenizer))
        child.start()
        child.join()
    return True


def _row(pattern: str, tokenizer: Tokenizer) -> None:
    """Print the CPU time of each part, and the memory that they take together at most."""
    before, times, note = peak(), [time.thread_time()], ""
    terms: Any = "-"
    try:
        constraint = Constraint.regex(pattern)
        times.append(time.thread_time())
        config = GenerationConfig(eos_token_ids=(1, 106), pad_token_id=0)
        machine = constraint.over(tokenizer, config, VOCABULARY_SIZE)
        times.append(time.thread_time())
        rng, shape = np.random.default_rng(0), (CANVAS, CANDIDATES)
        projector = machine.projector(machine.start, MAX_TOKENS)
        for _ in range(2):  # the second canvas has the same candidates, as most steps do
            ids = np.random.default_rng(1).integers(0, VOCABULARY_SIZE, shape).astype(np.int32)
            skeleton = rng.normal(size=(CANVAS, len(projector.skeleton)))
            projector(skeleton, ids, rng.normal(size=shape), rng.random(CANVAS))
            times.append(time.thread_time())
        terms = len(constraint.machine.terms)
    except DgemmaError as error:
        times.append(time.thread_time())
        note = error.message
    cells = [f"{seconds:5.2f} s" for seconds in np.diff(times)] + [""] * (5 - len(times))
    shown = pattern.replace("\n", "\\n")
    row = " ".join(f"{cell:>7}" for cell in cells)
    print(f"{shown:45} {terms:>6} {row} {peak() - before:5.0f} {note}", flush=True)


def peak() -> float:
    """Return the most memory that this process has had, in MB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6
