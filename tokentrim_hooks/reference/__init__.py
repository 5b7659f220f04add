"""A small, trained causal video diffusion model and the scenes it was trained on."""
