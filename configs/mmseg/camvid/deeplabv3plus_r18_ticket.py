# DeepLabV3+ on a ResNet-18 ticket, on the street scenes of CamVid; trains on a CPU.
#   tools/train_seg.py configs/mmseg/camvid/deeplabv3plus_r18_ticket.py --ticket round_04.ticket
# ../_base_/camvid.py has the options for half the size and for fewer images.
# The first two bases are mmseg's, by their paths (see ../fcn_r50_cityscapes_ticket.py).
_base_ = [
    __import__("mmseg").__path__[0] + "/.mim/configs/_base_/default_runtime.py",
    __import__("mmseg").__path__[0] + "/.mim/configs/_base_/models/deeplabv3plus_r50-d8.py",
    "../_base_/camvid.py",
    "../_base_/schedule_1k.py",
]
custom_imports = dict(imports=["lth_plugins.mmseg"])
custom_hooks = [dict(type="TicketHook")]
norm_cfg = dict(type="BN", requires_grad=True)  # SyncBN needs a GPU

model = dict(
    pretrained=None,  # the ticket has the weights
    data_preprocessor=dict(seg_pad_val=11, size_divisor=32),  # 11: CamVid's pixels without a label
    backbone=dict(
        type="TicketResNet",  # TicketResNetV1c for a ticket with a deep stem
        depth=18,
        strides=(1, 2, 2, 1),  # stride 16: mmseg's 8 costs more
        dilations=(1, 1, 1, 2),
        norm_cfg=norm_cfg,
        init_cfg=dict(type="Ticket", checkpoint=None),  # give --ticket FILE, or write a file here
    ),
    decode_head=dict(
        in_channels=512,
        channels=128,
        c1_in_channels=64,
        c1_channels=12,
        dilations=(1, 6, 12, 18),
        num_classes=11,
        ignore_index=11,
        norm_cfg=norm_cfg,
    ),
    auxiliary_head=dict(
        in_channels=256, channels=64, num_classes=11, ignore_index=11, norm_cfg=norm_cfg
    ),
)
