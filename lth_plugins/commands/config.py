"""The configurations that come with lth_plugins.

    lth config list                     their names
    lth config list mmseg               those below a folder
    lth config path mmseg/fcn_r50_cityscapes_ticket.py
                                        the file, for `_base_` (mmengine) or `_BASE_` (detectron2)
    lth config copy transfer/cifar10_r50.yaml FOLDER
                                        a copy to edit, and of what it inherits

Every command also accepts such a name where it expects a configuration.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lth_plugins import cli
from lth_plugins.errors import ConfigError, RunError
from lth_plugins.resilience.atomic import write_atomically
from lth_plugins.shipped import CONFIGS, config_path, configs, folder, with_bases


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = cli.command_parser(__doc__, "lth config", prog)
    commands = parser.add_subparsers(required=True, metavar="{list,path,copy}")
    sub = commands.add_parser("list", help="the names of all configurations")
    sub.add_argument("folder", nargs="?", default="", help="only those below it, such as mmseg")
    sub.set_defaults(run=show_names)
    sub = commands.add_parser("path", help="the file of a configuration")
    sub.add_argument("name")
    sub.set_defaults(run=show_path)
    sub = commands.add_parser("copy", help="copy a configuration, to edit it")
    sub.add_argument("name")
    sub.add_argument("folder", type=Path, help="where to; it is made if it is not there")
    sub.set_defaults(run=copy)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "lth config") -> int:
    args = make_parser(prog).parse_args(argv)
    return cli.run(lambda: args.run(args), prog, cli.NOTHING_WRITTEN)


def show_names(args: argparse.Namespace) -> None:
    below = args.folder.strip("/")
    names = [name for name in configs() if not below or name.startswith(f"{below}/")]
    if not names:
        folders = sorted({name.partition("/")[0] for name in configs()})
        raise ConfigError(
            f"expected one of the folders {', '.join(folders)}, found {args.folder}: name another"
        )
    print(*names, sep="\n")


def show_path(args: argparse.Namespace) -> None:
    print(config_path(args.name))


def copy(args: argparse.Namespace) -> None:
    source, root = Path(config_path(args.name)), folder(CONFIGS)
    targets = {path: args.folder / path.relative_to(root) for path in with_bases(source)}
    for path, target in targets.items():
        if target.exists() and target.read_bytes() != path.read_bytes():
            raise RunError(
                f"expected no file at {target}, found one of other content: name another folder"
            )
    try:
        for path, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, path.read_bytes())
    except OSError as error:
        raise RunError(f"expected a folder to write to, found {error}: name another") from None
    print(*targets.values(), sep="\n")
