"""What a denoiser is conditioned on: classes, encoded prompts, nothing."""
