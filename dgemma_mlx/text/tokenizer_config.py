"""What ``tokenizer_config.json`` says about a checkpoint's control tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgemma_mlx.checks import shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import read_json

DAMAGED_HINT = "The file may be truncated, or a Git LFS pointer; download it again."
_GEMMA_NAMES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Read ``tokenizer_config.json`` of a checkpoint folder; return an empty dict when the file does not exist.

    Raises ``DgemmaError`` when the file is not a JSON object.
    """
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of the named tokens (``bos_token``, ``eos_token``, ...) of ``tokenizer_config.json``.

    Names that the file does not define have Gemma's own tokens. A name that the file sets to null is left out. Raises
    ``DgemmaError`` when one of Gemma's names is neither a token nor null.
    """
    for name in _GEMMA_NAMES:
        value = config.get(name)
        if value is not None and not _token_text(value):
            raise DgemmaError(f"tokenizer_config.json: {name} must be a token, not {shown(value)}", DAMAGED_HINT)
    names = {**_GEMMA_NAMES, **{name: value for name, value in config.items() if name.endswith("_token")}}
    texts = {name: _token_text(value) for name, value in names.items()}
    return {name: text for name, text in texts.items() if text}


def listed_tokens(config: Mapping[str, Any]) -> list[str]:
    """Return the texts of the control tokens that ``tokenizer_config.json`` lists without a name.

    Raises ``DgemmaError`` when the lists are not lists.
    """
    texts = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(name) or []
        if not isinstance(listed, (list, dict)):
            raise DgemmaError(f"tokenizer_config.json: {name} must be a list, not {shown(listed)}", DAMAGED_HINT)
        texts += [_token_text(value) for value in (listed.values() if isinstance(listed, dict) else listed)]
    return texts


def _token_text(value: Any) -> str:
    """Return the text of a token entry, which is a string or ``{"content": text, ...}``; "" for any other value."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""
