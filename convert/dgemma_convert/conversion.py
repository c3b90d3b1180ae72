"""The whole conversion: source, plan, shards, files, comparison, and one rename at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma_convert import mixed
from dgemma_convert.card import write_report, write_small_files
from dgemma_convert.formats import Format
from dgemma_convert.plan import MANIFEST, SHARD_BYTES, Plan, make_plan
from dgemma_convert.recipes import DEFAULT, MIXED, RECIPES, Recipe
from dgemma_convert.source import Source, open_source
from dgemma_convert.verify import Verification, verify
from dgemma_convert.walk import make_samples
from dgemma_convert.writer import begin, locked, sync_folder, write_index, write_shards
from dgemma_mlx.checkpoint.hub import Checkpoint, resolve
from dgemma_mlx.errors import DgemmaError

GROUP_SIZES = (32, 64, 128)

Progress = Callable[[str, int, int], None]
"""Called with a stage ("convert", "verify", "measure", "calibrate"), what is done of it, and all of it."""


@dataclass(frozen=True)
class Report:
    """What a conversion has written. ``data`` is the content of ``conversion_report.json``."""

    output: Path
    plan: Plan
    verification: Verification | None
    data: dict[str, Any]


def _silent(stage: str, done: int, total: int) -> None:
    pass


def convert(
    source: str, output: str | Path | None = None, recipe: str = DEFAULT, *, group_size: int | None = None,
    target_bytes: int | None = None, target_bpw: float | None = None, calibration: Path | None = None,
    resume: bool = False, force: bool = False, check: bool = False, progress: Progress = _silent,
) -> Report:
    """Converts a checkpoint (a folder, or a Hub id with ``@revision``) into a new folder.

    Args:
        source: the checkpoint, bf16 or already converted.
        output: the folder to write; ``<source name>-<recipe>`` beside the source by default.
        recipe: a name of ``RECIPES``.
        group_size: 32, 64 or 128, for affine formats.
        target_bytes, target_bpw: for the recipe "mixed", one of them: size of all weights, or bits per weight.
        calibration: for "mixed": a file of texts, one a line, to measure errors with.
        resume: go on with an interrupted conversion.
        force: replace an existing output or an interrupted conversion.
        check: compare the output with the source (``Verification``).
    Raises:
        DgemmaError: for bad input, before anything is written; for damaged weights, with nothing left behind.
    """
    plan = prepare(
        source, output, recipe, group_size=group_size, target_bytes=target_bytes, target_bpw=target_bpw,
        calibration=calibration, progress=progress,
    )
    return carry_out(plan, resume=resume, force=force, check=check, progress=progress)


def prepare(
    source: str, output: str | Path | None = None, recipe: str = DEFAULT, *, group_size: int | None = None,
    target_bytes: int | None = None, target_bpw: float | None = None, calibration: Path | None = None,
    progress: Progress = _silent, shard_bytes: int = SHARD_BYTES, download: bool = True,
) -> Plan:
    """Opens and checks the source and works out the plan; nothing is written.

    Without ``download`` the weights may stay on the Hub: such a plan can be looked at, not carried out. (The recipe
    "mixed" has to read them.)
    """
    chosen = _recipe(recipe, group_size)
    if (recipe == MIXED) != (target_bytes is not None or target_bpw is not None):
        raise DgemmaError(
            f"--target-size or --target-bpw and the recipe {MIXED} belong together",
            f"Give one of the two with --recipe {MIXED}, and none without.", exit_code=2,
        )
    if target_bytes is not None and target_bpw is not None:
        raise DgemmaError("the target is given twice", "Give one of the two.", exit_code=2)
    if target_bpw is not None and not 0 < target_bpw <= 16:
        raise DgemmaError(f"the target cannot be {target_bpw} bits per weight", "Give one like 4.5.", exit_code=2)
    if calibration is not None and recipe != MIXED:
        raise DgemmaError(f"--calibration is for --recipe {MIXED}", "Leave it out.", exit_code=2)
    checkpoint = resolve(source, weights=download or recipe == MIXED)
    folder = Path(output).expanduser() if output else _beside(checkpoint, recipe)
    opened = open_source(checkpoint)
    if recipe != MIXED:
        return make_plan(opened, folder, chosen, shard_bytes=shard_bytes)
    formats, table = _mix(opened, group_size or 64, target_bytes, target_bpw, calibration, progress)
    return make_plan(opened, folder, chosen, shard_bytes=shard_bytes, formats=formats, mixed=table)


def carry_out(plan: Plan, *, resume: bool = False, force: bool = False, check: bool = False,
              progress: Progress = _silent) -> Report:
    """Writes what the plan says."""
    _check_output(plan, force)
    plan.check_room()
    if check:
        make_samples(plan.source.folder, plan.source.config)  # a source without tokenizer fails now, not at the end
    made = [parent for parent in plan.output.absolute().parents if not parent.exists()]
    try:
        plan.partial.mkdir(parents=True, exist_ok=True)
        with locked(plan.partial):
            begin(plan, resume, force)
            return _write(plan, check, progress)
    except DgemmaError:
        if not plan.partial.exists():
            for parent in made:
                parent.rmdir()
        raise
    except OSError as error:
        raise DgemmaError(f"writing {plan.output} failed: {error}", "Mend that, then go on with --resume.") from error


def _write(plan: Plan, check: bool, progress: Progress) -> Report:
    """Shards, files, comparison; then the output gets its name."""
    done, total = 0, plan.bytes_in

    def converted(count: int) -> None:
        nonlocal done
        done += count
        progress("convert", done, total)

    try:
        shards = write_shards(plan, converted)
        write_index(plan)
        write_small_files(plan)
        verification = None
        if check:
            verification = verify(plan.source.folder, plan.partial, lambda done, total: progress("verify", done, total))
        data = write_report(plan, shards, verification)
    except DgemmaError:
        shutil.rmtree(plan.partial)  # the source is at fault: there is nothing to go on with
        raise
    (plan.partial / MANIFEST).unlink()
    _publish(plan)
    return Report(plan.output, plan, verification, data)


def _recipe(name: str, group_size: int | None) -> Recipe:
    if name not in RECIPES:
        raise DgemmaError(f"there is no recipe {name!r}", f"Recipes: {', '.join(RECIPES)}.", exit_code=2)
    recipe = RECIPES[name]
    if group_size is None:
        return recipe
    if group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise DgemmaError(f"the group size cannot be {group_size}", f"Group sizes: {sizes}.", exit_code=2)
    if name != MIXED and not any(rule.format.mode == "affine" for rule in recipe.rules):
        raise DgemmaError(f"the recipe {name} has no group size to choose", "Leave --group-size out.", exit_code=2)
    return recipe.with_group_size(group_size)


def _beside(checkpoint: Checkpoint, recipe: str) -> Path:
    """``<source name>-<recipe>``: beside a folder, here for the demo and what lies in the Hub's cache."""
    if checkpoint.is_demo or checkpoint.repo_id:
        name = (checkpoint.repo_id or checkpoint.name).rpartition("/")[2]
        return Path(f"{name}-{recipe}")
    folder = checkpoint.folder.resolve()
    return folder.with_name(f"{folder.name}-{recipe}")


