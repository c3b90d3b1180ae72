"""The trainer of the demo model's vision tower: ``make demo-vision``.

The text network is frozen: not a bit of it changes. The tower is trained on pictures that this repository draws
(``train.tasks.look``), in four stages.

1. ``see``: the tower alone, with two linear maps that are thrown away, learns to name the colour and the thing.
2. ``show``: vectors are learned that make the frozen network give the right answers: one for each colour, which stands
   in the even rows of a picture's soft tokens, one for each thing, in the odd rows, and one for each place.
3. ``fit``: the tower, with its projection, learns to write these vectors.
4. ``join``: tower and projection are trained together, through the frozen network, while two new linear maps keep the
   tower naming what it sees.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from dgemma_mlx.checkpoint.vision_config import VisionConfig
from dgemma_mlx.generation.load import load
from dgemma_mlx.generation.model import Model
from dgemma_mlx.json_text import parse_json, read_json
from dgemma_mlx.train.demo_tokenizer import CHAT_TEMPLATE
from dgemma_mlx.train.loop import restore, save
from dgemma_mlx.train.objective import ObjectiveConfig, block_diffusion_loss
from dgemma_mlx.train.optimizer import Muon, Schedule
from dgemma_mlx.train.pictures import Drawn, drawn, encode_pictures, questions, soft_tokens
from dgemma_mlx.train.score import as_markdown, picture_card
from dgemma_mlx.train.tasks.look import COLOURS, GRIDS, PATCH, THINGS, draw_scene
from dgemma_mlx.vision.tower import VisionTower

SEED = 0
STEPS = {"see": 3000, "show": 1500, "fit": 1000, "join": 2500}
BATCH = {"see": 64, "show": 16, "fit": 64, "join": 16}
NAMED, NAMING_WEIGHT = 40, 0.15  # of the stage join: pictures that are named in a step, and the weight of that loss
# Peak rates of Muon and of AdamW.
RATES = {"see": (0.02, 2e-3), "show": (0.0, 0.03), "fit": (0.005, 1e-3), "join": (0.005, 1e-3)}
_OBJECTIVE = ObjectiveConfig(causal_weight=0.0, balance_weight=0.0, full_noise=0.6, min_noise=0.4)
SHARD, INDEX = "model-vision.safetensors", "model.safetensors.index.json"
_LOG_EVERY, _SAVE_EVERY = 25, 100

VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "patch_size": PATCH,
    "pooling_kernel_size": 1,
    "position_embedding_size": 70,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "standardize": False,
    "use_clipped_linears": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
TOKENS = {"image_token_id": 102, "boi_token_id": 103, "eoi_token_id": 104, "vision_soft_tokens_per_image": 70}
PROCESSOR = {
    "image_processor": {
        "do_resize": True, "do_rescale": True, "do_normalize": False, "resample": 3, "rescale_factor": 1 / 255,
        "patch_size": VISION["patch_size"], "pooling_kernel_size": VISION["pooling_kernel_size"],
        "max_soft_tokens": TOKENS["vision_soft_tokens_per_image"],
    }
}  # fmt: skip

Loss = Callable[[random.Random, mx.array], tuple[mx.array, dict[str, mx.array]]]
Log = Callable[[dict[str, Any]], None]


def vision_config() -> VisionConfig:
    """Return the configuration of the demo model's tower."""
    config = VisionConfig.read({"vision_config": VISION, **TOKENS}, PROCESSOR)
    assert config is not None and config.problem is None
    return config


class Seeing(nn.Module):
    """A tower with linear maps from its soft tokens to colours and things.

    Attributes:
        tower: The tower.
        colours: Map to the logits of ``COLOURS``.
        things: Map to the logits of ``THINGS``.
    """

    def __init__(self, tower: VisionTower, width: int) -> None:
        super().__init__()
        self.tower = tower
        self.colours, self.things = (nn.Linear(width, len(names)) for names in (COLOURS, THINGS))

    def naming(self, pictures: Drawn) -> tuple[mx.array, dict[str, mx.array]]:
        """Return the loss of naming what pictures show, and the shares of right colours and of right things.

        Each soft token names it, and all of them together.
        """
        soft, total, right = encode_pictures(self.tower, pictures), mx.array(0.0), {}
        heads = {"colour": self.colours, "thing": self.things}
        for (name, head), label in zip(heads.items(), pictures.labels(), strict=True):
            logits = head(soft)  # (B, n, names)
            whole, each = logits.mean(axis=1), mx.broadcast_to(label[:, None], logits.shape[:2])
            total = total + nn.losses.cross_entropy(whole, label, reduction="mean")
            total = total + 0.5 * nn.losses.cross_entropy(logits, each, reduction="mean")
            right[name] = (whole.argmax(-1) == label).mean()
        return total, right


