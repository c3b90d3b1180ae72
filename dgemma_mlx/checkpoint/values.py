"""Validation of single values of a checkpoint's configuration files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dgemma_mlx.checks import is_whole, shown
from dgemma_mlx.errors import DgemmaError

LARGEST = 1 << 24  # of a size; far above any real one, and the product of two fits in a shape
# The numbers between which a constant of the network lies. Real ones are far within; outside, float16 overflows or all
# activations are nearly the same.
_RANGES = {
    "rms_norm_eps": (1e-12, 1e-2), "final_logit_softcapping": (0.1, 1e4), "rope_theta": (1.0, 1e12),
    "partial_rotary_factor": (1e-6, 1.0),
}  # fmt: skip
MOST_LAYERS = 1024
DAMAGED = "The checkpoint may be damaged or belong to another model."


def require(condition: bool, message: str) -> None:
    """Raise ``DgemmaError`` with this message unless the condition holds."""
    if not condition:
        raise DgemmaError(message, DAMAGED)


def require_size(value: Any, name: str) -> None:
    """Raise ``DgemmaError`` unless the value is a positive integer of at most ``LARGEST``."""
    require(is_whole(value) and 0 < value <= LARGEST, f"{name} must be a positive integer, not {shown(value)}")


def constant(value: Any, name: str, place: str = "") -> float:
    """Return a constant of the network, of which JSON may omit the decimal point, as a float.

    Raises ``DgemmaError``, which says after ``place`` what it must be, unless it lies in its range in ``_RANGES``.
    """
    least, most = _RANGES[name]
    good = (is_whole(value) or isinstance(value, float)) and least <= value <= most
    require(good, f"{place}{name} must be a number from {least:g} to {most:g}, not {shown(value)}")
    return float(value)


def require_usual_layers(raw: Mapping[str, Any]) -> None:
    """Raise ``DgemmaError`` for layers with another activation than GELU or with biases, in text network and tower."""
    activation = raw.get("hidden_activation", "gelu_pytorch_tanh")
    require(activation == "gelu_pytorch_tanh", f"unsupported hidden_activation {shown(activation)}")
    require(not raw.get("attention_bias"), "attention_bias is not supported")


def first(*values: Any) -> Any:
    """Return the first value that is not None, or None."""
    return next((value for value in values if value is not None), None)


def token_id(value: Any, name: str) -> int:
    """Return the value if it is a token id. Raises ``DgemmaError`` otherwise."""
    good = is_whole(value) and 0 <= value <= LARGEST
    require(good, f"{name} must be a token id, not {shown(value)}")
    return int(value)


def token_ids(value: Any, name: str) -> tuple[int, ...]:
    """Return the ids of a value that is a token id or a list of token ids. Raises ``DgemmaError`` otherwise."""
    return tuple(token_id(item, name) for item in (value if isinstance(value, list) else [value]))


def json_object(raw: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """Return a JSON object of the configuration, or None if it is missing, null or empty.

    Raises ``DgemmaError`` for a value that is not an object.
    """
    value = raw.get(name)
    require(value is None or isinstance(value, Mapping), f"{name} must be an object, not {shown(value)}")
    return value or None


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Put the path of a file before the message of every ``DgemmaError`` that the block raises."""
    try:
        yield
    except DgemmaError as error:
        raise DgemmaError(f"{path}: {error.message}", DAMAGED) from None
