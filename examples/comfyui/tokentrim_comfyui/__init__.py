"""TokenTrim for ComfyUI: nodes, the adapter of its AR video model, and what patches a model while it samples."""
