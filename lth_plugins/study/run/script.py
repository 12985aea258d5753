"""Runs a training script of the user's own on a ticket, as a condition of a study asks for it."""

import logging
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lth_plugins.deploy.onnx import untrained
from lth_plugins.errors import RunError
from lth_plugins.resilience.seeds import reseed, seeded
from lth_plugins.ticket import Choice

logger = logging.getLogger(__name__)

MADE = "condition.ticket"
"""The ticket of a random or reversed mask, or of other weights, while the script runs."""


def run_script(
    script: Path, choice: Choice, seed: int, out: Path, arguments: Sequence[str] = ()
) -> None:
    """Run a Python script with ``--ticket FILE --seed N --out FOLDER``.

    The script gets a file that is the condition's ticket, whatever that is: where the masks or
    weights differ from those of the chosen file, ``condition.ticket`` in the folder, which is
    removed at the end. PyTorch, NumPy and Python are seeded before it starts.

    Args:
        script: runs in this process, as ``__main__``.
        choice: the ticket. ``load_weights=False`` stands for torchvision's initialisation of the
            trunk, drawn by the seed.
        seed: of the training.
        out: is made, and kept where the script is stopped, so that it can resume from there.
        arguments: after the others.

    Raises:
        LthError: if there is no such script or ticket.
        RunError: if the script raises an exception; its traceback is printed.
    """
    if not script.is_file():
        raise RunError(f"expected a Python script, found none at {script}: check the path")
    out.mkdir(parents=True, exist_ok=True)
    made = None if replace(choice, seed=0) == Choice(choice.path) else out / MADE
    if made is not None:
        _make(choice, seed, made)
    ticket = f"{choice.path if made is None else made}"
    given = ("--ticket", ticket, "--seed", f"{seed}", "--out", f"{out}", *arguments)
    logger.info("Running %s %s", script, " ".join(given))
    try:
        _run(script, given, seed)
    finally:
        if made is not None:
            made.unlink(missing_ok=True)


def _make(choice: Choice, seed: int, path: Path) -> None:
    ticket = replace(choice, load_weights=True).load()
    if not choice.load_weights:
        with seeded(seed):
            weights = untrained(ticket.arch).state_dict()
        ticket = ticket.with_weights(weights)
    ticket.save(path)


def _run(script: Path, given: Sequence[str], seed: int) -> None:
    argv, path = sys.argv, sys.path
    sys.argv = [f"{script}", *given]
    sys.path = [os.path.abspath(script.parent), *path]  # modules beside it, as Python does
    reseed(seed)
    try:
        runpy.run_path(f"{script}", run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    except Exception as error:
        traceback.print_exc()
        raise RunError(f"{script} raised {type(error).__name__}: {error}") from error
    finally:
        sys.argv, sys.path = argv, path
