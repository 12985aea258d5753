"""Tracing: which channels of a model belong together, and what each layer costs.

The coupling is that of torch-pruning's dependency graph (DepGraph, Fang et al., arXiv 2301.12900),
which follows autograd's graph from the outputs of a model to its layers. What a detector needs
beyond that is here:

- a convolution that normalises or activates inside (detectron2's ``Conv2d``) is split in two,
  without being replaced, because an FPN also calls its convolutions through Python lists;
- frozen BatchNorm of detectron2 and torchvision is a normalisation like any other;
- the graph starts at the output of every layer, as what a detector returns was selected without
  gradients, and ends where features are only sampled at coordinates;
- a group is used only if it is consistent, and some layer reads its channels: what no layer reads
  is the model's output. All others are held, with the reason.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lth_plugins.errors import RunError, TicketError
from lth_plugins.masking.attachment import attached
from lth_plugins.slimming.network import Group, Layer, Member, Network

Forward = Callable[[nn.Module], object]
"""Run a model on an example, whatever it takes."""

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
SAMPLERS = ("roi_align", "grid_sample")
"""Functions of features and coordinates, whose channels have nothing to do with each other."""


def trace(
    model: nn.Module,
    forward: Forward,
    keep: Iterable[str] = (),
    inference: Forward | None = None,
) -> Network:
    """The groups and layers of a model.

    The model is run twice, in evaluation mode, and is not changed.

    Args:
        model: any model of convolutions, linear layers and normalisations.
        forward: runs all layers of the model that it is given on an example, of the size that
            costs are stated for.
        keep: names of modules; no output channels of theirs, nor of modules in them, are removed.
        inference: runs the layers that costs are counted of, without those that only training
            has, such as auxiliary heads; by default all.

    Raises:
        RunError: if torch-pruning is not installed.
        TicketError: if a convolution is none of `LAYERS`, such as a deformable one, the model
            fails on the example, its graph cannot be followed, or a name in ``keep`` is no module
            of it.
    """
    names = dict(model.named_modules())
    keep = list(keep)
    absent = [name for name in keep if name not in names]
    if absent:
        raise TicketError(
            f"expected modules of the {type(model).__name__} to keep, found none named "
            f"{absent[0]!r}: name one such as {', '.join(list(names)[1:4])}"
        )
    _check_known(model)
    layers = _measured(model, inference or forward)
    groups, held = _consistent(_coupled(model, forward), model)
    for name, group in list(groups.items()):
        asked = [m.module for m in group.writers if _inside(m.module, keep)]
        if asked:
            held[name] = f"{asked[0]} is to be kept"
            del groups[name]
    return Network(groups, held, layers)


def tensors_in(value: object) -> Iterator[Tensor]:
    """All floating-point tensors in what a model returns: containers, and objects with fields."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "get_fields"):  # detectron2's Instances
        yield from tensors_in(value.get_fields())
    elif isinstance(boxes := getattr(value, "tensor", None), Tensor):  # and Boxes
        yield from tensors_in(boxes)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode; afterwards each module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _inside(name: str, keep: Iterable[str]) -> bool:
    return any(name == kept or name.startswith(f"{kept}.") or not kept for kept in keep)


def is_depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.groups > 1
        and module.groups == module.in_channels == module.out_channels
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises each channel by itself, with statistics that it holds."""
    return isinstance(getattr(module, "running_var", None), Tensor) and not isinstance(
        module, nn.modules.instancenorm._InstanceNorm
    )


def _check_known(model: nn.Module) -> None:
    """Refuse convolutions of kinds whose channels and cost are not known."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 4 and not isinstance(module, LAYERS):
            raise TicketError(
                f"expected plain, depthwise, grouped or transposed convolutions to slim, found "
                f"{name}, a {type(module).__name__}: channels of deformable and other special ones "
                "are not removed, nor is their cost known. Build the model without them"
            )


