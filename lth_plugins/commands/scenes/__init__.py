"""Write scenes of real handwritten digits for detection and segmentation: COCO and mmseg layout.

    OUT/images/{train,test}/000000.png              RGB
    OUT/annotations/instances_{train,test}.json     COCO: boxes and instance masks
    OUT/labels/{train,test}/000000.png              8-bit label maps: 0 background, digit d is d + 1
    OUT/scenes.json                                 the settings of the scenes

Categories 1 to 10 are named '0' to '9'. Instance masks are COCO's compressed run lengths, which
hold the rendered masks exactly, holes and split digits included, as polygons could not. pycocotools
reads them directly, detectron2 with `INPUT.MASK_FORMAT: bitmask`. The label maps fit mmseg's
`BaseSegDataset` with `img_suffix='.png', seg_map_suffix='.png', reduce_zero_label=False`.

The same settings give the same bytes (with the same NumPy, Pillow and scikit-learn), and scene i of
a split depends only on the seed, the sizes and i. OUT is written atomically; a killed run leaves
only a hidden `.OUT.partial-…` beside it, which can be deleted.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lth_plugins import cli

LOOKS = ("busy", "calm")  # those of `lth_plugins.digits`, which imports PyTorch


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = cli.command_parser(__doc__, "lth scenes", prog)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder to write; datasets/… is below $LTH_DATASETS, if that is set",
    )
    parser.add_argument("--train", type=int, default=300, help="training scenes (default 300)")
    parser.add_argument("--test", type=int, default=80, help="test scenes (default 80)")
    parser.add_argument("--seed", type=int, default=0, help="0 or more (default 0)")
    parser.add_argument("--min-size", type=int, default=96, help="smallest side, px (default 96)")
    parser.add_argument("--max-size", type=int, default=160, help="largest side, px (default 160)")
    parser.add_argument(
        "--look",
        choices=LOOKS,
        default=LOOKS[0],
        help="busy: up to six digits of 20 to 64 px that overlap, on any ground; calm: up to three "
        "of 32 to 48 px, side by side, light on dark or dark on light (default busy)",
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "lth scenes") -> int:
    args = make_parser(prog).parse_args(argv)
    return cli.run(lambda: start(args), prog, cli.NOTHING_WRITTEN)


def start(args: argparse.Namespace) -> None:
    with cli.needing("pip install 'lth_plugins[digits]'"):
        from lth_plugins.commands.scenes.write import make
    make(args)
