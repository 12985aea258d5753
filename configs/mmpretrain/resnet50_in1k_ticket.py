# ImageNet classification with a ResNet-50 ticket.
# The base is mmpretrain::resnet/…, by its path, because mmengine resolves
# mmpretrain:: only where the package has its upstream name.
_base_ = __import__("mmpretrain").__path__[0] + "/.mim/configs/resnet/resnet50_8xb32_in1k.py"
custom_imports = dict(imports=["lth_plugins.mmseg"])
custom_hooks = [dict(type="TicketHook")]

model = dict(
    backbone=dict(init_cfg=dict(type="Ticket", checkpoint=None)),  # write the ticket's file here
)
