"""The methods and data structures of other projects, re-expressed without their code.

PyTorch's own (`torch.nn.utils.prune`, ``torch.save``) are used directly.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

Modules = Mapping[str, nn.Module]


def modules_of(weights: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Convolutions with these weights, as torch.nn.utils.prune wants them."""
    modules = {}
    for name, weight in weights.items():
        module = nn.Conv2d(1, 1, 1, device="meta")
        module.weight = nn.Parameter(weight.clone())
        modules[name] = module
    return modules


def prune_as_torch(modules: Modules, fraction: float) -> dict[str, Tensor]:
    """`torch.nn.utils.prune.global_unstructured`; so does the code of arXiv 2012.06908."""
    parameters = [(module, "weight") for module in modules.values()]
    prune.global_unstructured(parameters, prune.L1Unstructured, amount=fraction)
    return {name: module.weight_mask for name, module in modules.items()}


def prune_as_open_lth(
    weights: Mapping[str, Tensor], masks: Mapping[str, np.ndarray], fraction: float
) -> dict[str, np.ndarray]:
    """open_lth's way: all kept magnitudes in one array, sorted; keep what is above the k-th.

    Masks are arrays of floats there, one per parameter.
    """
    values = {name: np.abs(weight.cpu().numpy()) for name, weight in weights.items()}
    kept = np.concatenate([value[masks[name] == 1] for name, value in values.items()])
    threshold = np.sort(kept)[round(fraction * len(kept)) - 1]
    return {
        name: np.where(value > threshold, masks[name], np.float32(0))
        for name, value in values.items()
    }


def mask_as_torch(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """`torch.nn.utils.prune.custom_from_mask` on the modules that these names are of."""
    for name, mask in masks.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        prune.custom_from_mask(module, "weight", mask.to(module.weight.device))


def save_pair(state: Mapping[str, Tensor], masks: Mapping[str, Tensor], folder: Path) -> list[Path]:
    """The two files that arXiv 2012.06908 publishes: weights, and masks as floats."""
    paths = [folder / "weights.pth", folder / "masks.pth"]
    torch.save(dict(state), paths[0])
    torch.save({name: mask.float() for name, mask in masks.items()}, paths[1])
    return paths


def zipped(paths: list[Path], target: Path) -> int:
    """Bytes of the files in one deflated archive."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in paths:
            archive.write(path, path.name)
    return target.stat().st_size


def shared_as_floats(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[float]:
    """How many weights two masks both keep in each parameter, by multiplying them as floats."""
    return [float((mask.float() * other[name].float()).sum()) for name, mask in one.items()]
