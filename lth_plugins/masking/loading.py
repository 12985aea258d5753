"""Checks what is loaded into a host's backbone, whatever loads it.

`lth_plugins.attach` masks what is loaded. In a host that is not enough: a checkpoint of another
ticket's run would lose weights, a compacted one has other widths, and for inference there may be
only a checkpoint. `watch_loading` has the backbone look at each state dict first. The backbone's
own state dict says which masks it was trained with, and on what input: in its metadata, where
PyTorch keeps the versions of modules, so that keys are the stock ones and no trainer is involved.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, cast

from torch import Tensor, is_grad_enabled, nn
from torch.utils.hooks import RemovableHandle

from lth_plugins.errors import LthError, TicketError
from lth_plugins.masking.attachment import Attachment, attached
from lth_plugins.masking.input import ModelInput, check_input, noted_in
from lth_plugins.masking.narrowing import find_trunk, narrow
from lth_plugins.masking.weight import mask_what_loads, zeroed_so_far
from lth_plugins.masking.zeros import count_nonzero
from lth_plugins.ticket.arch import STAGES
from lth_plugins.ticket.layout import Layout
from lth_plugins.ticket.meta import TicketMeta
from lth_plugins.ticket.wording import SCRIPT, Wording

logger = logging.getLogger(__name__)

_ATTRIBUTE, _REFUSAL = "ticket_loading", "ticket_refusal"
_MASKS, _INPUT = "ticket_masks", "ticket_input"  # in a state dict's metadata


@contextmanager
def reading(path: str | PathLike[str]) -> Iterator[None]:
    """Turn any error of reading a checkpoint into one sentence.

    Raises:
        TicketError: instead of what was raised.
    """
    try:
        yield
    except LthError:
        raise
    except Exception as error:  # what PyTorch raises for a broken file is of many kinds
        there = "://" in str(path) or Path(path).is_file()
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        found = f"a file that cannot be read ({reason})" if there else "no such file"
        raise TicketError(
            f"expected a checkpoint at {path}, found {found}: give one that is there and complete"
        ) from error


class _Watch:
    """The state of a watched module. It is copied and pickled with the module."""

    def __init__(
        self,
        parts: Sequence[str] | None,
        allow: bool,
        wording: Wording,
        model_input: ModelInput | None,
    ) -> None:
        self.parts, self.allow, self.wording, self.input = parts, allow, wording, model_input
        self.hooks: tuple[RemovableHandle, ...] = ()
        self.awaited: str | None = None
        """The digest of the masks of the checkpoint that was loaded last, where a method of sparse
        training has moved them since the start."""
        self.expects = False
        """Whether a host restores masks that a checkpoint says nothing of, after its weights."""
        self.lacks = False
        """Whether the weights that were loaded are not all there until those masks are."""
        self.started: str | None = None
        """The digest of the masks that the training started with, also before it was resumed."""
        self.loads: tuple[Layout, dict[str, Tensor]] | None = None
        """The trunk and its entries in what is being loaded, between the two hooks of a load."""
        self._last: tuple[TicketMeta, str] | None = None

    def digests(self, handle: Attachment) -> list[str]:
        """The masks that the training started with and, if it has pruned more, its own."""
        # A state dict is read often; masks change together with their description alone.
        if self._last is None or self._last[0] is not handle.meta:
            self._last = (handle.meta, handle.masks.digest)
        self.started = self.started or self._last[1]
        return list(dict.fromkeys([self.started, self._last[1]]))


def watch_loading(
    module: nn.Module,
    *,
    wording: Wording = SCRIPT,
    allow_other_checkpoint: bool = False,
    parts: Sequence[str] | None = None,
    model_input: ModelInput | None = None,
) -> None:
    """Have a backbone check what is loaded into it, and note in its state dict what to check.

    - A checkpoint that was trained with other masks is refused, and so is one with weights that
      the masks would zero; where it is allowed, a warning says how many. Sparse training moves the
      masks of a run: its checkpoints fit the ticket it ended with, and also the one it started
      from, but training then has to wait until the method has restored their masks; so has
      inference, if they keep weights that the ticket prunes.
    - A checkpoint that was trained on another input than the model has is refused.
    - A compacted checkpoint gives the backbone its widths. The backbone then only infers, because
      the optimizer has the wide parameters. Where the loader has left out what does not fit, as
      fvcore's does, the checkpoint is refused; so is a trunk of another architecture.

    A refusal leaves the module unchanged. A second call replaces the first. Call it after a ticket
    is attached: it checks before the masks are applied, and narrows after that.

    Args:
        module: holds the trunk, or a part of it; a ticket may be attached, now or later, or none.
        wording: how messages call what a host's configuration would change.
        allow_other_checkpoint: warn of other masks instead.
        parts: of the trunk, in the module; by default all up to the last stage that it has.
        model_input: the input that the host gives the model; None where it is unknown.
    """
    previous: _Watch | None = module.__dict__.get(_ATTRIBUTE)
    for hook in previous.hooks if previous is not None else ():
        hook.remove()
    watch = _Watch(parts, allow_other_checkpoint, wording, model_input)
    module.__dict__[_ATTRIBUTE] = watch
    handle = attached(module)
    if handle is not None:
        watch.digests(handle)  # before a method moves the masks
    watch.hooks = (
        module.register_state_dict_post_hook(_after_state_dict),
        module.register_load_state_dict_pre_hook(_check_what_loads),
        # It detaches the ticket, whose hooks PyTorch must not call after that.
        module.register_load_state_dict_pre_hook(_narrow_to_what_loads),
    )
    # Check before all other hooks, in PyTorch's own container: masking changes what loads.
    hooks = cast(OrderedDict[int, Any], module._load_state_dict_pre_hooks)
    hooks.move_to_end(watch.hooks[1].id, last=False)


def is_watched(module: nn.Module) -> bool:
    """Whether `watch_loading` was called for a module."""
    return _ATTRIBUTE in module.__dict__


def start_anew(model: nn.Module) -> None:
    """Have backbones in a model note other masks as those that their training starts with.

    For a model that gets another ticket than the one whose digests it has noted so far.
    """
    for module in model.modules():
        if is_watched(module):
            module.__dict__[_ATTRIBUTE].started = None


def refuse_to_run(module: nn.Module, why: str, parts: Sequence[str] | None = None) -> None:
    """Have a backbone refuse to train, and to infer before a checkpoint was loaded into it.

    Args:
        module: holds the trunk, or a part of it.
        why: the reason, for the message.
        parts: of the trunk, in the module; by default all up to the last stage that it has.
    """
    _refuse(_first_block(module, find_trunk(module, parts)), why)


def _refuse(first: nn.Module, why: str) -> None:
    # The backbone itself may not be called: some models call its stages.
    if _REFUSAL not in first.__dict__:
        first.register_forward_pre_hook(_before_forward)
    first.__dict__[_REFUSAL] = (why, False)


def allow_to_run(model: nn.Module) -> None:
    """Have the backbones in a model refuse no longer: what it is made into needs no ticket."""
    for module in model.modules():
        module.__dict__.pop(_REFUSAL, None)


def why_refused(model: nn.Module) -> str | None:
    """Why a backbone in a model refuses to train; None where none does."""
    reasons = (module.__dict__.get(_REFUSAL) for module in model.modules())
    return next((reason[0] for reason in reasons if reason is not None), None)


def _first_block(module: nn.Module, layout: Layout) -> nn.Module:
    name = next(name for name in layout.keys if name in layout.arch.prunable)
    return layout.modules(module)[name]


def _before_forward(module: nn.Module, _: object) -> None:
    refusal = module.__dict__.get(_REFUSAL)
    if refusal is None:
        return
    why, loaded = refusal
    if not loaded or (module.training and is_grad_enabled()):
        raise TicketError(why)


def _after_state_dict(
    module: nn.Module, _: object, __: str, local_metadata: dict[str, Any]
) -> None:
    watch, handle = module.__dict__[_ATTRIBUTE], attached(module)
    if handle is not None:
        local_metadata[_MASKS] = watch.digests(handle)
        if watch.input is not None:
            note_input(local_metadata, watch.input)


def _check_moved(module: nn.Module, _: object) -> None:
    """Refuse a checkpoint of sparse training under the ticket that its run started from."""
    watch: _Watch = module.__dict__[_ATTRIBUTE]
    handle, trains = attached(module), module.training and is_grad_enabled()
    if watch.awaited is None or not (trains or watch.lacks):
        return
    if handle is not None and handle.masks.digest != watch.awaited:
        raise TicketError(
            f"expected masks {watch.awaited[:12]}, to which sparse training has moved those of the "
            "checkpoint, found those of the ticket that it started from "
            f"({handle.masks.digest[:12]}): what was pruned would train again, and what was grown "
            "is missing. Resume with the same method, name the ticket that the run ended with "
            f"(final.ticket), or start from it all the same: {watch.wording.other_checkpoint}"
        )
    watch.awaited, watch.lacks = None, False  # from now on the masks may change


def _trunk_in(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str
) -> tuple[Layout, dict[str, Tensor]] | None:
    """The trunk of a watched module, and its entries in what loads; None where it has none."""
    try:
        layout = find_trunk(module, module.__dict__[_ATTRIBUTE].parts)
    except LthError:
        return None  # no trunk that a ticket fits: attaching one says so
    there = {key: state_dict.get(prefix + key) for key in layout.keys.values()}
    state = {key: value for key, value in there.items() if isinstance(value, Tensor)}
    if not any(name in layout.arch.prunable and key in state for name, key in layout.keys.items()):
        return None  # such as the checkpoint of a head alone
    return layout, state


def _check_what_loads(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    *_: object,
) -> None:
    watch: _Watch = module.__dict__[_ATTRIBUTE]
    watch.loads = None
    found = _trunk_in(module, state_dict, prefix)
    if found is None:
        return
    layout, state = found
    _check_complete(layout, state, watch.wording)
    _check_depth(layout, state_dict, prefix)
    _check_shapes(module, layout, state)
    noted_input = noted_in(local_metadata.get(_INPUT))
    if noted_input is not None and watch.input is not None:
        check_input("the checkpoint", noted_input, watch.input, _ITS_CONFIG)
    handle = attached(module)
    if handle is not None:
        noted = local_metadata.get(_MASKS)
        zeroed = _check_masks(watch, layout, handle, state, noted)
        _follow(module, handle, noted)
        watch.lacks = watch.awaited is not None and zeroed > 0
        mask_what_loads(module, state_dict, prefix)  # what it zeroes has been said
    watch.loads = found


def _narrow_to_what_loads(module: nn.Module, *_: object) -> None:
    watch: _Watch = module.__dict__[_ATTRIBUTE]
    if watch.loads is None:
        return
    (layout, state), watch.loads = watch.loads, None
    own, first = module.state_dict(keep_vars=True), _first_block(module, layout)
    if any(value.shape != own[key].shape for key, value in state.items()):
        narrow(module, layout, state)
        _refuse(first, _NARROWED)
    if _REFUSAL in first.__dict__:
        first.__dict__[_REFUSAL] = (first.__dict__[_REFUSAL][0], True)


def expect_moved_masks(model: nn.Module) -> None:
    """Have the backbones in a model load weights that their masks zero, to restore both later.

    For a host whose checkpoints drop the metadata of a state dict, and which restores the masks of
    sparse training once the weights are loaded.
    """
    for module in model.modules():
        if is_watched(module):
            module.__dict__[_ATTRIBUTE].expects = True


def trained_with(module: nn.Module) -> list[str]:
    """The digests of the masks that a watched module trained with: at first, and now.

    For a host whose checkpoints drop the metadata of a state dict: it notes these itself.
    """
    handle = attached(module)
    return [] if handle is None else _watch_of(module).digests(handle)


def check_trained_with(module: nn.Module, noted: Sequence[str]) -> None:
    """Check what a host noted of a checkpoint, by `trained_with`, before it resumes from that.

    Where sparse training has moved the masks, training waits until they are restored.

    Raises:
        TicketError: if the checkpoint was trained with other masks.
    """
    watch, handle = _watch_of(module), attached(module)
    if handle is None:
        return
    own = watch.digests(handle)
    if not (watch.allow or set(own) & set(noted)):
        raise _of_another_ticket(watch, f"{_trained(noted)}, not {own[-1][:12]} as the ticket has")
    _follow(module, handle, noted)


def _watch_of(module: nn.Module) -> _Watch:
    """What watches a module; from now on, if nothing did."""
    if not is_watched(module):
        watch_loading(module)
    watch: _Watch = module.__dict__[_ATTRIBUTE]
    return watch


def _follow(module: nn.Module, handle: Attachment, noted: Sequence[str] | None) -> None:
    """Remember which masks a checkpoint was trained with, and wait for those it had last."""
    watch: _Watch = module.__dict__[_ATTRIBUTE]
    moved = noted is not None and not watch.allow and noted[-1] != handle.masks.digest
    if moved and watch.awaited is None:
        module.register_forward_pre_hook(_check_moved)
    watch.awaited = noted[-1] if noted is not None and moved else None
    if noted is not None and not watch.allow:
        watch.started = noted[0]


_ITS_CONFIG = ": use the configuration that it was trained with, such as the config.yaml beside it"

_NARROWED = (
    "the backbone has the widths of a compacted checkpoint, and no ticket: it infers, but an "
    "optimizer that was made before has the wide parameters. To train a compacted model, call "
    "lth_plugins.masking.narrowing.narrow_to(model, state_dict) before the optimizer is made"
)


def _check_complete(layout: Layout, state: Mapping[str, Tensor], wording: Wording) -> None:
    convolutions = [key for name, key in layout.keys.items() if name in layout.arch.prunable]
    absent = [key for key in convolutions if key not in state]
    if absent:
        raise TicketError(
            f"expected the {len(convolutions)} convolutions of the trunk in the checkpoint, found "
            f"none that fit {len(absent)} of them, such as {absent[0]}. Other loaders may leave "
            "out what a compacted checkpoint has in other widths: load one with "
            f"{wording.load_compacted}"
        )


def _check_depth(layout: Layout, state_dict: Mapping[str, Any], prefix: str) -> None:
    beyond = [key for key in _next_blocks(layout) if prefix + key in state_dict]
    if beyond:
        raise TicketError(
            f"expected a checkpoint of {layout.arch.description}, found {beyond[0]} in it, which "
            "that does not have: it is of a deeper one. Give the checkpoint of this model, or the "
            "configuration of that one"
        )


def _next_blocks(layout: Layout) -> Iterator[str]:
    """What the first convolutions after the last blocks of the stages would be called."""
    spell, arch = layout.dialect.spell, layout.arch
    for stage, depth in zip(STAGES, arch.depths, strict=True):
        first = layout.keys.get(f"{stage}.0.conv1.weight")
        if first is not None:
            prefix = first.removesuffix(spell(f"{stage}.0.conv1.weight", arch))
            yield prefix + spell(f"{stage}.{depth}.conv1.weight", arch)


def noted_input(state: Any) -> ModelInput | None:
    """The input that the model of a state dict was trained on; None where it notes none."""
    metadata = getattr(state, "_metadata", {})
    return noted_in(next((entry[_INPUT] for entry in metadata.values() if _INPUT in entry), None))


def note_input(local_metadata: dict[str, Any], model_input: ModelInput) -> None:
    """Note the input of a model for `noted_input`, in the metadata of a module's state dict."""
    local_metadata[_INPUT] = model_input.to_dict()


