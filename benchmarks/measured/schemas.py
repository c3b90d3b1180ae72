"""Real JSON schemas: what constraints of them cost, and whether the answers of a random model validate."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
from jsonschema.validators import validator_for
from measured import checkpoints
from measured.patterns import CANVAS, VOCABULARY_SIZE, peak

from dgemma_mlx import Constraint, DgemmaError, Model, generate_batch, load
from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.constrain.canvas import CANDIDATES
from dgemma_mlx.constrain.tokens import TokenMachine
from dgemma_mlx.json_text import read_json
from dgemma_mlx.text.tokenizer import Tokenizer, load_tokenizer

TOKENS, STEPS = 4000, 6
SHORT_CANVAS, MOST_TOKENS = 64, 192


def read_schemas(file: Path, count: int) -> list[dict[str, Any]]:
    """Return up to ``count`` of the schemas of a JSONL file, evenly spread: objects with name and schema."""
    items = [json.loads(line) for line in file.open()]
    return items[:: max(1, len(items) // count)]


def schema_costs(file: Path, vocabulary: Path, count: int) -> bool:
    """Print the CPU time and memory that constraints of schemas take, and return whether all keep to the limits.

    Each schema is compiled and projected in a process of its own. A canvas of 256 has 64 random candidates of 4,000
    tokens at each position.
    """
    tokenizer = load_tokenizer(vocabulary)
    Constraint.json_schema(True)  # imports the compiler, some 50 ms
    rows = []
    for item in read_schemas(file, count):
        ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=_send_cost, args=(item, tokenizer, theirs))
        child.start()
        theirs.close()
        try:
            rows.append({"name": item["name"], **ours.recv()})
        except EOFError:
            rows.append({"name": item["name"], "crash": f"exit {child.exitcode}"})
        child.join()
    done = [row for row in rows if "steps" in row]
    print(f"{len(rows)} schemas, {len(done)} compiled, {sum('refused' in row for row in rows)} refused")
    for name, unit in (("compile", "s"), ("prepare", "s"), ("megabytes", "MB")):
        _print_spread(name, [row[name] for row in done], unit)
    for exact, label in ((True, "all states"), (False, "a beam")):
        chosen = [row for row in done if row["exact"] is exact]
        if chosen:
            _print_spread(f"{label}: first projection", [row["steps"][0] for row in chosen], "s")
            _print_spread(f"{label}: median of the later ones", [median(row["steps"][1:]) for row in chosen], "s")
    for row in rows:
        if "crash" in row:
            print(row)
    return len(done) + sum("refused" in row for row in rows) == len(rows)


def _print_spread(label: str, values: list[float], unit: str) -> None:
    values = sorted(values)
    middle, most_of_them = values[len(values) // 2], values[9 * len(values) // 10]
    print(f"{label}: {len(values)}, median {middle:.3f} {unit}, 90 % {most_of_them:.3f}, most {values[-1]:.3f}")


def _send_cost(item: dict[str, Any], tokenizer: Tokenizer, pipe: Any) -> None:
    try:
        pipe.send(_cost(item["schema"], tokenizer))
    except DgemmaError as error:
        pipe.send({"refused": error.message})


def _cost(schema: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the CPU seconds of each part, and the memory that they take together at most."""
    before, times = peak(), [time.thread_time()]
    constraint = Constraint.json_schema(schema)
    times.append(time.thread_time())
    config = GenerationConfig(eos_token_ids=(1, 106), pad_token_id=0)
    machine = constraint.over(tokenizer, config, VOCABULARY_SIZE)
    room = machine.shortest(machine.start) + 4096
    machine.projector(machine.start, room)
    times.append(time.thread_time())
    rng, state = np.random.default_rng(0), machine.start
    tokens = rng.choice(VOCABULARY_SIZE, TOKENS, replace=False).astype(np.int32)
    while len(times) < 3 + STEPS:  # three steps a canvas
        projector = machine.projector(state, room)
        for _ in range(3):
            ids = tokens[rng.integers(0, TOKENS, (CANVAS, CANDIDATES))]
            skeleton_scores = 3 * rng.normal(size=(CANVAS, len(projector.skeleton)))
            scores, uniforms = 4 + 3 * rng.normal(size=ids.shape), rng.random(CANVAS)
            begin = time.thread_time()
            found = projector(skeleton_scores, ids, scores, uniforms)
            times.append(times[-1] + time.thread_time() - begin)
        after = machine.advance(state, found.argmax.tolist())
        assert after is not None
        state, room = (machine.start, room) if after is machine.ended else (after, room - CANVAS)
    compile_, prepare, *steps = np.diff(times).tolist()
    return {
        "compile": compile_, "prepare": prepare, "steps": steps, "exact": machine.is_exact,
        "megabytes": peak() - before,
    }  # fmt: skip


def schema_outputs(file: Path, count: int, outputs: int) -> bool:
    """Print how many answers of a random model under real schemas validate, and return whether all do.

    The canvases have 64 positions, and the answers up to three canvases, or more where the schema needs them.
    """
    total = right = refused = canvases = 0
    with random_model() as model:
        for item in read_schemas(file, count):
            try:
                constraint = Constraint.json_schema(item["schema"])
                machine: TokenMachine = constraint.over(
                    model.tokenizer, model.generation, model.config.text.vocab_size
                )
            except DgemmaError:
                refused += 1
                continue
            room = max(MOST_TOKENS, machine.shortest(machine.start) + SHORT_CANVAS)
            answers = generate_batch(
                model, ["Write."] * outputs, max_tokens=room, seeds=list(range(outputs)), speed="reference",
                generation=model.generation.override(max_denoising_steps=2), constraint=constraint,
            )  # fmt: skip
            for done in answers:
                total += 1
                canvases += done.statistics.canvases
                if problem := _problem(item["schema"], done.text):
                    print(f"{item['name']}: {problem}: {done.text[:200]!r}", flush=True)
                else:
                    right += 1
    print(f"{right} of {total} answers validate, of {canvases} canvases; {refused} schemas are refused")
    return right == total


def _problem(schema: Any, text: str) -> str:
    """Return what is wrong with an answer, or nothing."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return str(error)
    kind = validator_for(schema)
    errors = list(kind(schema, format_checker=kind.FORMAT_CHECKER).iter_errors(value))
    return errors[0].message[:200] if errors else ""


@contextmanager
def random_model() -> Iterator[Model]:
    """Yield a random model with the demo model's tokens and canvases of 64."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints.write("tiny", folder, [16], mx.float32)
        config = read_json(folder / "packed/config.json")
        config["canvas_length"] = SHORT_CANVAS
        (folder / "packed/config.json").write_text(json.dumps(config))
        yield load(folder / "packed", cpu_dequantize="on")
