"""Whether a denoiser call can be made twice: what it counts, what it keeps, what a replay with nothing pruned shows."""
