"""Where the command begins: Ctrl-C while it is still being loaded is one line and status 130, as it is later."""

import os
import signal

from tokentrim_hooks.cli.status import INTERRUPTED


def main() -> int:
    """Load the command line and run it; returns the exit status."""
    waits = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if waits:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, _stop)
    from tokentrim_hooks.cli.main import main as run

    if waits:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run()


def _stop(*_: object) -> None:
    """Nothing is begun yet; an exception would be raised in somebody's import, which may make another one of it."""
    os.write(2, b"tokentrim: stopped by Ctrl-C.\n")
    os._exit(INTERRUPTED)
