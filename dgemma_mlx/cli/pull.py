"""``dgemma-mlx pull``: download a model from the Hub."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dgemma_mlx.cli.complete import published_models
from dgemma_mlx.cli.interrupt import ending_at_once
from dgemma_mlx.cli.parameters import CpuDequantize
from dgemma_mlx.errors import DgemmaError

HubName = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="A Hub id, `owner/name` or `owner/name@revision`.", autocompletion=published_models
    ),
]


def pull(name: HubName, cpu_dequantize: CpuDequantize = None) -> None:
    """Download a model from the Hugging Face Hub, or update it.

    The verdict comes first: the size, the free disk, the memory that the model takes and the memory that this machine
    gives it. On a terminal, a question follows if the model does not fit.

    Notes:
        - Interrupt at any time: the same command goes on where the last one stopped, also within a file. Each file is
          checked by its checksum as it is downloaded. Of a file that is in the cache already, the size is compared.
        - The other commands download a model that is missing in the same way. They ask before, on a terminal.
        - A model that is complete in the cache is compared with the newest commit on the Hub, and only files that
          have changed are downloaded.
        - The model is stored in the Hub's cache, which other programs share. HF_HOME names its folder, and
          `dgemma-mlx models` lists what is there.

    Examples:
        dgemma-mlx pull mlx-community/diffusiongemma-26B-A4B-it-4bit
        dgemma-mlx pull owner/name@v2
    """
    from dgemma_mlx.checkpoint.hub import resolve
    from dgemma_mlx.cli.downloading import obtain
    from dgemma_mlx.cli.settings import Settings

    with ending_at_once():
        checkpoint = resolve(name, weights=False, refresh=True)
    if checkpoint.repo_id is None:
        raise DgemmaError(f"{name} is on this machine already", "Name a model on the Hub: owner/name.", exit_code=2)
    if not checkpoint.has_weights:
        chosen = Settings().pick("cpu_dequantize", cpu_dequantize)
        checkpoint = obtain(checkpoint, ask_if_it_fits=False, cpu_dequantize=chosen)
    elif checkpoint.was_compared:
        print(f"{name} is complete and up to date", file=sys.stderr)
    if not checkpoint.was_compared:
        print(f"{name} is complete in the cache; the Hub could not be asked for a newer one", file=sys.stderr)
    print(f"try: dgemma-mlx chat -m {name}", file=sys.stderr)
