"""Ticket encoders for segmentation_models_pytorch.

``import lth_plugins.smp``, then ``smp.Unet("ticket_resnet50", encoder_weights="moco_r50.ticket")``,
and likewise every other model of smp, ``smp.create_model`` and ``get_encoder``: ``encoder_weights``
is a ticket, and ``in_channels`` the ticket's. ``smp.encoders.get_preprocessing_params`` and
``get_preprocessing_fn`` know its input. Each ResNet that smp's encoders and tickets share has an
encoder. A model with another ResNet encoder, such as ``tu-resnet50``, is for `lth_plugins.attach`.

smp reads weights and their input from files of the Hugging Face hub. Where it asks for those of a
ticket, `_download` gives it files that stand for the ticket.
"""

from importlib.util import find_spec

if find_spec("segmentation_models_pytorch") is None:
    raise ImportError(
        "lth_plugins.smp needs segmentation_models_pytorch: install the extra, lth_plugins[smp]"
    )

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import segmentation_models_pytorch.encoders as smp_encoders
import torch
from safetensors.torch import save_file
from segmentation_models_pytorch.encoders.resnet import ResNetEncoder, resnet_encoders

from lth_plugins.errors import NotFound, TicketError
from lth_plugins.masking.attachment import attach, attached
from lth_plugins.masking.hosting import warn_if_untested
from lth_plugins.masking.loading import watch_loading
from lth_plugins.ticket import ARCHITECTURES, InputSpec, Ticket, Wording

_PREFIX = "ticket_"
_DIGEST = "ticket_digest"  # the one entry of a state dict that stands for a ticket

WORDING = Wording(
    trunk_only="save ticket.without_outside() and name that file as encoder_weights",
    attach_outside="call lth_plugins.attach_rest(model)",
    channels="in_channels={}",
    other_checkpoint="smp's own encoder, given the ticket by lth_plugins.attach,",
)

_NO_TICKET = (
    "for a dense model, or to infer from a checkpoint without its ticket, write encoder_name "
    f"without {_PREFIX} and encoder_weights=None"
)


class TicketEncoder(ResNetEncoder):
    """smp's ResNet encoder on a ticket, with the stock keys in its state dict."""

    def load_state_dict(self, state_dict: Mapping[str, Any], **options: Any) -> Any:
        """Load a state dict; smp, making an encoder, gives one that stands for a ticket.

        Raises:
            TicketError: if the ticket does not fit.
        """
        if set(state_dict) != {_DIGEST}:
            return super().load_state_dict(state_dict, **options)
        ticket = _asked[bytes(state_dict[_DIGEST].tolist()).decode()]
        super().set_in_channels(ticket.meta.input.channels, pretrained=False)
        attach(self, ticket, whole=False, wording=WORDING)
        watch_loading(self, wording=WORDING)

    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:
        """Check the channels that smp asks for, where a stock encoder changes its weights for them.

        Raises:
            TicketError: if the ticket reads others, or there is none.
        """
        handle = attached(self)
        if handle is None:
            raise TicketError(
                "expected encoder_weights of a ticket encoder to name a ticket (a path, a catalog "
                f"name or hf://owner/repo), found none: {_NO_TICKET}"
            )
        spec = handle.meta.input
        if in_channels != spec.channels:
            raise TicketError(
                f"the ticket reads images of {spec.label}, but the model is built with "
                f"in_channels={in_channels}: write {WORDING.channels.format(spec.channels)}, or "
                f"take a ticket of weights that read {in_channels}"
            )


class _Asked(str):
    """The digest of a ticket that smp was asked for, where smp has the name of a repository."""

    ticket: Ticket


_asked: WeakValueDictionary[str, Ticket] = WeakValueDictionary()
"""Tickets by digest, each for as long as smp makes an encoder of it."""


class _Tickets(Mapping[str | PathLike[str], Mapping[str, Any]]):
    """What ``encoder_weights`` of a ticket encoder may be: whatever names a ticket."""

    def __init__(self, stock: Mapping[str, Any]) -> None:
        self._stock = stock

    def __getitem__(self, ref: str | PathLike[str]) -> Mapping[str, Any]:
        if not isinstance(ref, str):
            raise TicketError(
                "expected encoder_weights of a ticket encoder to be text, because smp writes it to "
                f"the configuration of a saved model, found a {type(ref).__name__}: give the "
                "ticket's path or name as a str"
            )
        if ref in self._stock:
            raise TicketError(
                f"expected encoder_weights of a ticket encoder to name a ticket, found {ref!r}, "
                f"weights of smp's own: give a ticket; {_NO_TICKET}"
            )
        try:
            ticket = Ticket.load(ref)
        except NotFound as error:
            raise NotFound(f"{error}; {_NO_TICKET}") from error
        asked = _Asked(ticket.digest)
        asked.ticket = _asked[asked] = ticket
        return {"repo_id": asked, "revision": None}

    def __contains__(self, ref: object) -> bool:
        return True  # `__getitem__` says what is wrong with one

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def preprocessing(spec: InputSpec) -> dict[str, Any]:
    """What smp's ``preprocess_input`` is to do to images, [H, W, channels], for a ticket's input.

    Images of 8 bits are divided by 255, which smp does for an ``input_range`` of [0, 1]; others are
    normalised as their files hold them.
    """
    mean, std, values = spec.mean_255, spec.std_255, [-math.inf, math.inf]
    if spec.is_photograph:
        mean, std, values = spec.mean, spec.std, [0, 1]
    return {"input_space": spec.format, "input_range": values, "mean": mean, "std": std}


_hub_download = smp_encoders.hf_hub_download
_folder = tempfile.TemporaryDirectory(prefix="lth_plugins_smp_")


def _download(repo_id: str, filename: str, **options: Any) -> str:
    """The path of a file on the hub; where a ticket was asked for, of one that stands for it."""
    if not isinstance(repo_id, _Asked):
        return str(_hub_download(repo_id, filename=filename, **options))
    path = Path(_folder.name) / f"{repo_id}-{filename}"
    if path.suffix == ".json":
        path.write_text(json.dumps(preprocessing(repo_id.ticket.meta.input)))
    else:
        save_file({_DIGEST: torch.tensor(list(repo_id.encode()), dtype=torch.uint8)}, path)
    return str(path)


def _register() -> None:
    warn_if_untested("segmentation_models_pytorch", "0.6", "0.6")
    smp_encoders.hf_hub_download = _download
    for name in ARCHITECTURES.keys() & resnet_encoders.keys():
        stock = resnet_encoders[name]
        smp_encoders.encoders[_PREFIX + name] = {
            "encoder": TicketEncoder,
            "pretrained_settings": _Tickets(stock["pretrained_settings"]),
            "params": stock["params"],
        }


_register()
