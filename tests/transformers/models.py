"""Small models of transformers with a ResNet trunk, on digit scenes of 64 px; nothing is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset
from transformers import (
    DetrConfig,
    DetrImageProcessor,
    Mask2FormerImageProcessor,
    ResNetConfig,
    RTDetrResNetConfig,
    SegformerImageProcessor,
    TimmBackboneConfig,
    Trainer,
    TrainingArguments,
)

from lth_plugins.digits import render_scene

if getattr(importlib.util.find_spec("datasets"), "origin", None) is None:
    # It takes a folder of photographs in the working directory, datasets/, for that package.
    transformers.trainer.is_datasets_available = lambda: False

_SMALL = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 20,
    "num_labels": 10,
}
_RT_DETR = {
    **_SMALL,
    "decoder_layers": 2,
    "encoder_hidden_dim": 32,
    "decoder_in_channels": [32, 32, 32],
    "decoder_n_points": 2,
    "num_denoising": 0,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "DetrForObjectDetection": _SMALL,
    "ConditionalDetrForObjectDetection": _SMALL,
    "DeformableDetrForObjectDetection": {
        **_SMALL,
        "decoder_layers": 2,
        "num_feature_levels": 3,
        "encoder_n_points": 2,
        "decoder_n_points": 2,
    },
    "RTDetrForObjectDetection": _RT_DETR,
    "RTDetrV2ForObjectDetection": _RT_DETR,
    "MaskFormerForInstanceSegmentation": {"fpn_feature_size": 32, "mask_feature_size": 32},
    "Mask2FormerForUniversalSegmentation": {
        "feature_size": 32,
        "mask_feature_size": 32,
        "hidden_dim": 32,
        "encoder_feedforward_dim": 32,
        "dim_feedforward": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_attention_heads": 2,
        "num_queries": 20,
        "train_num_points": 64,
        "num_labels": 10,
    },
    "UperNetForSemanticSegmentation": {
        "hidden_size": 32,
        "pool_scales": [1, 2],
        "auxiliary_channels": 16,
        "auxiliary_in_channels": 256,
        "num_labels": 11,
    },
}
"""What makes each model a small one."""


def resnet(arch: str, stages: tuple[int, ...], **options: Any) -> Any:
    """The configuration of a backbone: a ResNet-18, a ResNet-50-D, or timm's ResNet-18."""
    names = [f"stage{number}" for number in stages]
    if arch == "timm":
        return TimmBackboneConfig(backbone="resnet18", out_indices=list(stages), **options)
    if arch == "resnet50d":
        return RTDetrResNetConfig(out_features=names, **options)
    widths = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    return ResNetConfig(**widths, out_features=names, **options)


def small(kind: str, arch: str = "timm", **options: Any) -> Any:
    """A small model of a class of `OPTIONS`; DETR's relatives get their last stages."""
    stages = (1, 2, 3, 4)
    if kind in ("DetrForObjectDetection", "ConditionalDetrForObjectDetection"):
        stages = (4,)
    elif "Detr" in kind:
        stages = (2, 3, 4)
    config = getattr(transformers, kind).config_class
    given = {**OPTIONS[kind], "backbone_config": resnet(arch, stages), **options}
    if kind.startswith("RTDetr"):
        widths = [512, 1024, 2048] if arch == "resnet50d" else [128, 256, 512]
        given["encoder_in_channels"] = widths
    if kind.startswith("MaskFormer"):
        given |= {"decoder_config": DetrConfig(**_SMALL), "num_labels": 10}
    return getattr(transformers, kind)(config(**given))


def processor_for(kind: str, **options: Any) -> Any:
    """An image processor for a model, which leaves the size of images."""
    if "Semantic" in kind:
        return SegformerImageProcessor(do_resize=False, do_reduce_labels=False, **options)
    if "Segmentation" in kind:
        return Mask2FormerImageProcessor(do_resize=False, ignore_index=0, **options)
    return DetrImageProcessor(do_resize=False, do_pad=False, **options)


class Scenes(Dataset[dict[str, Any]]):
    """Digit scenes of 64 px in memory, as an image processor makes them for a model."""

    def __init__(self, kind: str, processor: Any, count: int = 4) -> None:
        generator = np.random.default_rng(0)
        self._items = [self._item(kind, processor, generator, i) for i in range(count)]

    def _item(self, kind: str, processor: Any, generator: Any, index: int) -> dict[str, Any]:
        scene = render_scene(generator, "train", min_size=64, max_size=64)
        image = scene.image
        if "Semantic" in kind:
            made = processor(image, segmentation_maps=scene.label_map, return_tensors="pt")
            return {"pixel_values": made["pixel_values"][0], "labels": made["labels"][0]}
        if "Segmentation" in kind:
            instances = np.zeros(image.shape[:2], np.int64)
            for number, mask in enumerate(scene.masks, 1):
                instances[mask] = number
            classes = {number: int(label) for number, label in enumerate(scene.labels, 1)}
            made = processor(
                [image],
                segmentation_maps=[instances],
                instance_id_to_semantic_id=[{**classes, 0: 0}],
                return_tensors="pt",
            )
            names = ("pixel_values", "pixel_mask", "mask_labels", "class_labels")
            return {name: made[name][0] for name in names}
        annotations = [
            {"category_id": int(label), "bbox": box.tolist(), "area": 1.0, "iscrowd": 0}
            for label, box in zip(scene.labels, scene.boxes, strict=True)
        ]
        target = {"image_id": index, "annotations": annotations}
        made = processor(image, annotations=target, return_tensors="pt")
        return {"pixel_values": made["pixel_values"][0], "labels": made["labels"][0]}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._items[index]


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch, as the collators of the official example scripts make it."""
    batch = {name: [item[name] for item in items] for name in items[0]}
    stacked = [name for name in batch if name.startswith("pixel_")]
    if isinstance(batch.get("labels", [0])[0], torch.Tensor):
        stacked.append("labels")
    return {**batch, **{name: torch.stack(batch[name]) for name in stacked}}


def arguments(folder: Path, steps: int, **options: Any) -> TrainingArguments:
    """Of a run that saves after each step."""
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": steps,
            "save_steps": 1,
            "save_strategy": "steps",
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "seed": 1,
            "use_cpu": True,
            "report_to": [],
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
            **options,
        }
    )


def trainer(model: Any, args: TrainingArguments, processor: Any, callbacks: list[Any]) -> Trainer:
    """A Trainer, as the official example scripts make it."""
    return Trainer(
        model,
        args,
        data_collator=collate,
        train_dataset=Scenes(type(model).__name__, processor),
        processing_class=processor,
        callbacks=callbacks,
    )
