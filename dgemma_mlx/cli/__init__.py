"""The command line: arguments in, events drawn. No module here imports mlx before a command needs it."""
