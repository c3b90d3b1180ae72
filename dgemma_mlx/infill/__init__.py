"""Text around which, or from which, a canvas is denoised: filling gaps, editing, choosing."""
