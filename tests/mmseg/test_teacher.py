"""Segmentors that learn the logits of a dense teacher, in mmengine's own Runner."""

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmseg.models  # noqa: F401  # fills mmseg's registry
import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from lth_plugins import TicketError
from lth_plugins.errors import ConfigError, LthError, RunError
from lth_plugins.mmseg import DistillHook, apply_teacher
from lth_plugins.mmseg.teacher import check_teacher, load_teacher
from tests.processes import together

pytestmark = pytest.mark.usefixtures("quiet")
TRUNK, HEAD = "backbone.layer3.0.conv1.weight", "decode_head.conv_seg.weight"
NORM = dict(type="BN", requires_grad=True)
# OCRNet: two heads, of which the second refines what the first finds.
OCR = [
    dict(type="FCNHead", in_channels=512, in_index=3, channels=16, num_convs=1),
    dict(type="OCRHead", in_channels=512, in_index=3, channels=16, ocr_channels=16),
]


@pytest.fixture
def teach(tiny_config: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    def make(heads: list[dict[str, Any]] | None = None) -> Any:
        """The config of a student whose teacher is the same model, as it is built."""
        cfg = tiny_config()
        if heads is not None:
            cfg.model.update(type="CascadeEncoderDecoder", num_stages=len(heads))
            cfg.model.decode_head = [dict(num_classes=11, norm_cfg=NORM, **head) for head in heads]
        checkpoint = {"state_dict": build(cfg).state_dict(), "meta": {"cfg": cfg.pretty_text}}
        torch.save(checkpoint, tmp_path / "teacher.pth")
        apply_teacher(cfg, str(tmp_path / "teacher.pth"))
        return cfg

    return make


def build(cfg: Any) -> nn.Module:
    init_default_scope("mmseg")
    torch.manual_seed(0)
    return MODELS.build(cfg.model)


def scene(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    samples = [SegDataSample(metainfo={"img_shape": (64, 64)}) for _ in range(2)]
    for sample in samples:
        labels = torch.randint(0, 11, (1, 64, 64), generator=generator)
        sample.gt_sem_seg = PixelData(data=labels)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    return {"inputs": images, "data_samples": samples, "mode": "loss"}


def started(cfg: Any) -> tuple[Runner, DistillHook]:
    """A Runner whose model equals its teacher and learns from it."""
    runner = Runner.from_cfg(cfg)
    runner.model.load_state_dict(torch.load(cfg.custom_hooks[-1].teacher)["state_dict"])
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, DistillHook))
    hook.before_train(runner)
    return runner, hook


@pytest.mark.parametrize("heads", [None, OCR], ids=["one head", "cascade"])
def test_a_student_learns_and_its_teacher_does_not(
    heads: list[dict[str, Any]] | None, teach: Callable[..., Any]
) -> None:
    cfg = teach(heads)
    runner, hook = started(cfg)
    model = runner.model
    assert list(model.state_dict()) == list(build(cfg).state_dict())
    model.eval()  # with the statistics that a teacher has, and no dropout
    assert model(**scene())["loss_distill"].item() == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        model.get_parameter(TRUNK).mul_(3)
    loss = model(**scene())["loss_distill"]
    assert loss > 1e-3
    loss.backward()
    last = HEAD if heads is None else "decode_head.1.conv_seg.weight"
    assert all(model.get_parameter(name).grad.any() for name in (TRUNK, last))
    with torch.autocast("cpu", torch.bfloat16):
        half = model(**scene())["loss_distill"]
    assert half.dtype == torch.float32 and half.item() == pytest.approx(loss.item(), rel=0.2)
    with torch.no_grad():
        assert model(**{**scene(), "mode": "tensor"}).shape[1] == 11
    hook.after_train(runner)
    assert "loss_distill" not in model(**scene())


