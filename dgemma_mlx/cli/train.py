"""``dgemma-mlx train``: fine-tunes a checkpoint; a line of progress now and then on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgemma_mlx.checks import LARGEST_SEED
from dgemma_mlx.cli.generate import Dequantize, ModelName, Quiet, load_as_told
from dgemma_mlx.cli.interrupt import interruptible
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import size

if TYPE_CHECKING:
    from dgemma_mlx.train.finetune import FinetuneRun

Data = Annotated[
    list[Path],
    typer.Option("--data", help="A JSONL file, or a folder with train.jsonl and perhaps valid.jsonl; may be repeated."),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write: the adapter, logs, checkpoints.")]
Start = Annotated[
    Path | None,
    typer.Option("--adapter", help="Train this adapter on, instead of a new one; its rank and targets stay."),
]
Valid = Annotated[Path | None, typer.Option("--valid", help="A JSONL file to validate with.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Updates of the weights.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Examples worked on at a time.")]
Accumulate = Annotated[int, typer.Option("--accumulate", min=1, help="Batches whose gradients make one step.")]
MaxLength = Annotated[int, typer.Option("--max-length", min=1, help="Tokens of prompt and answer; the rest is cut.")]
Rate = Annotated[float | None, typer.Option("--learning-rate", help="At its peak; 1e-4 for adamw, 1e-2 for muon.")]
OptimizerName = Annotated[str, typer.Option("--optimizer", help="adamw or muon.")]
ScheduleName = Annotated[str, typer.Option("--schedule", help="After the warm-up: cosine, linear or constant.")]
Warmup = Annotated[int, typer.Option("--warmup", min=0, help="Steps over which the learning rate rises.")]
Decay = Annotated[float, typer.Option("--weight-decay", min=0.0)]
Rank = Annotated[int, typer.Option("--rank", min=1, help="Of the adapter's matrices.")]
Alpha = Annotated[float | None, typer.Option("--alpha", help="The adapter adds alpha / rank times; twice the rank.")]
Dropout = Annotated[float, typer.Option("--dropout", help="Of the adapter's inputs.")]
Targets = Annotated[
    str,
    typer.Option("--targets", help="attention, mlp, experts, self_conditioning, or modules like q_proj; with commas."),
]
Dora = Annotated[bool, typer.Option("--dora", help="DoRA instead of LoRA; not for experts.")]
Full = Annotated[bool, typer.Option("--full", help="Train all weights and write a checkpoint. For small models.")]
CanvasLength = Annotated[int | None, typer.Option("--canvas-length", min=1, help="Instead of the checkpoint's.")]
Causal = Annotated[
    float, typer.Option("--causal-weight", min=0.0, help="Of the encoder's next-token loss; 0 saves its time.")
]
Checkpointing = Annotated[
    bool, typer.Option("--grad-checkpoint", help="Work out layers again for their gradients: less memory, more time.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED)]
LogEvery = Annotated[int, typer.Option("--log-every", min=1, help="Steps between lines of progress.")]
SaveEvery = Annotated[int, typer.Option("--save-every", min=1, help="Steps between checkpoints.")]
ValidEvery = Annotated[int, typer.Option("--valid-every", min=0, help="Steps between validations; 0: at the end only.")]
ValidAnswers = Annotated[int, typer.Option("--valid-answers", min=0, help="Examples to answer for the exact match.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the data, estimate the memory, and stop.")]
ReportTo = Annotated[str | None, typer.Option("--report-to", help="tensorboard or wandb, where it is installed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print plan or result as one JSON object.")]


def train(
    data: Data,
    output: Output,
    model: ModelName = None,
    adapter: Start = None,
    valid: Valid = None,
    steps: Steps = 1000,
    batch_size: BatchSize = 4,
    accumulate: Accumulate = 1,
    max_length: MaxLength = 2048,
    learning_rate: Rate = None,
    optimizer: OptimizerName = "adamw",
    schedule: ScheduleName = "cosine",
    warmup: Warmup = 100,
    weight_decay: Decay = 0.0,
    rank: Rank = 16,
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    targets: Targets = "attention,mlp",
    dora: Dora = False,
    full: Full = False,
    canvas_length: CanvasLength = None,
    causal_weight: Causal = 1.0,
    grad_checkpoint: Checkpointing = False,
    seed: Seed = 0,
    log_every: LogEvery = 10,
    save_every: SaveEvery = 100,
    valid_every: ValidEvery = 200,
    valid_answers: ValidAnswers = 8,
    resume: Resume = False,
    dry_run: DryRun = False,
    report_to: ReportTo = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    cpu_dequantize: Dequantize = None,
) -> None:
    """Fine-tune a model on examples: an adapter that chat and generate take with --adapter.

    Ctrl-C saves; the same command with --resume goes on, to the same end.
    """
    from dgemma_mlx.model.adapter import AdapterConfig
    from dgemma_mlx.model.adapter_file import read_adapter
    from dgemma_mlx.train.dataset import read_data
    from dgemma_mlx.train.estimate import make_plan
    from dgemma_mlx.train.finetune import FinetuneConfig, open_run

    shape = AdapterConfig(
        rank, 2.0 * rank if alpha is None else alpha, dropout,
        tuple(target.strip() for target in targets.split(",")), dora, canvas_length,
    ) if adapter is None else read_adapter(adapter)[0]  # fmt: skip
    config = FinetuneConfig(
        steps, batch_size, accumulate, max_length, learning_rate, optimizer, schedule, warmup, weight_decay,
        causal_weight=causal_weight, seed=seed, checkpoint_layers=grad_checkpoint, full=full, adapter=shape,
        log_every=log_every, save_every=save_every, valid_every=valid_every, valid_answers=valid_answers,
    )  # fmt: skip
    examples, held_out = read_data(data, valid)
    loaded = load_as_told(Settings(), model, cpu_dequantize, no_kernels=False, quiet=quiet, adapter=adapter)
    run = open_run(loaded, examples, held_out, config)
    if run.left_out:
        print(f"dgemma-mlx: {run.left_out} of {len(examples)} examples are longer than --max-length {max_length} "
              "and left out", file=sys.stderr)  # fmt: skip
    plan = make_plan(run)
    if dry_run or not quiet:
        _show_plan(plan, as_json and dry_run, sys.stdout if dry_run else sys.stderr)
    if not dry_run:
        _carry_out(run, output, resume, report_to, quiet)
        if as_json:
            print(json.dumps({"output": str(output), **plan}))
        elif not quiet:
            use = f"-m {output}" if full else f"-m {run.model.name} --adapter {output}"
            print(f"wrote {output}; try: dgemma-mlx generate {use} \"...\"", file=sys.stderr)


def _carry_out(run: FinetuneRun, output: Path, resume: bool, report_to: str | None, quiet: bool) -> None:
    """Trains to the end; a ``DgemmaError`` (exit code 130) says how to go on after Ctrl-C."""
    from dgemma_mlx.cli.train_log import open_log
    from dgemma_mlx.train.finetune import finetune

    steps = run.config.steps
    with open_log(output, steps, report_to, quiet) as log, interruptible() as stopped:
        done = finetune(run, output, log, resume=resume, stopped=stopped)
    if done < steps:
        raise DgemmaError(
            f"interrupted after step {done} of {steps}; saved in {output}", "The same command with --resume goes on.",
            exit_code=130,
        )


def _show_plan(plan: dict[str, Any], as_json: bool, file: Any) -> None:
    if as_json:
        print(json.dumps(plan), file=file)
        return
    memory = plan["estimated_memory"]
    print(f"{plan['model']}: {plan['examples']:,} examples, the longest of {plan['longest']:,} tokens; "
          f"canvases of {plan['canvas_length']}", file=file)  # fmt: skip
    print(f"{plan['steps']:,} steps, {plan['epochs']:g} epochs; {plan['trained_parameters']:,} parameters trained",
          file=file)  # fmt: skip
    print(f"memory: about {size(memory['total'])} (estimated: weights {size(memory['weights'])}, gradients and "
          f"optimizer {size(memory['training'])}, activations {size(memory['activations'])})", file=file)  # fmt: skip
