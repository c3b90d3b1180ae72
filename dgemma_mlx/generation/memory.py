"""Estimates of the memory that generation takes, from the configuration alone, and how to stay within a limit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import mlx.core as mx

from dgemma_mlx.checkpoint.config import FULL, SLIDING, ModelConfig
from dgemma_mlx.checks import shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.model import Model
from dgemma_mlx.kernels import MAX_KEPT
from dgemma_mlx.model.cache import SCORE_BYTES, SPARE
from dgemma_mlx.model.prediction import dense_rows, dense_value_bytes
from dgemma_mlx.sizes import size

DEQUANTIZE_CHOICES = ("auto", "on", "off")
# On a GPU, more positions at a time give each expert more rows. On a CPU they only make a sliding layer compute more
# scores outside its window: 2,048 positions took 14 to 37 % more CPU time than 512 on two small models.
PREFILL_STEP_SIZE = 2048 if mx.metal.is_available() else 512
_AHEAD = 8  # blocks of scores alive at a time (measured): MLX starts operations before earlier ones have ended
_MARKS = 2  # copies of the sliding layers' keys and values that a ``PromptCache`` holds
_MASKS = 3  # boolean arrays alive while the masks of a batch of padded prompts, or of pictures, are computed
_TOWER_HIDDEN, _TOWER_HEADS, _TOWER_INNER = 12, 17, 3  # arrays of each width alive in the vision tower (measured)
_SAMPLER_BYTES, _SAMPLER_ARRAYS = 4 << 20, 5  # without Metal: bytes of a block of the sampler, and blocks alive
_SPARSE_ROWS = 72  # without Metal: float32 rows of the embedding table alive for each list of probable tokens
_SHARE_OF_FREE = 0.9  # of the free memory, without Metal


@dataclass(frozen=True)
class Budget:
    """The working set: how much is worked on at a time.

    Attributes:
        prefill_step_size: Number of prompt positions encoded at once, over all rows of a batch. MLX's fast product of
            packed experts takes at most 32,768 rows, which are 4,096 positions with 8 experts each.
        score_bytes: Bytes of attention scores computed at once, for each row of a batch.
        idle_bytes: Bytes of freed memory that MLX may keep between two chunks of a prompt.
    """

    prefill_step_size: int = PREFILL_STEP_SIZE
    score_bytes: int = SCORE_BYTES
    idle_bytes: int = 0


# Budgets to try, the largest first. Down to 512 positions at a time, the blocks of scores keep their size.
_BUDGETS = (
    *(Budget(size) for size in (2048, 1024, 512) if size <= PREFILL_STEP_SIZE),
    *(Budget(512 // n, SCORE_BYTES // n) for n in (2, 4, 8)),
)


@dataclass(frozen=True)
class Work:
    """What a request runs, as far as its memory depends on it.

    Attributes:
        rows: Number of canvases that are denoised at a time.
        shares_prefix: Whether all rows follow one prefix, which is encoded once and then copied for each row.
        verifies: Whether the encoder reads each canvas.
        patches: Number of patches of the largest picture; 0 without pictures.
    """

    rows: int = 1
    shares_prefix: bool = False
    verifies: bool = False
    patches: int = 0


ONE_ANSWER = Work()


class Stored(Protocol):
    """A tensor as a file stores it, or will store it."""

    @property
    def dtype(self) -> str:
        """The dtype's name in safetensors files, such as "BF16"."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""


