# Faster R-CNN with FPN on a ResNet-50 ticket, COCO.
# The base is mmdet::faster_rcnn/…, by its path, because mmengine resolves
# mmdet:: only where the package has its upstream name.
_base_ = (
    __import__("mmdet").__path__[0] + "/.mim/configs/faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
)
custom_imports = dict(imports=["lth_plugins.mmseg"])
custom_hooks = [dict(type="TicketHook")]

model = dict(
    backbone=dict(
        init_cfg=dict(type="Ticket", checkpoint=None),  # write the ticket's file here
        # The ticket's BN statistics are those of the dense network, so they must adapt.
        norm_eval=False,
        frozen_stages=-1,
        norm_cfg=dict(type="SyncBN", requires_grad=True),  # over all GPUs: two images each are few
    ),
)
