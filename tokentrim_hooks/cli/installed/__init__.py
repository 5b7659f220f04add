"""Commands that say what is installed, and what it makes of a model."""
