"""Compare engines for JSON schemas: what they compile, whether they are sound, and how long they take.

    python -m venv PEERS && PEERS/bin/pip install llguidance outlines-core xgrammar numpy
    python benchmarks/schema_peers.py FILE --peer PEERS/bin/python [--engines dgemma-mlx,llguidance,...]
           [--seconds 20] [--gigabytes 4] [--rows ROWS.json]

FILE has schemas with instances that are valid or not: JSONSchemaBench (MaskBench) as JSON lines, objects with name,
group, schema and tests, or a bundle of the JSON-Schema-Test-Suite, a JSON list of objects with file and groups. Each
schema is compiled in a process of its own, within ``--seconds`` of CPU time and ``--gigabytes`` of memory. Then the
engine judges the instances, each in four spellings: ASCII or not, and with or without a space after "," and ":". An
instance is accepted when one spelling is.

All engines run with their default options. Those of the peers compile for a vocabulary of 256 bytes, so their times do
not include what a vocabulary of a model adds. ``--rows`` keeps the results: engines that are not named but have rows
in this file are in the tables, too. A schema is unsound when an invalid instance of it is accepted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

Matches = Callable[[str], bool]
Compile = Callable[[Any], Matches]
SPELLINGS = [(ascii_only, marks) for ascii_only in (False, True) for marks in ((", ", ": "), (",", ":"))]
PUZZLES = ("Handwritten", "Synthesized")  # the groups that are not from real sources
BYTES, END = [bytes([value]) for value in range(256)], 256  # the vocabulary of the peers, and its end-of-text token


class RefusedError(Exception):
    """An engine does not compile a schema, and says so."""


def dgemma_mlx() -> Compile:
    """Return the compiler of this project."""
    from dgemma_mlx import Constraint, DgemmaError

    def compile_schema(schema: Any) -> Matches:
        try:
            return Constraint.json_schema(schema).matches
        except DgemmaError as error:
            raise RefusedError(error) from error

    compile_schema({"properties": {"a": {"type": "string", "pattern": "^a"}}})  # imports what every schema needs
    return compile_schema


def llguidance() -> Compile:
    """Return the compiler of llguidance."""
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    class ByteTokenizer:
        eos_token_id, bos_token_id, tokens, special_token_ids = END, None, [*BYTES, b"<end>"], [END]

        def __call__(self, text: bytes) -> list[int]:
            return list(text)

    tokenizer = LLTokenizer(TokenizerWrapper(ByteTokenizer()))

    def compile_schema(schema: Any) -> Matches:
        try:
            matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)), log_level=0)
        except ValueError as error:
            raise RefusedError(error) from error
        if matcher.is_error():
            raise RefusedError(matcher.get_error())

        def matches(text: str) -> bool:
            tokens = list(text.encode())
            matcher.reset()
            return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

        return matches

    return compile_schema


def outlines_core() -> Compile:
    """Return the compiler of outlines-core: a regular expression, and its index over the vocabulary."""
    from outlines_core import Index, Vocabulary, json_schema

    vocabulary = Vocabulary(END, {token: [value] for value, token in enumerate(BYTES)})

    def compile_schema(schema: Any) -> Matches:
        try:
            index = Index(json_schema.build_regex_from_schema(json.dumps(schema)), vocabulary)
        except ValueError as error:
            raise RefusedError(error) from error

        def matches(text: str) -> bool:
            state = index.get_initial_state()
            for value in text.encode():
                if state is not None:
                    state = index.get_next_state(state, value)
            return state is not None and index.is_final_state(state)

        return matches

    return compile_schema


def xgrammar() -> Compile:
    """Return the compiler of xgrammar."""
    from xgrammar import GrammarCompiler, GrammarMatcher, TokenizerInfo

    vocabulary = TokenizerInfo([*BYTES, b"<end>"], stop_token_ids=[END])

    def compile_schema(schema: Any) -> Matches:
        try:
            compiler = GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)
            matcher = GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))
        except (RuntimeError, ValueError) as error:
            raise RefusedError(error) from error

        def matches(text: str) -> bool:
            matcher.reset()
            return matcher.accept_string(text) and matcher.is_completed()

        return matches

    return compile_schema


ENGINES: dict[str, Callable[[], Compile]] = {
    "dgemma-mlx": dgemma_mlx, "llguidance": llguidance, "outlines-core": outlines_core, "xgrammar": xgrammar
}  # fmt: skip


def read_items(file: Path) -> list[dict[str, Any]]:
    """Return objects with name, group, schema and tests: the lines of the file, or the groups of the bundle."""
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.open()]
    items = []
    for part in json.loads(file.read_text()):
        kind = "remote" if "refRemote" in part["file"] else "optional" if "/optional/" in part["file"] else "required"
        items += [{**group, "name": f"{part['file']}: {group['description']}", "group": kind}
                  for group in part["groups"]]  # fmt: skip
    return items


def accepts(matches: Matches, data: Any) -> bool:
    """Return whether one of the spellings of the data matches; a lone surrogate is text only where it is escaped."""
    texts = {json.dumps(data, ensure_ascii=ascii_only, separators=marks) for ascii_only, marks in SPELLINGS}
    return any(matches(text) for text in texts if text.encode(errors="replace").decode() == text)


def judge(compile_schema: Compile, item: dict[str, Any]) -> dict[str, Any]:
    """Compile a schema and return the status, the CPU time, and the verdicts as pairs of valid and accepted."""
    began = time.process_time()
    try:
        matches = compile_schema(item["schema"])
        cpu = time.process_time() - began
        verdicts = [(test["valid"], accepts(matches, test["data"])) for test in item["tests"]]
    except RefusedError as error:
        return {"status": "refused", "why": str(error)[:300]}
    except BaseException as error:  # a panic of Rust is no Exception
        return {"status": "crashed", "why": repr(error)[:300]}
    return {"status": "compiled", "cpu": cpu, "verdicts": verdicts}


def judge_and_send(compile_schema: Compile, item: dict[str, Any], seconds: int, size: int, sender: Connection) -> None:
    """Send the row of a schema, within the limits; runs in the process of the schema."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    signal.alarm(10 * seconds)  # ends an engine that waits for ever
    sender.send(judge(compile_schema, item))


