"""What the blocks of each page are given, and what is checked once they ran.

A page is prepared in the empty folder that its blocks run in. Files and names are those that the
page speaks of, small enough to train in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lth_plugins as lth

ROOT = Path(__file__).parents[2]
LINES = 25
"""The most that the first script on a host's page takes."""


class Page:
    """A page whose blocks need nothing.

    Attributes:
        names: those that its Python blocks find, and add to.
    """

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.names: dict[str, Any] = {"__name__": "page"}
        self.prepare(request)

    def prepare(self, request: pytest.FixtureRequest) -> None:
        """Write the files, and set the names, that the page speaks of."""

    def ran(self, text: str) -> None:
        """Check a Python block after it ran."""

    def read(self, settings: Any, text: str) -> None:
        """Check a YAML block."""
        raise AssertionError(f"what reads this?\n{text}")

    def end(self) -> None:
        """Check what is there after the last block."""


class Tickets(Page):
    """Commands on tickets: the files that pages name, of a ResNet-18."""

    SPARSE = ("round_08", "round_12", "moco_12", "runs/digits/round_07")
    DENSE = ("round_00", "simclr_00")

    def prepare(self, request: pytest.FixtureRequest) -> None:
        Path("runs/digits").mkdir(parents=True)
        for names, fixture in ((self.SPARSE, "ticket18_file"), (self.DENSE, "dense18_file")):
            for name in names:
                Path(f"{name}.ticket").symlink_to(request.getfixturevalue(fixture))
        torch.save(request.getfixturevalue("resnet18_state"), "resnet50.pth")


class Mmengine(Page):
    """Configs of mmengine, over a segmentor of the digits."""

    def prepare(self, request: pytest.FixtureRequest) -> None:
        Path("round_08.ticket").symlink_to(request.getfixturevalue("ticket18_file"))

    def ran(self, text: str) -> None:
        from mmengine.config import Config
        from mmengine.registry import HOOKS, init_default_scope
        from mmseg.registry import MODELS

        init_default_scope("mmseg")
        settings = {
            name: self.names[name]
            for name in ("custom_imports", "custom_hooks", "model")
            if name in self.names
        }
        config = Config.fromfile(ROOT / "configs/mmseg/digits/fcn_r18_ticket.py")
        config.merge_from_dict(settings)
        for hook in config.custom_hooks:
            HOOKS.build(hook)
        if "model" in settings:
            model = MODELS.build(config.model)
            model.init_weights()
            lth.attached(model).verify()


class Readme(Mmengine, Tickets):
    """A config of detectron2, one of mmseg, and a model of one's own."""

    def prepare(self, request: pytest.FixtureRequest) -> None:
        Tickets.prepare(self, request)
        Path("moco_r50.ticket").symlink_to(request.getfixturevalue("ticket18_file"))
        base = "configs/detectron2/digits/faster_rcnn_R_18_FPN_ticket.yaml"
        settings = {"_BASE_": base, "MODEL": {"TICKET": {"PATH": "moco_r50.ticket"}}}
        Path("your_config.yaml").write_text(yaml.safe_dump(settings))

    def ran(self, text: str) -> None:
        if "custom_imports" in text:
            super().ran(text)
            self.names["model"] = torchvision.models.resnet18()

    def end(self) -> None:
        assert self.names["cfg"].INPUT.FORMAT == "RGB"
        assert lth.Ticket.load("tuned.ticket").meta.source == "my task"


class Deploy(Page):
    """A classifier on a channel ticket."""

    def prepare(self, request: pytest.FixtureRequest) -> None:
        from lth_plugins.pruning.structure import make_structure, structured

        dense = lth.Ticket.load(request.getfixturevalue("dense18_file"))
        model = torchvision.models.resnet18(num_classes=2)
        lth.attach(model, structured(dense, make_structure("channel", density=0.3)))
        self.names |= {"model": model, "images": torch.rand(2, 3, 32, 32)}

    def end(self) -> None:
        sizes = [
            sum(p.numel() for p in self.names[name].parameters()) for name in ("small", "model")
        ]
        assert sizes[0] < 0.5 * sizes[1] and Path("model.onnx").stat().st_size < 5 * sizes[0]


