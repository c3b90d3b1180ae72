"""Validation of single option values from callers and configuration files."""

from __future__ import annotations

import math
from typing import Any

from dgemma_mlx.errors import DgemmaError

_SHOWN = 80  # characters of a quoted value

LARGEST_SEED = 2**64 - 1  # largest seed that ``mlx.core.random.key`` accepts; also the largest count


def is_whole(value: Any) -> bool:
    """Return whether the value is an integer. A bool does not count as one."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_text(value: Any) -> bool:
    """Return whether the value is a string that can be encoded as UTF-8.

    Strings with lone surrogates cannot. They come from command lines with undecodable bytes and from JSON escapes.
    """
    try:
        return isinstance(value, str) and str.encode(value) is not None
    except UnicodeEncodeError:
        return False


def shown(value: Any) -> str:
    """Return the value as error messages quote it: at most 80 characters, without line feeds or control characters.

    Of a longer text, both ends are shown, because the end of a path is what names the file.
    """
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of about {round(value.bit_length() * math.log10(2))} digits"
    if isinstance(value, str) and len(value) > 2 * _SHOWN:
        value = value[:_SHOWN] + value[-_SHOWN:]
    try:
        text = repr(value[:_SHOWN] if isinstance(value, (bytes, list, tuple)) else value)
    except (ValueError, RecursionError):  # a long integer, or too deep
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}…{text[1 - _SHOWN // 2 :]}"


def reason(error: BaseException) -> str:
    """Return what an exception says, as one line for a message: without an error number, a path, or further lines."""
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def check_text(name: str, value: Any) -> None:
    """Raise ``DgemmaError`` (exit code 2) unless the value is a string. ``name`` names it in the error message."""
    if not isinstance(value, str):
        raise DgemmaError(f"{name} must be a text, not {shown(value)}", "Write it in quotes.", exit_code=2)


def check_count(name: str, value: Any) -> None:
    """Raise ``DgemmaError`` (exit code 2) unless the value is an integer from 1 to ``LARGEST_SEED``.

    ``name`` is the option's name in the error message.
    """
    if not is_whole(value) or not 1 <= value <= LARGEST_SEED:
        raise DgemmaError(f"{name} must be at least 1, not {shown(value)}", "It must be a whole number.", exit_code=2)


def check_seed(value: Any) -> None:
    """Raise ``DgemmaError`` (exit code 2) unless the value is None or an integer from 0 to ``LARGEST_SEED``."""
    if value is not None and not (is_whole(value) and 0 <= value <= LARGEST_SEED):
        raise DgemmaError(f"not a seed: {shown(value)}", "A seed is a whole number from 0 to 2^64 - 1.", exit_code=2)


def check_temperature(value: Any) -> None:
    """Raise ``DgemmaError`` (exit code 2) unless the value is None or a finite number of at least 0."""
    if value is not None and not ((is_whole(value) or isinstance(value, float)) and 0 <= value < math.inf):
        raise DgemmaError(
            f"temp must be a number of at least 0, not {shown(value)}", "0 always takes the most probable token.",
            exit_code=2,
        )
