"""Measure right answers and the work that they cost, of each speed mode and of --verify, on the demo model.

    python benchmarks/answers.py [--prompts 100] [--ways reference,balanced,fast,reference+flag,...] [--tasks ...]
           [--adapter FOLDER] [--model FOLDER] [--processes 2] [--output FILE] [--plots FOLDER]
    python benchmarks/answers.py --from FILE ... [--ways ...] [--tasks ...] [--plots FOLDER]

A way is a speed mode, optionally followed by ``+flag`` or ``+repair`` for ``--verify``. Every way answers the same
held-out prompts of every task with the same seeds. The task ``sudoku6``, 6x6 Sudoku, needs the adapter of
recipes/sudoku, ``--adapter``; it is not part of the sums over all tasks.

Work is the number of positions that pass through the layers: those of the canvas in every denoising step (a decoder
pass), and those of every encoder pass over a canvas, which commits it before the next one or which ``--verify`` makes.
The prompt's prefill is the same for all ways and is left out. Of the right answers, the table shows Wilson's interval
of their share and Newcombe's interval of the paired difference to the first way; of the work, a bootstrap interval over
prompts of the ratio to the first way. All are of 95 %.

``--output`` writes one record per answer, from which ``--from`` prints and draws everything again, without this
package's libraries. It takes several files, such as that of ``sampler_peers.py``. ``--plots`` draws the right answers
against the work, and the modes by task; it needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from measured.comparison import compare, doubts, table
from measured.records import Record, ask, in_processes, read, share, write

WAYS = "reference,balanced,fast,reference+flag,reference+repair"


def names(text: str) -> list[str]:
    """Return the names in a list with commas."""
    return text.split(",")


def parser_of(doc: str | None, ways: str) -> argparse.ArgumentParser:
    """Return the options that this script and ``sampler_peers.py`` share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20, help="prompts per task (default: 20)")
    parser.add_argument("--ways", type=names, metavar="LIST", help=f"ways to answer (default: {ways})")
    parser.add_argument("--tasks", type=names, metavar="LIST", help="tasks of the demo model (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the choice of prompts")
    parser.add_argument("--processes", type=int, default=1, help="processes that share the prompts")
    parser.add_argument("--share", metavar="I/N", help="answer the I-th of N parts, and print the records as JSON")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the records to this file, as JSON")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw plots into this folder")
    return parser


def show(records: Sequence[Record], arguments: argparse.Namespace) -> None:
    """Print the tables, and draw the plots that are asked for."""
    sums = compare(records)
    print(table(sums))
    if doubted := doubts(sums):
        print(f"\n{doubted}")
    if arguments.plots:
        from measured.plots import draw

        for path in draw(sums, arguments.plots):
            print(path, file=sys.stderr)


def run(script: str, arguments: argparse.Namespace, answered: Iterable[Record]) -> None:
    """Collect the records, in several processes of ``script`` when asked, and print, write and draw them.

    ``answered`` are the records of this process, which are computed only when they are read.
    """
    if arguments.share:
        print(json.dumps([asdict(record) for record in answered]))
        return
    records = in_processes(script, sys.argv[1:], arguments.processes) if arguments.processes > 1 else list(answered)
    order = {way: index for index, way in enumerate(arguments.ways)}
    places = {task: index for index, task in enumerate(arguments.tasks)}
    records.sort(key=lambda record: (places[record.task], order[record.way], record.number))
    if arguments.output:
        write(arguments.output, records, prompts=arguments.prompts, seed=arguments.seed)
    show(records, arguments)


def part(text: str | None) -> tuple[int, int]:
    """Return the part and the number of parts of ``--share``."""
    index, of = (text or "0/1").split("/")
    return int(index), int(of)


def kept(files: Sequence[Path], arguments: argparse.Namespace) -> list[Record]:
    """Return the records of files, of the ways and tasks that are asked for, ways in the order asked for.

    Where several files hold a way's answer to a question, the first one counts; others that differ are told on stderr.
    """
    first: dict[tuple[str, str, int], Record] = {}
    records = [record for file in files for record in read(file)]
    differing = sum(record != first.setdefault((record.way, record.task, record.number), record) for record in records)
    if differing:
        print(f"{differing} records of later files differ from those of earlier ones and are left out", file=sys.stderr)
    found = list(first.values())
    ways = arguments.ways or list(dict.fromkeys(record.way for record in found))
    found = [record for record in found if record.way in ways and record.task in (arguments.tasks or [record.task])]
    return sorted(found, key=lambda record: ways.index(record.way))


def answered(arguments: argparse.Namespace) -> Iterable[Record]:
    """Answer this process's questions in all ways."""
    from measured.own_ways import answerer
    from measured.questions import SUDOKU6, questions

    from dgemma_mlx import load

    asked = share(questions(arguments.tasks, arguments.prompts, arguments.seed), *part(arguments.share))
    for is_tuned in (False, True):
        own = [question for question in asked if (question.task == SUDOKU6) == is_tuned]
        if own:
            model = load(arguments.model, adapter=arguments.adapter if is_tuned else None)
            for way in arguments.ways:
                yield from ask(way, answerer(model, way), own)


def main() -> None:
    """Parse the command line, measure or read the records, and print the tables."""
    parser = parser_of(__doc__, WAYS)
    parser.add_argument("--model", default="demo", help="model or checkpoint folder")
    parser.add_argument("--adapter", metavar="FOLDER", help="adapter of recipes/sudoku, for the task sudoku6")
    parser.add_argument("--from", dest="files", type=Path, nargs="+", metavar="FILE", help="show these files' records")
    arguments = parser.parse_args()
    if arguments.files:
        show(kept(arguments.files, arguments), arguments)
        return
    from measured.own_ways import is_way
    from measured.questions import SUDOKU6, TASKS

    arguments.ways = arguments.ways or names(WAYS)
    arguments.tasks = arguments.tasks or [*TASKS, *([SUDOKU6] if arguments.adapter else [])]
    if unknown := [way for way in arguments.ways if not is_way(way)]:
        parser.error(f"not a speed mode, optionally with +flag or +repair: {', '.join(unknown)}")
    if unknown := [task for task in arguments.tasks if task not in (*TASKS, SUDOKU6)]:
        parser.error(f"not a task: {', '.join(unknown)}")
    if SUDOKU6 in arguments.tasks and not arguments.adapter:
        parser.error(f"{SUDOKU6} needs --adapter")
    run(__file__, arguments, answered(arguments))


if __name__ == "__main__":
    main()
