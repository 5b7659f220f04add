"""The search for AdaptivePolicy's options, on scenes that no table reports: a script, no command."""
