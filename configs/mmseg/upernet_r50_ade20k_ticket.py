# UPerNet on a ResNet-50 ticket, ADE20K.
# The base is mmseg::upernet/…, by its path, because mmengine resolves
# mmseg:: only where the package has its upstream name.
_base_ = (
    __import__("mmseg").__path__[0]
    + "/.mim/configs/upernet/upernet_r50_4xb4-160k_ade20k-512x512.py"
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
