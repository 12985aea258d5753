"""CAP: the cost of ranking a whole ResNet, and how good its masks are before any fine-tuning."""

import copy
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import lth_plugins as lth
from benchmarks.measure import Run, peak_extra_rss, seconds_of
from benchmarks.report import Row, at_least, at_most
from benchmarks.setting import Setting
from lth_plugins.pretrain import load_config
from lth_plugins.pretrain.data import open_images
from lth_plugins.pretrain.find import find, pretraining
from lth_plugins.pruning import select
from lth_plugins.pruning.criteria.cap import CAP, WoodFisher
from lth_plugins.training.fit import Validator
from lth_plugins.training.loader import spread

CONFIG = Path(__file__).parents[1] / "configs/pretrain/digits_supervised.yaml"
IMAGES, SIZE, BLOCK = 256, 64, 64
SPARSITIES = (0.5, 0.7, 0.8, 0.9)


def cost(setting: Setting) -> Iterator[Row]:
    """One prune by CAP, from the first gradient to the masks."""
    tiny = setting.arch == "resnet18"
    arguments = (setting.arch, 4 if tiny else IMAGES, 32 if tiny else SIZE, 16 if tiny else BLOCK)
    seconds = seconds_of(prepare(*arguments))
    grown = peak_extra_rss(prepare, *arguments)
    arch, images, size, block = arguments
    what = f"one prune by CAP, {arch}, {images} gradients of {size} px, blocks of {block}"
    yield Row(what, f"{seconds:.0f} s", "–", seconds / 60, at_most(10), unit="minutes")
    yield Row(
        f"{what}: peak extra memory",
        f"{grown / 1e9:.2f} GB",
        f"{4e-9 * block * _prunable(arch):.1f} GB (all blocks at once)",
        grown / 1e9,
        at_most(8),
        unit="GB",
    )


def prepare(arch: str, images: int, size: int, block: int) -> Run:
    torch.manual_seed(0)
    model = torchvision.models.get_model(arch)
    batch = torch.randn(images, 3, size, size)
    labels = torch.randint(1000, (images,))
    loss = lambda model: cross_entropy(model(batch), labels)  # noqa: E731
    return lambda: lth.prune(model, 0.5, criterion=CAP(block), loss=loss)


def _prunable(arch: str) -> int:
    model = torchvision.models.get_model(arch)
    return lth.Ticket.dense(model).masks.numel


def quality(setting: Setting) -> Iterator[Row]:
    """Top-1 of a classifier of digits after one prune, without fine-tuning or new statistics."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    tiny = setting.batches == 1
    with tempfile.TemporaryDirectory() as folder:
        options = [f"out={folder}/run", "rounds=0", "trainer.accelerator=cpu"]
        if tiny:
            options += ["data.size=32", "data.subset=32", "batch_size=16", "pretrain.epochs=1"]
        config = load_config(CONFIG, options)
        find(config)
        yield from compared(Path(folder) / "run", tiny)


def compared(folder: Path, tiny: bool = False, *overrides: str) -> Iterator[Row]:
    """The rows of `quality`, of the network that a search in a folder pre-trained."""
    from safetensors.torch import load_file

    config = load_config(folder / "config.yaml", ["trainer.accelerator=cpu", *overrides])
    images = open_images(config.data)
    task = pretraining("supervised")(config, config.pretrain, len(images.classes), stream=0)
    trained = load_file(folder / "pretrained.safetensors")
    task.load_state_dict(trained)
    validate = Validator(task, images)
    dense = validate()["val_top1"]
    model = torchvision.models.get_model(config.arch, num_classes=len(images.classes))
    model.load_state_dict({name.removeprefix("trunk."): value for name, value in trained.items()})
    count = 8 if tiny else IMAGES
    batches = list(DataLoader(spread(images.bank or images.train, count), count))
    losses = [_loss(*batch) for batch in batches]

    def top1(state: dict[str, Tensor]) -> float:
        task.load_state_dict(
            {f"trunk.{n}" if f"trunk.{n}" in trained else n: v for n, v in state.items()}
        )
        return 100 * validate()["val_top1"]

    block = 16 if tiny else BLOCK
    whole = lth.Ticket.dense(model).masks
    weights = {name: model.get_parameter(name).detach() for name in whole}
    for name, criterion in {"woodfisher": WoodFisher(block), "cap": CAP(block)}.items():
        scores = criterion(weights, copy.deepcopy(model), losses)
        for sparsity in SPARSITIES[-1:] if tiny else SPARSITIES:
            masks = select(scores, whole, sparsity, "global")
            moved = criterion.update(weights, masks, copy.deepcopy(model), losses)
            plain = top1(_pruned(model, lth.prune(model, sparsity)))
            alone, updated = top1(_pruned(model, masks)), top1({**model.state_dict(), **moved})
            yield Row(
                f"{name}, {config.arch} on {config.data.name}, {100 * sparsity:g} % sparse, "
                f"{count} gradients",
                f"{updated:.2f} % top-1 ({alone:.2f} with the masks alone)",
                f"{plain:.2f} % (magnitude)",
                updated - plain,
                at_least(0),
                f"{100 * dense:.2f} % dense",
                "the Fisher information is of too few images",
                unit="points",
            )


def _loss(images: Tensor, labels: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: cross_entropy(model(images), labels)


def _pruned(model: nn.Module, masks: lth.Masks) -> dict[str, Tensor]:
    state = dict(model.state_dict())
    return state | {name: state[name] * mask for name, mask in masks.items()}
