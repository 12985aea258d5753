"""What a command does before its imports, which take seconds: this module imports none of them."""

import os
import signal


def stop_in_one_line() -> None:
    """Until `lth_plugins.cli.run` takes over, end on Ctrl-C or SIGTERM with one line.

    By default Ctrl-C would print a traceback, and SIGTERM nothing. What is ignored stays ignored.
    """
    for name in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(name) is not signal.SIG_IGN:
            signal.signal(name, lambda by, _: os.write(2, b"stopped\n") and os._exit(128 + by))