class Slimming(Page):
    """A classifier."""

    def prepare(self, request: pytest.FixtureRequest) -> None:
        images, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
        model = torchvision.models.resnet18(num_classes=2)
        self.names |= {"model": model, "example": images, "images": images, "labels": labels}
        self.names["loss"] = nn.functional.cross_entropy

    def end(self) -> None:
        small, model = self.names["small"], self.names["model"]
        assert small.layer4[0].conv1.weight.shape[0] < model.layer4[0].conv1.weight.shape[0]


class Study(Page):
    """Keys of a study, over that of the digits."""

    def prepare(self, request: pytest.FixtureRequest) -> None:
        Path("train.py").touch()

    def read(self, settings: Any, text: str) -> None:
        from lth_plugins.study.plan.config import load_config

        whole = yaml.safe_load((ROOT / "configs/study/digits.yaml").read_text())
        whole |= {"rounds": [4, 8], "baselines": {}, **settings}
        Path("study.yaml").write_text(yaml.safe_dump(whole))
        config = load_config("study.yaml")
        assert {name for name in settings if not getattr(config, name)} == set()


class Verdict(Study, Tickets):
    """The same, numbers by seed, and tickets to perturb."""

    def prepare(self, request: pytest.FixtureRequest) -> None:
        Tickets.prepare(self, request)

    def end(self) -> None:
        assert self.names["verdicts"][0].word in ("matching", "not matching", "open")


class Import(Tickets):
    """A checkpoint, and one of a network that reads 13 bands."""

    def prepare(self, request: pytest.FixtureRequest) -> None:
        state = request.getfixturevalue("resnet18_state")
        torch.save(state, "CKPT")
        name = "B13_rn50_moco_0099_ckpt.pth"
        torch.save({**state, "conv1.weight": torch.randn(64, 13, 7, 7)}, name)

    def end(self) -> None:
        assert lth.Ticket.load("s2_moco.ticket").meta.input.channels == 13


class Detectron2(Page):
    """A detector of digits that trains two steps."""

    def prepare(self, request: pytest.FixtureRequest) -> None:
        import detectron2.config
        import detectron2.data
        import detectron2.engine

        import lth_plugins.detectron2 as plugin
        from tests.detectron2.conftest import TINY

        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save("image.png")
        box = {"bbox": [8.0, 8.0, 40.0, 40.0], "bbox_mode": 0, "category_id": 3}
        record = {"file_name": "image.png", "height": 64, "width": 64, "image_id": 0}
        catalog = detectron2.data.DatasetCatalog
        catalog.register("page", lambda: [{**record, "annotations": [box]}] * 2)
        detectron2.data.MetadataCatalog.get("page").thing_classes = [*"0123456789"]
        request.addfinalizer(
            lambda: (catalog.remove("page"), detectron2.data.MetadataCatalog.pop("page"))
        )
        base = detectron2.config.get_cfg()
        plugin.add_ticket_config(base)
        base.merge_from_file("configs/detectron2/digits/faster_rcnn_R_18_FPN_ticket.yaml")
        changes = {"DATASETS.TRAIN": ("page",), "DATASETS.TEST": (), "SOLVER.MAX_ITER": 2}
        options = {**TINY, **changes}
        base.merge_from_list([one for pair in options.items() for one in pair])
        base.OUTPUT_DIR = "runs"
        Path("page.yaml").write_text(base.dump())
        self.names |= {
            "CONFIG": "page.yaml",
            "DefaultTrainer": detectron2.engine.DefaultTrainer,
            "L": detectron2.config.LazyCall,
            "cfg": base,
            "lth_plugins": lth,
            "model": detectron2.config.LazyCall(torchvision.models.resnet18)(),
        }


class Detectron2Page(Detectron2):
    """The same; the first script trains it."""

    def ran(self, text: str) -> None:
        if "trainer.train()" in text:
            assert len(text.splitlines()) <= LINES
            lth.attached(self.names["trainer"].model).verify()
            assert lth.Ticket.load("final.ticket")


class Distill(Detectron2):
    """detectron2's trainer with a teacher, and mmseg's config."""

    def ran(self, text: str) -> None:
        if "custom_imports" in text:
            assert self.names["custom_hooks"][0]["type"] == "DistillHook"


