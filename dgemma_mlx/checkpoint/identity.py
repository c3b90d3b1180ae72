"""A digest that identifies the weights of a checkpoint without reading all of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from dgemma_mlx.checkpoint.shards import StoredTensor, stored_tensors, weight_files
from dgemma_mlx.errors import DgemmaError

_SAMPLE = 4096  # bytes per sample: the least that a disk reads, so that fewer would not be faster
_EVERY = 2 << 20  # bytes from one sample to the next: about one expert of the published model at 4 bits
_READERS = 8  # threads


def weights_digest(folder: Path) -> str:
    """Return a SHA-256 digest of a checkpoint's weights, in hex.

    For each tensor it covers the name, dtype and shape, 4 KB of every 2 MB of the data, and the last 4 KB. Training,
    quantization and conversion change values throughout a tensor, and therefore the digest. A change of single rows may
    go unnoticed. The digest does not depend on how the tensors are distributed over files. Raises ``DgemmaError`` when
    the files cannot be read.
    """
    files, tensors = weight_files(folder), stored_tensors(folder)
    digest = hashlib.sha256()
    try:
        with ExitStack() as stack, ThreadPoolExecutor(_READERS) as readers:
            opened = {path: stack.enter_context(path.open("rb", buffering=0)).fileno() for path in files}
            ordered = [tensors[name] for name in sorted(tensors)]
            samples = readers.map(lambda tensor: _sample(tensor, opened), ordered)
            for name, tensor, sample in zip(sorted(tensors), ordered, samples, strict=True):
                digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode() + sample)
    except OSError as error:
        message = f"the weights in {folder} cannot be read: {error.strerror}"
        raise DgemmaError(message, "Check the files and their permissions.") from None
    return digest.hexdigest()


def _sample(tensor: StoredTensor, opened: Mapping[Path, int]) -> bytes:
    """Return the SHA-256 digest of a tensor's sampled bytes. ``opened`` maps paths to open file descriptors."""
    places = [*range(tensor.start, tensor.end, _EVERY), max(tensor.start, tensor.end - _SAMPLE)]
    digest = hashlib.sha256()
    for start in places:
        digest.update(os.pread(opened[tensor.path], min(_SAMPLE, tensor.end - start), start))
    return digest.digest()
