# DeepLabV3+ on a ResNet-50 ticket, Pascal VOC 2012 with SBD's annotations.
# The base is mmseg::deeplabv3plus/…, by its path, because mmengine resolves
# mmseg:: only where the package has its upstream name.
_base_ = (
    __import__("mmseg").__path__[0]
    + "/.mim/configs/deeplabv3plus/deeplabv3plus_r50-d8_4xb4-20k_voc12aug-512x512.py"
)
custom_imports = dict(imports=["lth_plugins.mmseg"])
custom_hooks = [dict(type="TicketHook")]

model = dict(
    pretrained=None,  # the ticket has the weights
    backbone=dict(
        type="TicketResNet",  # TicketResNetV1c for a ticket with a deep stem
        init_cfg=dict(type="Ticket", checkpoint=None),  # give --ticket FILE, or write a file here
    ),
)
