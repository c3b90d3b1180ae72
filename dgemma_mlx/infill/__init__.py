"""Text in the canvas from the beginning: filling gaps, editing, choosing among answers."""
