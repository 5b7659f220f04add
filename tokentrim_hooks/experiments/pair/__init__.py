"""One script, patched and unpatched from the same seeds: the videos it wrote, how they differ, words and curves."""