class Codes(nn.Module):
    """Vectors that show a colour and a thing to the text network.

    Attributes:
        colours: One vector for each of ``COLOURS``, (7, M), for the even rows of soft tokens.
        things: One vector for each of ``THINGS``, (21, M), for the odd rows.
        rows: One vector for each row of a picture's soft tokens, whatever it shows, (11, M).
        columns: One vector for each column, (11, M).
    """

    def __init__(self, text_width: int) -> None:
        super().__init__()
        longest = max(max(grid) for grid in GRIDS)
        sizes = {"colours": (0.7, len(COLOURS)), "things": (0.7, len(THINGS)), "rows": (0.5, longest),
                 "columns": (0.5, longest)}  # fmt: skip
        for name, (scale, count) in sizes.items():
            setattr(self, name, scale * mx.random.normal((count, text_width)))

    def __call__(self, pictures: Drawn) -> mx.array:
        """Return the sum of the vectors of each place of each picture, (B, n, M)."""
        colour, thing = pictures.labels()
        shown = mx.where(
            even_rows(pictures.grid)[:, None], self.colours[colour][:, None], self.things[thing][:, None]
        )
        summed: mx.array = shown + self.places(pictures.grid)
        return summed

    def places(self, grid: tuple[int, int]) -> mx.array:
        """Return the vectors of the places of a grid, (n, M)."""
        place = mx.arange(grid[0] * grid[1])
        return self.rows[place // grid[1]] + self.columns[place % grid[1]]


def even_rows(grid: tuple[int, int]) -> mx.array:
    """Return which places of a grid are in an even row, (n,) bool."""
    return mx.arange(grid[0] * grid[1]) // grid[1] % 2 == 0


def schedule(peak: float, steps: int) -> Schedule:
    """Return a rate that rises to ``peak`` and then falls to a hundredth of it, linearly."""
    warmup = min(50, steps // 4)
    joined: Schedule = optim.join_schedules(
        [optim.linear_schedule(peak / warmup, peak, warmup), optim.linear_schedule(peak, peak / 100, steps - warmup)],
        [warmup],
    )
    return joined


def train_stage(stage: str, module: nn.Module, loss: Loss, steps: int, folder: Path, log: Log) -> None:
    """Train the parameters of a module that are not frozen for ``steps`` steps, and save them to ``folder``.

    An interrupted stage continues from its last checkpoint. ``loss`` takes the step's random numbers and its random
    key, and returns the loss and values for the log.
    """
    muon_rate, adam_rate = RATES[stage]
    muon = Muon(schedule(muon_rate, steps), weight_decay=0.02)
    adamw = optim.AdamW(schedule(adam_rate, steps), betas=[0.9, 0.98], weight_decay=0.01, bias_correction=True)
    optimizer = optim.MultiOptimizer([muon, adamw], [_is_hidden_matrix])
    step = restore(folder / stage, module, optimizer, steps)  # type: ignore[arg-type]  # any module
    gradient = nn.value_and_grad(module, loss)
    sums: dict[str, float] = {}
    began = time.perf_counter()
    while step < steps:
        (_, values), gradients = gradient(random.Random(f"{SEED}/{stage}/{step}"), mx.random.key((SEED << 32) + step))
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(module, gradients)
        mx.eval(module.trainable_parameters(), optimizer.state, values)
        step += 1
        sums = {name: sums.get(name, 0.0) + value.item() for name, value in values.items()}
        if step % _LOG_EVERY == 0:
            seconds, began = time.perf_counter() - began, time.perf_counter()
            means = {name: round(total / _LOG_EVERY, 4) for name, total in sums.items()}
            log({"stage": stage, "step": step, **means, "seconds_per_step": round(seconds / _LOG_EVERY, 3)})
            sums = {}
        if step % _SAVE_EVERY == 0 or step == steps:
            save(folder / stage, module, optimizer, step)  # type: ignore[arg-type]


def _is_hidden_matrix(path: str, parameter: mx.array) -> bool:
    """Return whether Muon trains a parameter: a matrix of the tower."""
    return parameter.ndim == 2 and path.endswith("weight") and "proj" in path


def see(config: VisionConfig, steps: int, folder: Path, log: Log) -> VisionTower:
    """Train the tower alone, with the identity as its projection, and return it."""
    mx.random.seed(SEED)
    tower = VisionTower(config, config.hidden_size)
    tower.embedding_projection.weight = mx.eye(config.hidden_size)
    tower.embedding_projection.freeze()
    seeing = Seeing(tower, config.hidden_size)

    def loss(rng: random.Random, _: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        total, right = seeing.naming(drawn(rng, "train", BATCH["see"]))
        return total, {"loss": total, **right}

    train_stage("see", seeing, loss, steps, folder, log)
    return tower


def answers(model: Model, key: mx.array, features: mx.array, rng: random.Random, pictures: Drawn) -> mx.array:
    """Return the loss of the frozen network's answers to questions about pictures with features (B, n, M)."""
    pad_id = model.tokenizer.special_ids["<pad>"]
    batch, rows = questions(rng, pictures.scenes, features.shape[1], model.tokenizer, model.template)
    loss, _ = block_diffusion_loss(
        model.network, batch, _OBJECTIVE, pad_id, key, rng.random() < 0.3, soft_tokens(features, rows)
    )
    return loss


def show(model: Model, steps: int, folder: Path, log: Log) -> Codes:
    """Learn the vectors that the frozen network understands, and return them."""
    mx.random.seed(SEED)
    codes = Codes(model.config.text.hidden_size)

    def loss(rng: random.Random, key: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        scenes = [draw_scene(rng, "train") for _ in range(BATCH["show"])]
        pictures = Drawn(scenes, mx.zeros(0), rng.choice(GRIDS))
        total = answers(model, key, codes(pictures), rng, pictures)
        return total, {"loss": total}

    train_stage("show", codes, loss, steps, folder, log)
    return codes


def fit(seen: VisionTower, codes: Codes, steps: int, folder: Path, log: Log) -> VisionTower:
    """Return a tower with a projection that is trained, from a tower that sees, to write the vectors of ``show``."""
    mx.random.seed(SEED)
    tower = VisionTower(vision_config(), codes.colours.shape[-1])
    weights: Any = tree_flatten(seen.parameters())
    tower.load_weights([(path, array) for path, array in weights if "projection" not in path], strict=False)
    tower.embedding_projection.weight = _least_squares(seen, codes)

    def loss(rng: random.Random, _: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        pictures = drawn(rng, "train", BATCH["fit"])
        wanted, written = codes(pictures), encode_pictures(tower, pictures)
        error = mx.square(written - wanted).mean() / mx.square(wanted).mean()
        shown, even = written - codes.places(pictures.grid), even_rows(pictures.grid)
        values, total = {"error": error}, error
        # The vector that a place writes must also be nearer to its own than to those of other colours or things.
        for name, vectors, label, places in zip(
            ("colour", "thing"), (codes.colours, codes.things), pictures.labels(), (even, ~even), strict=True
        ):
            logits = 0.1 * (shown @ vectors.T - mx.square(vectors).sum(axis=-1) / 2)
            each = mx.broadcast_to(label[:, None], logits.shape[:2])
            wrong = nn.losses.cross_entropy(logits, each)
            total = total + (wrong * places).sum() / (places.sum() * len(label))
            values[name] = ((logits.argmax(-1) == each) * places).sum() / (places.sum() * len(label))
        return total, {"loss": total, **values}

    codes.freeze()
    train_stage("fit", tower, loss, steps, folder, log)
    return tower


def _least_squares(seen: VisionTower, codes: Codes, batches: int = 20) -> mx.array:
    """Return the projection (M, H) of features that comes nearest to the vectors of ``show``."""
    squares: Any = 0.0
    products: Any = 0.0
    for number in range(batches):
        pictures = drawn(random.Random(f"{SEED}/least squares/{number}"), "train", BATCH["fit"])
        features, wanted = encode_pictures(seen, pictures), codes(pictures)
        a, b = (np.array(array.reshape(-1, array.shape[-1]), np.float64) for array in (features, wanted))
        squares, products = squares + a.T @ a, products + a.T @ b
    ridge = 1e-4 * np.trace(squares) / len(squares) * np.eye(len(squares))
    return mx.array(np.linalg.solve(squares + ridge, products).T.astype(np.float32))


def join(model: Model, tower: VisionTower, steps: int, folder: Path, log: Log) -> None:
    """Train tower and projection together, through the frozen network, while the tower goes on naming pictures."""
    mx.random.seed(SEED)
    seeing = Seeing(tower, model.config.text.hidden_size)

    def loss(rng: random.Random, key: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        pictures = drawn(rng, "train", BATCH["join"])
        answering = answers(model, key, encode_pictures(tower, pictures), rng, pictures)
        naming, right = seeing.naming(drawn(rng, "train", NAMED))
        return answering + NAMING_WEIGHT * naming, {"loss": answering, **right}

    train_stage("join", seeing, loss, steps, folder, log)


def export(tower: VisionTower, source: Path, folder: Path) -> None:
    """Write a copy of the checkpoint ``source`` with the tower to ``folder``.

    The tower's weights are a file of their own, so that the files of the text network stay as they are.
    """
    shutil.copytree(source, folder, dirs_exist_ok=True)
    parameters: Any = tree_flatten(tower.parameters())
    tensors = {_source_name(path): array.astype(mx.bfloat16) for path, array in parameters}
    mx.save_safetensors(str(folder / SHARD), tensors, metadata={"format": "mlx"})
    config = {**read_json(source / "config.json"), "vision_config": VISION, **TOKENS}
    text = [mx.load(str(path)) for path in sorted(folder.glob("*.safetensors"))]
    stored: Any = {name: array for each in text for name, array in each.items()}  # type: ignore[union-attr]
    old = read_json(source / INDEX)["weight_map"]
    index = {
        "metadata": {
            "total_size": sum(array.nbytes for array in stored.values()),
            "total_parameters": sum(array.size for array in stored.values()),
        },
        "weight_map": {**old, **dict.fromkeys(sorted(tensors), SHARD)},
    }
    for name, value in (("config.json", config), (INDEX, index), ("processor_config.json", PROCESSOR)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _source_name(path: str) -> str:
    """Return the name that a parameter of the tower has in a published checkpoint."""
    part = "embed_vision" if path.startswith("embedding_projection") else "vision_tower"
    return f"model.encoder.{part}.{path}"


def score(folder: Path, pictures: int) -> None:
    """Print how many questions about held-out pictures a checkpoint answers, and add it to its ``score_card.json``."""
    scores = picture_card(load(folder), pictures)
    path = folder / "score_card.json"
    card = [line for line in parse_json(path.read_bytes()) if not line["task"].startswith("picture: ")]
    path.write_text(json.dumps([*card, *map(asdict, scores)], indent=2) + "\n", encoding="utf-8")
    print(as_markdown(scores))


def main() -> None:
    """Train or score the demo model's tower as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo-vision"),
                        help="folder of checkpoints and log; training resumes from it")  # fmt: skip
    parser.add_argument("--model", default="demo", help="the checkpoint whose text network reads the pictures")
    parser.add_argument("--score", type=Path, help="score this checkpoint instead of training")
    parser.add_argument("--pictures", type=int, default=200, help="held-out pictures of each topic in the score card")
    for stage, count in STEPS.items():
        parser.add_argument(f"--{stage}", type=int, default=count, help=f"updates of the weights in the stage {stage}")
    arguments = parser.parse_args()
    if arguments.score:
        score(arguments.score, arguments.pictures)
        return
    folder: Path = arguments.run
    folder.mkdir(parents=True, exist_ok=True)
    began = time.time()

    def log(record: dict[str, Any]) -> None:
        line = json.dumps({**record, "minutes": round((time.time() - began) / 60, 1)})
        print(line, file=sys.stderr, flush=True)
        with (folder / "log.jsonl").open("a") as file:
            print(line, file=file)

    model = load(arguments.model, dtype="float32")
    model.network.freeze()
    model.network.train()
    seen = see(vision_config(), arguments.see, folder, log)
    codes = show(model, arguments.show, folder, log)
    tower = fit(seen, codes, arguments.fit, folder, log)
    join(model, tower, arguments.join, folder, log)
    export(tower, model.folder, folder / "model")


if __name__ == "__main__":
    main()
