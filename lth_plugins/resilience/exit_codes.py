"""The exit codes of tools that a signal stopped: started again, they resume."""

import signal

EXIT_CODE = 128 + signal.SIGTERM
"""The exit code of a tool that SIGTERM stopped; started again, it resumes."""

INTERRUPTED = 128 + signal.SIGINT
"""The exit code of a tool that Ctrl-C stopped; started again, it resumes."""

STOPPED_BY = {
    EXIT_CODE: "SIGTERM",
    -signal.SIGTERM: "SIGTERM",
    INTERRUPTED: "Ctrl-C",
    -signal.SIGINT: "Ctrl-C",
}
"""The exit codes of processes that a signal ended, and the signal: they saved, or had no need."""
