"""Training and evaluating a detector as a command line says: set up, build, train."""

import argparse
import json
import sys
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from yaml import YAMLError

from lth_plugins import cli, compact
from lth_plugins.detectron2 import (
    add_dataset_config,
    add_distill_config,
    add_slim_config,
    add_solver_config,
    add_ticket_config,
    apply_noted_input,
    apply_ticket_input,
    export_onnx,
    method_of,
    register_datasets,
    slimming_of,
    slims,
    task_search,
)
from lth_plugins.detectron2.checkpoint import WholeCheckpointer, state_in
from lth_plugins.detectron2.datasets import declare_options, import_files, register_digit_scenes
from lth_plugins.detectron2.evaluation import check_datasets
from lth_plugins.detectron2.solver import check_solver
from lth_plugins.detectron2.teacher import check_teacher
from lth_plugins.detectron2.trainer import Trainer
from lth_plugins.errors import ConfigError, RunError
from lth_plugins.resilience.atomic import open_atomically, write_atomically
from lth_plugins.resilience.lock import output_folder
from lth_plugins.resilience.sigterm import passed_on
from lth_plugins.slimming.options import has_budget
from lth_plugins.slimming.selection import budget_of
from lth_plugins.ticket import NotFound, TicketError
from lth_plugins.ticket.keys import is_slimmed

EVALUATION = "evaluation.json"
"""What an evaluation leaves in ``OUTPUT_DIR``: its metrics, by names such as bbox/AP."""

EXPORTED = 4
"""The number of test images on which an exported model must find what it found here."""


