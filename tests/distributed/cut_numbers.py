"""A program that each of several processes runs: a cut model beside the whole one, on rank 0, in numbers.

    python -m tests.distributed.cut_numbers FOLDER SHARES [ADAPTER]

Rank 0 prints a JSON object: for each thing that is compared, the largest absolute difference (0 or 1 for what must be
equal), and the messages and bytes of a step beside those that are expected.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from dgemma_mlx.diffusion.edits import Pins
from dgemma_mlx.diffusion.stopping import gap
from dgemma_mlx.distributed.channel import MachineLostError, open_channel
from dgemma_mlx.distributed.collective import Collective
from dgemma_mlx.distributed.follow import Follower
from dgemma_mlx.distributed.launch import launched
from dgemma_mlx.distributed.lead import Leader, LeadingNetwork
from dgemma_mlx.distributed.links import step_traffic
from dgemma_mlx.distributed.network import CutNetwork
from dgemma_mlx.generation.load import LoadOptions, load, load_cut
from dgemma_mlx.kernels import LogitBias
from dgemma_mlx.model.soft_tokens import SoftTokens
from dgemma_mlx.model.text import DiffusionGemma

C, B = 16, 2
Numbers = dict[str, mx.array]


def prefixes(network: DiffusionGemma) -> Numbers:
    """Hidden states after everything that a cache can do: padding, snapshots, forks and rows."""
    ids = mx.array(np.random.default_rng(0).integers(0, network.config.vocab_size, (B, 40)))
    cache = network.new_cache(mx.array([0, 3], mx.int32))
    cache.reserve(30)
    network.extend(ids[:, :9], cache)
    before = cache.snapshot()
    first = network.encode(ids[:, 9:20], cache)
    cache.restore(before)
    again = network.encode(ids[:, 20:31], cache)
    fork = cache.fork(before, 30)
    forked = network.encode(ids[:, 31:], fork)
    rows = cache.rows([1, 1])
    chosen = network.encode(ids[:, :5], rows)
    logits = network.project(again[:, 2:])
    features = mx.random.normal((6, network.config.hidden_size), key=mx.random.key(5))
    place = mx.array([[-1, 0, 1, 2, -1, -1], [3, 4, 5, -1, -1, -1]], mx.int32)
    soft = SoftTokens(features, place, mx.where(place >= 0, 0, -1))
    pictures = network.encode(ids[:, :6], network.new_cache(), soft=soft)
    return {"first": first, "again": again, "fork": forked, "rows": chosen, "logits": logits, "pictures": pictures}


def steps(network: DiffusionGemma) -> Numbers:
    """Logits and samples of denoising steps, with barred ids and pins."""
    rng, V = np.random.default_rng(1), network.config.vocab_size
    ids = mx.array(rng.integers(0, V, (B, 12 + C)))
    cache = network.new_cache()
    network.extend(ids[:, :12], cache)
    numbers: Numbers = {}
    table = mx.where(mx.arange(V) % 5 == 0, -mx.inf, 0.0)
    barred = LogitBias(mx.stack([mx.zeros(V), table]), mx.array([[0] * C, [1] * C], mx.int32))
    pins = Pins(ids[:, 12:], mx.arange(C)[None] % 4 > mx.array([[0], [1]]))
    canvas, signal = ids[:, 12:], network.conditioning_signal(None, (B, C))
    for number, (T, bias, pinned) in enumerate(((0.8, None, None), (0.6, barred, None), (0.4, None, pins))):
        raw = network.step(canvas, signal, cache)
        sample = network.sample(raw, mx.array(rng.random((B, C)), mx.float32), T, bias)
        sample = sample if pinned is None else pinned.certain(sample)
        numbers |= {f"logits {number}": network.whole(raw), f"entropy {number}": sample.entropy,
                    f"argmax {number}": sample.argmax, f"sample {number}": sample.sample}
        if pinned is None and isinstance(network, CutNetwork):
            probable = mx.topk(mx.softmax(network.processed(network.whole(raw), T, bias), axis=-1), 2)
            numbers[f"gap {number}"] = gap(sample) - mx.abs(probable[..., 1] - probable[..., 0])
        signal = network.next_signal(raw, sample, T, bias)
        canvas = sample.sample
    numbers["last"] = network.whole(network.step(canvas, signal, cache))
    return {name: mx.where(mx.isinf(each), -99, each.astype(mx.float32)) for name, each in numbers.items()}


def traffic(network: LeadingNetwork, collective: Collective) -> dict[str, list[int]]:
    """The messages and bytes of one step in the middle of a canvas, and those that are expected."""
    cache = network.new_cache()
    network.extend(mx.array([[2, 3, 4]]), cache)
    uniforms, signal = mx.zeros((1, C)), network.conditioning_signal(None, (1, C))
    for _ in range(2):
        before = collective.messages, collective.nbytes
        raw = network.step(mx.zeros((1, C), mx.int32), signal, cache)
        signal = network.next_signal(raw, network.sample(raw, uniforms, 1.0), 1.0)
    expected = step_traffic(network.config, C, network.dtype.size)
    return {"traffic": [collective.messages - before[0], collective.nbytes - before[1]],
            "expected traffic": [expected.messages, expected.nbytes]}  # fmt: skip


def main() -> None:
    folder, shares = sys.argv[1], json.loads(sys.argv[2])
    options = LoadOptions(folder, cpu_dequantize="off", adapter=Path(sys.argv[3]) if len(sys.argv) > 3 else None)
    launch = launched()
    assert launch is not None
    channel = open_channel(launch)
    channel.ends_with = True
    collective = Collective(mx.distributed.init(strict=True, backend="ring"))
    if launch.rank:
        follower = load_cut(options, shares, lambda config, cuts: CutNetwork(config, cuts, collective)).network
        assert isinstance(follower, CutNetwork)
        try:
            Follower(follower, channel).follow()
        except MachineLostError:
            return
    leader = Leader(channel)
    cut = load_cut(options, shares, lambda config, cuts: LeadingNetwork(config, cuts, collective, leader)).network
    whole = load(folder, cpu_dequantize="off", adapter=options.adapter).network
    results: dict[str, Any] = {}
    parts: tuple[Callable[[DiffusionGemma], Numbers], ...] = (prefixes, steps)
    for part in parts:
        expected, actual = part(whole), part(cut)
        results |= {name: float(mx.abs(expected.get(name, 0) - actual[name]).max()) for name in actual}
    assert isinstance(cut, LeadingNetwork)
    print(json.dumps(results | traffic(cut, collective)))
    channel.close()


if __name__ == "__main__":
    main()
