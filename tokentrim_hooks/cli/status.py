"""Exit status of the command line, beside those of scripts."""

WRONG, INTERRUPTED = 2, 130
"""A wrong use, a missing extra, a file that cannot be read or written; and Ctrl-C."""
