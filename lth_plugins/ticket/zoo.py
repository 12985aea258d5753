"""The tickets that come with the project: ``NAME.ticket`` and its card ``NAME.md`` in one folder.

The catalog loads them by name.
"""

from pathlib import Path

from lth_plugins.shipped import folder
from lth_plugins.ticket.hub import SUFFIX


def zoo() -> dict[str, Path]:
    """The files of the tickets that come with the project, by name."""
    return {path.stem: path for path in sorted(folder("zoo").glob(f"*{SUFFIX}"))}
