"""The command line: arguments in, events drawn. Nothing here imports mlx before a command needs it."""
