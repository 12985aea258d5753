"""What all commands share: how they exit, on an error and when stopped."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from lth_plugins.errors import LthError, RunError
from lth_plugins.resilience.sigterm import Stopped, stoppable

COMMANDS: Mapping[str, str | None] = MappingProxyType(
    {
        "find": "find_ticket.py",
        "det": "train_det.py",
        "seg": "train_seg.py",
        "test-seg": "test_seg.py",
        "cls": "train_cls.py",
        "script": "train_script.py",
        "ticket": "ticket.py",
        "study": "study.py",
        "demo": "demo.py",
        "scenes": "make_digit_scenes.py",
        "config": None,
    }
)
"""The commands of `lth`, each with the script of ``tools/`` that is the same."""

RESUMES = "the same command resumes"
RESUMES_WITH_OPTION = "the same command with --resume resumes"
NOTHING_WRITTEN = "nothing was written"

BAD_INPUT = 2
"""The exit code of bad input, the same as argparse's."""


def command(name: str) -> tuple[str, ...]:
    """What Python is given to start a command, wherever it is installed."""
    return ("-m", "lth_plugins", name)


def run(body: Callable[[], int | None], name: str, stopped: str) -> int:
    """Run the body of a tool and return its exit code.

    An `LthError` prints one line and exits with the code of bad input. On SIGTERM and Ctrl-C a
    training ends its step and saves; then, or at once where nothing trains, the tool exits with one
    line and the code 143 or 130. A second Ctrl-C exits at once.

    Args:
        body: returns an exit code, or None for 0.
        name: of the tool, as the user calls it; messages begin with it.
        stopped: what to print when it is stopped, such as how to resume.
    """
    try:
        with stoppable():
            return body() or 0
    except LthError as error:
        _say(f"{name}: error: {error}")
        return BAD_INPUT
    except Stopped as stop:
        saved = f" and saved {stop.saved}" if stop.saved else ""
        if is_first():
            _say(f"{name}: stopped{saved}; {stopped}")
        assert isinstance(stop.code, int)
        return stop.code


def command_parser(description: str | None, command: str, prog: str) -> argparse.ArgumentParser:
    """The parser of a command.

    Args:
        description: what `--help` says; it calls the command by its name.
        command: that name.
        prog: what the user calls it, which may be a script of tools/.
    """
    return argparse.ArgumentParser(
        prog=prog,
        description=(description or "").replace(command, prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_config_arguments(parser: argparse.ArgumentParser, folder: str) -> None:
    """Add a YAML file, such as those in a folder, and changes to it."""
    parser.add_argument("config", help=f"YAML file, such as those in {folder}")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="changes to the configuration"
    )


def log_progress() -> None:
    """Log what a training reports to the terminal, on the first process alone."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("lth_plugins.masking").setLevel(logging.WARNING)
    if not is_first():
        logging.getLogger().setLevel(logging.WARNING)


@contextmanager
def needing(install: str) -> Iterator[None]:
    """Say what to install where an import inside finds a package missing.

    Args:
        install: what installs it.

    Raises:
        RunError: instead of the ``ImportError``.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "lth_plugins"):
            raise
        raise RunError(f"expected the package {missing}, found none: {install}") from None


def quiet_lightning() -> None:
    """Leave out what Lightning logs of itself. Call it after its import, which sets the levels."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _say(text: str) -> None:
    if sys.stderr.isatty():
        text = f"\r\033[K{text}"  # over the terminal's ^C, or a progress bar
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def is_first() -> bool:
    """Whether this process prints, where several do the same."""
    distributed: Any = sys.modules.get("torch.distributed")  # not imported for this question
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return bool(distributed.get_rank() == 0)
    given = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return int(next(filter(None, given), 0)) == 0
