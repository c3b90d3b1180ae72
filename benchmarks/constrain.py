"""Constrained output: whether all of it matches, whether as many answers are right, and what it costs.

    python benchmarks/constrain.py [json] [--prompts 500] [--speed MODE]
    python benchmarks/constrain.py random [--outputs 200] [--each N]
    python benchmarks/constrain.py cost [--steps 8]
    python benchmarks/constrain.py patterns [--vocabulary runs/gemma4]
    python benchmarks/constrain.py schemas FILE.jsonl [--count 300]
    python benchmarks/constrain.py outputs FILE.jsonl [--count 300] [--each 3]

``json``: the demo model writes JSON with and without a schema, for the same held-out prompts and seeds. ``random``: a
model with random weights, a generated vocabulary of 262,144 tokens and a canvas of 32 writes under ten schemas and 20
regular expressions. ``--outputs`` counts the outputs of all schemas together and of all regular expressions together,
or ``--each`` those of each one. ``jsonschema`` and ``re`` check them. ``cost``: the time of steps with and without
a constraint on the checkpoint small-262k (canvas 256), and of the projection
within them. ``patterns``: what some 60 regular expressions take to compile, and to project a first canvas onto, with
Gemma's own vocabulary, which ``make runs/gemma4/tokenizer.json`` fetches. ``schemas`` and ``outputs`` take a file of
JSON schemas, an object with "name" and "schema" on each line, such as JSONSchemaBench's. ``schemas``: what each takes
to compile and to project canvases of 256 onto, with the same vocabulary. ``outputs``: a random model with canvases of
64 writes under each schema, and ``jsonschema`` checks the answers, with their formats.

The exit code is 1 when an output does not match, when fewer constrained answers are right, or when the projection takes
15 % of a step or more for the typical schema.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from jsonschema import Draft202012Validator
from measured import checkpoints
from measured.patterns import patterns
from measured.schemas import schema_costs, schema_outputs
from measured.vocabulary import write_tokenizer

from dgemma_mlx import Constraint, Draft, Model, generate, generate_batch, load, stream
from dgemma_mlx.constrain.canvas import CanvasProjection
from dgemma_mlx.constrain.projection import Projector
from dgemma_mlx.kernels import CanvasSample
from dgemma_mlx.sizes import rate
from dgemma_mlx.train.tasks import TASKS


def thing(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


TEXT, WHOLE, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
RECORD = thing(name=TEXT, age=WHOLE, city=TEXT)
TYPICAL = thing(
    ["title", "kind", "people"], title=TEXT, kind={"enum": ["note", "task", "event"]},
    priority={"type": "integer", "minimum": 1, "maximum": 5}, done={"type": "boolean"}, score=NUMBER,
    people={"type": "array", "items": thing(["name"], name=TEXT, email=TEXT)},
    due={"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
)  # fmt: skip
LENGTHS = thing(a={"type": "string", "maxLength": 40}, b={"type": "string", "maxLength": 40})
SCHEMAS: dict[str, Any] = {
    "record": RECORD,
    "typical": TYPICAL,
    "nested": thing(a=thing(b=thing(c=thing(d=TEXT, e=WHOLE)), f={"type": "boolean"})),
    "arrays": thing(rows={"type": "array", "items": {"type": "array", "items": WHOLE, "maxItems": 4}, "minItems": 2}),
    "enum": {"enum": ["red", "Grün", 'a "quoted" one', 3, 4.5, None, True, {"k": [1, 2]}]},
    "numbers": thing(p={"type": "number", "minimum": 0, "maximum": 1}, n=WHOLE, x=NUMBER,
                     t={"type": "integer", "minimum": -40, "maximum": 55}),
    "optional": thing([], **dict.fromkeys(("one", "two", "three", "four", "five"), TEXT)),
    "unicode": thing(größe={"type": "string", "minLength": 2, "maxLength": 12}, 名前=TEXT),
    "union": thing(
        shape={"oneOf": [thing(kind={"const": "circle"}, r=NUMBER), thing(kind={"const": "box"}, w=NUMBER)]},
        code={"type": "string", "pattern": r"^[A-Z]{2}-\d{3,5}$"},
    ),
    "anything": {"type": "object"},
}  # fmt: skip
REGEXES = (
    "[0-9]{4}-[0-9]{2}-[0-9]{2}", "(yes|no|maybe)", "[A-Z][a-z]+ [A-Z][a-z]+", "(a|ab)(c|bcd)*", r"#[0-9a-f]{6}",
    ".*", r"\+?[0-9]{1,3}( [0-9]{2,4}){2,4}", "[^aeiou]{5,20}", "(([01]?[0-9]|2[0-3]):[0-5][0-9])",
    "x{0,40}y", "", "é+(ü|日本)*",
    r"[a-z0-9._]+@[a-z0-9]+\.(com|org|net)", "(- [a-z ]+\n){3}", r"\$[1-9][0-9]{0,2}(,[0-9]{3})*\.[0-9]{2}",
    "[αβγ]{3,9}",
    r"SELECT [a-z_]+(, [a-z_]+)* FROM [a-z_]+;", "((a|b){2}c)+", "(?i:hello), (world|[a-z]{3,12})!", r"<b>[^<>&]*</b>",
)  # fmt: skip


def extract_json(prompts: int, speed: str) -> bool:
    model, validator = load("demo"), Draft202012Validator(RECORD)
    rng, task = random.Random("constrain/json/0"), TASKS["json"]
    examples = [task.sample(rng, "heldout") for _ in range(prompts)]
    all_right = []
    for name, constraint in (("without", None), ("with", Constraint.json_schema(RECORD))):
        right = valid = steps = 0
        began = time.perf_counter()
        for seed, example in enumerate(examples):
            done = generate(
                model, list(example.messages), max_tokens=128, seed=seed, speed=speed, constraint=constraint
            )
            right += task.check(example, done.text)
            valid += validates(validator, done.text)
            steps += done.statistics.denoising_steps
        seconds = time.perf_counter() - began
        counts = f"valid {valid} of {prompts}, exact {right} of {prompts}"
        print(f"{name:8} {counts}, {steps} steps, {seconds:.0f} s", flush=True)
        all_right.append(right)
    return valid == prompts and all_right[1] >= all_right[0]


def validates(validator: Draft202012Validator, text: str) -> bool:
    try:
        return bool(validator.is_valid(json.loads(text)))
    except ValueError:
        return False


def random_outputs(outputs: int, each: int) -> bool:
    cases: list[tuple[str, Constraint, Any]] = [
        (name, Constraint.json_schema(schema), partial(validates, Draft202012Validator(schema)))
        for name, schema in SCHEMAS.items()
    ]
    cases += [(regex, Constraint.regex(regex), re.compile(regex).fullmatch) for regex in REGEXES]
    good = True
    with checkpoint("tiny-262k") as model:
        for place, (name, constraint, matches) in enumerate(cases):
            share = each or -(-outputs // (len(SCHEMAS) if place < len(SCHEMAS) else len(REGEXES)))
            began = time.perf_counter()
            texts = [done.text for first in range(0, share, 10) for done in answers(model, constraint, first, share)]
            matching, seconds = sum(is_match(matches, text) for text in texts), time.perf_counter() - began
            print(f"{matching} of {share} match, {len(set(texts))} different, {seconds:.0f} s: {name!r}", flush=True)
            good &= matching == share
    return good


def is_match(matches: Callable[[str], Any], text: str) -> bool:
    return matches(text) not in (None, False)


def answers(model: Model, constraint: Constraint, first: int, count: int) -> list[Any]:
    """Return up to ten answers of up to three canvases with two steps each. A random model may write anything."""
    seeds = list(range(first, min(first + 10, count)))
    config = model.generation.override(max_denoising_steps=2)
    most = [48 + seed % 48 for seed in seeds]
    return generate_batch(
        model, ["Write."] * len(seeds), max_tokens=most, seeds=seeds, generation=config, speed="reference",
        constraint=constraint,
    )  # fmt: skip


class checkpoint:  # noqa: N801
    """A random model with a generated vocabulary, as a context manager that removes its folder."""

    def __init__(self, case: str) -> None:
        self._case, self._folder = case, tempfile.TemporaryDirectory()

    def __enter__(self) -> Model:
        folder = Path(self._folder.name)
        checkpoints.write(self._case, folder, [16], mx.float32)
        write_tokenizer(folder / "packed", checkpoints.CASES[self._case].vocab_size)
        return load(folder / "packed", cpu_dequantize="on")  # packed weights are slow on a CPU: a step would look cheap

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def cost(steps: int) -> bool:
    """Print the wall time of whole steps and of projections, and return whether the projection is cheap enough.

    The dynamic programming is measured in CPU time of its one thread, which depends less on other load.
    """
    share = 0.0
    with checkpoint("small-262k") as model:
        plain = median(step_times(model, None, steps))
        print(f"without: {1e3 * plain:.0f} ms a step, median of {steps}", flush=True)
        for name, schema in (("record", RECORD), ("typical", TYPICAL), ("lengths", LENGTHS)):
            constraint = Constraint.json_schema(schema)
            wall, one_thread = time.perf_counter, time.thread_time
            with timed(CanvasProjection, "__call__", wall) as times, timed(Projector, "__call__", one_thread) as cpu:
                whole = median(step_times(model, constraint, steps))
            first, rest = times[0], median(times[1:])
            spread = f"{1e3 * min(times[1:]):.0f} to {1e3 * max(times[1:]):.0f}, the first {1e3 * first:.0f}"
            print(f"{name}: {1e3 * whole:.0f} ms a step; projection {1e3 * rest:.0f} ms ({spread}), "
                  f"{rate(rest, plain):.1%} of a step; dynamic programming {1e3 * median(cpu):.0f} ms of CPU time",
                  flush=True)  # fmt: skip
            if name == "typical":
                share = rate(rest, plain)
    return share < 0.15


@contextmanager
def timed(owner: Any, name: str, clock: Callable[[], float]) -> Iterator[list[float]]:
    """Yield the seconds of each call of a function. Its arguments are evaluated before, as part of the step."""
    times: list[float] = []
    function = getattr(owner, name)

    def call(*arguments: Any) -> Any:
        mx.eval(*(argument for argument in arguments if isinstance(argument, (mx.array, CanvasSample))))
        began = clock()
        result = function(*arguments)
        times.append(clock() - began)
        return result

    setattr(owner, name, call)
    yield times
    setattr(owner, name, function)


def step_times(model: Model, constraint: Constraint | None, steps: int) -> Iterator[float]:
    """Yield the seconds of each step of a canvas except the first."""
    config = model.generation.override(max_denoising_steps=steps + 1)
    before = None
    for event in stream(model, "Write.", seed=1, generation=config, speed="reference", constraint=constraint):
        now = time.perf_counter()
        if not isinstance(event, Draft):
            return
        if before is not None:
            yield now - before
        before = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("json", "random", "cost", "patterns", "schemas", "outputs")
    parser.add_argument("what", choices=kinds, nargs="?", default="json")
    parser.add_argument("file", type=Path, nargs="?", help="JSONL of schemas and outputs")
    parser.add_argument("--count", type=int, default=300, help="number of schemas")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--speed", default="balanced")
    parser.add_argument("--outputs", type=int, default=200)
    parser.add_argument("--each", type=int, default=0, help="outputs of each case")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--vocabulary", type=Path, default=Path("runs/gemma4"))
    arguments = parser.parse_args()
    parts = {
        "json": lambda: extract_json(arguments.prompts, arguments.speed),
        "random": lambda: random_outputs(arguments.outputs, arguments.each),
        "cost": lambda: cost(arguments.steps),
        "patterns": lambda: patterns(arguments.vocabulary),
        "schemas": lambda: schema_costs(arguments.file, arguments.vocabulary, arguments.count),
        "outputs": lambda: schema_outputs(arguments.file, arguments.count, arguments.each or 3),
    }  # fmt: skip
    sys.exit(not parts[arguments.what]())


if __name__ == "__main__":
    main()
