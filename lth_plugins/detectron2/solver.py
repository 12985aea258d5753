"""The optimizer of a fine-tuning: AdamW beside SGD, and a learning rate of its own for the trunk.

The keys have the names that detectron2's projects gave them (Mask2Former's ``SOLVER.OPTIMIZER`` and
``SOLVER.BACKBONE_MULTIPLIER``).
"""

import torch
from detectron2.config import CfgNode
from detectron2.solver import build as solver
from torch import nn

from lth_plugins.errors import ConfigError, unknown
from lth_plugins.ticket import locate

OPTIMIZERS = ("SGD", "ADAMW")


def add_solver_config(cfg: CfgNode) -> None:
    """Add the keys ``SOLVER.OPTIMIZER`` and ``SOLVER.BACKBONE_MULTIPLIER`` that a config lacks."""
    # SGD, as detectron2 has it, or ADAMW, which takes SOLVER.WEIGHT_DECAY and no momentum.
    cfg.SOLVER.setdefault("OPTIMIZER", "SGD")
    # The trunk's learning rate as a multiple of SOLVER.BASE_LR: below 1, what was pre-trained
    # changes less than the neck and the heads, which are new.
    cfg.SOLVER.setdefault("BACKBONE_MULTIPLIER", 1.0)


def _read(cfg: CfgNode) -> tuple[str, float]:
    return cfg.SOLVER.get("OPTIMIZER", "SGD"), cfg.SOLVER.get("BACKBONE_MULTIPLIER", 1.0)


def check_solver(cfg: CfgNode) -> None:
    """Raise ``ConfigError`` for an unknown optimizer or a negative multiple."""
    name, multiple = _read(cfg)
    if name not in OPTIMIZERS:
        raise unknown("SOLVER.OPTIMIZER", name, OPTIMIZERS)
    if multiple < 0:
        raise ConfigError(f"expected SOLVER.BACKBONE_MULTIPLIER to be 0 or more, found {multiple}")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that a config describes; with the defaults, detectron2's own.

    Args:
        cfg: with or without the keys of `add_solver_config`.
        model: its trunk is found by its parameters' names, in C4 models the last stage, too.

    Raises:
        ConfigError: as `check_solver`.
        TicketError: if there is a multiple other than 1 and no trunk.
    """
    check_solver(cfg)
    name, multiple = _read(cfg)
    if name == "SGD" and multiple == 1:
        return solver.build_optimizer(cfg, model)
    trunk = set() if multiple == 1 else set(locate(model).keys.values())
    groups = solver.get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        lr_factor_func=lambda parameter: multiple if parameter in trunk else 1.0,
    )
    settings = {"lr": cfg.SOLVER.BASE_LR, "weight_decay": cfg.SOLVER.WEIGHT_DECAY, "foreach": True}
    if name == "ADAMW":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, **settings)
    else:
        momentum = {"momentum": cfg.SOLVER.MOMENTUM, "nesterov": cfg.SOLVER.NESTEROV}
        optimizer = torch.optim.SGD(groups, **settings, **momentum)
    return solver.maybe_add_gradient_clipping(cfg, optimizer)
