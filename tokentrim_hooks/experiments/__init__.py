"""Demo, comparison and benchmark: evidence, built in."""
