"""Fine-tuning a loaded model on a set of conversations: an adapter on frozen weights, or all weights.

The objective is that of the demo model's training, as it was published for DiffusionGemma: see ``objective``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from dgemma_mlx.checkpoint.config import read_json
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import write_whole
from dgemma_mlx.generation.api import generate_batch
from dgemma_mlx.generation.model import Model
from dgemma_mlx.model.adapter import AdapterConfig, attach, unfreeze
from dgemma_mlx.model.adapter_file import adapter_digest, save_adapter
from dgemma_mlx.train.checkpointing import checkpointed
from dgemma_mlx.train.data import Conversation, Part, canvas_batch, parts_at
from dgemma_mlx.train.dataset import Example, encode_all
from dgemma_mlx.train.fuse import write_trained
from dgemma_mlx.train.loop import Log, Record, TrainConfig, train
from dgemma_mlx.train.objective import ObjectiveConfig, block_diffusion_loss
from dgemma_mlx.train.optimizer import make_finetune_optimizer, warmed_up

OPTIMIZERS, SCHEDULES = ("adamw", "muon"), ("cosine", "linear", "constant")
RUN, LOG = "run.json", "loss.jsonl"
_RATES = {"adamw": 1e-4, "muon": 1e-2}
_MIN_NOISE = 0.001
_VALIDATED = 64  # conversations at most, for the denoising loss


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that a run depends on beside model and data; the same again resumes it."""

    steps: int = 1000
    batch_size: int = 4
    accumulate: int = 1
    """batches whose gradients are summed for a step"""
    max_length: int = 2048
    """tokens of prompt and answer; canvases behind are not trained"""
    learning_rate: float | None = None
    """at its peak; None: 1e-4 for adamw, 1e-2 for muon"""
    optimizer: str = "adamw"
    schedule: str = "cosine"
    warmup: int = 100
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    causal_weight: float = 1.0
    """of the encoder's next-token loss; 0 does without, in less time"""
    seed: int = 0
    checkpoint_layers: bool = False
    """work a layer out again for its gradient: less memory, more time"""
    full: bool = False
    """train all weights, not an adapter"""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    log_every: int = 10
    save_every: int = 100
    valid_every: int = 200
    valid_answers: int = 8
    """validation examples that are answered, for the exact match"""

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1), ("batch_size", 1), ("accumulate", 1), ("max_length", 1), ("warmup", 0), ("log_every", 1),
            ("save_every", 1), ("valid_every", 0), ("valid_answers", 0), ("weight_decay", 0), ("causal_weight", 0),
            ("seed", 0), ("clip_norm", 0), ("learning_rate", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise DgemmaError(f"{name} must be at least {least}, not {value}", exit_code=2)
        for name, choices in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                raise DgemmaError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}", "", 2)
        if self.checkpoint_layers and self.adapter.dropout:
            raise DgemmaError("gradient checkpointing goes without dropout", "A layer must come out the same twice.", 2)

    @property
    def objective(self) -> ObjectiveConfig:
        """A padding position counts as much as any other, the routers learn with all weights only."""
        return ObjectiveConfig(
            pad_weight=1.0, causal_weight=self.causal_weight, balance_weight=0.01 if self.full else 0.0,
            full_noise=0.0, min_noise=_MIN_NOISE,
        )  # fmt: skip

    def make_optimizer(self) -> optim.Optimizer:
        rate = _RATES[self.optimizer] if self.learning_rate is None else self.learning_rate
        schedule = partial(warmed_up, self.schedule, steps=self.steps, warmup=min(self.warmup, self.steps - 1))
        return make_finetune_optimizer(self.optimizer, schedule, rate, self.weight_decay)


@dataclass(frozen=True)
class FinetuneRun:
    """A model that is ready to be trained, and the tokenized examples; made by ``open_run``."""

    model: Model
    config: FinetuneConfig
    conversations: Sequence[Conversation]
    left_out: int = 0
    """examples that have no room for a canvas within ``max_length``"""
    valid: Sequence[Example] = ()
    valid_conversations: Sequence[Conversation] = ()


def open_run(
    model: Model, examples: Sequence[Example], valid: Sequence[Example], config: FinetuneConfig
) -> FinetuneRun:
    """Prepares a model and its data. ``DgemmaError`` where weights to be trained are packed, or no example fits."""
    model = prepare(model, config)
    conversations, left_out = encode_all(model, examples, config.max_length)
    held_out = encode_all(model, valid, config.max_length)[0] if valid else []
    return FinetuneRun(model, config, conversations, left_out, valid, held_out)


