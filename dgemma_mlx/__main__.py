"""Run the command line as ``python -m dgemma_mlx``."""

from dgemma_mlx.cli.app import main

main()