def _measured(model: nn.Module, forward: Forward) -> dict[str, Layer]:
    """What each layer costs for an example."""
    macs: dict[str, float] = {}
    activations: dict[str, float] = {}
    modules: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, LAYERS)
    }

    def counter(name: str) -> Callable[..., None]:
        def count(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # A transposed convolution multiplies each input, any other makes each output.
            calls = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
            each = module.weight[0].numel()
            macs[name] = macs.get(name, 0) + calls.numel() * each
            activations[name] = activations.get(name, 0) + output.numel()

        return count

    hooks = [module.register_forward_hook(counter(name)) for name, module in modules.items()]
    try:
        with torch.no_grad(), evaluating(model):
            run_on_example(model, forward)
    finally:
        for hook in hooks:
            hook.remove()
    return {n: Layer(n, macs[n], activations[n], is_depthwise(modules[n])) for n in macs}


def run_on_example(model: nn.Module, forward: Forward) -> object:
    """Run a model on an example.

    Raises:
        TicketError: if it fails.
    """
    try:
        return forward(model)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise TicketError(
            f"expected the example to run through the {type(model).__name__}, found "
            f"{type(error).__name__}: {error}. Give what the model is called with to evaluate"
        ) from error


class _Detached(TorchFunctionMode):
    """Cuts the graph at coordinates that features are sampled at, and where maps are multiplied.

    torch-pruning would follow each of the positions of an attention map, which it does not finish.
    Layers that are read there alone are held; what else depends on them is found by the trial.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(sampler in str(func) for sampler in SAMPLERS) and len(args) > 1:
            features, where, *others = args
            args = (features, where.detach() if isinstance(where, Tensor) else where, *others)
        if "matmul" in str(func) and not any(isinstance(a, nn.Parameter) for a in args):
            args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        return func(*args, **(kwargs or {}))


class _Split(nn.Module):
    """Of a convolution that normalises and activates inside: these three, one after the other."""

    convolution: nn.Conv2d

    def forward(self, features: Tensor) -> Tensor:
        features = self.convolution(features)
        norm, activation = getattr(self, "norm", None), getattr(self, "activation", None)
        features = features if norm is None else norm(features)
        return features if activation is None else activation(features)


def _split(model: nn.Module) -> None:
    """Split convolutions that normalise or activate inside, where they are."""
    for module in list(model.modules()):
        if (
            isinstance(module, nn.Conv2d)
            and type(module).forward is not nn.Conv2d.forward
            and hasattr(module, "norm")
            and hasattr(module, "activation")
        ):
            plain: Any = nn.Conv2d(1, 1, 1, device="meta")
            own = {key: value for key, value in module.__dict__.items() if key in plain.__dict__}
            shared = {key: value for key, value in own.items() if not key.endswith("hooks")}
            plain.__dict__.update(shared, _modules={})
            module._parameters = {}
            module.__class__ = _Split  # type: ignore[assignment]
            module.convolution = plain


@dataclass(frozen=True)
class _Item:
    """What torch-pruning found in a group.

    Attributes:
        traced: the module, operation or parameter of the copy that was traced.
        module: of the given model; None for an operation or a parameter.
        is_out: whether its outputs are concerned; else its inputs.
        entries: which of them, and ``channels``: of which channel of the group each is.
    """

    traced: object
    module: nn.Module | None
    is_out: bool
    entries: Sequence[int]
    channels: Sequence[int | None]


def _coupled(model: nn.Module, forward: Forward) -> list[list[_Item]]:
    """torch-pruning's groups of a model."""
    try:
        import torch_pruning
    except ImportError:
        raise RunError("slimming needs torch-pruning: pip install 'lth_plugins[slim]'") from None
    copied = copy.deepcopy(model).eval()
    handle = attached(copied)
    if handle is not None:
        handle.detach()
    origin = dict(zip(copied.modules(), model.modules(), strict=True))
    _split(copied)
    for module in copied.modules():
        if isinstance(module, _Split):
            origin[module.convolution] = origin[module]
    copied.requires_grad_(True)
    roots: list[Tensor] = []

    def root(module: nn.Module, inputs: object, output: Tensor) -> None:
        if output.numel():
            roots.append(output.sum())

    for module in copied.modules():
        if isinstance(module, LAYERS):
            module.register_forward_hook(root)

    def run(traced: nn.Module, _: object) -> list[Tensor]:
        with _Detached():
            run_on_example(traced, forward)
        return roots

    class Norm(torch_pruning.pruner.function.BatchnormPruner):
        def get_out_channels(self, layer: Any) -> int:
            return len(layer.running_var)

        get_in_channels = get_out_channels

    plain = nn.modules.batchnorm._BatchNorm
    norms = {type(m) for m in copied.modules() if is_norm(m) and not isinstance(m, plain)}
    graph = torch_pruning.DependencyGraph()
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        pruners = {norm: Norm() for norm in norms}
        try:
            graph.build_dependency(copied, None, run, customized_pruners=pruners, verbose=False)
            groups = list(graph.get_all_groups(root_module_types=LAYERS))
        except (ArithmeticError, AssertionError, AttributeError, LookupError) as error:
            raise TicketError(
                f"the graph of the {type(model).__name__} cannot be followed: torch-pruning fails "
                f"with {type(error).__name__}: {error}. It has operations on channels that are "
                "not known, such as a shuffle; slim a part of the model without them, or keep it"
            ) from error
    return [
        [
            _Item(
                item.dep.target.module,
                origin.get(item.dep.target.module),
                graph.is_out_channel_pruning_fn(item.dep.handler),
                item.idxs,
                item.root_idxs,
            )
            for item in group
        ]
        for group in groups
    ]


def _consistent(
    coupled: Sequence[Sequence[_Item]], model: nn.Module
) -> tuple[dict[str, Group], dict[str, str]]:
    """The groups whose channels may be removed, and why others are held, by name."""
    names = {module: name for name, module in model.named_modules()}
    groups: dict[str, Group] = {}
    held: dict[str, str] = {}
    for items in coupled:
        name = names.get(items[0].module, "") if items[0].module is not None else ""
        try:
            groups[name] = _group(name, items, names)
        except _Held as why:
            held[name] = str(why)
    for name, claim in _contested(groups).items():
        held[name] = claim
        del groups[name]
    return groups, held


class _Held(Exception):
    """Why the channels of a group stay."""


def _group(name: str, items: Sequence[_Item], names: Mapping[nn.Module, str]) -> Group:
    """The group of these items; raise `_Held` if its channels cannot be removed."""
    channels = len(items[0].entries)
    members: list[Member] = []
    for item in items:
        if isinstance(item.traced, nn.Parameter):
            raise _Held(f"a parameter of shape {tuple(item.traced.shape)} has their number")
        if item.module is None:  # an operation without parameters
            continue
        module, where = item.module, names[item.module]
        size = _size(module, where, item.is_out)
        at: list[list[int]] = [[] for _ in range(channels)]
        for entry, channel in zip(item.entries, item.channels, strict=True):
            if not 0 <= entry < size or channel is None:
                raise _Held(f"{where} has {size} entries, and they would be its {entry}th")
            at[channel].append(entry)
        if len({len(entries) for entries in at}) != 1:
            raise _Held(f"{where} does not read each of them equally often")
        members.append(Member(where, "out" if item.is_out else "in", size, torch.tensor(at)))
    group = Group(name, channels, tuple(members))
    if not group.readers:
        raise _Held("no layer reads them: they are outputs of the model")
    return group


def _size(module: nn.Module, where: str, is_out: bool) -> int:
    """How many entries the side of a layer has; raise `_Held` if it cannot lose some."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        if module.groups > 1 and not is_depthwise(module):
            raise _Held(f"{where} is a convolution of {module.groups} groups")
        return module.out_channels if is_out else module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features if is_out else module.in_features
    if is_norm(module):
        return len(module.running_var)  # type: ignore[arg-type]
    raise _Held(f"{where} is a {type(module).__name__}, which is not made narrower")


def _contested(groups: Mapping[str, Group]) -> dict[str, str]:
    """The groups that claim the same entries as others, and why that holds them."""
    owner: dict[tuple[str, str], dict[int, str]] = {}
    contested: dict[str, str] = {}
    for name, group in groups.items():
        for member in group.members:
            taken = owner.setdefault((member.module, member.side), {})
            for entry in member.at.flatten().tolist():
                other = taken.setdefault(entry, name)
                if other != name:
                    why = f"{member.module} has the same entries for channels of {{}}"
                    contested[name] = why.format(other)
                    contested[other] = why.format(name)
    return contested
