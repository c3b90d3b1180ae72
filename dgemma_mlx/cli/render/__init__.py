"""What draws: events in, text out. Nothing here imports mlx."""
