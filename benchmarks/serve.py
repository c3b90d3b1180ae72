"""Measure the server with the demo model: load, fairness, batches.

    python benchmarks/serve.py load [--seconds 30] [--clients 50] [--requests 100]
    python benchmarks/serve.py fairness [--repeats 5]
    python benchmarks/serve.py batches [--repeats 5]

``load`` puts clients on a server at once, every second one of which breaks off its requests at random moments, and then
sends further requests. Every answer must be the one that ``generate`` gives for the seed, and the memory of the server,
as Linux reports it in ``smaps_rollup``, must stay flat. It exits with 1 otherwise.

``fairness`` asks a short question while a long answer is written, and prints the seconds until each answer has ended:
alone, first come first served, and in turns. ``batches`` compares answers that take turns with answers in one batch.
"""

from __future__ import annotations

import argparse
import json
import sys

from measured.fairness import batches, fairness
from measured.load import load, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["load", "fairness", "batches"], default="load")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.what != "load":
        print(json.dumps({"fairness": fairness, "batches": batches}[options.what](options.repeats)))
        return
    sys.exit(0 if report(load(options.seconds, options.clients, options.requests)) else 1)


if __name__ == "__main__":
    main()