def _check_shapes(module: nn.Module, layout: Layout, state: Mapping[str, Tensor]) -> None:
    """Check that shapes are the module's, or those of a compacted one."""
    own = module.state_dict(keep_vars=True)
    found = {name: tuple(state[key].shape) for name, key in layout.keys.items() if key in state}
    compacted = layout.arch.narrowed(found)
    for name, shape in found.items():
        key = layout.keys[name]
        if shape not in (tuple(own[key].shape), tuple(compacted[name])):
            raise TicketError(
                f"expected a checkpoint of {layout.arch.description}, found {key} of shape "
                f"{shape} instead of {tuple(own[key].shape)}: it is of another architecture. Give "
                "the checkpoint of this model, or the configuration of that one"
            )


def count_zeroed(state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> tuple[int, int]:
    """Count the weights of a state dict that masks would zero, and those that are not zero.

    Args:
        state: a state dict.
        masks: True keeps a weight; by keys of the state dict.
    """
    zeroed = surviving = 0
    for key, mask in masks.items():
        already = zeroed_so_far(state[key])
        surviving += count_nonzero(state[key]) + already
        zeroed += count_nonzero(state[key], ~mask) + already
    return zeroed, surviving


def _warn_of_more_zeros(
    state: Mapping[str, Tensor], masks: Mapping[str, Tensor], surviving: int
) -> None:
    """Warn of a checkpoint that looks like one of a sparser ticket, and notes no masks.

    Files of safetensors have no metadata. A weight that is trained is hardly ever exactly zero.
    """
    kept = sum(int(mask.count_nonzero()) for mask in masks.values())
    if kept - surviving > kept / 100:
        logger.warning(
            "%s of the %s weights that the ticket keeps are zero in the checkpoint, which does not "
            "note its masks. If it is of a sparser ticket, name that one: its zeros would be "
            "trained",
            *(f"{kept - surviving:,}", f"{kept:,}"),
        )


def _trained(noted: Sequence[str] | None) -> str:
    masks = "masks that it says nothing about"
    if noted is not None:
        masks = f"masks {', '.join(digest[:12] for digest in noted)}"
    return f"that was trained with {masks}"


def _of_another_ticket(watch: _Watch, found: str) -> TicketError:
    return TicketError(
        f"expected a checkpoint that was trained with this ticket, found one {found}. Name the "
        "ticket that it was trained with, or a checkpoint of this ticket; "
        f"{watch.wording.other_checkpoint} starts from the other one all the same"
    )


def _check_masks(
    watch: _Watch,
    layout: Layout,
    handle: Attachment,
    state: Mapping[str, Tensor],
    noted: Sequence[str] | None,
) -> int:
    """Check the masks of a checkpoint; returns how many of its weights the ticket's would zero."""
    masks = {layout.keys[name]: mask for name, mask in handle.masks.items()}
    # Of a compacted checkpoint's narrow layers nothing is masked.
    masks = {key: m for key, m in masks.items() if key in state and state[key].shape == m.shape}
    zeroed, surviving = count_zeroed(state, masks)
    own = watch.digests(handle)
    other = noted is not None and not set(own) & set(noted)
    if noted is None and not zeroed:
        _warn_of_more_zeros(state, masks, surviving)
    moved = noted is not None and len(noted) > 1 and noted[0] == own[0] and not watch.allow
    if moved or (noted is None and watch.expects) or not (zeroed or other):
        return zeroed
    found = (
        f"{_trained(noted)}: the ticket's masks ({own[-1][:12]}) zero {zeroed:,} of its "
        f"{surviving:,} surviving weights"
    )
    if not watch.allow:
        raise _of_another_ticket(watch, found)
    logger.warning(
        "Loading a checkpoint %s, which is allowed (%s)", found, watch.wording.other_checkpoint
    )
    return zeroed
