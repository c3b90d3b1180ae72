"""Pictures in: pixels and video frames to patches, and the tower that turns patches into soft tokens."""
