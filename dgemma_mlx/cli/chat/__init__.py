"""``dgemma-mlx chat``: a conversation in the terminal."""
