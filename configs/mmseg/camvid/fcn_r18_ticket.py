# FCN on a ResNet-18 ticket, on the street scenes of CamVid; trains on a CPU.
#   tools/train_seg.py configs/mmseg/camvid/fcn_r18_ticket.py --ticket round_04.ticket
# ../_base_/camvid.py has the options for half the size and for fewer images.
# The first base is mmseg's default_runtime.py, by its path (see ../fcn_r50_cityscapes_ticket.py).
_base_ = [
    __import__("mmseg").__path__[0] + "/.mim/configs/_base_/default_runtime.py",
    "../_base_/fcn_r18.py",
    "../_base_/camvid.py",
    "../_base_/schedule_1k.py",
]
custom_imports = dict(imports=["lth_plugins.mmseg"])
custom_hooks = [dict(type="TicketHook")]

model = dict(
    # 11: CamVid's pixels without a label.
    data_preprocessor=dict(seg_pad_val=11, size_divisor=32),
    decode_head=dict(ignore_index=11),
)