def learning(cfg: Any, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A model that differs from its teacher and learns from it."""
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    model = build(cfg).eval()
    with torch.no_grad():
        model.get_parameter(TRUNK).mul_(3)
    runner.model = wrap(model)
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, DistillHook))
    hook.before_train(runner)
    return runner.model


def gradient(model: nn.Module, seed: int) -> Tensor:
    model.zero_grad()
    losses = model(**scene(seed))
    sum(value for name, value in losses.items() if "loss" in name).backward()
    (found,) = (p.grad for name, p in model.named_parameters() if name.endswith(HEAD))
    return found.clone()


def in_process(rank: int, cfg: Any) -> Tensor:
    model = learning(cfg, lambda m: MMDistributedDataParallel(m, broadcast_buffers=False))
    return gradient(model, rank)


def test_processes_average_what_they_learn(teach: Callable[..., Any]) -> None:
    cfg = teach()
    found = together(in_process, cfg)
    model = learning(cfg, lambda m: m)
    mean = (gradient(model, 0) + gradient(model, 1)) / 2
    assert torch.equal(*found) and torch.allclose(found[0], mean, rtol=1e-3, atol=1e-6)


def saved(folder: Path, iteration: int) -> dict[str, Any]:
    return torch.load(folder / f"iter_{iteration}.pth", weights_only=False)


def test_the_tool_distils_and_resumes_bit_for_bit(
    tool: Any, tiny_options: dict[str, Any], teach: Callable[..., Any], tmp_path: Path
) -> None:
    cfg = teach()
    cfg.default_hooks.logger.interval = 1
    cfg.pop("custom_hooks")
    cfg.dump(tmp_path / "config.py")
    ticket = ["--ticket", cfg.model.backbone.init_cfg.checkpoint]
    teacher = ["--teacher", str(tmp_path / "teacher.pth")]
    other = tmp_path / "other.pth"
    torch.save({"state_dict": build(cfg).state_dict()}, other)

    def train(folder: str, *flags: str, iterations: int = 2) -> int:
        command = [str(tmp_path / "config.py"), *ticket, "--work-dir", str(tmp_path / folder)]
        options = ["--cfg-options", f"train_cfg.max_iters={iterations}", "param_scheduler=None"]
        options.append("log_level=INFO")
        return tool("seg").main([*command, *flags, *options, "randomness.seed=3"])

    assert train("whole", *teacher) == 0
    logs = "".join(path.read_text() for path in (tmp_path / "whole").rglob("scalars.json"))
    assert '"loss_distill"' in logs
    # The teacher was loaded once, to check it before anything was written.
    lines = "".join(path.read_text() for path in (tmp_path / "whole").rglob("*.log"))
    assert "Learns from teacher" in lines and f"from path: {teacher[1]}" not in lines
    assert train("halves", *teacher, iterations=1) == 0
    before = sorted(path.name for path in (tmp_path / "halves").iterdir())
    assert train("halves", "--resume") == 2
    assert train("halves", "--resume", "--teacher", str(other)) == 2
    assert sorted(path.name for path in (tmp_path / "halves").iterdir()) == before
    assert train("halves", "--resume", *teacher) == 0
    expected, found = (saved(tmp_path / folder, 2) for folder in ("whole", "halves"))
    assert list(expected["state_dict"]) == list(build(cfg).state_dict())
    for key, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][key], value), key
    assert len(found["distillation"]["teacher"]) == 64


def test_a_stock_segmentor_learns_without_a_ticket_and_keeps_to_its_teacher(
    teach: Callable[..., Any], tmp_path: Path
) -> None:
    cfg = teach()
    cfg.model.backbone.update(type="ResNet", init_cfg=None)
    cfg.custom_hooks = cfg.custom_hooks[-1:]
    cfg.train_cfg.max_iters = 1
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.message_hub.get_scalar("train/loss_distill").current() > 0
    again = copy.deepcopy(cfg)
    again.update(resume=True, experiment_name="again")
    again.train_cfg.max_iters = 2
    torch.save({**torch.load(tmp_path / "teacher.pth"), "more": 1}, tmp_path / "teacher.pth")
    with pytest.raises(RunError, match="expected to resume with teacher .* found teacher"):
        Runner.from_cfg(again).train()


def cut(checkpoint: dict[str, Any]) -> None:
    for key in ("decode_head.conv_seg.weight", "decode_head.conv_seg.bias"):
        checkpoint["state_dict"][key] = checkpoint["state_dict"][key][:7]


def add(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["backbone.layer1.2.conv1.weight"] = torch.zeros(1)


def on_other_input(checkpoint: dict[str, Any]) -> None:
    config = checkpoint["meta"]["cfg"]
    assert "bgr_to_rgb=True" in config
    checkpoint["meta"]["cfg"] = config.replace("bgr_to_rgb=True", "bgr_to_rgb=False")


def noting_other_input(checkpoint: dict[str, Any]) -> None:
    noted = {"format": "RGB", "mean": [0, 0, 0], "std": [255, 255, 255]}
    checkpoint["meta"]["ticket_input"] = noted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "a teacher of 11 classes, as the config has, found one of 7"),
        (lambda c: c["state_dict"].pop(TRUNK), "none such as backbone.layer3.0.conv1.weight"),
        (add, "found 1 parameters of another model in .* as backbone.layer1.2.conv1.weight"),
        (on_other_input, "the teacher was trained on BGR input"),
        (noting_other_input, r"the teacher was trained on RGB input with mean \[0, 0, 0\]"),
        (lambda c: c.clear(), "found 0 of them"),
    ],
    ids=["classes", "lacks", "deeper", "input", "noted input", "empty"],
)
def test_a_teacher_of_another_model_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, teach: Callable[..., Any]
) -> None:
    cfg = teach()
    check_teacher(cfg)
    path = cfg.custom_hooks[-1].teacher
    checkpoint = torch.load(path)
    change(checkpoint)
    torch.save(checkpoint, path)
    with pytest.raises(TicketError, match=message):
        check_teacher(cfg)


def test_what_cannot_be_distilled_is_refused(teach: Callable[..., Any], tmp_path: Path) -> None:
    cfg = teach()
    (tmp_path / "junk.pth").write_text("no checkpoint")
    for name, found in (("none.pth", "no such file"), ("junk.pth", "that cannot be read")):
        apply_teacher(cfg, str(tmp_path / name))
        assert len([hook for hook in cfg.custom_hooks if hook.type == "DistillHook"]) == 1
        with pytest.raises(LthError, match=f"{name}, found .*{found}"):
            check_teacher(cfg)
    cfg.model.decode_head = dict(
        type="SegmenterMaskTransformerHead",
        num_classes=11,
        num_layers=1,
        num_heads=1,
        in_channels=512,
        embed_dims=64,
        channels=64,
    )
    with pytest.raises(ConfigError, match="decode head has a conv_seg, .* SegmenterMaskTransf"):
        load_teacher(cfg, str(tmp_path / "teacher.pth"))


def test_each_run_of_a_search_has_the_teacher(
    tool: Any, teach: Callable[..., Any], dense18_file: Path, tmp_path: Path
) -> None:
    cfg = teach()
    cfg.default_hooks.logger.interval = 1
    cfg.train_cfg.max_iters = 1
    cfg.pop("custom_hooks")
    cfg.dump(tmp_path / "config.py")
    teacher, other, out = (tmp_path / name for name in ("teacher.pth", "other.pth", "search"))

    def search(path: Path) -> int:
        command = [str(tmp_path / "config.py"), "--ticket", str(dense18_file)]
        flags = ["--teacher", str(path), "--imp-rounds", "1", "--work-dir", str(out)]
        return tool("seg").main([*command, *flags, "--cfg-options", "log_level=INFO"])

    assert search(teacher) == 0
    for k in (0, 1):
        logs = "".join(p.read_text() for p in (out / f"train_{k:02d}").rglob("scalars.json"))
        assert '"loss_distill"' in logs
    recipe = json.loads((out / "recipe.json").read_text())["config"]["custom_hooks"]
    (hook,) = (hook for hook in recipe if hook["type"] == "DistillHook")
    assert hook["teacher"] == hashlib.sha256(teacher.read_bytes()).hexdigest()
    torch.save({"state_dict": build(cfg).state_dict()}, other)
    assert search(other) == 2
    assert search(teacher) == 0
