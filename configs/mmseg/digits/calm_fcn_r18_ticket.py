# FCN on a ResNet-18 ticket, on calm scenes of handwritten digits: a minute of one CPU core.
#   tools/make_digit_scenes.py --look calm --min-size 96 --max-size 96 --train 400 --test 100 \
#       --out datasets/digit_scenes_calm
#   tools/train_seg.py configs/mmseg/digits/calm_fcn_r18_ticket.py --ticket round_04.ticket
_base_ = "./fcn_r18_ticket.py"

max_iters = 120
model = dict(
    data_preprocessor=dict(size=(96, 96)),
    # Stage 4 at stride 16, dilated: at stride 32 a digit is one pixel of it.
    backbone=dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)),
    decode_head=dict(
        in_index=(0, 3),
        in_channels=(64, 512),
        loss_decode=dict(class_weight=[0.15] + [1.0] * 10),
    ),
)

train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        data_root="datasets/digit_scenes_calm",
        pipeline=[  # scenes of 96 x 96 need no crop
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="PackSegInputs"),
        ],
    ),
)
val_dataloader = dict(dataset=dict(data_root="datasets/digit_scenes_calm"))
test_dataloader = val_dataloader

optim_wrapper = dict(
    optimizer=dict(lr=4e-3),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.2))),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, begin=0, end=10, by_epoch=False),
    dict(type="PolyLR", power=0.9, eta_min=1e-6, begin=10, end=max_iters, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=max_iters))
