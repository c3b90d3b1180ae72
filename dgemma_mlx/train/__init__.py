"""Training: the data tasks, the objective and the loop of the demo model."""
