# FCN on a ResNet-18 ticket, on scenes of handwritten digits; sized for two CPU cores.
#   tools/make_digit_scenes.py --out datasets/digit_scenes
#   tools/train_seg.py configs/mmseg/digits/fcn_r18_ticket.py --ticket round_08.ticket
# The base is mmseg::_base_/default_runtime.py, by its path (see ../fcn_r50_cityscapes_ticket.py).
_base_ = __import__("mmseg").__path__[0] + "/.mim/configs/_base_/default_runtime.py"
custom_imports = dict(imports=["lth_plugins.mmseg"])
custom_hooks = [dict(type="TicketHook")]

crop_size = (64, 64)
max_iters = 80
norm_cfg = dict(type="BN", requires_grad=True)  # SyncBN needs a GPU

model = dict(
    type="EncoderDecoder",
    # The ticket's input: RGB with ImageNet's mean and std. A contradicting input is an error.
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=crop_size,
    ),
    backbone=dict(
        type="TicketResNet",
        depth=18,
        norm_cfg=norm_cfg,
        init_cfg=dict(type="Ticket", checkpoint=None),  # give --ticket FILE, or write a file here
    ),
    # All four stages, each resized to stride 4: a digit is too small for stride 32 alone.
    decode_head=dict(
        type="FCNHead",
        input_transform="resize_concat",
        in_index=(0, 1, 2, 3),
        in_channels=(64, 128, 256, 512),
        channels=64,
        kernel_size=1,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        # Most pixels are background; a small weight keeps the head from predicting nothing else.
        loss_decode=dict(type="CrossEntropyLoss", class_weight=[0.1] + [1.0] * 10),
    ),
    test_cfg=dict(mode="whole"),
)

dataset = dict(
    type="BaseSegDataset",
    data_root="datasets/digit_scenes",
    img_suffix=".png",
    seg_map_suffix=".png",
    metainfo=dict(
        classes=("background", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
        palette=[
            [0, 0, 0],
            [230, 25, 75],
            [60, 180, 75],
            [255, 225, 25],
            [0, 130, 200],
            [245, 130, 48],
            [145, 30, 180],
            [70, 240, 240],
            [240, 50, 230],
            [210, 245, 60],
            [250, 190, 212],
        ],
    ),
)
train_dataloader = dict(
    batch_size=32,  # 8 images per step show too few digits
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/train", seg_map_path="labels/train"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="RandomCrop", crop_size=crop_size),
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
        data_prefix=dict(img_path="images/test", seg_map_path="labels/test"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="PackSegInputs"),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.02),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.3))),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, begin=0, end=20, by_epoch=False),
    dict(type="PolyLR", power=0.9, eta_min=1e-6, begin=20, end=max_iters, by_epoch=False),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=20, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=max_iters),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
)
randomness = dict(seed=0)
