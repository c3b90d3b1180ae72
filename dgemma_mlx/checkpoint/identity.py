"""Which weights a checkpoint holds, told without reading all of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from dgemma_mlx.checkpoint.shards import StoredTensor, merged, read_header, shard_files
from dgemma_mlx.errors import DgemmaError

_SAMPLE = 4096  # bytes: what a disk reads at least, so that fewer would not be faster
_EVERY = 2 << 20  # bytes: about an expert of the published model at 4 bits
_READERS = 8


def weights_digest(folder: Path) -> str:
    """SHA-256, in hex, over each tensor's name, dtype and shape, and 4 KB out of every 2 MB of it, and its last 4 KB.

    Training, quantizing and converting change tensors all over, and so the digest; an edit of single rows may be
    missed. How the tensors are spread over files does not matter. ``DgemmaError`` where the files cannot be read.
    """
    files = shard_files(folder)
    tensors = merged(map(read_header, files))
    digest = hashlib.sha256()
    try:
        with ExitStack() as stack, ThreadPoolExecutor(_READERS) as readers:
            opened = {path: stack.enter_context(path.open("rb", buffering=0)).fileno() for path in files}
            ordered = [tensors[name] for name in sorted(tensors)]
            samples = readers.map(lambda tensor: _sample(tensor, opened), ordered)
            for name, tensor, sample in zip(sorted(tensors), ordered, samples, strict=True):
                digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode() + sample)
    except OSError as error:
        raise DgemmaError(f"the weights in {folder} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _sample(tensor: StoredTensor, opened: Mapping[Path, int]) -> bytes:
    """The digest of what is looked at."""
    places = [*range(tensor.start, tensor.end, _EVERY), max(tensor.start, tensor.end - _SAMPLE)]
    digest = hashlib.sha256()
    for start in places:
        digest.update(os.pread(opened[tensor.path], min(_SAMPLE, tensor.end - start), start))
    return digest.digest()
