"""``dgemma-mlx cluster``: several machines, before they are used."""

from __future__ import annotations

import atexit
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dgemma_mlx.cli.help import Command, Group
from dgemma_mlx.cli.machines import Hostfile, launch_of
from dgemma_mlx.cli.parameters import AsJson, ModelName
from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.errors import DgemmaError

if TYPE_CHECKING:
    from dgemma_mlx.distributed.channel import Channel
    from dgemma_mlx.distributed.launch import Launch
    from dgemma_mlx.distributed.start import Started

cluster = typer.Typer(cls=Group, subcommand_metavar="COMMAND [ARGS]...")


@cluster.callback()
def about() -> None:
    """Check several machines before they are used together.

    docs/several-macs.md tells how to set them up.

    Examples:
        dgemma-mlx cluster check --hostfile hosts.json
        dgemma-mlx cluster check --hostfile hosts.json --json
    """


@cluster.command("check", cls=Command)
def check(hostfile: Hostfile = None, model: ModelName = None, as_json: AsJson = False) -> None:
    """Reach every machine, measure the links, and say what fits where.

    Each machine has a line with its versions, chip, memory and speed, or with the reason why it cannot be used; then
    the exit code is 1. If all are there, the links are measured at the sizes of the model. A prediction follows: the
    memory on each machine, and a denoising step on all of them and on the fastest one alone. No weights are loaded.

    Examples:
        dgemma-mlx cluster check --hostfile hosts.json
        dgemma-mlx cluster check --hostfile hosts.json -m google/diffusiongemma-26B-A4B-it --json
    """
    from dgemma_convert.source import open_source
    from dgemma_mlx.checkpoint.hub import full_name
    from dgemma_mlx.cli.loading import fetch
    from dgemma_mlx.cli.machine_check import all_facts, fits, lead_links
    from dgemma_mlx.cli.settings import Settings

    chosen = Settings().pick("model", model)
    source = open_source(fetch(chosen, weights=False))
    launch, channel, started = _start(hostfile)
    facts: dict[str, Any] = {
        "model": source.checkpoint.name, "backend": launch.backend, "machines": [], "links": None, "fits": None,
        "problem": None,
    }  # fmt: skip

    def say(lines: list[str]) -> None:
        if not as_json:
            print(visible("\n".join(lines)), flush=True)

    def say_all() -> None:
        if as_json:
            print(json.dumps(facts), flush=True)

    with quiet_when_closed():
        facts["machines"] = all_facts(channel, launch, started, full_name(chosen))
        say(_machine_lines(facts["machines"]))
        if missing := [each for each in facts["machines"] if each["problem"] is not None]:
            facts["problem"] = f"{len(missing)} of {launch.size} machines cannot be used"
        else:
            try:
                facts["problem"] = "the links cannot be measured"  # until they are
                facts["links"] = lead_links(channel, launch, source, say_all)
                say(_link_lines(facts["links"], launch.backend))
                facts["fits"] = fits(source, facts["machines"], facts["links"]["step"])
                facts["problem"] = None
                say(_fit_lines(facts))
            except DgemmaError as error:
                facts["problem"] = error.message
        channel.close()
        say_all()
    if facts["problem"] is not None:
        say([facts["problem"]])
        raise typer.Exit(1)


def _start(hostfile: Path | None) -> tuple[Launch, Channel, dict[int, Started]]:
    """Start the machines of a hostfile, or take those that mlx.launch has started, and connect those that come.

    Raises ``DgemmaError`` for a hostfile that cannot be used, for a single machine, and when a port is taken.
    """
    from dgemma_mlx.distributed.channel import open_for_check
    from dgemma_mlx.distributed.start import end_started

    launch, started = launch_of(hostfile, keep_errors=True)
    if launch is None:
        raise DgemmaError("a check needs several machines", "Name them with --hostfile.", exit_code=2)
    channel = open_for_check(launch, lambda rank: rank in started and started[rank].has_ended)
    channel.last_acts.append(end_started)
    atexit.register(channel.close)
    return launch, channel, started


def _machine_lines(machines: list[dict[str, Any]]) -> list[str]:
    """Return a line for each machine."""
    from dgemma_mlx.sizes import size

    lines, own = [], machines[0]["checkpoint"]
    for each in machines:
        start = f"rank {each['rank']}  {each['name']}"
        if each["problem"] is not None:
            lines.append(f"{start}: {each['problem']}")
            continue
        speed = each["speed"]
        lines.append(
            f"{start}: dgemma-mlx {each['dgemma_mlx']}, MLX {each['mlx']}, Python {each['python']}, {each['os']}, "
            f"{each['chip']}, {size(each['memory'])} of memory, {size(each['memory_for_model'])} for a model, reads "
            f"{size(speed['bandwidth'])}/s, {speed['flops'] / 1e9:,.0f} GFLOP/s; {_checkpoint(each['checkpoint'], own)}"
        )
    return lines


def _checkpoint(theirs: str | None, own: str | None) -> str:
    """Return whether a machine has the model's weights, and the same as the first machine."""
    if theirs is None:
        return "the model's weights are not here"
    return "has the model" if own in (None, theirs) else "has another checkpoint under the model's name"


def _link_lines(links: dict[str, float], backend: str) -> list[str]:
    """Return the times of the links as lines."""
    from dgemma_mlx.sizes import size

    line = (
        f"links ({backend}): a small sum takes {1e3 * links['small_sum']:.2f} ms, a large one "
        f"{size(links['bandwidth'])}/s, and the sums of a denoising step {links['step']:.3f} s"
    )
    return [line]


def _fit_lines(facts: dict[str, Any]) -> list[str]:
    """Return what fits where, and the prediction."""
    from dgemma_mlx.sizes import size

    found, names = facts["fits"], [each["name"] for each in facts["machines"]]
    whole, expected, context = found["whole"], found["expected"], f"{found['context']:,} tokens of context"
    room = [name for name, is_there in zip(names, whole["fits"], strict=True) if is_there]
    where = f"fits {', '.join(room)}" if room else "fits none of the machines"
    lines = [
        f"{facts['model']}: {size(whole['bytes'])} of weights, an estimate of {size(whole['memory'])} with {context}",
        f"  whole on one machine: {where}",
    ]
    for rank, (part, name) in enumerate(zip(found["cut"], names, strict=True)):
        verdict = "fits" if part["fits"] else "does not fit"
        lines.append(
            f"  cut, rank {rank} {name}: {size(part['bytes'])} of weights, {size(part['memory'])} with {context}: "
            f"{verdict}"
        )
    lines.append(
        f"  prediction: a denoising step takes {expected['cut']:.3f} s on all machines ({expected['link']:.3f} s of it "
        f"on the links), and {expected['alone']:.3f} s on the fastest one alone{'' if room else ', if it fitted one'}"
    )
    return lines
