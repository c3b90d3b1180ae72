"""A conversion from start to end: source, plan, weight files, small files, comparison, and one rename at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma_convert import mixed
from dgemma_convert.card import write_report, write_small_files
from dgemma_convert.formats import Format
from dgemma_convert.plan import MANIFEST, SHARD_BYTES, MixedFormats, Plan, make_plan, vision_targets
from dgemma_convert.recipes import DEFAULT, MIXED, RECIPES, Recipe
from dgemma_convert.source import Source, open_source
from dgemma_convert.verify import Verification, verify
from dgemma_convert.walk import make_samples
from dgemma_convert.writer import open_partial_folder, write_index, write_shards
from dgemma_mlx.checkpoint.hub import Checkpoint, resolve
from dgemma_mlx.checkpoint.output import check_output, output_folder
from dgemma_mlx.checks import reason, shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import locked_folder, replace_folder

GROUP_SIZES = (32, 64, 128)
_VISION = Format(8, 64)  # of the vision tower's matrices with ``vision_bits``

# Called with a stage ("convert", "verify", "measure" or "calibrate"), the amount of it that is done, and its total:
# bytes of the source for "convert", layers for "verify" and "calibrate", groups of tensors for "measure".
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Report:
    """The result of a conversion.

    Attributes:
        output: The folder that was written.
        plan: The plan that was carried out.
        verification: The comparison with the source, or None if it was not requested.
        data: The content of ``conversion_report.json``.
    """

    output: Path
    plan: Plan
    verification: Verification | None
    data: dict[str, Any]


def _silent(stage: str, done: int, total: int) -> None:
    """Ignore progress."""


def convert(
    source: str, output: str | Path | None = None, recipe: str = DEFAULT, *, group_size: int | None = None,
    target_bytes: int | None = None, target_bpw: float | None = None, calibration: Path | None = None,
    vision_bits: int | None = None, resume: bool = False, force: bool = False, check: bool = False,
    progress: Progress = _silent,
) -> Report:
    """Convert a checkpoint into a new folder.

    Args:
        source: The checkpoint: a folder, a Hub id ``owner/name[@revision]``, or ``demo``. It may be packed already.
        output: The folder to write. None takes ``<source name>-<recipe>`` next to the source, or in the current folder
            if the source comes from the Hub.
        recipe: A name in ``RECIPES``.
        group_size: Number of values that share a scale in affine formats: 32, 64 or 128. None takes the recipe's.
        target_bytes: Size of all weights in bytes. For the recipe "mixed", which needs this or ``target_bpw``.
        target_bpw: Bits per weight, above 0 and at most 16. For the recipe "mixed".
        calibration: A UTF-8 file with one text on each line. The recipe "mixed" weights errors by the activations that
            these texts cause.
        vision_bits: 8 packs the matrices of the vision tower in 8 bits. None keeps the tower as it is.
        resume: Continue an interrupted conversion.
        force: Replace an existing output, or start an interrupted conversion again.
        check: Compare the output with the source, which sets ``Report.verification``.
        progress: Called as the work advances; see ``Progress``.

    Raises:
        DgemmaError: If the source, the output or an option is not valid (nothing is written), if the weights are
            damaged (nothing is left behind), or if writing fails (the conversion can be resumed).
    """
    plan = prepare(
        source, output, recipe, group_size=group_size, target_bytes=target_bytes, target_bpw=target_bpw,
        calibration=calibration, vision_bits=vision_bits, progress=progress,
    )
    return carry_out(plan, resume=resume, force=force, check=check, progress=progress)


def prepare(
    source: str, output: str | Path | None = None, recipe: str = DEFAULT, *, group_size: int | None = None,
    target_bytes: int | None = None, target_bpw: float | None = None, calibration: Path | None = None,
    vision_bits: int | None = None, progress: Progress = _silent, shard_bytes: int = SHARD_BYTES,
    download: bool = True,
) -> Plan:
    """Open and check a source and plan its conversion. Nothing is written.

    Args:
        source: See ``convert``.
        output: See ``convert``.
        recipe: See ``convert``.
        group_size: See ``convert``.
        target_bytes: See ``convert``.
        target_bpw: See ``convert``.
        calibration: See ``convert``.
        vision_bits: See ``convert``.
        progress: Called while the recipe "mixed" measures errors; see ``Progress``.
        shard_bytes: Maximum size of one weight file of the output.
        download: Download weights that are still on the Hub. Without them, a plan can be shown but not carried out. The
            recipe "mixed" downloads them in any case, because it measures errors.

    Raises:
        DgemmaError: If the source or an option is not valid, or the download fails.
    """
    chosen = _recipe(recipe, group_size)
    _check_target(recipe, target_bytes, target_bpw, calibration)
    vision = _vision_format(vision_bits)
    checkpoint = resolve(source, weights=download or recipe == MIXED)
    folder = output_folder(_default_output(checkpoint, recipe) if output is None else output)
    opened = open_source(checkpoint)
    if vision is not None and not opened.vision:
        raise DgemmaError(
            f"{checkpoint.name} has no vision tower to pack", "Leave out --vision-bits.", exit_code=2
        )
    if recipe != MIXED:
        return make_plan(opened, folder, chosen, shard_bytes=shard_bytes, vision=vision)
    formats = _choose_formats(opened, group_size or 64, target_bytes, target_bpw, calibration, vision, progress)
    return make_plan(opened, folder, chosen, shard_bytes=shard_bytes, mixed=formats, vision=vision)


def carry_out(plan: Plan, *, resume: bool = False, force: bool = False, check: bool = False,
              progress: Progress = _silent) -> Report:
    """Write what a plan describes.

    Args:
        plan: A plan whose weights are on this machine.
        resume: Continue an interrupted conversion with the same plan.
        force: Replace an existing output, or start an interrupted conversion again.
        check: Compare the output with the source.
        progress: Called as the work advances; see ``Progress``.

    Raises:
        DgemmaError: See ``convert``.
    """
    check_output(plan.output, force, [plan.source.folder])
    plan.check_room()
    if check:
        make_samples(plan.source.folder, plan.source.config)  # fail now, not at the end, if the source has no tokenizer
    made = [parent for parent in plan.output.absolute().parents if not parent.exists()]
    try:
        with locked_folder(plan.partial):
            open_partial_folder(plan, resume, force)
            return _write(plan, force, check, progress)
    except DgemmaError:
        if not plan.partial.exists():
            for parent in made:
                parent.rmdir()
        raise
    except OSError as error:
        raise DgemmaError(
            f"writing {plan.output} failed: {reason(error)}", "Fix the cause, then continue with --resume."
        ) from error


def _write(plan: Plan, force: bool, check: bool, progress: Progress) -> Report:
    """Write shards and files, compare them with the source if ``check`` is set, and publish the output."""
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
        shutil.rmtree(plan.partial)  # the source is damaged, so the conversion cannot be resumed
        raise
    check_output(plan.output, force, [plan.source.folder])  # again: it may have come into being
    (plan.partial / MANIFEST).unlink()
    replace_folder(plan.partial, plan.output)
    return Report(plan.output, plan, verification, data)


def _check_target(
    recipe: str, target_bytes: int | None, target_bpw: float | None, calibration: Path | None
) -> None:
    """Raise ``DgemmaError`` (exit code 2) unless exactly the recipe "mixed" has a target, and the target is valid."""
    has_target = target_bytes is not None or target_bpw is not None
    if recipe == MIXED and not has_target:
        raise DgemmaError(f"the recipe {MIXED} needs a target", "Give --target-size or --target-bpw.", exit_code=2)
    if recipe != MIXED and has_target:
        raise DgemmaError(
            f"--target-size and --target-bpw apply only to --recipe {MIXED}",
            f"Leave them out, or choose --recipe {MIXED}.", exit_code=2,
        )
    if target_bytes is not None and target_bpw is not None:
        raise DgemmaError("both --target-size and --target-bpw are given", "Give one of the two.", exit_code=2)
    if target_bpw is not None and not 0 < target_bpw <= 16:
        raise DgemmaError(
            f"the target cannot be {target_bpw} bits per weight", "Give a number like 4.5, at most 16.", exit_code=2
        )
    if calibration is not None and recipe != MIXED:
        raise DgemmaError(
            f"--calibration applies only to --recipe {MIXED}",
            f"Leave it out, or choose --recipe {MIXED}.", exit_code=2,
        )


def _recipe(name: str, group_size: int | None) -> Recipe:
    """Return a recipe by its name, with another group size if one is given."""
    if name not in RECIPES:
        raise DgemmaError(f"there is no recipe {shown(name)}", f"The recipes are {', '.join(RECIPES)}.", exit_code=2)
    recipe = RECIPES[name]
    if group_size is None:
        return recipe
    if group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise DgemmaError(f"the group size cannot be {group_size}", f"The group sizes are {sizes}.", exit_code=2)
    if name != MIXED and not any(rule.format.mode == "affine" for rule in recipe.rules):
        raise DgemmaError(f"the recipe {name} takes no group size", "Leave out --group-size.", exit_code=2)
    return recipe.with_group_size(group_size)


def _vision_format(bits: int | None) -> Format | None:
    """Return the format of the vision tower's matrices for a number of bits. Raises ``DgemmaError`` unless it is 8."""
    if bits is not None and (isinstance(bits, bool) or bits != _VISION.bits):
        raise DgemmaError(
            f"the vision tower cannot have {shown(bits)} bits", "Give --vision-bits 8, or leave it out to keep bf16.",
            exit_code=2,
        )
    return None if bits is None else _VISION