def check_device(cfg: CfgNode) -> None:
    """Raise ``RunError`` where a config needs a GPU and PyTorch finds none."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise RunError(
            f"expected a GPU for MODEL.DEVICE {cfg.MODEL.DEVICE}, found none that PyTorch can use: "
            "run it where there is one, or add at the end of the command MODEL.DEVICE cpu "
            "MODEL.RESNETS.NORM BN"
        )


def resumed(cfg: CfgNode, args: argparse.Namespace) -> str | None:
    """The latest checkpoint of the run that --resume resumes; None where there is none."""
    latest = DetectionCheckpointer(torch.nn.Module(), cfg.OUTPUT_DIR)
    return latest.get_checkpoint_file() if args.resume and latest.has_checkpoint() else None


def weights_of(cfg: CfgNode, args: argparse.Namespace) -> str:
    """The checkpoint that is loaded first: with --resume the latest, else ``MODEL.WEIGHTS``.

    Raises:
        ConfigError: if an evaluation has none.
        TicketError: if it does not exist.
    """
    weights = resumed(cfg, args) or cfg.MODEL.WEIGHTS
    if args.eval_only and not weights:
        raise ConfigError(
            "expected a trained checkpoint to evaluate, found an empty MODEL.WEIGHTS: the heads "
            "would be random. Add MODEL.WEIGHTS FILE.pth at the end of the command"
        )
    if weights and "://" not in weights and not Path(weights.partition("?")[0]).is_file():
        raise TicketError(f"expected a checkpoint, found nothing at {weights}: check MODEL.WEIGHTS")
    return weights


def read_config(args: argparse.Namespace) -> CfgNode:
    """The config that the command line describes.

    Raises:
        LthError: if the file or a setting cannot be read, or there is no such device.
    """
    cfg = get_cfg()
    adds = (add_ticket_config, add_dataset_config, add_solver_config)
    for add in (*adds, add_distill_config, add_slim_config):
        add(cfg)
    try:
        cfg.merge_from_file(args.config_file)
        declare_options(cfg, args.opts)
        cfg.merge_from_list(args.opts)
    except (AssertionError, KeyError, ValueError, OSError, YAMLError) as error:
        raise ConfigError(
            f"{args.config_file} and the settings {args.opts} cannot be read as a config of "
            f"detectron2: {error.args[-1] if error.args else error}"
        ) from None
    cfg.DATASETS.REGISTER_FILES = (*cfg.DATASETS.REGISTER_FILES, *args.register)
    if args.imp_rounds is not None:
        cfg.MODEL.TICKET.IMP.ROUNDS = args.imp_rounds
    if has_budget(args):
        budget_of(args.prune_flops, args.prune_latency)  # refuses 0, too
        cfg.SLIM.FLOPS, cfg.SLIM.LATENCY = args.prune_flops or 0.0, args.prune_latency or 0.0
    method_of(cfg)  # refuses invalid options
    if slims(cfg):
        slimming_of(cfg)  # refuses invalid settings
    cfg.DISTILL.TEACHER = "" if args.eval_only else args.teacher or cfg.DISTILL.TEACHER
    register_datasets(cfg.DATASETS.REGISTER)
    import_files(cfg.DATASETS.REGISTER_FILES)
    register_digit_scenes([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    check_device(cfg)
    check_solver(cfg)
    return cfg


def setup(args: argparse.Namespace) -> CfgNode:
    """The config that the command line describes, with the input of its ticket; sets up the log.

    Where the ticket is missing, an evaluation, and the training of a slimmed detector, use the
    input that their checkpoint notes.
    """
    cfg = read_config(args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="lth_plugins")
    try:
        apply_ticket_input(cfg)
    except NotFound:
        weights = weights_of(cfg, args)
        if not args.eval_only and not is_slimmed(state_in(weights)):
            raise
        if args.eval_only:
            cfg.MODEL.WEIGHTS = weights
        apply_noted_input(cfg, weights)
    cfg.freeze()
    return cfg


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    folder = Path(read_config(args).OUTPUT_DIR)
    with output_folder(folder, main=comm.is_main_process()):
        comm.synchronize()  # no process writes before the main one has the lock
        return run(setup(args), args)


def run(cfg: CfgNode, args: argparse.Namespace) -> dict[str, Any] | None:
    check_datasets(cfg, train=not args.eval_only)
    if args.eval_only and not cfg.DATASETS.TEST and (args.onnx or not args.compact):
        raise ConfigError(
            "expected datasets to evaluate on, found an empty DATASETS.TEST: name one, such as "
            "DATASETS.TEST \"('coco_2017_val',)\""
        )
    weights = weights_of(cfg, args)
    if is_slimmed(state_in(weights)):
        cfg.defrost()
        cfg.SLIM.WIDTHS = weights
        if args.eval_only:  # it needs no ticket, which may be of the full width
            cfg.MODEL.WEIGHTS, cfg.MODEL.TICKET.PATH = weights, ""
        cfg.freeze()
    if not args.eval_only:
        check_teacher(cfg, resumed(cfg, args))
    if not args.eval_only and cfg.MODEL.TICKET.IMP.ROUNDS != 0:
        search = task_search(cfg, Trainer)  # refuses a folder of another run before it is touched
        default_setup(cfg, args)
        search.run()
        return None
    default_setup(cfg, args)
    if args.eval_only:
        return evaluate(cfg, args)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def evaluate(cfg: CfgNode, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate a checkpoint; with --compact and --onnx, also write what is evaluated."""
    folder = Path(cfg.OUTPUT_DIR)
    model = Trainer.build_model(cfg)
    checkpointer = WholeCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    if args.compact:
        model = compact(model)
        if comm.is_main_process():  # not by the checkpointer, which would note it as the latest
            with open_atomically(folder / "compact.pth") as file:
                torch.save({"model": model.state_dict()}, file)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results |= Trainer.test_augmented(cfg, model)
    if comm.is_main_process():
        write_atomically(folder / EVALUATION, json.dumps(flatten_results_dict(results)).encode())
        verify_results(cfg, results)
        if args.onnx:
            batches = islice(Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0]), EXPORTED)
            images = [entry["image"] for batch in batches for entry in batch]
            export_onnx(model.cpu().eval(), images, folder / "model.onnx")
    return results


def work(args: argparse.Namespace) -> None:
    """Run in one process; `launch` calls this in each."""
    if comm.get_world_size() > 1:
        # As with one GPU: `launch` spawns workers, which `spare_workers` cannot spare.
        torch.multiprocessing.set_start_method("fork", force=True)
    searches = args.imp_rounds is not None
    resumes = cli.RESUMES if searches or args.resume else cli.RESUMES_WITH_OPTION
    stopped = "nothing was evaluated to the end" if args.eval_only else resumes

    def body() -> None:
        main(args)

    if code := cli.run(body, args.prog, stopped):
        sys.exit(code)


def start(args: argparse.Namespace) -> int:
    """Check the config once, then run in each process; return the exit code."""

    def check() -> None:
        read_config(args)

    if code := cli.run(check, args.prog, cli.NOTHING_WRITTEN):
        return code
    several = args.num_gpus * args.num_machines > 1
    try:
        with passed_on() if several else nullcontext():
            launch(
                work,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
            )
    except SystemExit as end:  # of `work`, or of the processes that were waited for
        return int(end.code or 0)
    return 0
