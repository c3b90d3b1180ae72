"""What identifies a loaded model to a saved prompt cache."""

from __future__ import annotations

import hashlib
import json
import socket
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.checkpoint.identity import weights_digest
from dgemma_mlx.distributed.channel import Channel, Peer
from dgemma_mlx.generation.model import Model
from dgemma_mlx.kernels.dispatch import has_metal, mode
from dgemma_mlx.model.adapter_file import adapter_digest
from dgemma_mlx.model.dequantize import dequantized_bytes
from dgemma_mlx.version import __version__


def fingerprint(folder: Path, config: ModelConfig, adapter: Path | None) -> str:
    """Return the SHA-256, in hex, of a checkpoint's architecture and weights and of an adapter.

    Raises ``DgemmaError`` when their files cannot be read.
    """
    architecture = json.dumps([asdict(config.text), config.quantization], sort_keys=True, default=dict)
    of_adapter = "" if adapter is None else adapter_digest(adapter)
    return hashlib.sha256(f"{architecture}\n{weights_digest(folder)}{of_adapter}".encode()).hexdigest()


def require_same(channel: Channel, peer: Peer, theirs: str, own: str) -> None:
    """End all machines, with one line, when the fingerprint of another machine's model is not that of this one's."""
    if theirs != own:
        channel.fail(f"{peer} has another checkpoint, configuration or adapter than {socket.gethostname()}")


@dataclass(frozen=True)
class ModelIdentity:
    """A model's name, and everything that must be the same for its keys and values to be the same to the last bit.

    Attributes:
        name: The name under which the model was loaded, for messages only.
        weights: SHA-256, in hex, of the architecture, the weights and the adapter.
        made_with: Versions, device, dtype and kernels, as one readable line.
    """

    name: str
    weights: str
    made_with: str

    @classmethod
    def of(cls, model: Model) -> ModelIdentity:
        """Return the identity of a loaded model. Raises ``DgemmaError`` when its files cannot be read."""
        weights = fingerprint(model.folder, model.config, model.adapter)
        uses_kernels = has_metal() and mode() in ("auto", "force")
        made_with = (
            f"dgemma-mlx {__version__}", f"MLX {version('mlx')}", "GPU" if has_metal() else "CPU",
            str(model.network.dtype).removeprefix("mlx.core."),
            *(["packed weights"] if dequantized_bytes(model.network) else []),
            *(["kernels"] if uses_kernels else []),
            *([] if model.pictures is None else [f"image attention {model.network.image_attention}"]),
        )  # fmt: skip
        return cls(model.name, weights, ", ".join(made_with))
