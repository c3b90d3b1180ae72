"""One canvas: temperature schedule, acceptance, stopping, edits, and the loop over denoising steps."""
