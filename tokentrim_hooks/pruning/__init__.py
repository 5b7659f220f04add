"""How tokens die exactly: contexts, tombstones, key selection, the attention tap. Knows no adapter."""
