# FCN on a ResNet-18 ticket, on the street scenes of CamVid; trains on a CPU.
#   tools/train_seg.py configs/mmseg/camvid/fcn_r18_ticket.py --ticket round_04.ticket
# ../_base_/camvid.py has the options for half the size and for fewer images.
# The first base is mmseg's default_runtime.py, by its path (see ../fcn_r50_cityscapes_ticket.py).
_base_ = [
    __import__("mmseg").__path__[0] + "/.mim/configs/_base_/default_runtime.py",
    "../_base_/camvid.py",
    "../_base_/schedule_1k.py",
]
custom_imports = dict(imports=["lth_plugins.mmseg"])
custom_hooks = [dict(type="TicketHook")]
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
        seg_pad_val=11,  # as CamVid's pixels without a label
        size_divisor=32,
    ),
    backbone=dict(
        type="TicketResNet",
        depth=18,
        norm_cfg=norm_cfg,
        init_cfg=dict(type="Ticket", checkpoint=None),  # give --ticket FILE, or write a file here
    ),
    # All four stages, each resized to stride 4: a pole is too thin for stride 32 alone.
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
        ignore_index=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss"),
    ),
    test_cfg=dict(mode="whole"),
)
