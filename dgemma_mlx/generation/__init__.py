"""Whole answers: prefill, canvas after canvas, end of text, statistics."""
