"""The tickets that come with the project: ``NAME.ticket`` and its card ``NAME.md`` in one folder.

The catalog loads them by name. In a checkout the folder is ``zoo/`` at the top; a wheel has it
inside the package.
"""

from pathlib import Path

from lth_plugins.ticket.hub import SUFFIX

_PACKAGE = Path(__file__).parents[1]
FOLDERS = (_PACKAGE / "zoo", _PACKAGE.parent / "zoo")
"""Where the folder may be. Only files that end in ``.ticket`` count, so another ``zoo`` beside the
package adds no name."""


def zoo() -> dict[str, Path]:
    """The files of the tickets that come with the project, by name."""
    files = (path for folder in FOLDERS for path in folder.glob(f"*{SUFFIX}"))
    return {path.stem: path for path in sorted(files)}