class Photos(Page):
    """Datasets of one's own in detectron2."""

    def read(self, settings: Any, text: str) -> None:
        from detectron2.config import CfgNode, get_cfg

        from lth_plugins.detectron2 import add_dataset_config, register_datasets

        cfg = get_cfg()
        add_dataset_config(cfg)
        cfg.merge_from_other_cfg(CfgNode(settings))
        register_datasets(cfg.DATASETS.REGISTER)


class Script(Page):
    """A host's page whose first script trains a ticket and leaves the fine-tuned one."""

    ticket = "cifar10-simclr-r18-s96"
    tuned = "tuned.ticket"

    def ran(self, text: str) -> None:
        if self.tuned:
            assert len(text.splitlines()) <= LINES
            assert lth.Ticket.load(self.tuned).masks == lth.Ticket.load(self.ticket).masks
            self.tuned = ""


class Classifier(Script):
    """Lightning's and timm's pages: a few images with labels."""

    def prepare(self, request: pytest.FixtureRequest) -> None:
        data = TensorDataset(torch.rand(2, 3, 32, 32), torch.tensor([1, 2]))
        self.names["data_loader"] = DataLoader(data, 2)


class Torchvision(Script):
    """A detector of a few boxes; then three lines that prune a dense model."""

    def prepare(self, request: pytest.FixtureRequest) -> None:
        target = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 40.0]]), "labels": torch.tensor([3])}
        self.names["data_loader"] = [([torch.rand(3, 64, 64)] * 2, [target] * 2)]
        self.names |= {"lth": lth, "iterations": 9000, "step": 7999}
        self.dense = lth.Ticket.load(request.getfixturevalue("dense18_file"))

    def ran(self, text: str) -> None:
        if self.tuned:
            super().ran(text)
            self.names["model"] = torchvision.models.resnet18()
            lth.attach(self.names["model"], self.dense)

    def end(self) -> None:
        assert lth.attached(self.names["model"]).masks.sparsity == pytest.approx(0.9, abs=1e-4)


class Smp(Script):
    """A segmentor of 13 bands."""

    ticket = "s2_moco.ticket"
    tuned = "water.ticket"

    def prepare(self, request: pytest.FixtureRequest) -> None:
        Path(self.ticket).symlink_to(request.getfixturevalue("bands18_file"))


class Transformers(Script):
    """A DETR of digit scenes."""

    ticket = "resnet18.ticket"
    tuned = "runs/detr/final.ticket"

    def prepare(self, request: pytest.FixtureRequest) -> None:
        from tests.transformers.models import OPTIONS, Scenes, arguments, collate, resnet

        Path(self.ticket).symlink_to(request.getfixturevalue("ticket18_file"))
        kind = "DetrForObjectDetection"
        given = arguments(Path(), 1).to_dict()
        kept = ("max_steps", "per_device_train_batch_size", "use_cpu", "report_to", "disable_tqdm")
        others = {"remove_unused_columns": False, "dataloader_pin_memory": False}
        self.names |= {
            "CONFIG": {**OPTIONS[kind], "backbone_config": resnet("timm", (4,))},
            "ARGUMENTS": {**{name: given[name] for name in kept}, **others},
            "RESUME": None,
            "make_dataset": lambda processor: Scenes(kind, processor),
            "collate": collate,
        }

    def end(self) -> None:
        assert Path("runs/detr/model.safetensors").exists()


PREPARED: Mapping[str, type[Page]] = {
    "README.md": Readme,
    "docs/deploy.md": Deploy,
    "docs/distill.md": Distill,
    "docs/hosts/detectron2.md": Detectron2Page,
    "docs/hosts/lightning.md": Classifier,
    "docs/hosts/mmdet.md": Mmengine,
    "docs/hosts/mmseg.md": Mmengine,
    "docs/hosts/smp.md": Smp,
    "docs/hosts/timm.md": Classifier,
    "docs/hosts/torchvision.md": Torchvision,
    "docs/hosts/transformers.md": Transformers,
    "docs/import.md": Import,
    "docs/photos.md": Photos,
    "docs/slimming.md": Slimming,
    "docs/structured.md": Tickets,
    "docs/study.md": Study,
    "docs/verdict.md": Verdict,
}
