"""Fine-tuning of a loaded model on a fixed set of conversations: an adapter on frozen weights, or all weights.

The objective is the one that trains the demo model, as published for DiffusionGemma: see ``objective``.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

import mlx.core as mx
import mlx.optimizers as optim

from dgemma_mlx.checkpoint.output import check_apart, check_name
from dgemma_mlx.checks import is_whole, shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import is_clutter, locked_folder, write_whole
from dgemma_mlx.generation.api import generate_batch
from dgemma_mlx.generation.model import Model
from dgemma_mlx.json_text import parse_json, read_json
from dgemma_mlx.model.adapter import AdapterConfig, attach, unfreeze
from dgemma_mlx.model.adapter_file import adapter_digest, save_adapter
from dgemma_mlx.train.batches import Conversation, Part, canvas_batch, parts_at
from dgemma_mlx.train.dataset import Example, Limited, encode_all, visible_answer
from dgemma_mlx.train.fuse import write_trained
from dgemma_mlx.train.gradient_checkpointing import checkpointed
from dgemma_mlx.train.loop import MAX_SEED, Log, Record, TrainConfig, last_step, train
from dgemma_mlx.train.objective import ObjectiveConfig, block_diffusion_loss
from dgemma_mlx.train.optimizer import make_finetune_optimizer, warmed_up

OPTIMIZERS, SCHEDULES = ("adamw", "muon"), ("cosine", "linear", "constant")
RUN, LOG = "run.json", "loss.jsonl"
_BEFORE_A_RUN = ("tensorboard", f".{RUN}.*")  # a dashboard opens before the run, and a run may be killed at its start
# Settings that may differ when a run is resumed: the learning rate, for runs that diverged, and what changes no weight.
_CHANGEABLE = ("learning_rate", "log_every", "save_every", "valid_every", "valid_answers")
_LARGEST = 3e38  # of a number that becomes a float32
_RATES = {"adamw": 1e-4, "muon": 1e-2}
_MIN_NOISE = 0.001
_MAX_VALIDATED = 64  # maximum number of conversations for the validation loss


@dataclass(frozen=True)
class FinetuneConfig:
    """The settings of a fine-tuning run. A resumed run needs the same model and data, and the same settings except
    for the learning rate, and for how often the run logs, saves and validates.

    Raises ``DgemmaError`` (exit code 2) if a value is out of range or unknown.

    Attributes:
        steps: Number of updates of the weights.
        batch_size: Number of examples in a batch.
        accumulate: Number of batches whose gradients are averaged for one step.
        max_length: Maximum number of tokens of prompt and answer; later canvases of the answer are not trained.
        learning_rate: Peak learning rate. None takes 1e-4 for adamw and 1e-2 for muon.
        optimizer: "adamw", or "muon" for matrices with AdamW for the other parameters.
        schedule: The learning rate after the warm-up: "cosine", "linear" or "constant".
        warmup: Number of steps over which the learning rate rises linearly to its peak.
        weight_decay: Decoupled weight decay.
        clip_norm: Maximum norm of the gradients; larger gradients are scaled down.
        causal_weight: Weight of the encoder's next-token loss. 0 skips that loss and saves its time.
        seed: Seed of the data order, the noise, the dropout and a new adapter; at most 2^32 - 1.
        checkpoint_layers: Recompute layers for their gradients, which takes less memory and more time.
        full: Train all weights instead of an adapter.
        adapter: Shape of the adapter. With ``full``, only its ``canvas_length`` counts.
        log_every: Number of steps between two records in the log.
        save_every: Number of steps between two checkpoints.
        valid_every: Number of steps between two validations; 0 validates only after the last step.
        valid_answers: Number of validation examples that the model answers for the exact match.
    """

    steps: int = 1000
    batch_size: int = 4
    accumulate: int = 1
    max_length: int = 2048
    learning_rate: float | None = None
    optimizer: str = "adamw"
    schedule: str = "cosine"
    warmup: int = 100
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    causal_weight: float = 1.0
    seed: int = 0
    checkpoint_layers: bool = False
    full: bool = False
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    log_every: int = 10
    save_every: int = 100
    valid_every: int = 200
    valid_answers: int = 8

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1), ("batch_size", 1), ("accumulate", 1), ("max_length", 1), ("warmup", 0), ("log_every", 1),
            ("save_every", 1), ("valid_every", 0), ("valid_answers", 0), ("weight_decay", 0), ("causal_weight", 0),
            ("seed", 0), ("clip_norm", 0), ("learning_rate", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise DgemmaError(f"{name} must be at least {least}, not {value}", "Choose a larger number.", 2)
            if value is not None and not value <= (MAX_SEED if is_whole(value) else _LARGEST):
                raise DgemmaError(f"{name} is too large: {shown(value)}", f"The largest number is {MAX_SEED}.", 2)
        for name, choices in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                message = f"{name} cannot be {shown(getattr(self, name))}"
                raise DgemmaError(message, f"It is one of {', '.join(choices)}.", 2)
        if self.checkpoint_layers and self.adapter.dropout:
            raise DgemmaError(
                "gradient checkpointing cannot be combined with dropout",
                "A recomputed layer must give the same result; set the dropout to 0.", 2,
            )

    @property
    def objective(self) -> ObjectiveConfig:
        """The training objective of this run.

        A padding position counts as much as a text position. The routers are trained only when all weights are.
        """
        return ObjectiveConfig(
            pad_weight=1.0, causal_weight=self.causal_weight, balance_weight=0.01 if self.full else 0.0,
            full_noise=0.0, min_noise=_MIN_NOISE,
        )  # fmt: skip

    def make_optimizer(self) -> optim.Optimizer:
        """Return a new optimizer with the learning-rate schedule of this run."""
        rate = _RATES[self.optimizer] if self.learning_rate is None else self.learning_rate
        schedule = partial(warmed_up, self.schedule, steps=self.steps, warmup=min(self.warmup, self.steps - 1))
        return make_finetune_optimizer(self.optimizer, schedule, rate, self.weight_decay)


@dataclass(frozen=True)
class Validation:
    """Held-out examples, in both forms that a validation needs.

    Attributes:
        examples: The examples; some of them are answered for the exact match.
        conversations: The same examples as token ids, for the denoising loss. Examples that are too long are missing.
        limited: What ``config.max_length`` has taken from the examples.
    """

    examples: Sequence[Example]
    conversations: Sequence[Conversation]
    limited: Limited = field(default_factory=Limited)


@dataclass(frozen=True)
class FinetuneRun:
    """A model that is ready to be trained, with its tokenized data. ``open_run`` makes it.

    Attributes:
        model: The model, whose network has an adapter or unfrozen weights.
        config: The settings of the run.
        conversations: The training examples as token ids.
        limited: What ``config.max_length`` has taken from the training examples.
        validation: The held-out examples, or None to train without validation.
    """

    model: Model
    config: FinetuneConfig
    conversations: Sequence[Conversation]
    limited: Limited = field(default_factory=Limited)
    validation: Validation | None = None


def open_run(
    model: Model, examples: Sequence[Example], valid: Sequence[Example], config: FinetuneConfig
) -> FinetuneRun:
    """Prepare a model for training and tokenize its data.

    Args:
        model: A loaded model. Its network is changed: it gets an adapter, or its weights are unfrozen.
        examples: Training examples.
        valid: Validation examples; empty for a run without validation.
        config: The settings of the run.

    Raises:
        DgemmaError: If weights to be trained are packed, or if none of the examples fits into ``config.max_length``.
    """
    model = prepare(model, config)
    conversations, limited = encode_all(model, examples, config.max_length)
    validation = Validation(valid, *encode_all(model, valid, config.max_length)) if valid else None
    return FinetuneRun(model, config, conversations, limited, validation)


def prepare(model: Model, config: FinetuneConfig) -> Model:
    """Attach a new adapter to a model's network, or unfreeze the adapter that it has, or all weights with ``full``.

    Returns the model with the run's canvas length. Raises ``DgemmaError`` if all weights are to be trained and some of
    them are packed.
    """
    if config.full:
        packed = [name for name, module in model.network.named_modules() if "scales" in module]
        if packed:
            raise DgemmaError(
                f"{model.name} has packed weights, which cannot be trained", "Leave out --full to train an adapter."
            )
        model.network.unfreeze()
    elif model.adapter is None:
        mx.random.seed(config.seed)
        attach(model.network, config.adapter)
    else:
        unfreeze(model.network)
    model.network.wrap_layers(checkpointed if config.checkpoint_layers else None)
    length = config.adapter.canvas_length
    return model if length is None else replace(model, config=replace(model.config, canvas_length=length))


def finetune(
    run: FinetuneRun, out: Path, log: Log, *, resume: bool = False, stopped: Callable[[], bool] = lambda: False
) -> int:
    """Train, and write the adapter to a folder, or the whole checkpoint if all weights are trained.

    The folder also gets ``loss.jsonl`` (the log), ``run.json`` (the settings) and ``checkpoint/`` (the state from which
    a run resumes).

    Args:
        run: The prepared run.
        out: The folder to write to.
        log: Called with every record of the log.
        resume: Continue the run in ``out``.
        stopped: Asked after every step. If it returns True, the run saves its state, writes its result, and ends.

    Returns:
        The number of steps that are done, counting those before a resumption.

    Raises:
        DgemmaError: If ``out`` must not be written (see ``check_run_folder``), if it holds a different run, if another
            process is training in it, if it cannot be read or written, or if training diverges: the loss, the
            gradients or the weights are not finite.
    """
    model, config = run.model, run.config
    pad_id, canvas_length = model.config.pad_token_id, model.config.canvas_length

    def parts(number: int) -> list[Part]:
        return parts_at(
            number, run.conversations, config.batch_size, config.accumulate, canvas_length, pad_id, config.seed,
            causal=config.causal_weight > 0,
        )  # fmt: skip

    validate = None if run.validation is None else partial(_validate, model, config, run.validation)
    loop = TrainConfig(
        config.steps, config.seed, config.clip_norm, config.log_every, config.save_every, config.valid_every,
        objective=config.objective,
    )  # fmt: skip
    with _opened(out, run, resume) as file:

        def log_twice(record: Record) -> None:
            print(json.dumps(record), file=file, flush=True)
            log(record)

        steps = train(model.network, config.make_optimizer(), parts, pad_id, loop, out, log_twice, validate=validate,
                      stopped=stopped)  # fmt: skip
        model.network.eval()
        model.network.wrap_layers(None)
        if config.full:
            write_trained(model, out)
        else:
            save_adapter(model.network, config.adapter, out, model.name)
    return steps


def check_run_folder(out: Path, model: Model, resume: bool) -> None:
    """Raise ``DgemmaError`` (exit code 2) unless training may write to the folder ``out``.

    The folder must hold a run if ``resume`` is set, and be missing or empty otherwise. See also ``check_apart``.
    """
    check_name(out)
    check_apart(out, [model.folder] if model.adapter is None else [model.folder, model.adapter])
    if (out / RUN).exists():
        if not resume:
            raise DgemmaError(
                f"{out} already holds a run", "Continue it with --resume, or name another folder with -o.", exit_code=2
            )
        return
    if resume:
        raise DgemmaError(f"{out} holds no run to resume", "Leave out --resume to start a new run.", exit_code=2)
    if out.exists() and not out.is_dir():
        raise DgemmaError(f"{out} is not a folder", "Name another folder with -o.", exit_code=2)
    names = sorted(path.name for path in out.iterdir() if not is_clutter(path)) if out.exists() else []
    if other := [name for name in names if not any(fnmatch(name, pattern) for pattern in _BEFORE_A_RUN)]:
        raise DgemmaError(
            f"{out} is not empty: it holds {shown(other[0])}", "Name a new folder with -o.", exit_code=2
        )


@contextmanager
def _opened(out: Path, run: FinetuneRun, resume: bool) -> Iterator[TextIO]:
    """Create the folder and record the run in it, or check that it holds the same run; lock it, and yield its log.

    Records that were logged after the last checkpoint are dropped, because the resumed run logs these steps again.
    """
    check_run_folder(out, run.model, resume)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(out))
            check_run_folder(out, run.model, resume)  # again: another process may have trained until now
            _record_run(out, run)
            log = stack.enter_context((out / LOG).open("a", encoding="utf-8"))
        except OSError as error:
            raise DgemmaError(
                f"cannot write to {out}: {error.strerror}", "Name another folder with -o.", exit_code=2
            ) from None
        yield log


def _record_run(out: Path, run: FinetuneRun) -> None:
    """Write the settings of a new run, or compare them with those of the run in the folder."""
    data = sha256(repr(list(run.conversations)).encode()).hexdigest()
    start = None if run.model.adapter is None else adapter_digest(run.model.adapter)
    record = json.loads(json.dumps({"model": run.model.name, "start": start, "data": data, **asdict(run.config)}))
    path = out / RUN
    if not path.exists():
        write_whole(path, json.dumps(record, indent=2) + "\n")
        return
    before = read_json(path)
    if different := [name for name in record if before.get(name) != record[name] and name not in _CHANGEABLE]:
        raise DgemmaError(
            f"the run in {out} was started with other values of {', '.join(different)}",
            "Give the same options as before, or name another folder with -o.", 2,
        )
    _drop_log_after(out / LOG, last_step(out))


def read_log(path: Path) -> list[Record]:
    """Return the records of a log file. A missing file has none; a last line that a crash has cut off is left out.

    Raises ``DgemmaError`` if the file cannot be read, or if another line is not a record: an object of numbers with a
    "step".
    """
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DgemmaError(f"cannot read {path}: {error.strerror}", "Check its permissions.") from None
    records: list[Record] = []
    for number, line in enumerate(lines[:-1], 1):  # a complete line ends with a line feed
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if not (isinstance(record, dict) and is_whole(record.get("step")) and all(map(_is_number, record.values()))):
            raise DgemmaError(f"{path}, line {number} is not a record of a log", "Remove the line.")
        records.append(record)
    return records


def _is_number(value: Any) -> bool:
    """Return whether the value is a finite number."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _drop_log_after(path: Path, step: int) -> None:
    """Remove the records of steps after ``step`` from a log file."""
    kept = [record for record in read_log(path) if record["step"] <= step]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))


