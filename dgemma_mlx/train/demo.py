"""Builds the demo model from nothing: ``make demo-model``.

Tokenizer, training on the synthetic tasks of ``dgemma_mlx.train.tasks``, and a checkpoint under the names of
the published one. The sizes keep everything DiffusionGemma has: sliding and full layers, both head sizes,
K = V, experts beside a dense branch, self-conditioning, tied embeddings.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.generation.api import load
from dgemma_mlx.model.text import DiffusionGemma
from dgemma_mlx.text.chat import ChatTemplate, encode_chat
from dgemma_mlx.text.tokenizer import Tokenizer, load_tokenizer
from dgemma_mlx.train import demo_tokenizer
from dgemma_mlx.train.data import Conversation, Part, batch_pair_at
from dgemma_mlx.train.export import export
from dgemma_mlx.train.loop import Log, TrainConfig, mean_weights, train
from dgemma_mlx.train.optimizer import make_optimizer
from dgemma_mlx.train.score import as_markdown, score_card
from dgemma_mlx.train.tasks import training_example

STEPS, BATCH, SEED = 20_000, 16, 0  # BATCH for each of the processes that `make demo-model` starts

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
    """A freshly initialised demo model, float32."""
    mx.random.seed(seed)
    model = DiffusionGemma(ModelConfig.from_dict(CONFIG).text)
    mx.eval(model.parameters())
    return model


def sampler(tokenizer: Tokenizer, template: ChatTemplate) -> Callable[[random.Random], Conversation]:
    """Draws tokenized training conversations from the mix of tasks."""
    end = tokenizer.special_ids["<turn|>"]

    def sample(rng: random.Random) -> Conversation:
        example = training_example(rng)
        prompt = encode_chat(tokenizer, template, list(example.messages))
        return prompt, [*tokenizer.encode(example.answer), end]

    return sample


def build(run: Path, steps: int, log: Log) -> None:
    """Trains (or goes on training) in the folder ``run`` and writes the checkpoint to ``run/model``.

    One process of several, when ``mlx.launch`` started them: the first one writes, all of them train.
    """
    out, group = run / "model", mx.distributed.init()
    if group.rank() == 0:
        demo_tokenizer.build(out)
    mx.eval(mx.distributed.all_sum(mx.zeros(1)))  # the others wait for it
    tokenizer, template = load_tokenizer(out), ChatTemplate.load(out)
    model, pad_id = new_model(SEED), tokenizer.special_ids["<pad>"]
    sample, canvas_length = sampler(tokenizer, template), CONFIG["canvas_length"]

    def batch_pair(number: int) -> list[Part]:
        return batch_pair_at(number, sample, BATCH, canvas_length, pad_id, SEED)

    ends = (steps * 4 // 5, steps)  # of the last two cycles of the learning rate
    config = TrainConfig(steps=steps, seed=SEED, mean_of=ends)
    train(model, make_optimizer(steps), batch_pair, pad_id, config, run, log)
    if group.rank() == 0:
        model.load_weights(list(mean_weights(run, ends).items()))
        export(model, CONFIG, GENERATION, out)


def score(folder: Path, prompts: int) -> None:
    """Prints the score card of a checkpoint and writes it beside the weights."""
    scores = score_card(load(folder), prompts)
    (folder / "score_card.json").write_text(json.dumps([asdict(line) for line in scores], indent=2) + "\n")
    print(as_markdown(scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="checkpoints and log; resumes from it")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--score", type=Path, help="train nothing, score this checkpoint")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts for each task of the score card")
    arguments = parser.parse_args()
    if arguments.score:
        score(arguments.score, arguments.prompts)
        return
    run: Path = arguments.run
    (run / "model").mkdir(parents=True, exist_ok=True)
    started = time.time()
    with (run / "log.jsonl").open("a") as log_file:

        def log(record: dict[str, Any]) -> None:
            line = json.dumps({**record, "minutes": round((time.time() - started) / 60, 1)})
            print(line, file=sys.stderr, flush=True)
            print(line, file=log_file, flush=True)

        build(run, arguments.steps, log)


if __name__ == "__main__":
    main()
