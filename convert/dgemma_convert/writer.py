"""Writes the output's shards: streamed, synced, renamed; a manifest of finished ones lets a later run go on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

from dgemma_convert.formats import PLAIN
from dgemma_convert.plan import MANIFEST, Plan, Target
from dgemma_convert.source import Rows
from dgemma_mlx.checkpoint.config import read_json
from dgemma_mlx.errors import DgemmaError

Progress = Callable[[int], None]
"""Called with the number of source bytes that were just converted."""

INDEX = "model.safetensors.index.json"
_UNFINISHED = ".unfinished"
_HASH_BLOCK = 1 << 20


def write_shards(plan: Plan, progress: Progress) -> dict[str, str]:
    """Writes what the manifest does not hold yet; returns each shard's sha256. Raises ``DgemmaError`` for
    damaged weights."""
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


def begin(plan: Plan, resume: bool, force: bool) -> None:
    """Readies the folder to write in: empties it (``force``), or checks that what is there is of the same plan."""
    left = list(plan.partial.iterdir())
    if left and force and not resume:
        for path in left:
            path.unlink()
    elif left and not resume:
        raise DgemmaError(
            f"an earlier conversion to {plan.output} was interrupted",
            "Go on with --resume, or start over with --force.",
        )
    manifest, fingerprint = plan.partial / MANIFEST, plan.fingerprint()
    if not manifest.exists():
        write_text(manifest, json.dumps({"plan": fingerprint, "shards": {}}) + "\n")
    elif read_json(manifest).get("plan") != fingerprint:
        raise DgemmaError(
            f"the interrupted conversion to {plan.output} was of another source, recipe or version",
            "Start over with --force, or name another output with -o.",
        )


def _read_manifest(plan: Plan) -> dict[str, str]:
    return dict(read_json(plan.partial / MANIFEST)["shards"])


def _write_shard(path: Path, targets: Sequence[Target], progress: Progress) -> str:
    """One safetensors file, under another name until it is whole; returns its sha256."""
    unfinished = path.with_name(path.name + _UNFINISHED)
    digest = hashlib.sha256()
    with unfinished.open("wb") as file:

        def write(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        # One thread reads ahead, one writes. MLX stays on this one: it keeps a stream for each that has used it.
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
    """The length and the JSON header of a safetensors file with the targets' parts in order."""
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for target in targets:
        for part in target.parts:
            begin, end = end, end + part.nbytes
            entry = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [begin, end]}
            entries[target.weight.name + part.suffix] = entry
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data begins aligned
    return len(header).to_bytes(8, "little") + header


def _encoded(targets: Sequence[Target], reader: Executor, progress: Progress) -> Iterator[memoryview]:
    """The targets' bytes in file order: values block by block, then scales, which are small enough to hold."""
    blocks = ((target, start, stop) for target in targets for start, stop in target.weight.blocks())
    held: list[list[memoryview]] = []
    for target, start, stop, rows in _read_ahead(blocks, reader):
        if start == 0:
            held = [[] for _ in target.parts[1:]]
        arrays = _convert(target, rows)
        mx.eval(arrays)
        first, *others = map(_bytes, arrays)
        yield first
        for parts, data in zip(held, others, strict=True):
            parts.append(data)
        size, height = target.weight.nbytes, target.weight.rows
        progress(size * stop // height - size * start // height)
        if stop == height:
            mx.clear_cache()
            for parts in held:
                yield from parts


Block = tuple[Target, int, int]


def _read_ahead(blocks: Iterator[Block], reader: Executor) -> Iterator[tuple[Target, int, int, list[Rows]]]:
    """Each block with its rows; the next one is read meanwhile."""

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
    """Rows of the target's parts."""
    if target.is_copy:
        stored = target.weight.arrays(rows)  # scales of a float16 or float32 conversion are rounded
        rounded = [part.dtype == PLAIN for part in target.parts]
        return [x.astype(mx.bfloat16) if plain else x for x, plain in zip(stored, rounded, strict=True)]
    values = target.weight.values(rows)
    return [values] if target.format is None else target.format.pack(values)


def _bytes(array: mx.array) -> memoryview:
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.ascontiguousarray(array).data.cast("B")


def write_index(plan: Plan) -> None:
    """``model.safetensors.index.json``."""
    weight_map = {
        target.weight.name + part.suffix: name
        for name, targets in plan.shards.items() for target in targets for part in target.parts
    }
    values = sum(target.weight.size for target in plan.targets)
    metadata = {"total_size": plan.bytes_out, "total_parameters": values}
    record = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_text(plan.partial / INDEX, json.dumps(record, indent=2) + "\n")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second conversion out of the folder as long as this one runs."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DgemmaError(f"another conversion is writing {folder}", "Wait for it, or stop it.") from None
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a small file in UTF-8: whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a small file: whole or not at all."""
    unfinished = path.with_name(path.name + _UNFINISHED)
    with unfinished.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def sync_folder(folder: Path) -> None:
    """Makes renames in the folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
