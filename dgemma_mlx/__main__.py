"""Run the command line as ``python -m dgemma_mlx``."""

from dgemma_mlx.cli.entry import main

main()
