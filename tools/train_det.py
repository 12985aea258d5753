#!/usr/bin/env python3
r"""Train or evaluate a detector on a ticket, with detectron2's own trainer and its options.

    tools/train_det.py --config-file configs/detectron2/digits/faster_rcnn_R_18_FPN_ticket.yaml \
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
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

if __name__ in ("__main__", "__mp_main__"):
    from _start import stop_in_one_line

    stop_in_one_line()

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    default_argument_parser,
    default_setup,
    launch,
)
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
    verify_results,
)
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn
from yaml import YAMLError

from lth_plugins import attach_rest, attached, cli, compact
from lth_plugins.detectron2 import (
    DistillHook,
    ResumableLoader,
    SlimHook,
    SparseTrainingHook,
    TicketHook,
    add_dataset_config,
    add_distill_config,
    add_slim_config,
    add_solver_config,
    add_teacher,
    add_ticket_config,
    adopt_slimmed,
    apply_noted_input,
    apply_ticket_input,
    build_optimizer,
    example_of,
    export_onnx,
    method_of,
    register_datasets,
    resumable,
    resumable_train_loader,
    slimming_of,
    slims,
    task_search,
)
from lth_plugins.detectron2.checkpoint import WholeCheckpointer, state_in
from lth_plugins.detectron2.datasets import (
    check_classes,
    check_files,
    check_registered,
    declare_options,
    files_of,
    import_files,
    register_digit_scenes,
)
from lth_plugins.detectron2.hooks import ProgressHook, attachment_of
from lth_plugins.detectron2.slimming import widths_of
from lth_plugins.detectron2.solver import check_solver
from lth_plugins.detectron2.teacher import check_teacher, teacher_of
from lth_plugins.errors import ConfigError, RunError
from lth_plugins.masking.loading import why_refused
from lth_plugins.resilience.atomic import open_atomically, write_atomically
from lth_plugins.resilience.lock import output_folder
from lth_plugins.resilience.sigterm import passed_on
from lth_plugins.slimming.options import add_budget_options, check_budget_options, has_budget
from lth_plugins.slimming.selection import budget_of
from lth_plugins.ticket import NotFound, TicketError
from lth_plugins.ticket.keys import is_slimmed
from lth_plugins.training.images import Readable

EVALUATORS: dict[str, Callable[[str, str], list[DatasetEvaluator]]] = {
    "coco": lambda name, folder: [
        # A file that an earlier evaluation made of the annotations may be outdated.
        COCOEvaluator(name, output_dir=folder, allow_cached_coco=False)
    ],
    "coco_panoptic_seg": lambda name, folder: [
        SemSegEvaluator(name, output_dir=folder),
        COCOEvaluator(name, output_dir=folder),
        COCOPanopticEvaluator(name, folder),
    ],
    "sem_seg": lambda name, folder: [SemSegEvaluator(name, output_dir=folder)],
    "lvis": lambda name, folder: [LVISEvaluator(name, output_dir=folder)],
    "pascal_voc": lambda name, _: [PascalVOCDetectionEvaluator(name)],
    "cityscapes_instance": lambda name, _: [CityscapesInstanceEvaluator(name)],
    "cityscapes_sem_seg": lambda name, _: [CityscapesSemSegEvaluator(name)],
}
"""By ``evaluator_type`` of the dataset. Each is called with its name and an output folder."""

EVALUATION = "evaluation.json"
"""What an evaluation leaves in ``OUTPUT_DIR``: its metrics, by names such as bbox/AP."""

EXPORTED = 4
"""The number of test images on which an exported model must find what it found here."""


def evaluators_of(dataset_name: str) -> Callable[[str, str], list[DatasetEvaluator]]:
    """The entry of `EVALUATORS` for a dataset.

    Raises:
        ConfigError: if there is none.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind is None:
        raise ConfigError(
            f"expected datasets in DATASETS.TEST that say how they are evaluated, found "
            f"{dataset_name}, which does not. Write where it is registered:\n"
            f'    MetadataCatalog.get("{dataset_name}").evaluator_type = "coco"\n'
            f"or another of {', '.join(EVALUATORS)}; or evaluate on none (DATASETS.TEST '()')"
        )
    if kind not in EVALUATORS:
        raise ConfigError(
            f"expected datasets in DATASETS.TEST of the types {', '.join(EVALUATORS)}, found "
            f"{dataset_name}, of type {kind}: name others, or none (DATASETS.TEST '()')"
        )
    return EVALUATORS[kind]


