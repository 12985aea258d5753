"""Two steps of DDP as mmengine's Runner takes them; run by test_scripts.py, on two ranks.

mmengine's ``--launcher pytorch`` itself wants a GPU, so this is its order of events on a CPU: wrap
the model, build the optimizer, initialise the weights, broadcast them, train.
"""

import sys

import mmseg.models  # noqa: F401  # fills mmseg's registry
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

import lth_plugins as lth

config, store, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(rank)
MMLogger.get_instance("mmengine").setLevel("WARNING")
cfg = Config.fromfile(config)
init_default_scope("mmseg")
model = MMDistributedDataParallel(MODELS.build(cfg.model))
optimizer = dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=0.01)
clip = dict(max_norm=1.0)
optim_wrapper = build_optim_wrapper(
    model, dict(type="OptimWrapper", optimizer=optimizer, clip_grad=clip)
)
model.module.init_weights()
for value in model.module.state_dict().values():
    dist.broadcast(value, 0)

handle = lth.attached(model)
parameters = dict(model.module.backbone.named_parameters())


def check_gradients(*_: object) -> None:
    """After the ranks have averaged and clipped their gradients, before the step."""
    for name, mask in handle.masks.items():
        assert not parameters[name].grad[~mask].any(), name


optim_wrapper.optimizer.register_step_pre_hook(check_gradients)

for _ in range(2):
    data = dict(
        inputs=[torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)],
        data_samples=[
            SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 11, (1, 64, 64))))
            for _ in range(2)
        ],
    )
    model.train_step(data, optim_wrapper)
    handle.verify()

weight = model.module.backbone.layer4[0].conv2.weight.detach().clone()
other = weight.clone()
dist.broadcast(other, 0)
assert torch.equal(weight, other), "the ranks went apart"
print("pruned weights are zero on both ranks")
dist.destroy_process_group()