def prepare(model: Model, config: FinetuneConfig) -> Model:
    """Puts a new adapter on the model's network, where it has none, or unfreezes it; the model that comes back has the
    canvas length."""
    if config.full:
        packed = [name for name, module in model.network.named_modules() if "scales" in module]
        if packed:
            raise DgemmaError(
                f"packed weights cannot be trained, and {model.name} has some", "Train an adapter: leave out --full.",
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
    """Trains, and writes the adapter (``full``: the checkpoint) to ``out``; returns the steps done.

    Beside it stand ``loss.jsonl``, ``run.json`` and, to go on from, ``checkpoint/``. When ``stopped``, what there is
    by then is written. ``DgemmaError`` where ``out`` holds another run, or this one and not ``resume``.
    """
    model, config = run.model, run.config
    _open_folder(out, run, resume)
    pad_id, canvas_length = model.config.pad_token_id, model.config.canvas_length

    def parts(number: int) -> list[Part]:
        return parts_at(
            number, run.conversations, config.batch_size, config.accumulate, canvas_length, pad_id, config.seed,
            causal=config.causal_weight > 0,
        )  # fmt: skip

    validate = partial(_validate, run) if run.valid_conversations else None
    loop = TrainConfig(
        config.steps, config.seed, config.clip_norm, config.log_every, config.save_every, config.valid_every,
        objective=config.objective,
    )  # fmt: skip
    with (out / LOG).open("a", encoding="utf-8") as file:

        def both(record: Record) -> None:
            print(json.dumps(record), file=file, flush=True)
            log(record)

        steps = train(model.network, config.make_optimizer(), parts, pad_id, loop, out, both, validate=validate,
                      stopped=stopped)  # fmt: skip
    model.network.eval()
    model.network.wrap_layers(None)
    if config.full:
        write_trained(model, out)
    else:
        save_adapter(model.network, config.adapter, out, model.name)
    return steps


def _open_folder(out: Path, run: FinetuneRun, resume: bool) -> None:
    """Makes the folder and notes what is run there, or checks that it is the same; drops what was logged after the
    last checkpoint, as it will be again."""
    data = sha256(repr(list(run.conversations)).encode()).hexdigest()
    start = None if run.model.adapter is None else adapter_digest(run.model.adapter)
    record = json.loads(json.dumps({"model": run.model.name, "start": start, "data": data, **asdict(run.config)}))
    path = out / RUN
    if path.exists():
        before = read_json(path)
        if not resume:
            raise DgemmaError(
                f"{out} holds a run already", "Go on with it: --resume. Or name another folder with -o.", exit_code=2
            )
        if other := [name for name in record if before.get(name) != record[name]]:
            raise DgemmaError(
                f"the run in {out} had another {', '.join(other)}", "Give the same options, or another folder.", 2
            )
        _drop_log_after(out / LOG, last_step(out))
        return
    if resume:
        raise DgemmaError(f"{out} holds no run to go on with", "Leave out --resume.", exit_code=2)
    try:
        write_whole(path, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise DgemmaError(f"cannot write to {out}: {error.strerror}", exit_code=2) from None


def last_step(out: Path) -> int:
    """Of the run's last checkpoint; 0 without one."""
    states = (out / name / "state.json" for name in ("checkpoint", "checkpoint.old"))
    return next((int(read_json(state)["step"]) for state in states if state.exists()), 0)


def read_log(path: Path) -> list[Record]:
    """The records of a log; one that a crash has cut off is left out."""
    records: list[Record] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _drop_log_after(path: Path, step: int) -> None:
    kept = [record for record in read_log(path) if record["step"] <= step]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))


def _validate(run: FinetuneRun) -> Record:
    """The denoising loss on the same canvases with the same noise every time, and the share of answers that are
    those of the examples, to the letter."""
    model, config = run.model, run.config
    model.network.eval()
    canvas, pad_id = model.config.canvas_length, model.config.pad_token_id
    conversations, examples = run.valid_conversations[:_VALIDATED], run.valid[: config.valid_answers]
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
    asked = [example for example in examples if example.messages]
    if asked:
        most = max(len(model.tokenizer.encode(example.answer)) for example in asked) + canvas
        answers = generate_batch(
            model, [example.messages for example in asked], max_tokens=most, seeds=list(range(len(asked)))
        )
        right = sum(done.text.strip() == e.answer.strip() for done, e in zip(answers, asked, strict=True))
        record["exact_match"] = round(right / len(asked), 4)
    return record
