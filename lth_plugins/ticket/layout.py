"""`Layout`: where a trunk was found in a state dict or a model, and under which names."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lth_plugins.errors import TicketError
from lth_plugins.ticket.arch import ResNet
from lth_plugins.ticket.dialects import STATISTICS, Dialect, distinct_dialects
from lth_plugins.ticket.keys import State, common_path, real_prefix, unwrapped


@dataclass(frozen=True)
class Layout:
    """Where a trunk was found in a state dict.

    Attributes:
        dialect: the naming it follows.
        arch: the architecture it has.
        prefix: what comes before the dialect's own names; "" at the top.
        keys: torchvision name to the key in the state dict, in network order. Entries that a
            framework may leave out (``num_batches_tracked``) are absent here when they are there.
        left_out: the prefixes of other trunks there, and what each is to this one.
    """

    dialect: Dialect
    arch: ResNet
    prefix: str
    keys: Mapping[str, str]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def extract(self, state: State) -> dict[str, Tensor]:
        """The trunk's entries of this state dict under torchvision's names (no copies).

        Statistics that the source has folded into weight and bias are added: 0 and 1.
        """
        trunk = {name: state[key] for name, key in self.keys.items()}
        for name, shape in self.arch.shapes.items() if self.dialect.affine else ():
            module, _, entry = name.rpartition(".")
            if name not in trunk and f".{entry}" in STATISTICS and f"{module}.weight" in trunk:
                trunk[name] = torch.full(shape, STATISTICS[f".{entry}"])
        return trunk

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """The module of a model that holds each entry of the trunk, by torchvision name.

        Found by the entry itself: wrappers (of activation checkpointing) leave their names out of
        a state dict, so that a key need not be a module's name.

        Args:
            model: the model that `locate` was given, or a copy.

        Raises:
            TicketError: if its state dict holds something else than the model's own tensors.
        """
        holders: dict[int, nn.Module] = {}
        for module in model.modules():
            for entry in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                holders.setdefault(id(entry), module)
        state = model.state_dict(keep_vars=True)
        modules: dict[str, nn.Module] = {}
        for name, key in self.keys.items():
            holder = holders.get(id(state[key]))
            if holder is None:
                raise TicketError(
                    f"expected the state dict of the model to hold its own parameters, found a "
                    f"copy at {key}: give the module inside of what makes these"
                )
            modules[name] = holder
        return modules

    def branches(self) -> dict[str, str]:
        """The module's name, in a model, that holds the convolutions of each block, by block."""
        return {
            name.removesuffix(".conv1.weight"): common_path([key, self.keys[_second(name)]])[:-1]
            for name, key in self.keys.items()
            if name.endswith(".conv1.weight")
        }

    def ignored(self, state: State) -> list[str]:
        """The keys of a state dict that the framework's own loaders leave out, too."""
        pattern = self.dialect.ignored
        return [key for key in state if pattern is not None and re.search(pattern, key)]

    def blocks(self) -> Iterator[str]:
        """What the keys of each block begin with, without wrappers."""
        for name, key in self.keys.items():
            if name.endswith(".conv1.weight"):
                stage, block, *_ = name.removeprefix("layer").split(".")
                outer = unwrapped(key).removesuffix(self.dialect.spell(name, self.arch))
                yield outer + self.dialect.block(int(stage), int(block))


def _second(name: str) -> str:
    """The name of a block's second convolution, by that of its first."""
    return name.replace(".conv1.", ".conv2.")


def locate_prunable(keys: Iterable[str], arch: ResNet) -> list[Layout]:
    """Where prunable weights of an architecture are named, even if only some of them are.

    For masks, which may cover some layers only. `Layout.keys` holds what was found.

    Returns:
        One layout for every prefix of the dialect that explains most keys, the one with most
        keys first; nothing if no dialect explains any.
    """
    plain = {key: unwrapped(key) for key in keys}
    best: list[Layout] = []
    most = 0
    for dialect in filter(lambda dialect: dialect.supports(arch), distinct_dialects()):
        table = dialect.table(arch)
        names = {table[name]: name for name in arch.prunable}
        found: dict[str, dict[str, str]] = {}
        for key, whole in plain.items():
            for count, start in enumerate((0, *(m.end() for m in re.finditer(r"\.", whole)))):
                if whole[start:] in names:
                    prefix = real_prefix(key, count)
                    found.setdefault(prefix, {})[names[whole[start:]]] = key
                    break
        covered = sum(len(names) for names in found.values())
        if covered > most:
            most = covered
            ranked = sorted(found.items(), key=lambda item: -len(item[1]))
            best = [Layout(dialect, arch, prefix, names) for prefix, names in ranked]
    return best
