"""data_prep/latents."""
