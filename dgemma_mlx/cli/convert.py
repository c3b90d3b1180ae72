"""``dgemma-mlx convert``: show the plan of a conversion, carry it out, and show the result."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgemma_mlx.checks import reason, shown
from dgemma_mlx.cli import complete
from dgemma_mlx.cli.interrupt import end_in_order, ending_at_once
from dgemma_mlx.cli.parameters import PlanAsJson, output_option, section
from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import parse_size, size

if TYPE_CHECKING:
    from dgemma_convert import Plan, Report, Verification

_STAGES = {"convert": "converting", "verify": "comparing", "measure": "measuring", "calibrate": "calibrating"}

recipe_option, work_option, upload_option = section("Recipe"), section("Work"), section("Upload")

SourceName = Annotated[
    str | None,
    typer.Argument(
        help="A folder, a Hub id `owner/name[@revision]`, or `demo`.", autocompletion=complete.models
    ),
]
Output = Annotated[
    Path | None,
    output_option("--output", "-o", metavar="FOLDER", show_default="SOURCE-RECIPE, next to a source folder, else here",
                  help="The new folder."),
]  # fmt: skip
RecipeName = Annotated[
    str,
    recipe_option(
        "--recipe", metavar="NAME", help="The recipe, as in --list-recipes.", autocompletion=complete.recipes
    ),
]
GroupSize = Annotated[
    int | None,
    recipe_option(
        "--group-size", show_default="the recipe's", help="Number of values per scale: 32, 64 or 128.",
        autocompletion=complete.one_of("32", "64", "128"),
    ),
]
TargetSize = Annotated[
    str | None,
    recipe_option("--target-size", metavar="SIZE", help="Size of the weights for `mixed`, such as 14GB."),
]
TargetBpw = Annotated[float | None, recipe_option("--target-bpw", help="Bits per weight for `mixed`, such as 4.5.")]
Calibration = Annotated[
    Path | None,
    recipe_option(
        "--calibration", metavar="FILE", help="Texts for the error measurements of `mixed`, one per line."
    ),
]
VisionBits = Annotated[
    int | None,
    recipe_option(
        "--vision-bits", metavar="8", show_default="bf16",
        help="Bits of the vision tower's matrices.", autocompletion=complete.one_of("8"),
    ),
]
ListRecipes = Annotated[bool, recipe_option("--list-recipes", help="Print the recipes and stop.")]
DryRun = Annotated[bool, output_option("--dry-run", help="Print the plan and stop.")]
Resume = Annotated[bool, work_option("--resume", help="Continue an interrupted conversion.")]
Force = Annotated[
    bool, work_option("--force", help="Replace an output of convert or fuse, or an interrupted conversion.")
]
Verify = Annotated[bool, work_option("--verify", help="Compare the output with the source on built-in prompts.")]
UploadRepo = Annotated[
    str | None,
    upload_option("--upload-repo", metavar="OWNER/NAME", help="Upload the output to this Hub repository."),
]
Yes = Annotated[bool, upload_option("--yes", "-y", help="Upload without asking.")]


def convert(
    source: SourceName = None,
    recipe: RecipeName = "q4",
    group_size: GroupSize = None,
    target_size: TargetSize = None,
    target_bpw: TargetBpw = None,
    calibration: Calibration = None,
    vision_bits: VisionBits = None,
    list_recipes: ListRecipes = False,
    output: Output = None,
    dry_run: DryRun = False,
    as_json: PlanAsJson = False,
    resume: Resume = False,
    force: Force = False,
    verify: Verify = False,
    upload_repo: UploadRepo = None,
    yes: Yes = False,
) -> None:
    """Convert a checkpoint to a smaller MLX checkpoint.

    The plan is printed first: tensors, bits, bytes, free disk space, and an estimate of the memory to run the result.
    The conversion needs little memory whatever the size of the checkpoint. Interrupt at any time; `--resume`
    continues.

    Notes:
        - `q4`, the default, has experts and self-conditioning in 4 bits in groups of 64, and the rest in 8 bits: the
          layout of the published 4-bit conversions. `q8` has 8 bits everywhere, `q4-small` 4 bits everywhere.
        - `q3` has experts in 3 bits, but in 4 bits in the first and last three layers, self-conditioning in 4 bits, and
          the rest in 8 bits.
        - `mxfp4` and `nvfp4` have experts and self-conditioning in that format and the rest in 8 bits. `mxfp8` has
          mxfp8 everywhere. `bf16` packs nothing.
        - `mixed` chooses 3, 4, 5, 6 or 8 bits for each part of each layer by measured error, to reach `--target-size`
          or `--target-bpw`. It measures the errors of the weights. With `--calibration`, the activations of those
          texts say how much an error counts.
        - "Everywhere" means embeddings, attention, router, dense MLP, experts and self-conditioning. Norms, scalars and
          the vision tower stay bf16. `--list-recipes` prints the rules.
        - `--vision-bits 8` packs the matrices of the vision tower as well, in groups of 64. Those whose rows do not
          divide into groups stay bf16, as `down_proj` with its rows of 4,304 values.
        - Tensors are read and packed 64 MB at a time. A source of 3 GB with the real layout took at most 445 MB of
          memory (`make bench BENCH=convert`, 2 Linux cores).
        - The output appears under its name when it is complete. After an interruption or a crash, `--resume` continues
          and ends with the same bytes.
        - `--verify` runs source and output side by side, one layer at a time, and reports the differences of hidden
          states and logits. `conversion_report.json` and the model card of the output have them too.
        - A tensor of the source with NaN or infinity is refused by name.
        - A packed source can be converted again, and `--recipe bf16` unpacks it. A warning names the loss.
        - From Python, `dgemma_convert.convert(source, output, recipe)` converts and returns a report, and
          `dgemma_convert.prepare` only plans.

    Examples:
        dgemma-mlx convert demo -o demo-q4 --dry-run
        dgemma-mlx convert google/diffusiongemma-26B-A4B-it --verify
        dgemma-mlx convert google/diffusiongemma-26B-A4B-it --recipe mixed --target-size 14GB
    """
    if list_recipes:
        with quiet_when_closed():
            _print_recipes(as_json)
        return
    if source is None:
        raise DgemmaError("no source was given", "Write dgemma-mlx convert SOURCE, a folder or a Hub id.", exit_code=2)
    target_bytes = None if target_size is None else parse_size(target_size)
    if upload_repo:
        _check_upload(upload_repo, yes)
    from dgemma_convert import carry_out, prepare
    from dgemma_mlx.cli.downloading import download

    try:
        with _progress() as progress:
            planned = partial(
                prepare, source, output, recipe, group_size=group_size, target_bytes=target_bytes,
                target_bpw=target_bpw, calibration=calibration, vision_bits=vision_bits, progress=progress,
            )
            if recipe == "mixed":
                download(source)  # it measures the weights before there is a plan
            with ending_at_once():
                plan = planned(download=False)
        with quiet_when_closed():
            _show_plan(plan, dry_run, as_json)
        if dry_run:
            return
        plan.check_room()
        if not plan.source.checkpoint.has_weights:
            download(source)
            with ending_at_once():
                plan = planned()
        with _progress() as progress:
            report = carry_out(plan, resume=resume, force=force, check=verify, progress=progress)
    except KeyboardInterrupt:
        raise DgemmaError("interrupted", "The same command with --resume continues.", exit_code=130) from None
    _show_result(report, as_json)
    if upload_repo and (yes or typer.confirm(f"Upload {report.output} to {upload_repo}?", err=True)):
        _upload(report.output, upload_repo)


def _print_recipes(as_json: bool) -> None:
    """Print the recipes and their rules."""
    from dgemma_convert import RECIPES

    if as_json:
        rules = {
            name: [{"classes": rule.classes, "edge_layers": rule.edge, **rule.format.as_config()}
                   for rule in recipe.rules]
            for name, recipe in RECIPES.items()
        }  # fmt: skip
        print(json.dumps({n: {"summary": r.summary, "rules": rules[n]} for n, r in RECIPES.items()}))
        return
    for name, recipe in RECIPES.items():
        print(f"{name:9} {recipe.summary}")
        for rule in recipe.rules:
            edge = " (first and last 3 layers)" if rule.edge else ""
            print(f"{'':11}{rule.format!s:10} {', '.join(rule.classes)}{edge}")


def _show_plan(plan: Plan, dry_run: bool, as_json: bool) -> None:
    """Print the plan: to stdout for --dry-run, else to stderr. Warnings always go to stderr."""
    for warning in plan.warnings:
        print(visible(f"warning: {warning}"), file=sys.stderr)
    if as_json:
        if dry_run:
            print(json.dumps(plan.as_dict()))
        return
    from rich.console import Console

    console = Console(stderr=not dry_run, highlight=False)
    console.print(_plan_table(plan))
    recipe = plan.recipe.name
    to_download = "" if plan.source.checkpoint.has_weights else " to download"
    for line in (
        f"from {plan.source.checkpoint.name}, {size(plan.bytes_in)}" + to_download,
        f"to {plan.output}, {size(plan.bytes_out)}, {plan.bits_per_weight:.2f} bits per weight ({recipe})",
        f"disk: {size(plan.bytes_needed)} needed, {size(plan.bytes_free)} free",
        f"memory to run it with {plan.context:,} tokens of context: about {size(plan.memory_to_run)} (estimated)",
    ):
        console.print(visible(line), markup=False, soft_wrap=True)


def _plan_table(plan: Plan) -> Any:
    """Return a Rich table with one row per tensor class."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("tensors")
    for title in ("count", "format", "in", "out", "bits/weight"):
        table.add_column(title, justify="left" if title == "format" else "right")
    for row in plan.classes():
        table.add_row(
            row.tensor_class, str(row.tensors), ", ".join(row.formats), size(row.bytes_in), size(row.bytes_out),
            f"{row.bits_per_weight:.2f}",
        )
    return table


