"""Text input and output: tokenizer, chat template, parts of an answer, incremental decoding."""

from __future__ import annotations

from dgemma_mlx.text.chat import ChatTemplate, encode_chat
from dgemma_mlx.text.detokenize import Detokenizer
from dgemma_mlx.text.parts import Parts, PartsParser, ToolCall, parse_parts
from dgemma_mlx.text.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "ChatTemplate",
    "Detokenizer",
    "Parts",
    "PartsParser",
    "Tokenizer",
    "ToolCall",
    "encode_chat",
    "load_tokenizer",
    "parse_parts",
]