def _mix(
    source: Source, group_size: int, target_bytes: int | None, target_bpw: float | None, calibration: Path | None,
    progress: Progress,
) -> tuple[dict[str, Format], dict[str, Any]]:
    """Formats by parameter path, and the table they come from."""
    moments: mixed.Moments = {}
    if calibration is not None:
        texts = mixed.read_calibration(calibration)
        moments = mixed.calibrate(source, texts, lambda done, total: progress("calibrate", done, total))
    groups = mixed.measure(source, group_size, moments, lambda done, total: progress("measure", done, total))
    packed = {path for group in groups for path in group.paths}
    kept = [weight for path, weight in source.text.items() if path not in packed] + source.vision
    values = sum(weight.size for weight in (*source.text.values(), *source.vision))
    budget = target_bytes if target_bytes is not None else round((target_bpw or 0) * values / 8)
    bits = mixed.solve(groups, budget - sum(2 * weight.size for weight in kept), by_size=calibration is None)
    formats = {path: Format(bits[group.name], group_size) for group in groups for path in group.paths}
    table = {group.name: {"bits": bits[group.name], **group.as_dict()} for group in groups}
    return formats, {"budget_bytes": budget, "calibrated": calibration is not None, "groups": table}


def _check_output(plan: Plan, force: bool) -> None:
    """The output may be new; with ``force`` an old checkpoint, but never the source or another folder of the user's."""
    output, source = plan.output.resolve(), plan.source.folder.resolve()
    elsewhere = "Name another folder with -o."
    if output == source or output in source.parents or source in output.parents:
        raise DgemmaError(f"the output {plan.output} is, holds or lies in the source", elsewhere, exit_code=2)
    if not plan.output.exists():
        return
    if not force:
        raise DgemmaError(f"{plan.output} exists", "Replace it with --force, or name another folder with -o.")
    replaceable = plan.output.is_dir() and ((plan.output / "config.json").exists() or not any(plan.output.iterdir()))
    if not replaceable:
        raise DgemmaError(f"{plan.output} is no checkpoint; it is left as it is", elsewhere)


def _publish(plan: Plan) -> None:
    """One rename; an old output stands aside until it is done."""
    sync_folder(plan.partial)
    old = plan.output.with_name(f".{plan.output.name}.old")
    if plan.output.exists():
        shutil.rmtree(old, ignore_errors=True)
        plan.output.rename(old)
    plan.partial.rename(plan.output)
    sync_folder(plan.output.parent)
    shutil.rmtree(old, ignore_errors=True)
