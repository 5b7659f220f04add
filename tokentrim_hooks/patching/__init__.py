"""What hangs on a model, and how it comes off."""
