"""What the launcher says of the machines: the rank of this process, and the addresses of all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import parse_json

_HINT = "Start every machine with mlx.launch, or the first one with --hostfile."
DEFAULT_PORT = 32323  # mlx.launch's own, for the first address
OTHER_PORTS = "Wait for another run to end, or choose other ports: DGEMMA_CLUSTER_PORT, mlx.launch --starting-port."


@dataclass(frozen=True)
class Launch:
    """The place of this process among several.

    Attributes:
        rank: The number of this process, from 0.
        size: The number of processes.
        backend: MLX's back end: "ring" or "jaccl".
        addresses: The first address of each process, ``(host, port)``; with jaccl only that of rank 0.
        key: Proves to the others that a process belongs to the group.
    """

    rank: int
    size: int
    backend: str
    addresses: tuple[tuple[str, int], ...]
    key: bytes

    @property
    def channel_address(self) -> tuple[str, int]:
        """Where rank 0 waits for the others: the port before its first one."""
        host, port = self.addresses[0]
        return host, port - 1


def launched(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """Return what ``mlx.launch`` or ``--hostfile`` has written into the environment; None for a process on its own.

    Raises ``DgemmaError`` (exit code 2) when it is incomplete or damaged.
    """
    if "MLX_RANK" not in environ:
        return None
    try:
        rank = int(environ["MLX_RANK"])
        if "MLX_JACCL_COORDINATOR" in environ:
            addresses: tuple[tuple[str, int], ...] = (_address(environ["MLX_JACCL_COORDINATOR"]),)
            backend, text = "jaccl", Path(environ["MLX_IBV_DEVICES"]).read_text()
            size = len(parse_json(text))
        else:
            text = Path(environ["MLX_HOSTFILE"]).read_text()
            backend, addresses = "ring", tuple(_address(each[0]) for each in parse_json(text or "[]"))
            size = len(addresses)
    except KeyError as error:
        raise DgemmaError(f"MLX_RANK is set, but {error.args[0]} is not", _HINT, exit_code=2) from None
    except OSError as error:
        raise DgemmaError(f"cannot read {error.filename}: {error.strerror}", _HINT, exit_code=2) from None
    except (ValueError, TypeError, IndexError, AttributeError):
        raise DgemmaError("the launcher's MLX_RANK or its file of hosts is malformed", _HINT, exit_code=2) from None
    if size < 2:
        return None
    if not 0 <= rank < size:
        raise DgemmaError(f"MLX_RANK is {rank}, but there are {size} hosts", _HINT, exit_code=2)
    secret = environ.get("DGEMMA_CLUSTER_KEY", "") + " ".join(text.split())
    return Launch(rank, size, backend, addresses, sha256(secret.encode()).digest())


def _address(text: str) -> tuple[str, int]:
    """Return the host and the port of an address such as ``10.0.0.1:32323``. Raises ``ValueError``."""
    host, separator, port = text.rpartition(":")
    if not separator:
        return text, DEFAULT_PORT
    if not host or not 1 < int(port) < 1 << 16:
        raise ValueError(text)
    return host, int(port)
