"""What hosts and their tools offer to slim a model, and refuse beside it."""

from argparse import ArgumentParser, Namespace

from lth_plugins.errors import ConfigError


def add_budget_options(parser: ArgumentParser, model: str, more: str) -> None:
    """Add ``--prune-flops`` and ``--prune-latency``.

    Args:
        parser: of a tool that trains.
        model: what it trains, such as "detector".
        more: where other settings are.
    """
    parser.add_argument(
        "--prune-flops",
        type=float,
        metavar="SHARE",
        help=f"remove channels of the whole {model} until it has this share of its FLOPs; {more}",
    )
    parser.add_argument(
        "--prune-latency",
        type=float,
        metavar="SHARE",
        help="the same, until its inference takes this share of its time on this machine",
    )


def check_alone(method: str | None) -> None:
    """Refuse to slim a model while its masks move: removed channels would count as pruned.

    Args:
        method: what the host calls sparse training, if its configuration asks for that, too.

    Raises:
        ConfigError: if it does.
    """
    if method is not None:
        raise ConfigError(
            f"expected slimming without {method}, found both: the weights of removed channels "
            f"would count as pruned. Slim first, then prune slim.ticket on slim.pth with {method}"
        )


def has_budget(args: Namespace) -> bool:
    """Whether one of the options was given."""
    return args.prune_flops is not None or args.prune_latency is not None


def check_budget_options(
    parser: ArgumentParser, args: Namespace, model: str, others: dict[str, bool]
) -> None:
    """Exit with the parser's error where options contradict each other.

    Args:
        parser: has the options of `add_budget_options`.
        args: what it found.
        model: as there.
        others: options that slimming does not go with, and whether they were given.
    """
    if args.prune_flops is not None and args.prune_latency is not None:
        parser.error("--prune-flops and --prune-latency are two budgets: give one of them")
    given = next((option for option, is_given in others.items() if is_given), None)
    if has_budget(args) and given is not None:
        option = "--prune-flops" if args.prune_latency is None else "--prune-latency"
        parser.error(f"{option} slims a {model} in an ordinary training: leave out {given}")
