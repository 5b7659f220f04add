"""What being patched costs: ``tokentrim bench``. Measured, never asserted: no test and no command fails on a time."""
