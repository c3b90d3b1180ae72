"""Draw events as text, as JSON, or as a live canvas. No module here imports mlx."""
