"""One model cut over several machines: what rank 0 and the others do from the first word to the last."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import asdict
from functools import cache

import mlx.core as mx

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.checkpoint.hub import resolve
from dgemma_mlx.checkpoint.shards import stored_tensors
from dgemma_mlx.distributed.channel import Channel, Message
from dgemma_mlx.distributed.collective import Collective, ending_after
from dgemma_mlx.distributed.follow import Follower
from dgemma_mlx.distributed.launch import OTHER_PORTS, Launch
from dgemma_mlx.distributed.lead import Leader, LeadingNetwork
from dgemma_mlx.distributed.links import Expectation, Speed, expectation, measured_link, measured_speed, step_flops
from dgemma_mlx.distributed.network import CutNetwork
from dgemma_mlx.distributed.slices import slices
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.identity import fingerprint, require_same
from dgemma_mlx.generation.load import LoadOptions, load_cut
from dgemma_mlx.generation.memory import device_limit
from dgemma_mlx.generation.model import Model
from dgemma_mlx.generation.wired import wired_memory
from dgemma_mlx.kernels.dispatch import mode, set_mode

_CONNECT = 8.0  # seconds that MLX may take to connect the machines: it stops the heartbeat, so less than SILENCE
_MEASURE = 60.0  # seconds that measuring the links may take: Wi-Fi needs some


def lead(
    channel: Channel, launch: Launch, options: LoadOptions, say: Callable[[Expectation], None], anyway: bool = False
) -> Model:
    """Cut a model over the machines, and return it as rank 0 has it: the engine uses it as any other.

    The machines take shares in proportion to their memory. Before anything is loaded, they must have the same
    checkpoint and adapter, and the links are measured; ``say`` is told what a step is expected to take. From here on
    the loss of a machine ends all of them.

    Raises ``DgemmaError`` when the machines differ, when the model cannot be cut, and, unless ``anyway``, when one
    machine that has the memory for the whole model would be faster.
    """
    channel.ends_with, leader = True, Leader(channel)
    channel.tell({"work": "cut", "options": options.as_message(), "kernels": mode()})
    checkpoint = _Checkpoint(options)
    own = checkpoint.facts(launch)
    facts = [own, *(channel.receive(rank) for rank in channel.peers)]
    for peer, other in zip(channel.peers.values(), facts[1:], strict=True):
        require_same(channel, peer, other["fingerprint"], own["fingerprint"])
        if other["dtype"] != own["dtype"]:  # a sum of different sizes would never end
            channel.fail(f"{peer} computes in {other['dtype']}, and {socket.gethostname()} in {own['dtype']}")
    shares = [float(each["memory"]) for each in facts]
    channel.tell({"shares": shares})
    collective = collective_of(launch)
    with channel.within(_MEASURE):
        expected = checkpoint.expectation(collective, facts, shares)
    fits_one = max(shares) > own["bytes"]
    if not (expected.gains or anyway) and fits_one:
        line = (
            f"a step is expected to take {expected.cut:.3f} s on {channel.size} machines ({expected.link:.3f} s of it "
            f"on their links), and {expected.alone:.3f} s on one"
        )
        raise DgemmaError(line, "Use one machine, a faster link, or --anyway.")
    say(expected)
    channel.tell({"load": True})
    model = load_cut(options, shares, lambda config, all_slices: LeadingNetwork(config, all_slices, collective, leader))
    for rank in channel.peers:
        channel.receive(rank)
    return model


def follow(channel: Channel, launch: Launch, message: Message) -> Message:
    """Do what rank 0 asks of another machine: take a slice of a model, and follow its calls. Return what it asks next.

    ``message`` is what rank 0 asks for. Raises ``DgemmaError`` as ``lead`` does, and ``MachineLostError`` at the end.
    """
    options = LoadOptions.from_message(message["options"])
    set_mode(message["kernels"])
    checkpoint = _Checkpoint(options)
    channel.send(checkpoint.facts(launch))
    shares = channel.receive()["shares"]
    collective = collective_of(launch)
    checkpoint.link(collective)
    channel.receive()
    model = load_cut(options, shares, lambda config, all_slices: CutNetwork(config, all_slices, collective))
    channel.send({"loaded": True})
    assert isinstance(model.network, CutNetwork)
    with wired_memory():
        return Follower(model.network, channel).follow()


class _Checkpoint:
    """A model that will be cut, as this machine finds it."""

    def __init__(self, options: LoadOptions) -> None:
        self._folder, self._adapter = resolve(options.model).folder, options.adapter
        self._config, self._dtype = ModelConfig.load(self._folder), working_dtype(options)

    def facts(self, launch: Launch) -> Message:
        """Return what the machines compare, and what decides about their shares. Raises ``DgemmaError``."""
        if not collective_of.cache_info().currsize:  # otherwise this machine itself has the port
            check_port(launch)
        return {
            "fingerprint": fingerprint(self._folder, self._config, self._adapter), "memory": device_limit(),
            "bytes": sum(stored.nbytes for stored in stored_tensors(self._folder).values()),
            "speed": asdict(measured_speed(self._dtype)), "dtype": str(self._dtype).removeprefix("mlx.core."),
        }  # fmt: skip

    def link(self, collective: Collective) -> float:
        """Return the seconds that the links take in a step. All machines measure at the same time."""
        return measured_link(collective, self._config.text, self._config.canvas_length, self._dtype)

    def expectation(self, collective: Collective, facts: list[Message], shares: list[float]) -> Expectation:
        """Return what a step is expected to take. A machine's part is that of the experts, most of the weights."""
        text, packing = self._config.text, self._config.quantization or {}
        speeds = [Speed(**each["speed"]) for each in facts]
        parts = [len(own.experts) for own in slices(text, shares, packing.get("group_size", 1))]
        flops = step_flops(text, self._config.canvas_length)
        return expectation(facts[0]["bytes"], flops, speeds, parts, self.link(collective))


def working_dtype(options: LoadOptions) -> mx.Dtype:
    """Return the dtype of activations, for measurements."""
    if options.chosen_dtype is not None:
        return options.chosen_dtype
    return mx.bfloat16 if mx.metal.is_available() else mx.float32


@cache
def collective_of(launch: Launch) -> Collective:
    """Connect the machines for collective operations, once. Raises ``DgemmaError``; see also ``ending_after``."""
    line = f"{socket.gethostname()} (rank {launch.rank}) and its neighbours did not connect within {_CONNECT:.0f} s"
    try:
        with ending_after(_CONNECT, line):
            return Collective(mx.distributed.init(strict=True, backend=launch.backend))
    except RuntimeError as error:
        raise DgemmaError(f"MLX cannot connect the machines: {error}", OTHER_PORTS) from None


def check_port(launch: Launch) -> None:
    """Raise ``DgemmaError`` when this machine's port is taken, on which MLX would wait for long."""
    if launch.backend != "ring":
        return
    host, port = launch.addresses[launch.rank]
    with socket.socket() as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            attempt.bind((host, port))
        except OSError as error:
            raise DgemmaError(f"cannot listen on {host}:{port}: {error.strerror}", OTHER_PORTS) from None
