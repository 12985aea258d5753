"""What a command says of a file that it wrote."""

from pathlib import Path


def wrote(path: Path) -> None:
    print(f"wrote {path} ({path.stat().st_size:,} bytes)")
