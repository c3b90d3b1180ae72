"""A checkpoint as a folder on disk: its configuration, where it comes from, its tensors and their names."""
