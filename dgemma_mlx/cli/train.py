"""``dgemma-mlx train``: fine-tune a checkpoint, with lines of progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dgemma_mlx.cli import complete
from dgemma_mlx.cli.interrupt import interruptible
from dgemma_mlx.cli.loading import load_model
from dgemma_mlx.cli.parameters import (
    CpuDequantize,
    ModelName,
    ModelOptions,
    PlanAsJson,
    Quiet,
    model_option,
    output_option,
    resource_option,
    section,
)
from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import amount, size

if TYPE_CHECKING:
    from dgemma_mlx.train.dataset import Limited
    from dgemma_mlx.train.finetune import FinetuneRun

data_option, adapter_option = section("Data"), section("Adapter")
training_option, log_option = section("Training"), section("Progress and checkpoints")

Data = Annotated[
    list[Path],
    data_option(
        "--data", help="A JSONL file, or a folder with `train.jsonl` and optionally `valid.jsonl`. May be repeated."
    ),
]
Valid = Annotated[Path | None, data_option("--valid", metavar="FILE", help="A JSONL file of validation examples.")]
MaxLength = Annotated[
    int, data_option("--max-length", min=1, help="Maximum tokens of a prompt and its answer. "
                     "Longer answers are cut after a whole canvas.")
]
CanvasLength = Annotated[
    int | None,
    data_option("--canvas-length", min=1, show_default="the checkpoint's", help="Tokens of a canvas during training."),
]
Output = Annotated[
    Path,
    output_option("--output", "-o", metavar="FOLDER", help="The folder for the adapter, the log and the checkpoints."),
]
Start = Annotated[
    Path | None,
    model_option("--adapter", metavar="FOLDER", help="Continue with this adapter. Its rank and targets stay the same."),
]
Steps = Annotated[int, training_option("--steps", min=1, help="Number of updates of the weights.")]
BatchSize = Annotated[int, training_option("--batch-size", min=1, help="Number of examples per batch.")]
Accumulate = Annotated[
    int, training_option("--accumulate", min=1, help="Number of batches whose gradients make one update.")
]
Rate = Annotated[
    float | None,
    training_option("--learning-rate", show_default="1e-4 for adamw, 1e-2 for muon", help="Peak learning rate."),
]
OptimizerName = Annotated[
    str,
    training_option(
        "--optimizer", metavar="NAME", help="Optimizer: adamw or muon.",
        autocompletion=complete.one_of("adamw", "muon"),
    ),
]  # fmt: skip
ScheduleName = Annotated[
    str,
    training_option(
        "--schedule", metavar="NAME", help="Learning rate after the warm-up: cosine, linear or constant.",
        autocompletion=complete.one_of("cosine", "linear", "constant"),
    ),
]  # fmt: skip
Warmup = Annotated[int, training_option("--warmup", min=0, help="Steps over which the learning rate rises.")]
Decay = Annotated[float, training_option("--weight-decay", min=0.0, help="Weight decay of the optimizer.")]
Causal = Annotated[
    float,
    training_option(
        "--causal-weight", min=0.0, help="Weight of the encoder's next-token loss. 0 saves the time it takes."
    ),
]
Seed = Annotated[
    int, training_option("--seed", min=0, max=2**32 - 1, help="Seed of the examples' order and the noise.")
]
Full = Annotated[
    bool, training_option("--full", help="Train all weights and write a checkpoint. For small, unpacked models.")
]
Rank = Annotated[
    int | None, adapter_option("--rank", min=1, show_default="16", help="Rank of the adapter's matrices.")
]
Alpha = Annotated[
    float | None,
    adapter_option("--alpha", show_default="twice the rank", help="The adapter's output is scaled by alpha / rank."),
]
Dropout = Annotated[
    float | None, adapter_option("--dropout", show_default="0.0", help="Dropout of the adapter's inputs.")
]
Targets = Annotated[
    str | None,
    adapter_option(
        "--targets", metavar="A,B,C", show_default="attention,mlp",
        help="Modules to adapt: attention, mlp, experts, self_conditioning, or names such as q_proj.",
    ),
]  # fmt: skip
Dora = Annotated[bool, adapter_option("--dora", help="Train DoRA instead of LoRA. Experts always get LoRA.")]
Checkpointing = Annotated[
    bool,
    resource_option(
        "--grad-checkpoint", help="Compute each layer again for its gradient: less memory, more time."
    ),
]
LogEvery = Annotated[int, log_option("--log-every", min=1, help="Steps between two lines of progress.")]
SaveEvery = Annotated[int, log_option("--save-every", min=1, help="Steps between two checkpoints.")]
ValidEvery = Annotated[
    int, log_option("--valid-every", min=0, help="Steps between two validations. 0 validates only at the end.")
]
ValidAnswers = Annotated[
    int, log_option("--valid-answers", min=0, help="Number of validation examples to answer for the exact match.")
]
ReportTo = Annotated[
    str | None,
    log_option(
        "--report-to", metavar="NAME", help="Report to tensorboard or wandb, if it is installed.",
        autocompletion=complete.one_of("tensorboard", "wandb"),
    ),
]  # fmt: skip
Resume = Annotated[bool, log_option("--resume", help="Continue the run in the output folder.")]
DryRun = Annotated[bool, output_option("--dry-run", help="Check the data, estimate the memory and stop.")]


def train(
    data: Data,
    output: Output,
    valid: Valid = None,
    max_length: MaxLength = 2048,
    canvas_length: CanvasLength = None,
    model: ModelName = None,
    adapter: Start = None,
    dry_run: DryRun = False,
    as_json: PlanAsJson = False,
    quiet: Quiet = False,
    steps: Steps = 1000,
    batch_size: BatchSize = 4,
    accumulate: Accumulate = 1,
    learning_rate: Rate = None,
    optimizer: OptimizerName = "adamw",
    schedule: ScheduleName = "cosine",
    warmup: Warmup = 100,
    weight_decay: Decay = 0.0,
    causal_weight: Causal = 1.0,
    seed: Seed = 0,
    full: Full = False,
    rank: Rank = None,
    alpha: Alpha = None,
    dropout: Dropout = None,
    targets: Targets = None,
    dora: Dora = False,
    log_every: LogEvery = 10,
    save_every: SaveEvery = 100,
    valid_every: ValidEvery = 200,
    valid_answers: ValidAnswers = 8,
    report_to: ReportTo = None,
    resume: Resume = False,
    grad_checkpoint: Checkpointing = False,
    cpu_dequantize: CpuDequantize = None,
) -> None:
    """Fine-tune a model on examples.

    The result is a LoRA or DoRA adapter for `--adapter`, or with `--full` a checkpoint. Packed checkpoints are
    trained as they are. docs/finetuning.md describes the objective, the data and the files.

    Notes:
        - A line of the data has `messages`, or `prompt` and `completion`, both optionally with `tools`, or `text`.
          Other keys are refused. Every line is checked before anything is loaded; an error names file and line.
        - Control tokens in what the model learns to write are read as such; in all other messages they are plain text.
        - Ctrl-C saves the run. The same command with `--resume` continues it, on a CPU to the same bytes as without the
          interruption. A run that diverges ends with an error and keeps its last good state; `--resume` with a lower
          `--learning-rate` continues from there.
        - `--dry-run` prints the number of examples, epochs and trained parameters, and an estimate of the memory.
        - `loss.jsonl` in the output folder has every line of progress. `loss.png` is drawn if matplotlib is installed.

    Examples:
        dgemma-mlx train -m demo --data train.jsonl -o runs/adapter --steps 200 --dry-run
        dgemma-mlx train -m demo --data train.jsonl -o runs/adapter --steps 200
        dgemma-mlx generate -m demo --adapter runs/adapter "..."
    """
    from dgemma_mlx.model.adapter import AdapterConfig
    from dgemma_mlx.model.adapter_file import read_adapter
    from dgemma_mlx.train.dataset import Limited, read_data
    from dgemma_mlx.train.estimate import make_plan
    from dgemma_mlx.train.finetune import FinetuneConfig, open_run

    _check_shape_options(
        {"--rank": rank, "--alpha": alpha, "--dropout": dropout, "--targets": targets, "--dora": dora or None},
        adapter, canvas_length, full,
    )  # fmt: skip
    rank = 16 if rank is None else rank
    shape = AdapterConfig(
        rank, 2.0 * rank if alpha is None else alpha, 0.0 if dropout is None else dropout,
        tuple(target.strip() for target in (targets or "attention,mlp").split(",")), dora, canvas_length,
    ) if adapter is None else read_adapter(adapter)[0]  # fmt: skip
    config = FinetuneConfig(
        steps, batch_size, accumulate, max_length, learning_rate, optimizer, schedule, warmup, weight_decay,
        causal_weight=causal_weight, seed=seed, checkpoint_layers=grad_checkpoint, full=full, adapter=shape,
        log_every=log_every, save_every=save_every, valid_every=valid_every, valid_answers=valid_answers,
    )  # fmt: skip
    examples, held_out = read_data(data, valid)
    chosen = ModelOptions(model, adapter, cpu_dequantize=cpu_dequantize)
    loaded = load_model(Settings(), chosen, quiet, training=True, checked=True)
    run = open_run(loaded, examples, held_out, config)
    limits = [("", run.limited, len(examples))]
    if run.validation is not None:
        limits.append(("validation ", run.validation.limited, len(held_out)))
    for kind, limited, count in limits:
        if limited != Limited():
            print(f"dgemma-mlx: --max-length {max_length}: {_taken(limited, kind, count)}", file=sys.stderr)
    plan = make_plan(run)
    if dry_run or not quiet:
        _show_plan(plan, as_json and dry_run, sys.stdout if dry_run else sys.stderr)
    if not dry_run:
        _carry_out(run, output, resume, report_to, quiet)
        if as_json:
            print(json.dumps({"output": str(output), **plan}))
        elif not quiet:
            use = f"-m {output}" if full else f"-m {run.model.name} --adapter {output}"
            print(visible(f"wrote {output}; try: dgemma-mlx generate {use} \"...\""), file=sys.stderr)


def _check_shape_options(
    options: Mapping[str, Any], adapter: Path | None, canvas_length: int | None, full: bool
) -> None:
    """Raise `DgemmaError` (exit code 2) for options of a new adapter if none is made, because they have no effect."""
    if full and adapter is not None:
        raise DgemmaError("--full cannot be combined with --adapter", "Merge the adapter with fuse first.", exit_code=2)
    if full or adapter is not None:
        if adapter is not None:
            options = {**options, "--canvas-length": canvas_length}
        if given := [name for name, value in options.items() if value is not None]:
            reason = "--full, which makes no adapter" if full else "--adapter, whose shape stays the same"
            raise DgemmaError(f"{given[0]} has no effect with {reason}", "Leave it out.", exit_code=2)


def _taken(limited: Limited, kind: str, count: int) -> str:
    """Return what --max-length has taken from ``count`` examples."""
    parts = []
    if limited.cut:
        parts.append(f"{limited.cut:,} of {count:,} {kind}answers cut, {limited.lost:,} tokens lost")
    if limited.left_out:
        parts.append(f"{limited.left_out:,} of {count:,} {kind}examples left out, no room for a canvas")
    return "; ".join(parts)


def _carry_out(run: FinetuneRun, output: Path, resume: bool, report_to: str | None, quiet: bool) -> None:
    """Train to the end. Raises `DgemmaError` (exit code 130) after Ctrl-C, when the run has been saved."""
    from dgemma_mlx.cli.train_log import open_log
    from dgemma_mlx.train.finetune import check_run_folder, finetune

    steps = run.config.steps
    check_run_folder(output, run.model, resume)  # before a dashboard writes to the folder
    with open_log(output, steps, report_to, quiet) as log, interruptible() as stopped:
        done = finetune(run, output, log, resume=resume, stopped=stopped)
    if done < steps:
        raise DgemmaError(
            f"interrupted after step {done} of {steps}; saved in {output}", "The same command with --resume continues.",
            exit_code=130,
        )


def _show_plan(plan: dict[str, Any], as_json: bool, file: Any) -> None:
    """Print the examples, steps, trained parameters and estimated memory of a run."""
    if as_json:
        print(json.dumps(plan), file=file)
        return
    memory = plan["estimated_memory"]
    print(f"{plan['model']}: {plan['examples']:,} examples of at most {plan['longest']:,} tokens, "
          f"canvases of {plan['canvas_length']} tokens", file=file)  # fmt: skip
    trained = amount(plan["trained_parameters"])
    print(f"{plan['steps']:,} steps, {plan['epochs']:g} epochs; {trained} parameters trained", file=file)
    print(f"memory: about {size(memory['total'])} (estimated: weights {size(memory['weights'])}, gradients and "
          f"optimizer {size(memory['training'])}, activations {size(memory['activations'])})", file=file)  # fmt: skip