def weight_memory(tensors: Iterable[Stored]) -> int:
    """Return the bytes of stored weights once loaded. Without Metal, half precision is loaded as float32."""
    return sum(tensor.nbytes * (_element() // 2 if tensor.dtype in ("BF16", "F16") else 1) for tensor in tensors)


def cache_memory(config: ModelConfig, positions: int) -> int:
    """Return the bytes of keys and values for a prefix of ``positions`` and a canvas after it."""
    sliding = _window(config, positions) + config.canvas_length
    return _kept_memory(config, FULL, positions + SPARE) + _kept_memory(config, SLIDING, sliding)


def run_memory(
    config: ModelConfig, weight_bytes: int, positions: int, budget: Budget | None = None, work: Work = ONE_ANSWER
) -> int:
    """Return the peak bytes for prompts of up to ``positions``, once the weights are loaded.

    The peak is the sum of the weights, the cache, and the larger one of the working sets of prefill and denoising. The
    first answer may stay below it, because the weights of a layer are read when they are first used.
    """
    budget, rows = budget or Budget(), work.rows
    cache = cache_memory(config, positions)
    windows = _kept_memory(config, SLIDING, _window(config, positions))
    encoded = 1 if work.shares_prefix else rows
    prefill = encoded * cache + max(
        _prefill_memory(config, encoded, positions, budget, work.patches), _tower_memory(config, work.patches)
    )
    snapshot = rows * windows if work.verifies or work.shares_prefix else 0
    denoising = rows * cache + snapshot + _denoising_memory(config, rows, positions, budget)
    if work.shares_prefix:
        denoising += cache
    elif rows == 1:
        denoising += _MARKS * windows
    else:  # once an answer has ended or only some are denoised again, the others have a cache of their own
        others = rows - 1
        fewer = (rows + others) * cache + snapshot + _denoising_memory(config, others, positions, budget)
        denoising = max(denoising, fewer)
    tower = tower_weights(config) if work.patches else 0
    return weight_bytes + tower + max(prefill, denoising)


class Need(NamedTuple):
    """The memory of an answer beside the weights, in bytes.

    Attributes:
        kept: What it holds from its beginning to its end, also while other answers take turns.
        working: What it takes in addition during its own turns, with the smallest budget.
    """

    kept: int
    working: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.kept + self.working


def answer_need(config: ModelConfig, positions: int, patches: int = 0) -> Need:
    """Return the memory of an answer to a prompt of ``positions``. It is never less than ``run_memory`` says.

    ``patches`` is the number of patches of the prompt's largest picture, 0 without pictures. The weights of the vision
    tower count as the answer's, although they stay.
    """
    marks = _MARKS + 1  # the third is where prompts of several conversations part
    kept = cache_memory(config, positions) + marks * _kept_memory(config, SLIDING, _window(config, positions))
    prefill = max(_prefill_memory(config, 1, positions, _BUDGETS[-1], patches), _tower_memory(config, patches))
    tower = tower_weights(config) if patches else 0
    return Need(kept + tower, max(prefill, _denoising_memory(config, 1, positions, _BUDGETS[-1])))


def fitting_budget(
    config: ModelConfig, weight_bytes: int, positions: int, limit: int | None = None, work: Work = ONE_ANSWER,
    prefill_step_size: int | None = None,
) -> Budget:
    """Return the largest budget with which prompts of up to ``positions`` stay within ``limit`` bytes.

    ``prefill_step_size`` is the caller's choice, or None. Raises ``DgemmaError`` when not even the smallest budget
    fits, or the limit is not positive. Without a limit, the device's own one applies. It may be stretched, so the
    smallest budget is returned where none stays within it.
    """
    if limit is not None and limit <= 0:
        raise DgemmaError(
            f"the memory limit must be more than 0 bytes, not {limit}", "Write it as 8GB or 7.5GiB.", exit_code=2
        )
    bound = device_limit() if limit is None else limit
    budgets = [replace(budget, prefill_step_size=prefill_step_size or budget.prefill_step_size) for budget in _BUDGETS]
    needed = 0
    for budget in budgets:
        needed = run_memory(config, weight_bytes, positions, budget, work)
        if needed <= bound:
            # More than a chunk's working set would be of no use to the next chunk.
            encoded = 1 if work.shares_prefix else work.rows
            useful = _prefill_memory(config, encoded, positions, budget, work.patches)
            return replace(budget, idle_bytes=min(bound - needed, useful))
    if limit is None:
        return budgets[-1]
    canvases, fewer = "", ""
    if work.rows > 1:
        canvases, fewer = f"{work.rows} canvases after ", "Take fewer prompts or candidates at a time. "
    raise DgemmaError(
        f"{canvases}{positions:,} tokens of context take about {size(needed)}, "
        f"more than the memory limit of {size(limit)}",
        f"{fewer}Shorten the prompt, raise --memory-limit, or take a checkpoint with fewer bits per weight.",
    )


def fit_to_memory(
    model: Model, positions: int, work: Work, limit: int | None, prefill_step_size: int | None
) -> Budget:
    """Return the ``fitting_budget`` of a loaded model."""
    return fitting_budget(model.config, model.weight_bytes(), positions, limit, work, prefill_step_size)


def device_limit() -> int:
    """Return the bytes that may be used: the GPU's recommended working set, or 90 % of the free memory."""
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return mx.get_active_memory() + int(_SHARE_OF_FREE * free_memory())


def should_dequantize(nbytes: int, choice: str) -> bool:
    """Return whether packed weights are unpacked at load, given that they take ``nbytes`` once unpacked.

    On a GPU they never are. Otherwise ``choice`` decides: "on", "off", or "auto", which unpacks them when they take no
    more than half of the free memory. Raises ``DgemmaError`` (exit code 2) for any other choice.
    """
    if choice not in DEQUANTIZE_CHOICES:
        raise DgemmaError(
            f"cpu_dequantize must be one of {', '.join(DEQUANTIZE_CHOICES)}, not {shown(choice)}",
            "auto unpacks packed weights at load when they take no more than half of the free memory.", exit_code=2,
        )  # fmt: skip
    if choice == "off" or mx.default_device() != mx.Device(mx.cpu):
        return False
    return choice == "on" or nbytes <= free_memory() // 2


def free_memory() -> int:
    """Return the bytes of memory that programs may still take, or all memory where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _dtype() -> mx.Dtype:
    """Return the dtype of activations, logits, keys and values of the published checkpoints once they are loaded."""
    return mx.bfloat16 if mx.metal.is_available() else mx.float32


def _element() -> int:
    return _dtype().size


def _window(config: ModelConfig, positions: int) -> int:
    return min(positions, config.text.sliding_window - 1)


def _kept_memory(config: ModelConfig, kind: str, positions: int) -> int:
    """Return the bytes of the keys and values of ``positions`` in all layers of a kind."""
    text = config.text
    layers, width = text.layer_types.count(kind), text.kv_heads(kind) * text.layer_head_dim(kind)
    return 2 * layers * positions * width * _element()


def tower_weights(config: ModelConfig) -> int:
    """Return the bytes of the vision tower's weights once loaded, as if none of them were packed; 0 without a tower."""
    vision = config.vision
    if vision is None:
        return 0
    H, inner = vision.hidden_size, vision.num_attention_heads * vision.head_dim
    layer = 4 * H * inner + 3 * H * vision.intermediate_size + 4 * H + 2 * vision.head_dim
    ends = H * (3 * vision.patch_size**2 + 2 * vision.position_embedding_size + config.text.hidden_size + 2)
    return (vision.num_hidden_layers * layer + ends) * _element()


def _tower_memory(config: ModelConfig, patches: int) -> int:
    """Return the peak bytes of intermediate results of the vision tower for a picture of ``patches``."""
    vision = config.vision
    if vision is None or not patches:
        return 0
    heads = vision.num_attention_heads * vision.head_dim
    widths = _TOWER_HIDDEN * vision.hidden_size + _TOWER_HEADS * heads + _TOWER_INNER * vision.intermediate_size
    scores = 0 if mx.metal.is_available() else 4 * vision.num_attention_heads * patches**2
    return 4 * patches * widths + min(scores, _AHEAD * SCORE_BYTES)


def _prefill_memory(config: ModelConfig, rows: int, positions: int, budget: Budget, patches: int = 0) -> int:
    """Return the peak bytes of intermediate results of a chunk of ``rows`` prompts."""
    block = 0 if config.vision is None else patches // config.vision.pooling_kernel_size**2  # a chunk parts no picture
    length = min(max(1, budget.prefill_step_size // rows) + block, positions)
    # Encoding needs the last layer's keys and values, not what it would attend to.
    kinds = config.text.layer_types[:-1]
    masks = _MASKS * rows * length * positions if rows > 1 or patches else 0
    return masks + _layer_memory(config, kinds, rows, length, positions, budget, encoding=True)


def _denoising_memory(config: ModelConfig, rows: int, positions: int, budget: Budget) -> int:
    """Return the peak bytes of intermediate results of a denoising step over ``rows`` canvases."""
    canvas, kinds = config.canvas_length, config.text.layer_types
    layers = _layer_memory(config, kinds, rows, canvas, positions + canvas, budget, encoding=False)
    return max(layers, _prediction_memory(config, rows))


def _layer_memory(
    config: ModelConfig, kinds: Sequence[str], rows: int, length: int, keys: int, budget: Budget, encoding: bool
) -> int:
    """Return the peak bytes of intermediate results for ``rows`` times ``length`` positions in layers of these kinds.

    The factors are the number of arrays of each width that MLX holds at once, because it starts operations before
    earlier ones have ended. They are slopes of measured peaks over each width (float32, MLX 0.32 on Linux).
    """
    text = config.text
    M, K, element = text.hidden_size, text.top_k_experts, _element()
    feed_forward = 10 * M + K * (5 * M // 2 + 3 * text.moe_intermediate_size) + 3 * text.intermediate_size
    most = length * feed_forward * element
    for kind in set(kinds):
        seen = keys if kind == FULL else min(keys, text.sliding_window - 1 + length)
        heads, kv_heads = (n * text.layer_head_dim(kind) for n in (text.num_attention_heads, text.kv_heads(kind)))
        attention = length * (4 * M + 6 * heads + 6 * kv_heads) * element
        if encoding and kind == SLIDING:  # the window followed by the new positions, and the next window
            attention += 4 * seen * kv_heads * element
        scores = 4 * text.num_attention_heads * length * seen
        most = max(most, attention + min(scores, _AHEAD * budget.score_bytes))
    return rows * most


def _prediction_memory(config: ModelConfig, rows: int) -> int:
    """Return the peak bytes between a step's logits and the next step's self-conditioning, for ``rows`` canvases.

    That is the logits with the sampler's working set, or with the working set of the expected embeddings, which come
    from a position's list of probable tokens or from all its logits.
    """
    positions, element, on_gpu = rows * config.canvas_length, _element(), mx.metal.is_available()
    values = positions * config.text.vocab_size
    lists = 3 * 8 * positions * MAX_KEPT  # ids and weights: this step's, the last one's, and in parts
    sampler = 0 if on_gpu else _SAMPLER_ARRAYS * min(4 * values, _SAMPLER_BYTES)
    dense = min(values, dense_rows(config.text.vocab_size, _dtype()) * config.text.vocab_size)
    dense *= dense_value_bytes(_dtype())
    sparse = 0 if on_gpu else _SPARSE_ROWS * positions * config.text.hidden_size * 4
    return lists + max(values * element + max(sampler, dense), sparse)
