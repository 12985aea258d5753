"""Rounds whose masks are refilled, as the configuration says."""

from pathlib import Path

from lth_plugins.pretrain import load_config
from lth_plugins.pretrain.find import Search
from lth_plugins.ticket import Ticket

DIGITS = Path(__file__).resolve().parents[2] / "configs/pretrain/digits_supervised.yaml"


def test_every_round_has_whole_channels_and_none_comes_back(tmp_path: Path) -> None:
    settings = ["data.size=16", "data.subset=32", "batch_size=16", "rounds=2", f"out={tmp_path}"]
    settings += ["pretrain.epochs=1", "evaluate_last=false", "trainer.accelerator=cpu"]
    structure = ["structure.kind=channel", "structure.multiple=8"]
    paths = list(Search(load_config(DIGITS, [*settings, *structure])).run())
    before = None
    for k, ticket in enumerate(map(Ticket.load, paths)):
        assert ticket.density <= 0.8**k
        kept = [ticket.masks[f"{i.conv}.weight"].flatten(1).any(1) for i in ticket.arch.inner]
        for now, then in zip(kept, before or kept, strict=True):
            assert now.sum() % 8 == 0 and not (now & ~then).any()
        before = kept