def _validate(model: Model, config: FinetuneConfig, validation: Validation) -> Record:
    """Return a log record of the validation loss and, if some examples ask something, of the exact match.

    "valid_loss" is the denoising loss (nats per token) on the same canvases with the same noise every time.
    "exact_match" is the share of answers that equal those of the examples, apart from surrounding white space. Only
    examples without tools are asked, and only the visible text of an answer counts.
    """
    model.network.eval()
    canvas, pad_id = model.config.canvas_length, model.config.pad_token_id
    conversations = validation.conversations[:_MAX_VALIDATED]
    objective = ObjectiveConfig(pad_weight=1.0, causal_weight=0, balance_weight=0, full_noise=0, min_noise=_MIN_NOISE)
    losses = []
    rng = random.Random("validation")
    for start in range(0, len(conversations), config.batch_size):
        group = conversations[start : start + config.batch_size]
        batch = canvas_batch(group, canvas, pad_id, rng, causal=False)
        loss, _ = block_diffusion_loss(model.network, batch, objective, pad_id, mx.random.key(start), False)
        losses.append((float(loss.item()), len(group)))  # type: ignore[arg-type]
    rows = sum(count for _, count in losses)
    record: dict[str, Any] = {"valid_loss": round(sum(loss * count for loss, count in losses) / rows, 4)}
    asked = [e for e in validation.examples[: config.valid_answers] if e.messages and not e.tools]
    if asked:
        most = max(len(model.tokenizer.encode(example.answer)) for example in asked) + canvas
        answers = generate_batch(
            model, [example.messages for example in asked], max_tokens=most, seeds=list(range(len(asked)))
        )
        right = sum(
            done.text.strip() == visible_answer(model, e).strip() for done, e in zip(answers, asked, strict=True)
        )
        record["exact_match"] = round(right / len(asked), 4)
    return record
