"""The writer of an output's shards.

A shard is streamed to a file, synced to the disk, and renamed when it is complete. A manifest lists the complete
shards, so that an interrupted conversion can be resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np

from dgemma_convert.formats import PLAIN
from dgemma_convert.plan import MANIFEST, Plan, Target
from dgemma_convert.source import Rows
from dgemma_mlx.checkpoint.shards import INDEX
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import is_clutter, sync_folder
from dgemma_mlx.json_text import read_json

ByteProgress = Callable[[int], None]  # called with the number of source bytes that have just been converted

_UNFINISHED = ".unfinished"
_HASH_BLOCK = 1 << 20


def write_shards(plan: Plan, progress: ByteProgress) -> dict[str, str]:
    """Write all shards that are not complete, and return the sha256 digest of each shard by its file name.

    Raises ``DgemmaError`` if the weights of the source are damaged.
    """
    manifest, fingerprint = _read_manifest(plan), plan.fingerprint()
    for name, targets in plan.shards.items():
        path = plan.partial / name
        if name in manifest and path.exists() and sha256(path) == manifest[name]:
            progress(sum(target.weight.nbytes for target in targets))
            continue
        manifest[name] = _write_shard(path, targets, progress)
        record = {"plan": fingerprint, "shards": manifest}
        write_text(plan.partial / MANIFEST, json.dumps(record, indent=2) + "\n")
    return {name: manifest[name] for name in plan.shards}


def open_partial_folder(plan: Plan, resume: bool, force: bool) -> None:
    """Prepare ``plan.partial`` for writing.

    With ``force``, the folder is emptied; with ``resume``, its manifest must belong to the same plan. Raises
    ``DgemmaError`` if the folder holds an interrupted conversion and neither is set, if the plans differ, or if the
    manifest is damaged.
    """
    existing = [path for path in plan.partial.iterdir() if not is_clutter(path)]
    if existing and force and not resume:
        for path in existing:
            path.unlink()
    elif existing and not resume:
        raise DgemmaError(
            f"an earlier conversion to {plan.output} was interrupted",
            "Continue it with --resume, or start again with --force.",
        )
    manifest, fingerprint = plan.partial / MANIFEST, plan.fingerprint()
    if not manifest.exists():
        for path in plan.partial.iterdir():  # of a crash just before or after the output was published
            path.unlink()
        write_text(manifest, json.dumps({"plan": fingerprint, "shards": {}}) + "\n")
        return
    _read_manifest(plan)  # before anything is written
    if read_json(manifest).get("plan") != fingerprint:
        raise DgemmaError(
            f"the interrupted conversion to {plan.output} had another source, recipe or version",
            "Start again with --force, or name another output with -o.",
        )


def _read_manifest(plan: Plan) -> dict[str, str]:
    """Return the sha256 digests of complete shards by file name. Raises ``DgemmaError`` for a damaged manifest."""
    path = plan.partial / MANIFEST
    shards = read_json(path).get("shards")
    if not isinstance(shards, dict) or not all(isinstance(digest, str) for digest in shards.values()):
        raise DgemmaError(f"{path} is damaged", "Start the conversion again with --force.")
    return shards


def _write_shard(path: Path, targets: Sequence[Target], progress: ByteProgress) -> str:
    """Write one safetensors file and return its sha256 digest. The file has another name until it is complete."""
    unfinished = path.with_name(path.name + _UNFINISHED)
    digest = hashlib.sha256()
    with unfinished.open("wb") as file:

        def write(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        # One thread reads ahead and one writes. Only this thread uses MLX, which keeps a stream for each of its
        # threads.
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            pending = writer.submit(write, header_of(targets))
            for data in _encoded(targets, reader, progress):
                pending.result()
                pending = writer.submit(write, data)
            pending.result()
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    sync_folder(path.parent)
    return digest.hexdigest()


def header_of(targets: Sequence[Target]) -> bytes:
    """Return the length prefix and the JSON header of a safetensors file that holds the parts of targets in order."""
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for target in targets:
        for part in target.parts:
            begin, end = end, end + part.nbytes
            entry = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [begin, end]}
            entries[target.weight.name + part.suffix] = entry
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # align the data to 8 bytes
    return len(header).to_bytes(8, "little") + header


def _encoded(targets: Sequence[Target], reader: Executor, progress: ByteProgress) -> Iterator[memoryview]:
    """Yield the bytes of targets in file order.

    The values of a target are yielded block by block. Its scales and biases, which come after all of its values in the
    file, are small and kept until then.
    """
    blocks = ((target, start, stop) for target in targets for start, stop in target.weight.blocks())
    scales: list[list[memoryview]] = []
    for target, start, stop, rows in _read_ahead(blocks, reader):
        if start == 0:
            scales = [[] for _ in target.parts[1:]]
        arrays = _convert(target, rows)
        mx.eval(arrays)
        first, *others = map(_bytes, arrays)
        yield first
        for parts, data in zip(scales, others, strict=True):
            parts.append(data)
        size, height = target.weight.nbytes, target.weight.rows
        progress(size * stop // height - size * start // height)
        if stop == height:
            mx.clear_cache()
            for parts in scales:
                yield from parts


Block = tuple[Target, int, int]  # rows from a start to a stop (exclusive) of a target's weight


def _read_ahead(blocks: Iterator[Block], reader: Executor) -> Iterator[tuple[Target, int, int, list[Rows]]]:
    """Yield each block with its rows, while the reader thread reads the next block."""

    def submit() -> tuple[Block, Future[list[Rows]]] | None:
        block = next(blocks, None)
        return None if block is None else (block, reader.submit(block[0].weight.load, block[1], block[2]))

    ahead = submit()
    while ahead is not None:
        (target, start, stop), loading = ahead
        rows = loading.result()
        ahead = submit()
        yield target, start, stop, rows


def _convert(target: Target, rows: list[Rows]) -> list[mx.array]:
    """Convert rows of the source to rows of the target's parts."""
    if target.is_copy:
        stored = target.weight.arrays(rows)  # float16 and float32 scales are rounded to bfloat16
        rounded = [part.dtype == PLAIN for part in target.parts]
        return [x.astype(mx.bfloat16) if plain else x for x, plain in zip(stored, rounded, strict=True)]
    values = target.weight.values(rows)
    return [values] if target.format is None else target.format.pack(values)


def _bytes(array: mx.array) -> memoryview:
    """Return the bytes of an array in row-major order."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.ascontiguousarray(array).data.cast("B")


def write_index(plan: Plan) -> None:
    """Write ``model.safetensors.index.json``."""
    weight_map = {
        target.weight.name + part.suffix: name
        for name, targets in plan.shards.items() for target in targets for part in target.parts
    }
    values = sum(target.weight.size for target in plan.targets)
    metadata = {"total_size": plan.bytes_out, "total_parameters": values}
    record = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_text(plan.partial / INDEX, json.dumps(record, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file, either completely or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file, either completely or not at all."""
    unfinished = path.with_name(path.name + _UNFINISHED)
    with unfinished.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def sha256(path: Path) -> str:
    """Return the sha256 digest of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
