"""The texts that describe a constraint."""

from __future__ import annotations

from dgemma_mlx.errors import DgemmaError


def checked_text(value: object, label: str) -> str:
    """Return the value if it is text that UTF-8 can encode. Raises ``DgemmaError`` (exit code 2) otherwise.

    ``label`` names the value in the message.
    """
    if not isinstance(value, str):
        raise DgemmaError(f"{label} must be text, not {type(value).__name__}", "Give a string.", exit_code=2)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DgemmaError(
            f"{label} contains a lone surrogate, which is not a Unicode character",
            "Remove the characters U+D800 to U+DFFF.", exit_code=2,
        ) from None
    return value
