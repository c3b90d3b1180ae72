"""Several machines: one model cut into slices, and what holds the machines together."""
