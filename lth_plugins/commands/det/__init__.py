r"""Train or evaluate a detector on a ticket, with detectron2's own trainer and its options.

    lth det --config-file configs/detectron2/digits/faster_rcnn_R_18_FPN_ticket.yaml \
        MODEL.TICKET.PATH round_07.ticket OUTPUT_DIR runs/det

``--eval-only``, ``--resume``, ``--num-gpus``, ``--num-machines`` and settings at the end of the
line work as in detectron2's tools/train_net.py. ``OUTPUT_DIR`` gets detectron2's checkpoints and
logs, and the fine-tuned ticket, ``final.ticket``.

``--eval-only`` leaves its metrics in ``OUTPUT_DIR/evaluation.json``.

``--eval-only --compact`` first removes the dead channels of a structured ticket, writes
``compact.pth`` to ``OUTPUT_DIR`` and evaluates that; as ``MODEL.WEIGHTS`` it loads like any other
checkpoint. ``--eval-only --onnx`` also exports the evaluated model as ``model.onnx``, and checks
that onnxruntime finds the same in the first test images.

``--imp-rounds 8`` finds task-specific tickets instead: the ticket is dense then (round 0), each
round is such a training, and ``OUTPUT_DIR`` gets ``round_00.ticket``, … and the run of each in
``train_00``, …. The same command resumes. ``MODEL.TICKET.IMP`` has more settings.

``--teacher CHECKPOINT`` distils: the detector also learns the features of that one, which the same
config trained densely. ``DISTILL`` has the weights of the two losses.

``MODEL.TICKET.METHOD rigl MODEL.TICKET.METHOD_OPTIONS.SPARSITY 0.9`` trains sparse, by RigL or
another method (docs/methods.md).

``DATASETS.REGISTER`` of the config describes datasets of your own in COCO's or VOC's format, and
``--register FILE.py`` runs a file that registers any others.

Evaluating a trained checkpoint needs no ticket.

On SIGTERM or Ctrl-C it saves and exits with code 143 or 130; ``--resume`` continues from there.
"""

import argparse
import importlib
import os
from collections.abc import Sequence

from lth_plugins import cli
from lth_plugins.shipped import find_config
from lth_plugins.slimming.options import add_budget_options, check_budget_options


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = cli.command_parser(__doc__, "lth det", prog)
    parser.set_defaults(prog=prog)
    add_trainer_options(parser)
    parser.add_argument(
        "--imp-rounds", type=int, metavar="N", help="find task-specific tickets, pruning N times"
    )
    add_budget_options(parser, "detector", "SLIM of the config has more settings")
    parser.add_argument(
        "--teacher",
        default="",
        metavar="CHECKPOINT",
        help="also learn the features of this detector, of the dense training of the config",
    )
    parser.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="FILE.py",
        help="run a Python file that registers datasets in detectron2's catalogs; for COCO's and "
        "VOC's formats DATASETS.REGISTER of the config is enough",
    )
    parser.add_argument(
        "--compact",
        action="store_true",
        help="with --eval-only: first remove dead channels, write compact.pth and evaluate it",
    )
    parser.add_argument(
        "--onnx",
        action="store_true",
        help="with --eval-only: also export the evaluated model as model.onnx",
    )
    return parser


def add_trainer_options(parser: argparse.ArgumentParser) -> None:
    """The options of detectron2's own `default_argument_parser`, which is not imported for them."""
    parser.add_argument("--config-file", default="", metavar="FILE", help="the config")
    parser.add_argument(
        "--resume", action="store_true", help="resume from the latest checkpoint in OUTPUT_DIR"
    )
    parser.add_argument("--eval-only", action="store_true", help="only evaluate")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs of each machine")
    parser.add_argument("--num-machines", type=int, default=1, help="machines in all")
    parser.add_argument("--machine-rank", type=int, default=0, help="this machine's number, from 0")
    # As detectron2: a port of the user's own, so that a leftover process shows as a taken port.
    port = 2**15 + 2**14 + hash(os.getuid()) % 2**14
    parser.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{port}",
        help="where the processes meet, as torch.distributed's init_method",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="settings of the config to override, at the end of the command",
    )


def parse_args(argv: Sequence[str] | None = None, prog: str = "lth det") -> argparse.Namespace:
    """Parse the command line; refuse an option that would do nothing."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    if not args.config_file:
        parser.error(
            "the following arguments are required: --config-file FILE, one of configs/detectron2 "
            "or a config of your own"
        )
    late = [text for text in args.opts if text.startswith("--")]
    if late:  # detectron2's parser reads all that follows the first setting as settings
        parser.error(f"{late[0]} is after the settings ({args.opts[0]} …): give it before them")
    if (args.compact or args.onnx) and not args.eval_only:
        parser.error("--compact and --onnx change what is evaluated: add --eval-only")
    others = {"--eval-only": args.eval_only, "--imp-rounds": args.imp_rounds is not None}
    check_budget_options(parser, args, "detector", others)
    if args.imp_rounds is not None and args.eval_only:
        parser.error("--imp-rounds trains, and --eval-only does not: give one of the two")
    if args.teacher and args.eval_only:
        parser.error(
            "--teacher is for a training, and --eval-only does not train: give one of the two"
        )
    return args


def main(argv: Sequence[str] | None = None, prog: str = "lth det") -> int:
    args = parse_args(argv, prog)

    def find() -> None:
        args.config_file = f"{find_config(args.config_file)}"
        with cli.needing("docs/hosts/detectron2.md says how to install it"):
            importlib.import_module(f"{__name__}.run")

    if code := cli.run(find, prog, cli.NOTHING_WRITTEN):
        return code
    from lth_plugins.commands.det.run import start

    return start(args)