def _show_result(report: Report, as_json: bool) -> None:
    """Print the comparison with the source, if there is one, and where the output is."""
    if as_json:
        print(json.dumps({"output": str(report.output), **report.data}))
        return
    if report.verification:
        print(_comparison(report.verification), file=sys.stderr)
    print(visible(f"wrote {report.output}; try: dgemma-mlx generate -m {report.output} \"Hello\""), file=sys.stderr)


def _comparison(verification: Verification) -> str:
    """Return a short table: errors of the first, the middle and the last layer, and of the logits."""
    layers = len(verification.decoder_error)
    lines = ["compared with the source (relative errors)  encoder  decoder"]
    for layer in sorted({1, (layers + 1) // 2, layers}):
        encoder, decoder = verification.encoder_error[layer - 1], verification.decoder_error[layer - 1]
        lines.append(f"  hidden states after layer {layer:<14}  {encoder:7.4f}  {decoder:7.4f}")
    lines.append(f"  canvas logits: KL divergence {verification.kl_divergence:.5f} nats, "
                 f"same top token at {verification.top1_agreement:.1%} of positions")  # fmt: skip
    return "\n".join(lines)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function that draws a bar per stage on a terminal's stderr, and draws nothing elsewhere.

    Drawing starts with the first report, because a download draws a bar of its own before.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    percentage = TextColumn("{task.percentage:.0f}%")
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), percentage, TimeRemainingColumn(), console=console,
        transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    tasks: dict[str, Any] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            if console.is_terminal:
                end_in_order()  # the bar hides the cursor, and ``stop`` shows it again
            bars.start()
            tasks[stage] = bars.add_task(_STAGES[stage], total=total)
        bars.update(tasks[stage], completed=done)

    try:
        yield progress
    finally:
        bars.stop()


def _check_upload(repo_id: str, yes: bool) -> None:
    """Check before hours of work that the upload at their end is possible.

    Raises `DgemmaError` (exit code 2) for a bad repository name, and when nobody can confirm the upload.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise DgemmaError(f"{shown(repo_id)} is not the name of a repository", "Write it as owner/name.", 2) from None
    if not yes and not sys.stdin.isatty():
        raise DgemmaError(
            "cannot ask for confirmation, because stdin is not a terminal", "Add -y to upload without asking.", 2
        )


def _upload(folder: Path, repo_id: str) -> None:
    """Upload the output to the Hub. Raises `DgemmaError` with a hint when it fails."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        with ending_at_once():
            api.create_repo(repo_id, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"{folder.name} by dgemma-mlx")
    except Exception as error:  # includes errors of the HTTP library
        raise DgemmaError(
            f"uploading {folder} to {repo_id} failed: {reason(error)}",
            f"The conversion is complete. Log in with `hf auth login`, then: hf upload {repo_id} {folder}",
        ) from error
    print(f"uploaded to {repo_id}", file=sys.stderr)

