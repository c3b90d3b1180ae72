"""The trainer of the built-in demo model: ``make demo-model``.

It builds the tokenizer, trains a small network from scratch on the synthetic tasks of ``dgemma_mlx.train.tasks``, and
writes a checkpoint with the tensor names of the published one. The small network has every part of DiffusionGemma:
sliding and full attention layers, both head dimensions, keys that serve as values, experts in parallel to a dense
branch, self-conditioning, and tied embeddings.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.generation.load import load
from dgemma_mlx.model.text import DiffusionGemma
from dgemma_mlx.text.chat import ChatTemplate, encode_chat
from dgemma_mlx.text.tokenizer import Tokenizer, load_tokenizer
from dgemma_mlx.train import demo_tokenizer
from dgemma_mlx.train.batches import Conversation, Part, batch_pair_at
from dgemma_mlx.train.export import export
from dgemma_mlx.train.loop import Log, TrainConfig, mean_weights, train
from dgemma_mlx.train.optimizer import make_optimizer
from dgemma_mlx.train.score import as_markdown, score_card
from dgemma_mlx.train.tasks import LAST_MIX, MIX, training_example

# Each process that `make demo-model` starts takes BATCH conversations for a step.
BATCH, SEED = 16, 0
ENDS = (18_000, 19_500, 21_000)  # the steps at which the learning rate has fallen
MIXES = (MIX, LAST_MIX, LAST_MIX)  # of the tasks, during each fall

CONFIG: dict[str, Any] = {
    "architectures": ["DiffusionGemmaForBlockDiffusion"],
    "model_type": "diffusion_gemma",
    "canvas_length": 32,
    "tie_word_embeddings": True,
    "vision_config": None,
    "dtype": "bfloat16",
    "text_config": {
        "model_type": "diffusion_gemma_text",
        "vocab_size": 768,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 32,
        "global_head_dim": 64,
        "sliding_window": 64,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": "vision",
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {
                "rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0
            },
        },
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
}


GENERATION: dict[str, Any] = {
    "bos_token_id": 2,
    "pad_token_id": 0,
    "eos_token_id": [1, 106, 50],
    "max_denoising_steps": 48,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
}


def new_model(seed: int) -> DiffusionGemma:
    """Return a demo network with random float32 weights."""
    mx.random.seed(seed)
    model = DiffusionGemma(ModelConfig.from_dict(CONFIG).text)
    mx.eval(model.parameters())
    return model


def sampler(
    tokenizer: Tokenizer, template: ChatTemplate, mix: Mapping[str, float]
) -> Callable[[random.Random], Conversation]:
    """Return a function that draws a training example from a mix of tasks and tokenizes it."""
    end = tokenizer.special_ids["<turn|>"]

    def sample(rng: random.Random) -> Conversation:
        example = training_example(rng, mix)
        prompt = encode_chat(tokenizer, template, list(example.messages))
        return prompt, [*tokenizer.encode(example.answer), end]

    return sample


def build(folder: Path, log: Log) -> None:
    """Train the demo model, starting from the last checkpoint in ``folder``, and export it to ``folder/model``.

    The weights are the mean of those at the ends of the falls of the learning rate. If ``mlx.launch`` has started
    several processes, all of them train and only the first one writes files.
    """
    out, group = folder / "model", mx.distributed.init()
    if group.rank() == 0:
        demo_tokenizer.build(out)
    mx.eval(mx.distributed.all_sum(mx.zeros(1)))  # wait until the first process has written the tokenizer
    tokenizer, template = load_tokenizer(out), ChatTemplate.load(out)
    model, pad_id = new_model(SEED), tokenizer.special_ids["<pad>"]
    samples = [sampler(tokenizer, template, mix) for mix in MIXES]

    def batch_pair(number: int) -> list[Part]:
        fall = bisect_right(ENDS[:-1], number // group.size())
        return batch_pair_at(number, samples[fall], BATCH, CONFIG["canvas_length"], pad_id, SEED)

    config = TrainConfig(steps=ENDS[-1], seed=SEED, mean_of=ENDS)
    train(model, make_optimizer(ENDS), batch_pair, pad_id, config, folder, log)
    if group.rank() == 0:
        model.load_weights(list(mean_weights(folder, ENDS).items()))
        export(model, CONFIG, GENERATION, out)


def score(folder: Path, prompts: int) -> None:
    """Print the score card of a checkpoint and write it to ``score_card.json`` in the checkpoint's folder."""
    scores = score_card(load(folder), prompts)
    (folder / "score_card.json").write_text(json.dumps([asdict(line) for line in scores], indent=2) + "\n")
    print(as_markdown(scores))


def main() -> None:
    """Train or score the demo model as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"),
                        help="folder of checkpoints and log; training resumes from it")  # fmt: skip
    parser.add_argument("--score", type=Path, help="score this checkpoint instead of training")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts of each task in the score card")
    arguments = parser.parse_args()
    if arguments.score:
        score(arguments.score, arguments.prompts)
        return
    folder: Path = arguments.run
    (folder / "model").mkdir(parents=True, exist_ok=True)
    started = time.time()
    with (folder / "log.jsonl").open("a") as log_file:

        def log(record: dict[str, Any]) -> None:
            line = json.dumps({**record, "minutes": round((time.time() - started) / 60, 1)})
            print(line, file=sys.stderr, flush=True)
            print(line, file=log_file, flush=True)

        build(folder, log)


if __name__ == "__main__":
    main()
