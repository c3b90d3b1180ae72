"""The HTTP server: protocols that people's tools speak, over one model."""
