"""The options that `lth seg` and `lth test-seg` share; mmengine is not imported for them."""

import argparse

INSTALL = (
    "pip install 'lth_plugins[mmseg]', then pip install --no-deps mmcv-lite (docs/hosts/mmseg.md)"
)


def add_runner_options(parser: argparse.ArgumentParser) -> None:
    """The options that mmseg's own training and test scripts have in common."""
    parser.add_argument("config", help="config file")
    parser.add_argument(
        "--work-dir", help="where logs and results go (default ./work_dirs/CONFIG'S NAME)"
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        type=_setting,
        default=[],
        metavar="KEY=VALUE",
        help="settings of the config to override, such as model.backbone.init_cfg.random=True; "
        'lists as key="[a,b]" or key=a,b',
    )
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    # torch.distributed.launch gives the one or the other, by version.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0)


def _setting(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, found {text!r}")
    return text