def _default_output(checkpoint: Checkpoint, recipe: str) -> Path:
    """Return the output folder ``<source name>-<recipe>``.

    It lies next to a source folder, or in the current folder for the demo and for checkpoints from the Hub.
    """
    if checkpoint.is_demo or checkpoint.repo_id:
        name = (checkpoint.repo_id or checkpoint.name).rpartition("/")[2]
        return Path(f"{name}-{recipe}")
    folder = checkpoint.folder.resolve()
    return folder.with_name(f"{folder.name}-{recipe}")


def _choose_formats(
    source: Source, group_size: int, target_bytes: int | None, target_bpw: float | None, calibration: Path | None,
    vision: Format | None, progress: Progress,
) -> MixedFormats:
    """Measure the errors of all groups of tensors and choose their formats for the recipe "mixed"."""
    moments: mixed.Moments = {}
    if calibration is not None:
        texts = mixed.read_calibration(calibration)
        moments = mixed.calibrate(source, texts, lambda done, total: progress("calibrate", done, total))
    groups = mixed.measure(source, group_size, moments, lambda done, total: progress("measure", done, total))
    packed = {path for group in groups for path in group.paths}
    kept = sum(2 * weight.size for path, weight in source.text.items() if path not in packed)
    kept += sum(target.nbytes for target in vision_targets(source, vision))
    values = sum(weight.size for weight in (*source.text.values(), *source.vision))
    budget = target_bytes if target_bytes is not None else round((target_bpw or 0) * values / 8)
    bits = mixed.solve(groups, budget - kept, by_size=calibration is None)
    formats = {path: Format(bits[group.name], group_size) for group in groups for path in group.paths}
    table = {group.name: {"bits": bits[group.name], **group.as_dict()} for group in groups}
    return MixedFormats(
        formats, {"budget_bytes": budget, "calibrated": calibration is not None, "groups": table}
    )
