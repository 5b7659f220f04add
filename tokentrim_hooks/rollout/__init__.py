"""Algorithm 1 over denoiser calls: sessions, chunks, phases, regeneration."""
