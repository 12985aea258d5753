# PSPNet on a ResNet-50 ticket, Cityscapes.
# The base is mmseg::pspnet/…, by its path, because mmengine resolves
# mmseg:: only where the package has its upstream name.
_base_ = (
    __import__("mmseg").__path__[0]
    + "/.mim/configs/pspnet/pspnet_r50-d8_4xb2-80k_cityscapes-512x1024.py"
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
