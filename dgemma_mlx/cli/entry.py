"""Where the program begins: the signals first, then the slow imports."""

from __future__ import annotations

import signal
import sys

from dgemma_mlx.cli.signals import end_at_once

TYPE_CHECKING = False  # as in the module typing, which takes a while to import
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    """Run the program and exit with 0 (success), 1 (run-time error), 2 (wrong usage) or 130 (interrupted).

    Another signal that ends the program exits with 128 + its number, as in a shell.
    """
    end_at_once()
    from dgemma_mlx.cli.app import run
    from dgemma_mlx.cli.interrupt import end_in_order

    end_in_order()
    try:
        code = run()
    except KeyboardInterrupt:  # a second one, while the program was already ending
        code = 128 + signal.SIGINT
    end_at_once()
    sys.exit(code)
