"""The log: every answer and every conversation, in one SQLite file."""
