"""Several machines: what each holds of the published model, and what links add to a step. A prediction, not measured.

    python benchmarks/links.py

A step of a model that is cut over N machines makes a number of sums over the machines. The model of a sum:

* Ring (TCP): 2 (N - 1) hops one after another, and each machine sends 2 (N - 1) / N of the array over its link.
* JACCL (RDMA, a mesh with a cable between every two machines): one hop, and the whole array over every cable.
* seconds = messages x hops x latency of a hop + bytes x factor / bandwidth of the link in one direction

What is not in it: the additions and copies on the CPU, and the wait for the slowest machine. The bandwidths and
latencies of the links are assumptions; the table names where they come from. The step itself is the larger one of two
times, to read all weights and to multiply, with the bandwidth and the speed that are given for the chip. A real step
takes longer, so that its links weigh less and a cut gains more than the table says.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from memory_table import published  # first, because it asks for the estimates of a Mac

from dgemma_convert.plan import make_plan
from dgemma_convert.recipes import RECIPES
from dgemma_convert.source import Source
from dgemma_mlx.checkpoint.shards import StoredTensor
from dgemma_mlx.cli.ranks import cut_facts
from dgemma_mlx.distributed.links import Expectation, Speed, StepTraffic, expectation, step_flops, step_traffic

RANKS = (2, 3, 4)
CONTEXTS = (8192, 131_072)
ITEMSIZE = 2  # bytes of an activation in bfloat16
PLANNED = StepTraffic(63, 133_000_000)  # two sums a layer and three for self-conditioning, embedding and vocabulary


@dataclass(frozen=True)
class Link:
    """A kind of link between two machines.

    Attributes:
        bandwidth: Bytes a second in one direction that a program sees.
        latency: Seconds of a hop.
        source: Where both come from.
        is_mesh: Whether every two machines have a cable of their own, as JACCL uses them.
    """

    bandwidth: float
    latency: float
    source: str
    is_mesh: bool = False

    def seconds(self, traffic: StepTraffic, ranks: int) -> float:
        """Return the seconds that the link adds to a step."""
        hops, factor = (1, 1.0) if self.is_mesh else (2 * (ranks - 1), 2 * (ranks - 1) / ranks)
        return traffic.messages * hops * self.latency + traffic.nbytes * factor / self.bandwidth


LINKS = {
    "Thunderbolt 5, JACCL": Link(
        6e9, 30e-6, "public reports: 50 to 60 Gb/s, and 26 us a sum between two M4 Pro", is_mesh=True
    ),
    "Thunderbolt 5, ring": Link(4e9, 150e-6, "bandwidth assumed; 300 us an operation in public reports"),
    "Thunderbolt 4, ring": Link(2e9, 150e-6, "16 Gb/s between a Mac and a PC in a public report; latency as above"),
    "10 GbE, ring": Link(1.17e9, 200e-6, "94 % of the line rate; latency assumed"),
    "1 GbE, ring": Link(0.117e9, 250e-6, "94 % of the line rate; latency assumed"),
    "Wi-Fi, ring": Link(0.06e9, 3e-3, "assumed"),
}
# Bandwidth of the memory as Apple publishes it; Apple gives FLOPS for the M1 family only, the others are assumed.
MACS = {
    "M1 Max": (Speed(400e9, 10.4e12), "400 GB/s and 10.4 TFLOPS: Apple"),
    "M4 Pro": (Speed(273e9, 9e12), "273 GB/s: Apple; 9 TFLOPS: assumed"),
    "M4 Max": (Speed(546e9, 18e12), "546 GB/s: Apple; 18 TFLOPS: assumed"),
    "M3 Ultra": (Speed(819e9, 28e12), "819 GB/s: Apple; 28 TFLOPS: assumed"),
}
# Steps that others have reported for the 4-bit model; not measured here.
REPORTED = {"M3 Pro": 0.97, "M5 Max": 0.2}


def packed(source: Source, recipe: str) -> Source:
    """Return the checkpoint that a recipe would make of a source, as far as its headers go."""
    targets = {target.weight.name: target for target in make_plan(source, Path(recipe), RECIPES[recipe]).targets}
    text = {}
    for path, weight in source.text.items():
        target = targets[weight.name]
        stored = tuple(
            StoredTensor(source.folder, part.dtype, part.shape, 0, part.nbytes) for part in target.parts
        )
        text[path] = replace(weight, format=target.format, stored=stored)
    return replace(source, text=text)


def print_parts(source: Source) -> None:
    """Print what each rank holds, whatever the format."""
    print("| machines | rank | query and key/value heads, sliding | full | dense | expert | vocabulary | cache at",
          " | at ".join(f"{context:,} tokens" for context in CONTEXTS), "|")  # fmt: skip
    print("| --- " * (7 + len(CONTEXTS)) + "|")
    for ranks in RANKS:
        for rank, own in enumerate(cut_facts(source, ranks, CONTEXTS)["ranks"]):
            heads = [f"{each['queries']} and {each['keys']}" for each in own["heads"].values()]
            caches = [f"{memory['cache'] / 1e9:.2f} GB" for memory in own["memory"].values()]
            counts = [f"{own[name]:,}" for name in ("mlp", "experts", "vocabulary")]
            print("|", " | ".join([str(ranks), str(rank), *heads, *counts, *caches]), "|")


def print_weights(sources: dict[str, Source]) -> None:
    """Print the bytes of the weights of the text network, whole and on each rank."""
    print("\n| weights | on one machine |", *(f"on each of {ranks} |" for ranks in RANKS))
    print("| --- " * (2 + len(RANKS)) + "|")
    for name, source in sources.items():
        whole = sum(weight.nbytes for weight in source.text.values())
        cells = [f"{whole / 1e9:.2f} GB"]
        for ranks in RANKS:
            parts = cut_facts(source, ranks, [])["ranks"]
            cells.append(", ".join(f"{own['bytes'] / 1e9:.2f}" for own in parts) + " GB")
        print(f"| {name} |", " | ".join(cells), "|")


def print_links(traffic: StepTraffic) -> None:
    """Print the seconds that each link adds to a step."""
    print(f"\nA step makes {traffic.messages} sums of {traffic.nbytes / 1e6:.1f} MB in all. The plan was "
          f"{PLANNED.messages} of {PLANNED.nbytes / 1e6:.0f} MB; the statistics of the vocabulary take two small sums.")
    print("\n| link | bandwidth | latency of a hop | source |", *(f"{ranks} machines |" for ranks in RANKS))
    print("| --- " * (4 + len(RANKS)) + "|")
    for name, link in LINKS.items():
        seconds = [f"{link.seconds(traffic, ranks):.3f} s" for ranks in RANKS]
        print(f"| {name} | {link.bandwidth / 1e9:g} GB/s | {link.latency * 1e6:.0f} us | {link.source} |",
              " | ".join(seconds), "|")


def print_steps(source: Source, traffic: StepTraffic, ranks: int = 2) -> None:
    """Print what a step takes on one machine and on ``ranks`` equal ones, for each link."""
    weight_bytes = sum(weight.nbytes for weight in source.text.values())
    shares = [float(own["bytes"]) for own in cut_facts(source, ranks, [])["ranks"]]  # not equal: units of 64
    flops = step_flops(source.config.text, source.config.canvas_length)
    print(f"\n| {ranks} machines | given | a step on one |", *(f"{name} |" for name in LINKS))
    print("| --- " * (3 + len(LINKS)) + "|")
    for mac, (speed, given) in MACS.items():
        expected = [
            expectation(weight_bytes, flops, [speed] * ranks, shares, link.seconds(traffic, ranks))
            for link in LINKS.values()
        ]
        print_step(mac, given, expected)
    for mac, alone in REPORTED.items():
        links = [link.seconds(traffic, ranks) for link in LINKS.values()]
        part = alone * max(shares) / sum(shares)
        print_step(mac, "a step that others report", [Expectation(alone, part + link, link) for link in links])


def print_step(mac: str, given: str, expected: list[Expectation]) -> None:
    """Print a row of the table, with the steps in bold that are faster than on one machine."""
    cells = [f"**{each.cut:.3f} s**" if each.gains else f"{each.cut:.3f} s" for each in expected]
    print(f"| {mac} | {given} | {expected[0].alone:.3f} s |", " | ".join(cells), "|")


def main() -> None:
    """Print the tables in Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        plain = published(Path(folder))
        sources = {"4-bit (`q4`)": packed(plain, "q4"), "8-bit (`q8`)": packed(plain, "q8"), "bf16": plain}
        print_parts(plain)
        print_weights(sources)
        traffic = step_traffic(plain.config.text, plain.config.canvas_length, ITEMSIZE)
        print_links(traffic)
        print_steps(sources["4-bit (`q4`)"], traffic)


if __name__ == "__main__":
    main()
