"""What machines tell each other in ``dgemma-mlx cluster check``. Nothing is printed here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dgemma_mlx.distributed.channel import MachineLostError, address_of, difference, own_hello
from dgemma_mlx.errors import DgemmaError

if TYPE_CHECKING:
    from dgemma_convert.source import Source
    from dgemma_mlx.distributed.channel import Channel, Message, Peer
    from dgemma_mlx.distributed.launch import Launch
    from dgemma_mlx.distributed.start import Started

_ANSWER = 15.0  # seconds that a machine has to say what it is
_MEASURE = 300.0  # seconds that the sums may take: about 0.6 GB over the slowest link


def own_facts(launch: Launch, model: str | None) -> Message:
    """Return what this machine says of itself, with sizes in bytes.

    ``checkpoint`` is the fingerprint of the model here, None where its weights are not here, and ``problem`` what
    keeps the machine from being used, or None. ``memory_for_model`` is the limit of the GPU or the free memory.
    """
    from dgemma_mlx.cli.doctor import examine
    from dgemma_mlx.distributed.links import measured_speed
    from dgemma_mlx.generation.load import LoadOptions
    from dgemma_mlx.generation.machines import check_port, working_dtype
    from dgemma_mlx.generation.memory import device_limit

    examined, problem = examine(), None
    try:
        check_port(launch)
    except DgemmaError as error:
        problem = error.message
    return {
        "name": own_hello()["name"],
        **{name: examined[name] for name in ("dgemma_mlx", "mlx", "python", "os", "chip", "memory")},
        "memory_for_model": device_limit(), "speed": asdict(measured_speed(working_dtype(LoadOptions()))),
        "checkpoint": _own_checkpoint(model), "problem": problem,
    }  # fmt: skip


def _own_checkpoint(model: str | None) -> str | None:
    """Return the fingerprint of a model, or None where its weights are not on this machine."""
    from dgemma_mlx.checkpoint.config import ModelConfig
    from dgemma_mlx.checkpoint.hub import resolve
    from dgemma_mlx.generation.identity import fingerprint

    try:
        checkpoint = resolve(model, weights=False)
        if not checkpoint.has_weights:
            return None
        return fingerprint(checkpoint.folder, ModelConfig.load(checkpoint.folder), None)
    except DgemmaError:
        return None


def all_facts(channel: Channel, launch: Launch, started: Mapping[int, Started], model: str | None) -> list[Message]:
    """Return the facts of every machine by rank; of one that is missing, its ``name`` and ``problem``."""
    mine = own_hello()
    for rank in channel.alive:
        try:
            channel.send({"work": "check", "model": model}, rank)
        except MachineLostError:  # its facts say so
            continue
    found = [own_facts(launch, model)]
    for rank in range(1, launch.size):
        peer = channel.peers.get(rank)
        found.append(_missing(launch, rank, started) if peer is None else _facts_of(channel, peer, mine))
    return [{"rank": rank, **each} for rank, each in enumerate(found)]


def _missing(launch: Launch, rank: int, started: Mapping[int, Started]) -> Message:
    """Return the facts of a machine that has not come."""
    if rank not in started:
        return {"name": address_of(launch, rank), "problem": "did not come"}
    process = started[rank]
    end = f"ended with exit code {process.process.returncode}" if process.has_ended else "did not come in time"
    return {"name": process.host, "problem": process.last_words() or end}


def _facts_of(channel: Channel, peer: Peer, mine: Message) -> Message:
    """Wait for the facts of a machine. Its versions are known even if it has ended because they differ."""
    facts = channel.next_message(peer.rank, _ANSWER)
    if facts is not None:
        return facts
    problem = difference(peer, mine) or peer.loss or f"did not answer within {_ANSWER:.0f} s"
    return {
        "name": peer.hello["name"], "dgemma_mlx": peer.hello.get("version"), "mlx": peer.hello.get("mlx"),
        "problem": problem,
    }  # fmt: skip


def answer_check(channel: Channel, launch: Launch, message: Message) -> Message:
    """Do what rank 0 asks of another machine in a check, and return what it asks next."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # a check downloads nothing
    channel.send(own_facts(launch, message["model"]))
    order = channel.receive()
    if "sums_of" not in order:
        return order
    measure_links(launch, order["sums_of"], order["canvas_length"])
    return channel.receive()


def lead_links(
    channel: Channel, launch: Launch, source: Source, last_act: Callable[[], None]
) -> dict[str, float]:
    """Measure the links between the machines. From here on the loss of a machine ends them all, after ``last_act``.

    Raises ``DgemmaError`` when MLX cannot connect the machines.
    """
    channel.ends_with = True
    channel.last_acts.insert(0, last_act)
    sizes, length = source.raw_config["text_config"], source.config.canvas_length
    channel.tell({"sums_of": sizes, "canvas_length": length})
    return measure_links(launch, sizes, length, channel)


def measure_links(
    launch: Launch, sizes: Mapping[str, Any], canvas_length: int, channel: Channel | None = None
) -> dict[str, float]:
    """Measure sums over the machines, on all of them at the same time. Returns seconds, and bytes a second.

    ``sizes`` is ``text_config`` of config.json. Rank 0 passes its channel, which ends all machines when they wait for
    each other for too long. Raises ``DgemmaError`` when MLX cannot connect the machines.
    """
    from contextlib import nullcontext

    from dgemma_mlx.checkpoint.config import TextConfig
    from dgemma_mlx.distributed.links import measured_link, measured_sums
    from dgemma_mlx.generation.load import LoadOptions
    from dgemma_mlx.generation.machines import collective_of, working_dtype

    config = TextConfig.from_dict(sizes)
    collective = collective_of(launch)
    with nullcontext() if channel is None else channel.within(_MEASURE):
        step = measured_link(collective, config, canvas_length, working_dtype(LoadOptions()))
        sums = measured_sums(collective)
    return {"step": step, "small_sum": sums.latency, "bandwidth": sums.bandwidth}


def fits(source: Source, machines: Sequence[Message], link: float) -> dict[str, Any]:
    """Return what the machines hold of a model, whole and cut, whether it fits, and what a step is expected to take.

    ``link`` are the seconds that the links take in a step. Raises ``DgemmaError`` when the model cannot be cut.
    """
    from dgemma_mlx.cli.ranks import cut_source, rank_facts, traffic_facts
    from dgemma_mlx.cli.verdict import judge, loaded_bytes
    from dgemma_mlx.distributed.links import Speed, expectation, step_flops

    context, needed = next(iter(judge(source, loaded_bytes(source)).memory.items()))
    limits = [machine["memory_for_model"] for machine in machines]
    parts = [rank_facts(source, own, [context]) for own in cut_source(source, limits)]
    held = [part["bytes"] for part in parts]
    weight_bytes = sum(weight.nbytes for weight in source.text.values())
    speeds = [Speed(**machine["speed"]) for machine in machines]
    flops = step_flops(source.config.text, source.config.canvas_length)
    expected = expectation(weight_bytes, flops, speeds, held, link)
    return {
        "context": context,
        "whole": {"bytes": weight_bytes, "memory": needed, "fits": [needed <= limit for limit in limits]},
        "cut": [
            {**part, "memory": (total := part["memory"][str(context)]["total"]), "fits": total <= limit}
            for part, limit in zip(parts, limits, strict=True)
        ],
        "traffic": traffic_facts(source.config),
        "expected": asdict(expected),
    }  # fmt: skip
