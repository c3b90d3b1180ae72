"""Counts of what the server has done, in the text form of Prometheus."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping

from dgemma_mlx.server.tally import Use

_PREFIX = "dgemma_"
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})  # within the value of a label
_METRICS = {  # name: type, what it counts
    "info": ("gauge", "The model's name and the program's version, always 1."),
    "uptime_seconds": ("gauge", "Seconds since the start of the server."),
    "model_loaded": ("gauge", "Whether the model is in memory."),
    "requests_running": ("gauge", "Requests whose work has begun."),
    "requests_waiting": ("gauge", "Requests whose work has not begun."),
    "requests_total": ("counter", "Requests that have ended, by path and status; 499 is a client that went away."),
    "request_seconds": ("summary", "Seconds from a request to the end of its response."),
    "answers_total": ("counter", "Answers that have ended, by finish reason."),
    "prompt_tokens_total": ("counter", "Tokens of prompts."),
    "cached_tokens_total": ("counter", "Tokens of prompts that were not encoded again."),
    "generated_tokens_total": ("counter", "Tokens written."),
    "denoising_steps_total": ("counter", "Denoising steps."),
    "canvases_total": ("counter", "Canvases that were denoised."),
    "prefill_seconds_total": ("counter", "Seconds spent on encoding prompts."),
    "prompt_caches": ("gauge", "Encoded prompts that are kept and not in use."),
    "prompt_cache_bytes": ("gauge", "Bytes of memory that these take."),
    "memory_active_bytes": ("gauge", "Bytes of memory that MLX's arrays take."),
    "memory_cache_bytes": ("gauge", "Bytes of freed memory that MLX keeps for later."),
}


class Metrics:
    """Counts since the start of the server. The event loop is the only one that uses them."""

    def __init__(self) -> None:
        self._values: defaultdict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._began = time.monotonic()

    def uptime(self) -> float:
        """Return the seconds since the start of the server."""
        return time.monotonic() - self._began

    def add_request(self, path: str, status: int, seconds: float) -> None:
        """Count a request that has ended."""
        self._values["requests_total"][_labels(path=path, status=str(status))] += 1
        self._values["request_seconds_sum"][""] += seconds
        self._values["request_seconds_count"][""] += 1

    def add_answer(self, use: Use) -> None:
        """Count an answer that has ended, also for a client that has gone."""
        self._values["answers_total"][_labels(finish_reason=use.finish_reason)] += 1
        for name, count in (
            ("prompt_tokens", use.prompt_tokens), ("cached_tokens", use.cached_tokens),
            ("generated_tokens", use.tokens), ("denoising_steps", use.steps), ("canvases", use.canvases),
            ("prefill_seconds", use.prefill_seconds),
        ):  # fmt: skip
            self._values[f"{name}_total"][""] += count

    def text(self, gauges: Mapping[str, float], **info: str) -> str:
        """Return everything in Prometheus' text format, version 0.0.4. ``gauges`` are the values of now, by name."""
        values = {**self._values, **{name: {"": value} for name, value in gauges.items()}}
        values["info"] = {_labels(**info): 1}
        lines = []
        for name, (kind, help) in _METRICS.items():
            lines += [f"# HELP {_PREFIX}{name} {help}", f"# TYPE {_PREFIX}{name} {kind}"]
            for series in (f"{name}_sum", f"{name}_count") if kind == "summary" else (name,):
                found = values.get(series) or ({} if kind == "gauge" else {"": 0})
                lines += [f"{_PREFIX}{series}{labels} {value!r}" for labels, value in found.items()]
        return "\n".join(lines) + "\n"


def _labels(**labels: str) -> str:
    """Return labels in braces."""
    return "{" + ",".join(f'{name}="{text.translate(_ESCAPES)}"' for name, text in labels.items()) + "}"
