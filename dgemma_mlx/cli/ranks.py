"""What each of several machines holds of a model that is cut over them, from the headers of a checkpoint alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dgemma_mlx.sizes import size

if TYPE_CHECKING:
    from dgemma_convert.source import Source
    from dgemma_mlx.checkpoint.config import ModelConfig
    from dgemma_mlx.distributed.slices import Slice


def cut_source(source: Source, shares: Sequence[float]) -> list[Slice]:
    """Return the slices of a checkpoint for machines with these shares, as ``load_slice`` cuts it.

    Raises ``DgemmaError`` when there are more machines than parts.
    """
    from dgemma_mlx.distributed.slices import slices

    group_sizes = {weight.format.group_size for weight in source.text.values() if weight.format is not None}
    return slices(source.config.text, shares, math.lcm(*group_sizes) if group_sizes else 1)


def rank_facts(
    source: Source, own: Slice, contexts: Iterable[int], cpu_dequantize: str = "auto", batch_size: int = 1
) -> dict[str, Any]:
    """Return the facts about the machine that holds a slice, with sizes in bytes.

    ``bytes`` is the size of its part of the text network's weights in the files. ``memory`` is as in ``describe`` of
    ``info``, for the machine's own heads, inner values and ids: an estimate, and ``cache`` in it exact.
    """
    from dgemma_mlx.cli.verdict import loaded_weight
    from dgemma_mlx.distributed.slices import share_of
    from dgemma_mlx.generation.memory import Work, cache_memory, run_memory, should_dequantize

    text = source.config.text
    weights = [(weight, share_of(path, weight.shape, text, own)) for path, weight in source.text.items()]
    plain = sum(int(4 * weight.size * share) for weight, share in weights if weight.format is not None)
    unpacked = should_dequantize(plain, cpu_dequantize)
    loaded = sum(int(loaded_weight(weight, unpacked) * share) for weight, share in weights)
    config = _own_config(source.config, own)
    return {
        "heads": {
            kind: {"queries": len(heads.queries), "keys": len(heads.keys)} for kind, heads in own.heads.items()
        },
        "mlp": len(own.mlp),
        "experts": len(own.experts),
        "vocabulary": len(own.vocabulary),
        "bytes": sum(int(weight.nbytes * share) for weight, share in weights),
        "memory": {
            str(n): {
                "cache": batch_size * cache_memory(config, n),
                "total": run_memory(config, loaded, n, work=Work(batch_size)),
            }
            for n in contexts
        },
    }  # fmt: skip


def cut_facts(source: Source, ranks: int, contexts: Iterable[int], cpu_dequantize: str = "auto",
              batch_size: int = 1) -> dict[str, Any]:
    """Return what each of ``ranks`` machines with equal shares holds, and what a denoising step sends.

    Raises ``DgemmaError`` when there are more machines than parts.
    """
    all_slices, contexts = cut_source(source, [1.0] * ranks), list(contexts)
    return {
        "ranks": [rank_facts(source, own, contexts, cpu_dequantize, batch_size) for own in all_slices],
        "step": traffic_facts(source.config),
    }


def traffic_facts(config: ModelConfig) -> dict[str, int]:
    """Return how many collective operations a denoising step of one canvas takes, and the bytes put into them."""
    import mlx.core as mx

    from dgemma_mlx.distributed.links import step_traffic

    itemsize = 2 if mx.metal.is_available() else 4  # activations are bfloat16 on a GPU, and float32 otherwise
    traffic = step_traffic(config.text, config.canvas_length, itemsize)
    return {"messages": traffic.messages, "bytes": traffic.nbytes}


def cut_lines(facts: dict[str, Any]) -> list[str]:
    """Return what ``cut_facts`` says as lines of text."""
    ranks, step = facts["ranks"], facts["step"]
    lines = [f"cut over {len(ranks)} machines with equal shares:"]
    for rank, own in enumerate(ranks):
        lines.append(f"  rank {rank}: {size(own['bytes'])} of weights")
        lines += [f"    {line}" for line in _parts(own)]
        lines += [
            f"    {int(context):>7,} tokens of context  {size(memory['total']):>9} (cache {size(memory['cache'])})"
            for context, memory in own["memory"].items()
        ]
    lines.append(f"  a denoising step sums {size(step['bytes'])} over the machines, in {step['messages']} messages")
    return lines


def _parts(own: dict[str, Any]) -> list[str]:
    """Return what a rank holds, as lines."""
    heads = (
        f"{kind.partition('_')[0]} layers: {each['queries']} query and {each['keys']} key/value heads"
        for kind, each in own["heads"].items()
    )
    inner = f"{own['mlp']:,} inner values of the dense branch, {own['experts']:,} of each expert"
    return [*heads, f"{inner}, {own['vocabulary']:,} rows of the vocabulary"]


def _own_config(config: ModelConfig, own: Slice) -> ModelConfig:
    """Return the sizes of a slice, for estimates of the memory; of the query heads the most in any kind of layer."""
    from dgemma_mlx.checkpoint.config import FULL, SLIDING

    keys = {kind: len(heads.keys) for kind, heads in own.heads.items()}
    text = replace(
        config.text, intermediate_size=len(own.mlp), moe_intermediate_size=len(own.experts),
        vocab_size=len(own.vocabulary), num_attention_heads=max(len(heads.queries) for heads in own.heads.values()),
        num_key_value_heads=keys.get(SLIDING, config.text.num_key_value_heads),
        num_global_key_value_heads=keys.get(FULL, config.text.num_global_key_value_heads),
    )  # fmt: skip
    return replace(config, text=text)
