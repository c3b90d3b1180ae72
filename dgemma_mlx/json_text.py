"""Reading of text and JSON that comes from outside: checkpoints, data files, settings and requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dgemma_mlx.errors import DgemmaError

MOST_BYTES = 1 << 28  # of a JSON file that is read whole
MOST_DEPTH = 200  # of nested objects and lists; Python's recursion limit is not far above it
_MOST_DIGITS = 20  # of an integer that is a count, an id or a size; 2^64 has 20


def parse_json(text: str | bytes, most_digits: int = _MOST_DIGITS) -> Any:
    """Return the value of a JSON text. Bytes are read as UTF-8, and a byte order mark is ignored.

    Raises ``ValueError``, with a short message, for a text that is not JSON, is nested deeper than ``MOST_DEPTH``,
    or holds an integer of more than ``most_digits`` digits or a string with a lone surrogate, which UTF-8 cannot
    encode.
    """

    def whole(digits: str) -> int:
        if len(digits) > most_digits + 1:  # with a sign
            raise ValueError(f"an integer has {len(digits)} digits")
        return int(digits)

    decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
    try:
        value = json.loads(decoded, parse_int=whole)
    except RecursionError:
        raise ValueError(f"nested deeper than {MOST_DEPTH}") from None
    if decoded.count("[") + decoded.count("{") > MOST_DEPTH:
        _check_depth(value)
    if "\\u" in decoded or not decoded.isascii():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a string holds a lone surrogate, which is not text") from None
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a checkpoint or of an adapter.

    Raises ``DgemmaError``, which names the file, when it is missing or unreadable or holds anything but a JSON object.
    """
    try:
        if path.is_file() and path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise DgemmaError(
            f"{path.parent} has no {path.name}", "Check that this is a complete checkpoint folder."
        ) from None
    except OSError as error:
        raise DgemmaError(f"cannot read {path}: {error.strerror}", "Check the file and its permissions.") from None
    except ValueError as error:
        raise DgemmaError(f"cannot read {path}: {error}", "The file may be cut off. Fetch it again.") from None
    if not isinstance(value, dict):
        raise DgemmaError(f"{path} does not contain a JSON object", "The file may be damaged. Fetch it again.")
    return value


def _check_depth(value: Any) -> None:
    """Raise ``ValueError`` when lists and objects are nested deeper than ``MOST_DEPTH``."""
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        level = [item for item in level if isinstance(item, (dict, list))]
        if not level:
            return
        level = [item for items in level for item in (items.values() if isinstance(items, dict) else items)]
    raise ValueError(f"nested deeper than {MOST_DEPTH}")
