"""Damaged copies of files: strategies that change a place in a document, the document's text, or its bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tests.model.odd_values import ABSENT, changed, places

Changes = Callable[[bytes], st.SearchStrategy[bytes]]  # from a file's bytes to damaged copies

# JSON that Python's encoder does not write; ``_written`` puts it in place of the marks.
_RAW = {
    "\x00digits": "9" * 5000, "\x00overflow": "1e400", "\x00surrogate": '"\\ud800"', "\x00deep": "[" * 150 + "]" * 150,
    "\x00deeper": "[" * 20_000 + "]" * 20_000, "\x00zeros": "0." + "0" * 400 + "1",
}  # fmt: skip
VALUES: list[Any] = [
    ABSENT, None, True, False, 0, 1, -1, 2, 3, 5, 64, 767, 768, 65_537, 2**24, 2**31 - 1, 2**31, 2**32, 2**53 + 1,
    2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**19, 0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-45, 5e-324, 1e-30, 1e30, 1e39,
    1.7e308, float("inf"), float("-inf"), float("nan"), "", "x", "64", "1e30", "nan", "x" * 100_000, "é\u202e\u2028",
    "\x1b]0;title\x07", "a\x00b", "\n", "..", ".", "/", "../x", "config.json", [], [0], [1, 1], [None], [[]], ["x"],
    [2**63], [-1], ["x"] * 1000, {}, {"": ""}, {"content": 5}, {"0": {}}, *_RAW,
]  # fmt: skip
_BYTES = [b"", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\n", b"{", b"]", b'"', b",", b"NaN", b"9" * 400, b"\xed\xa0\x80"]
_TOML = [
    "1", "-1", "0", "1.5", "nan", "inf", "-inf", "1e400", "9223372036854775807", "9" * 30, "9" * 5000, '""', '"x"',
    '"demo"', '"\\u0000"', '"\\u001b]0;x"', f'"{"x" * 100_000}"', "true", "[]", "[[1]]", "{}", '{a = "b"}',
    "1979-05-27", "1979-05-27T07:32:00Z", "07:32:00", "[" * 3000, '"\\ud800"', '"""a\nb"""', "'a'", "0x10", "1_000", "",
]  # fmt: skip
_TEXTS = ["", " ", "x", "1", "-1", "0", "1.5", "nan", "inf", "-inf", "1e400", "1e308", "1_0", "٣", "true", "ON", "²"]
_TEXTS += ["9" * 30, "9" * 5000, "x" * 100_000, "\udcff", "\x1b]0;x", "a\nb", "demo", "/", ".", "~", "20GB", "1e5GB"]


def json_changes(content: bytes) -> st.SearchStrategy[bytes]:
    """Change one to three places of a JSON document, or its bytes."""
    return st.one_of(_documents(json.loads(content)).map(_written), byte_changes(content))


def line_changes(content: bytes) -> st.SearchStrategy[bytes]:
    """Change a line of a JSONL file as ``json_changes`` changes a file."""
    lines = content.splitlines()

    def replaced(i: int) -> st.SearchStrategy[bytes]:
        return json_changes(lines[i]).map(lambda line: b"\n".join([*lines[:i], line, *lines[i + 1 :]]))

    return st.sampled_from(range(len(lines))).flatmap(replaced)


def byte_changes(content: bytes) -> st.SearchStrategy[bytes]:
    """Cut the bytes, flip one of them, or insert some."""
    place = st.integers(0, max(0, len(content) - 1))
    return st.one_of(
        place.map(lambda at: content[:at]),
        st.tuples(place, st.integers(1, 255)).map(lambda drawn: _flipped(content, *drawn)),
        st.tuples(place | st.just(0), st.sampled_from(_BYTES)).map(
            lambda drawn: content[: drawn[0]] + drawn[1] + content[drawn[0] :]
        ),
    )


def header_changes(content: bytes) -> st.SearchStrategy[bytes]:
    """Change the header of a safetensors file as ``json_changes`` changes a file; its length stays right mostly."""
    length = struct.unpack("<Q", content[:8])[0]
    data = content[8 + length :]
    headers = _documents(json.loads(content[8 : 8 + length]), [*VALUES, *_HEADER_VALUES]).map(_written)
    lengths = st.sampled_from([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
    return st.one_of(
        headers.map(lambda header: struct.pack("<Q", len(header)) + header + data),
        lengths.map(lambda other: struct.pack("<Q", other) + content[8:]),
        byte_changes(content[: 8 + length]).map(lambda header: header + data),
        st.integers(0, len(content)).map(lambda at: content[:at]),
    )


def toml_changes(content: bytes) -> st.SearchStrategy[bytes]:
    """Give settings other values, or change the bytes of the file."""
    names = [line.partition("=")[0].strip() for line in content.decode().splitlines()]
    line = st.tuples(st.sampled_from([*names, "unknown", "a.b", '"x\\u001b"']), st.sampled_from(_TOML))
    text = st.lists(line.map(" = ".join), min_size=1, max_size=3).map("\n".join)
    return st.one_of(text.map(str.encode), byte_changes(content))


def texts() -> st.SearchStrategy[str]:
    """Texts of environment variables and of options."""
    return st.one_of(st.sampled_from(_TEXTS), st.text(max_size=20).filter(lambda text: "\0" not in text))


_HEADER_VALUES: list[Any] = [
    "F64", "I64", "BOOL", "F8_E4M3", "F4", "BF16", "U32", "C64", "?", [0, 0], [0, 2], [2, 0], [0, 2**62], [0],
    [0, 1, 2], [2**40, 2**40], [1] * 40, [-1, -128], [0, 128], [2**31, 2**31],
]  # fmt: skip


def _documents(document: Any, values: list[Any] = VALUES) -> st.SearchStrategy[Any]:
    """Change one to three places of a JSON document: to odd values, to the values of other places, or to new keys."""
    numbers = st.integers(0, 10_000)
    change = st.tuples(st.integers(1, 6), numbers, st.sampled_from(["value", "value", "swap", "key", "wrap"]), numbers)

    def apply(changes: list[tuple[int, int, str, int]]) -> Any:
        result = document
        for depth, at, kind, other in changes:
            found = [path for path in places(result) if len(path) <= depth]
            if not found:
                return result
            path = found[at % len(found)]
            value = values[other % len(values)]
            if kind == "swap":
                value = _at(result, found[other % len(found)])
            elif kind == "wrap":
                value = [_at(result, path)] if other % 2 else {"x": _at(result, path)}
            elif kind == "key" and isinstance(_at(result, path), dict):
                path = (*path, ("", "x" * 100_000, "\x1b]0;x", "\n", "0", "per_layer_config")[other % 6])
                value = None if value is ABSENT else value
            result = changed(result, path, value)
        return result

    return st.one_of(st.lists(change, min_size=1, max_size=3).map(apply), st.sampled_from(values[1:]))


def _at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def _written(document: Any) -> bytes:
    """Return the document as JSON, with the texts of ``_RAW`` in place of their marks."""
    text = json.dumps(document)
    for mark, raw in _RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text.encode()


def _flipped(content: bytes, at: int, bits: int) -> bytes:
    if not content:
        return bytes([bits])
    return content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :]
