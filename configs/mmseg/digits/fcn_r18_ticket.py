# FCN on a ResNet-18 ticket, on scenes of handwritten digits; sized for two CPU cores.
#   tools/make_digit_scenes.py --out datasets/digit_scenes
#   tools/train_seg.py configs/mmseg/digits/fcn_r18_ticket.py --ticket round_08.ticket
# The first base is mmseg's default_runtime.py, by its path (see ../fcn_r50_cityscapes_ticket.py).
_base_ = [
    __import__("mmseg").__path__[0] + "/.mim/configs/_base_/default_runtime.py",
    "../_base_/fcn_r18.py",
    "../_base_/schedule_1k.py",
]
custom_imports = dict(imports=["lth_plugins.mmseg"])
custom_hooks = [dict(type="TicketHook")]

crop_size = (64, 64)
max_iters = 80

model = dict(
    data_preprocessor=dict(seg_pad_val=255, size=crop_size),
    # Most pixels are background; a small weight keeps the head from predicting nothing else.
    decode_head=dict(loss_decode=dict(class_weight=[0.1] + [1.0] * 10)),
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

optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, begin=0, end=20, by_epoch=False),
    dict(type="PolyLR", power=0.9, eta_min=1e-6, begin=20, end=max_iters, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(checkpoint=dict(interval=max_iters))