def run(engine: str, file: Path, seconds: int, size: int) -> dict[str, Any]:
    """Return the engine's version and a row for each schema of the file."""
    compile_schema, rows, context = ENGINES[engine](), [], multiprocessing.get_context("fork")
    for item in read_items(file):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=judge_and_send, args=(compile_schema, item, seconds, size, sender))
        child.start()
        sender.close()
        try:
            row = receiver.recv()
            child.join()
        except EOFError:
            child.join()
            late = child.exitcode in (-signal.SIGXCPU, -signal.SIGALRM, -signal.SIGKILL)
            row = {"status": "timed out" if late else "crashed", "why": f"exit code {child.exitcode}"}
            print(f"{engine}: {item['name']}: {row['status']}, {row['why']}", file=sys.stderr)
        valid = sum(test["valid"] for test in item["tests"])
        rows.append({"name": item["name"], "group": item["group"], "valid": valid, **row})
    return {"version": importlib.metadata.version(engine), "rows": rows}


def unsound(row: dict[str, Any]) -> bool:
    """Return whether an invalid instance was accepted."""
    return any(accepted and not valid for valid, accepted in row.get("verdicts", ()))


def summary(name: str, rows: list[dict[str, Any]]) -> str:
    """Return one row of the table of engines, for some of the schemas."""
    done = [row for row in rows if row["status"] == "compiled"]
    verdicts = [verdict for row in done for verdict in row["verdicts"]]
    valid, wrong = [a for v, a in verdicts if v], [a for v, a in verdicts if not v]
    times = sorted(1000 * row["cpu"] for row in done) or [0.0]
    ninth = quantiles(times, n=10)[-1] if len(times) > 1 else times[0]
    counts = [sum(row["status"] == status for row in rows) for status in ("refused", "timed out", "crashed")]
    cells = [
        name, f"{len(done)} ({len(done) / len(rows):.1%})", *counts, sum(map(unsound, rows)),
        f"{sum(wrong)} of {len(wrong)}", f"{sum(valid)} of {len(valid)} ({sum(valid) / max(1, len(valid)):.1%})",
        f"{sum(valid) / max(1, sum(row['valid'] for row in rows)):.1%}",
        f"{median(times):.1f}", f"{ninth:.1f}", f"{times[-1]:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def tables(results: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table of the engines for all schemas and for each part, and one of the groups."""
    some = next(iter(results.values()))["rows"]
    groups = sorted({row["group"] for row in some})
    parts: dict[str, list[str]] = {"all": groups, **{group: [group] for group in groups}}
    if set(PUZZLES) <= set(groups):
        real = [group for group in groups if group not in PUZZLES]
        parts = {"all": groups, "real sources": real, " and ".join(PUZZLES): list(PUZZLES)}
    head = ["compiled", "refused", "timed out", "crashed", "unsound", "invalid accepted", "valid accepted",
            "of all valid", "CPU ms: median", "90th percentile", "largest"]  # fmt: skip
    lines = []
    for part, members in parts.items():
        count = sum(row["group"] in members for row in some)
        lines += [f"\n| {part}: {count} schemas | {' | '.join(head)} |", "| --- |" + " ---: |" * len(head)]
        lines += [
            summary(f"{engine} {found['version']}", [row for row in found["rows"] if row["group"] in members])
            for engine, found in results.items()
        ]
    lines += [f"\n| compiled | schemas | {' | '.join(results)} |", "| --- | ---: |" + " ---: |" * len(results)]
    for group in groups:
        own = [[row for row in found["rows"] if row["group"] == group] for found in results.values()]
        counts = [sum(row["status"] == "compiled" for row in rows) for rows in own]
        wrong = [sum(map(unsound, rows)) for rows in own]
        cells = [f"{count} ({bad} unsound)" if bad else str(count) for count, bad in zip(counts, wrong, strict=True)]
        lines.append(f"| {group} | {len(own[0])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, run each engine in the Python that has it, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="schemas with instances, .jsonl or .json")
    parser.add_argument("--peer", metavar="PYTHON", help="Python interpreter that has the other engines")
    parser.add_argument("--engines", type=lambda text: text.split(","), help="engines to run (default: all there are)")
    parser.add_argument("--seconds", type=int, default=20, help="CPU time for a schema")
    parser.add_argument("--gigabytes", type=float, default=4, help="memory for a schema")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="keep the results in this file, as JSON")
    parser.add_argument("--send", action="store_true", help=argparse.SUPPRESS)  # of one engine, as JSON
    arguments = parser.parse_args()
    if arguments.file is None:
        print("no file of schemas: nothing to compare")
        return
    if arguments.send:
        (engine,) = arguments.engines
        print(json.dumps(run(engine, arguments.file, arguments.seconds, int(arguments.gigabytes * 1e9))))
        return
    results = json.loads(arguments.rows.read_text()) if arguments.rows and arguments.rows.exists() else {}
    for engine in arguments.engines or (ENGINES if arguments.peer else ["dgemma-mlx"]):
        python = sys.executable if engine == "dgemma-mlx" else arguments.peer
        if python is None:
            sys.exit(f"{engine} needs --peer, a Python interpreter that has it")
        command = [python, __file__, str(arguments.file), "--send", "--engines", engine,
                   "--seconds", str(arguments.seconds), "--gigabytes", str(arguments.gigabytes)]  # fmt: skip
        results[engine] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        if arguments.rows:
            arguments.rows.write_text(json.dumps(results))
    print(tables({engine: results[engine] for engine in ENGINES if engine in results}))


if __name__ == "__main__":
    main()
