"""The readers that are fuzzed: a file, how it is damaged, and what reads it.

To add a reader, add a line to ``READERS``. All of them work on copies of one tiny checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from hypothesis import strategies as st

import dgemma_mlx
from dgemma_convert import prepare
from dgemma_convert.mixed import read_calibration
from dgemma_convert.plan import MANIFEST
from dgemma_convert.writer import open_partial_folder
from dgemma_mlx import Model, PromptCache, generate
from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.cli.batch import read_batch
from dgemma_mlx.cli.info import describe
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.kernels.selfcheck import Store
from dgemma_mlx.model.adapter import AdapterConfig, attach
from dgemma_mlx.model.adapter_file import save_adapter
from dgemma_mlx.train.dataset import read_examples
from dgemma_mlx.train.loop import restore, save
from tests.convert.checkpoints import SMALLEST, TOKENIZER_VOCABULARY, make_source
from tests.fuzz.mutations import Changes, byte_changes, header_changes, json_changes, line_changes, toml_changes
from tests.model.checkpoint import flat_config, random_tensors

_LOOP = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "tool_calls": [{"id": "a", "name": "f", "arguments": "{}"}]},
    {"role": "tool", "tool_call_id": "a", "content": {"x": [1, None]}}, {"role": "assistant", "content": "Ho"},
]  # fmt: skip
_TOOL = {"name": "f", "parameters": {"properties": {"x": {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]}},
                                     "$defs": {"A": {"type": ["string", "integer"]}}}}  # fmt: skip
_SESSION = {
    "format": "dgemma-mlx session 1", "system": "Be brief.", "model": "demo", "settings": {"seed": 1, "temp": 0.5},
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "thinking": "so"}, *_LOOP],
}  # fmt: skip
_BATCH = b"\n".join(
    json.dumps(value).encode()
    for value in ("Hi", {"prompt": [{"role": "user", "content": "Hi"}], "id": 3, "system": "x", "seed": 1},
                  {"prompt": "x", "max_tokens": 4}, {"prompt": _LOOP, "tools": [_TOOL], "tool_choice": "auto"})
)  # fmt: skip
_DATA = b"\n".join(
    json.dumps(value).encode()
    for value in ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
                  {"prompt": "Hi", "completion": "Ho"}, {"text": "Hi"}, {"messages": _LOOP, "tools": [_TOOL]})
)  # fmt: skip
_TOML = b'model = "demo"\nmax_tokens = 64\ntemp = 0.5\nthinking = false\nspeed = "fast"\nmemory_limit = "20GB"'
_OUTPUT = "converted"  # folder of the conversion, next to the checkpoint
_ONE_STEP = {"max_denoising_steps": 1}
_ADAPTER = AdapterConfig(rank=2, targets=("attention",), dora=True)


@dataclass(frozen=True)
class Reader:
    """A reader of one file.

    Attributes:
        file: The name of the file in the folder.
        changes: Makes the strategy of its damaged copies from its bytes.
        read: Reads the folder.
    """

    file: str
    changes: Changes
    read: Callable[[Path], Any]


def make_folder(folder: Path) -> None:
    """Write a tiny checkpoint of one layer with every kind of file that a reader reads."""
    config = flat_config(**SMALLEST, vocab_size=TOKENIZER_VOCABULARY)
    make_source(folder, config, random_tensors(config, mx.bfloat16), shards=2, tokenizer=True)
    template = (folder / "chat_template.jinja").read_text()
    named = [{"name": "default", "template": template}]
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": named}))
    (folder / "session.json").write_text(json.dumps(_SESSION))
    (folder / "batch.jsonl").write_bytes(_BATCH)
    (folder / "data.jsonl").write_bytes(_DATA)
    (folder / "config.toml").write_bytes(_TOML)
    (folder / "calibration.txt").write_text("one\ntwo\n")
    verdict = {"status": "faster", "detail": "", "kernel": 1.0, "reference": 2.0}
    (folder / "kernels.json").write_text(json.dumps({"a": verdict, "b": {**verdict, "status": "checking"}}))
    (folder / "conversion_report.json").write_bytes((DEMO_FOLDER / "conversion_report.json").read_bytes())
    planned = prepare(str(folder), folder.parent / _OUTPUT)
    planned.partial.mkdir()
    open_partial_folder(planned, resume=False, force=False)
    (planned.partial / MANIFEST).write_text(json.dumps({"plan": planned.fingerprint(), "shards": {"x": "0" * 64}}))
    model, optimizer = _training(folder)
    optimizer.init(model.network.trainable_parameters())
    save(folder / "run", model.network, optimizer, 3)
    save_adapter(model.network, _ADAPTER, folder / "adapter", "demo")
    model = dgemma_mlx.load(folder)
    cache = PromptCache()
    generate(model, "Hi", max_tokens=2, seed=0, prompt_cache=cache, generation=model.generation.override(**_ONE_STEP))
    cache.save(folder / "prompt.cache", model)


def _training(folder: Path) -> tuple[Model, optim.Optimizer]:
    """Return the model with an adapter that is trained, and its optimizer."""
    model = dgemma_mlx.load(folder)
    attach(model.network, _ADAPTER)
    return model, optim.AdamW(1e-4)


def one_step(model: Model) -> None:
    """Denoise a canvas in one step."""
    generate(model, "Hi", max_tokens=2, seed=0, generation=model.generation.override(**_ONE_STEP))


def load_and_step(folder: Path) -> None:
    """Load the checkpoint and denoise a canvas in one step."""
    one_step(dgemma_mlx.load(folder))


def plan(folder: Path) -> None:
    """Plan a conversion and describe the checkpoint, as convert --dry-run and info do."""
    planned = prepare(str(folder), folder.parent / _OUTPUT)
    json.dumps([planned.as_dict(), planned.fingerprint(), describe(planned.source)])


def _resume(folder: Path) -> None:
    open_partial_folder(prepare(str(folder), folder.parent / _OUTPUT), resume=True, force=False)


def _cache_changes(content: bytes) -> st.SearchStrategy[bytes]:
    """Change the header of a prompt cache, with a digest that is right, or change any byte."""
    return st.one_of(header_changes(content[:-32]).map(lambda body: body + hashlib.sha256(body).digest()),
                     byte_changes(content))  # fmt: skip


def _read_cache(folder: Path) -> None:
    model = _intact(folder)
    cache = PromptCache.load(folder / "prompt.cache", model)
    settings = model.generation.override(**_ONE_STEP)
    generate(model, "Hi", max_tokens=2, seed=0, prompt_cache=cache, generation=settings)


def _read_adapter(folder: Path) -> None:
    one_step(dgemma_mlx.load(folder, adapter=folder / "adapter"))


def _restore(folder: Path) -> None:
    model, optimizer = _training(folder)
    restore(folder / "run", model.network, optimizer, steps=5)


def _read_session(folder: Path) -> None:
    session = Session.load(folder / "session.json")
    _intact(folder).encode_prompt(session.prompt())


def _read_verdicts(folder: Path) -> None:
    store = Store(folder / "kernels.json")
    for key in store._read():
        store.get(key)


_models: dict[Path, Model] = {}


def _intact(folder: Path) -> Model:
    """Return the model of a folder whose checkpoint is not damaged, loaded once."""
    return _models.setdefault(folder, _models.get(folder) or dgemma_mlx.load(folder))


SHARD = "model-00001-of-00002.safetensors"
READERS = {
    "config": Reader("config.json", json_changes, load_and_step),
    "config, converting": Reader("config.json", json_changes, plan),
    "generation config": Reader("generation_config.json", json_changes, load_and_step),
    "tokenizer config": Reader("tokenizer_config.json", json_changes, load_and_step),
    "tokenizer": Reader("tokenizer.json", json_changes, load_and_step),
    "template": Reader("chat_template.jinja", byte_changes, load_and_step),
    "index": Reader("model.safetensors.index.json", json_changes, load_and_step),
    "weights": Reader(SHARD, header_changes, load_and_step),
    "weights, converting": Reader(SHARD, header_changes, plan),
    "conversion manifest": Reader(f"../.{_OUTPUT}.partial/{MANIFEST}", json_changes, _resume),
    "conversion report": Reader("conversion_report.json", json_changes, plan),
    "prompt cache": Reader("prompt.cache", _cache_changes, _read_cache),
    "session": Reader("session.json", json_changes, _read_session),
    "settings": Reader("config.toml", toml_changes, lambda folder: Settings({}, folder / "config.toml")),
    "batch": Reader("batch.jsonl", line_changes, lambda folder: read_batch(folder / "batch.jsonl")),
    "calibration": Reader("calibration.txt", byte_changes, lambda folder: read_calibration(folder / "calibration.txt")),
    "kernels": Reader("kernels.json", json_changes, _read_verdicts),
    "adapter settings": Reader("adapter/adapter_config.json", json_changes, _read_adapter),
    "adapter weights": Reader("adapter/adapter_model.safetensors", header_changes, _read_adapter),
    "training state": Reader("run/checkpoint/state.json", json_changes, _restore),
    "trained weights": Reader("run/checkpoint/model.safetensors", header_changes, _restore),
    "optimizer state": Reader("run/checkpoint/optimizer.safetensors", header_changes, _restore),
    "training data": Reader("data.jsonl", line_changes, lambda folder: read_examples(folder / "data.jsonl")),
}
