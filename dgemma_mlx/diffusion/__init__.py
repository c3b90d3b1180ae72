"""One canvas: temperature schedule, acceptance, stopping, and the loop over denoising steps."""