def check_datasets(cfg: CfgNode, train: bool) -> None:
    """Check that the datasets of a config are registered and evaluated, before they are loaded.

    Raises:
        LthError: if one is not, or an image that a training is evaluated on cannot be read.
    """
    if train:
        check_registered(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
        if not cfg.DATASETS.TRAIN:
            raise ConfigError(
                "expected datasets to train on, found an empty DATASETS.TRAIN: name one, such as "
                "DATASETS.TRAIN \"('coco_2017_train',)\""
            )
    check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
    check_classes(cfg, [*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST])
    for name in cfg.DATASETS.TEST:
        evaluators_of(name)
        if train:  # before it, not after hours of it
            check_files(DatasetCatalog.get(name))


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


class Trainer(DefaultTrainer):
    """detectron2's trainer with the evaluators of its datasets and our hooks."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        attach_rest(model)  # what the ticket prunes in neck and heads; before weights are loaded
        adopt_slimmed(model, cfg)
        needs_ticket = not widths_of(cfg) and not slims(cfg)
        if needs_ticket and attached(model) is None and why_refused(model) is None:
            attachment_of(model)  # says why it must have one
        add_teacher(model, cfg)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> ResumableLoader:
        return resumable_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        mapper = Readable(DatasetMapper(cfg, False), files_of)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, folder: str = "inference"
    ) -> DatasetEvaluator:
        make = evaluators_of(dataset_name)
        return DatasetEvaluators(make(dataset_name, str(Path(cfg.OUTPUT_DIR) / folder)))

    @classmethod
    def test_augmented(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate with test-time augmentation, for R-CNNs with ``TEST.AUG.ENABLED``."""
        evaluators = [cls.build_evaluator(cfg, n, "inference_TTA") for n in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": result for name, result in results.items()}

    def build_hooks(self) -> list[HookBase | None]:
        cfg, folder = self.cfg, Path(self.cfg.OUTPUT_DIR)
        before: list[HookBase] = []  # what is saved is masked, pruned and slimmed
        if slims(cfg):
            before.append(SlimHook(slimming_of(cfg), example_of(cfg), folder))
        if attached(self.model) is not None:
            period, source = cfg.SOLVER.CHECKPOINT_PERIOD, "+".join(cfg.DATASETS.TRAIN)
            before.append(TicketHook(period, folder / "final.ticket", source=source))
        if (method := method_of(cfg)) is not None:
            name, options = method
            before.append(SparseTrainingHook(name, **options))
        hooks = [*before, *super().build_hooks(), ProgressHook()]
        if teacher_of(cfg):
            hooks.append(DistillHook())
        if cfg.TEST.AUG.ENABLED:
            hooks.append(EvalHook(0, lambda: self.test_augmented(cfg, self.model)))
        return resumable(hooks, cfg.SEED)


def argument_parser() -> argparse.ArgumentParser:
    parser = default_argument_parser()
    parser.description = __doc__
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


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; refuse an option that would do nothing."""
    parser = argument_parser()
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

    if code := cli.run(body, __file__, stopped):
        sys.exit(code)


def start(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)

    def check() -> None:
        read_config(args)

    if code := cli.run(check, __file__, cli.NOTHING_WRITTEN):  # once, not in each process
        sys.exit(code)
    several = args.num_gpus * args.num_machines > 1
    with passed_on() if several else nullcontext():
        launch(
            work,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )


if __name__ == "__main__":
    start()
