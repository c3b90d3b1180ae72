"""``dgemma-mlx train``: fine-tune a checkpoint, with lines of progress on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dgemma_mlx.checks import LARGEST_SEED
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
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import size

if TYPE_CHECKING:
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
OptimizerName = Annotated[str, training_option("--optimizer", metavar="NAME", help="Optimizer: adamw or muon.")]
ScheduleName = Annotated[
    str,
    training_option(
        "--schedule", metavar="NAME", help="Learning rate after the warm-up: cosine, linear or constant."
    ),
]
Warmup = Annotated[int, training_option("--warmup", min=0, help="Steps over which the learning rate rises.")]
Decay = Annotated[float, training_option("--weight-decay", min=0.0, help="Weight decay of the optimizer.")]
Causal = Annotated[
    float,
    training_option(
        "--causal-weight", min=0.0, help="Weight of the encoder's next-token loss. 0 saves the time it takes."
    ),
]
Seed = Annotated[
    int, training_option("--seed", min=0, max=LARGEST_SEED, help="Seed of the examples' order and the noise.")
]
Full = Annotated[
    bool, training_option("--full", help="Train all weights and write a checkpoint. For small, unpacked models.")
]
Rank = Annotated[int, adapter_option("--rank", min=1, help="Rank of the adapter's matrices.")]
Alpha = Annotated[
    float | None,
    adapter_option("--alpha", show_default="twice the rank", help="The adapter's output is scaled by alpha / rank."),
]
Dropout = Annotated[float, adapter_option("--dropout", help="Dropout of the adapter's inputs.")]
Targets = Annotated[
    str,
    adapter_option(
        "--targets", metavar="A,B,C",
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
    str | None, log_option("--report-to", metavar="NAME", help="Report to tensorboard or wandb, if it is installed.")
]
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
    rank: Rank = 16,
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    targets: Targets = "attention,mlp",
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
        - A line of the data has `messages`, or `prompt` and `completion`, or `text`. Every line is checked before
          anything is loaded, and an error names the file and the line.
        - Ctrl-C saves the run. The same command with `--resume` continues it, on a CPU to the same bytes as without the
          interruption.
        - `--dry-run` prints the number of examples, epochs and trained parameters, and an estimate of the memory.
        - `loss.jsonl` in the output folder has every line of progress. `loss.png` is drawn if matplotlib is installed.

    Examples:
        dgemma-mlx train -m demo --data train.jsonl -o runs/adapter --steps 200 --dry-run
        dgemma-mlx train -m demo --data train.jsonl -o runs/adapter --steps 200
        dgemma-mlx generate -m demo --adapter runs/adapter "..."
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
    chosen = ModelOptions(model, adapter, cpu_dequantize=cpu_dequantize)
    loaded = load_model(Settings(), chosen, quiet, training=True, checked=True)
    run = open_run(loaded, examples, held_out, config)
    if run.left_out:
        print(f"dgemma-mlx: {run.left_out} of {len(examples)} examples leave no room for a canvas within "
              f"--max-length {max_length} and were left out", file=sys.stderr)  # fmt: skip
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
    """Train to the end. Raises `DgemmaError` (exit code 130) after Ctrl-C, when the run has been saved."""
    from dgemma_mlx.cli.train_log import open_log
    from dgemma_mlx.train.finetune import finetune

    steps = run.config.steps
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
    print(f"{plan['steps']:,} steps, {plan['epochs']:g} epochs; {plan['trained_parameters']:,} parameters trained",
          file=file)  # fmt: skip
    print(f"memory: about {size(memory['total'])} (estimated: weights {size(memory['weights'])}, gradients and "
          f"optimizer {size(memory['training'])}, activations {size(memory['activations'])})", file=file)  # fmt: skip
