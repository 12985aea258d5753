"""`Computed`: tensors that are made when they are asked for, so that not all lie in memory at once.

Ranking the weights of a whole network needs one copy of them. A second one, of all scores, would
double that.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor


class Computed(Mapping[str, Tensor]):
    """A mapping that keeps no values: each lookup computes one.

    Args:
        names: the keys, in order.
        compute: makes the tensor of a name, the same one each time.
    """

    def __init__(self, names: Iterable[str], compute: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
