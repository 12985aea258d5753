"""The scripts that people run: mmseg's own, unmodified, and ours, which set up little more."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mmseg
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.registry import MODELS
from PIL import Image
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import lth_plugins as lth
from lth_plugins.deploy.onnx import export_onnx
from lth_plugins.masking.narrowing import narrow_to
from lth_plugins.pruning.structure import Channels, structured
from tests.reliability.starter import Starter

TOOLS = Path(mmseg.__file__).parent / ".mim/tools"  # what mmseg ships
ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "configs/mmseg/digits/fcn_r18_ticket.py")


def run(*arguments: Any, **environment: str) -> str:
    """Run Python with these arguments, in a process of its own, and return what it printed."""
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


def cfg_options(options: dict[str, Any]) -> list[str]:
    """As one writes them on a command line."""
    texts = {k: str(v).replace(" ", "") for k, v in options.items()}
    return ["--cfg-options", *(f"{name}={text}" for name, text in texts.items())]


@pytest.mark.slow
def test_mmsegs_own_scripts_train_a_ticket_and_test_it_without_us(
    tiny_config: Callable[..., Any], ticket18: lth.Ticket, tmp_path: Path, starter: Starter
) -> None:
    cfg = tiny_config({"train_cfg.val_interval": 2, "log_level": "INFO"})
    cfg.pop("custom_hooks")  # an import and a backbone are all that a user writes
    assert cfg.custom_imports.imports == ["lth_plugins.mmseg"]
    cfg.dump(tmp_path / "user.py")
    work_dir = ["--work-dir", tmp_path / "run"]
    assert starter.run([TOOLS / "train.py", tmp_path / "user.py", *work_dir]) == 0, starter.said()
    printed = starter.said()
    assert "Attached Ticket(resnet18, test, round 5" in printed
    assert "mIoU" in printed
    checkpoint = tmp_path / "run/iter_2.pth"
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    for name, mask in ticket18.masks.items():
        assert not state[f"backbone.{name}"][~mask].count_nonzero(), name

    cfg.pop("custom_imports")
    cfg.model.backbone.update(type="ResNet", init_cfg=None)
    cfg.dump(tmp_path / "stock.py")
    # A module that is None in sys.modules cannot be imported.
    without_us = (
        "import runpy, sys; sys.modules['lth_plugins'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = [tmp_path / "stock.py", checkpoint, "--work-dir", tmp_path / "test"]
    printed = run("-c", without_us, TOOLS / "test.py", *arguments)
    assert "mIoU" in printed
    assert "unexpected key" not in printed and "missing keys" not in printed


def test_our_scripts_train_resume_and_test(
    tool, tiny_options, ticket18, ticket18_file, tmp_path, capfd
) -> None:
    train, test = tool("seg").main, tool("test_seg").main
    work_dir = ["--work-dir", str(tmp_path / "run")]
    command = [DIGITS, "--ticket", str(ticket18_file), *work_dir]
    assert train([*command, *cfg_options({**tiny_options, "train_cfg.max_iters": 1})]) == 0
    capfd.readouterr()
    given = cfg_options({**tiny_options, "log_level": "INFO"})
    assert train([*command, "--resume", *given]) == 0
    about = "6 images, 2 steps of 2; results go to"
    assert about in (said := capfd.readouterr().out) and "(validates on 2)" in said
    final = lth.Ticket.load(tmp_path / "run/final.ticket")
    assert final.masks == ticket18.masks

    capfd.readouterr()
    outputs = ["--out", str(tmp_path / "labels"), "--show-dir", str(tmp_path / "painted")]
    arguments = [DIGITS, str(tmp_path / "run/iter_2.pth"), "--work-dir", str(tmp_path / "test")]
    options = cfg_options({**tiny_options, "log_level": "INFO"})
    assert test([*arguments, *outputs, *options]) == 0
    assert "mIoU" in capfd.readouterr().out
    labels = [np.asarray(Image.open(p)) for p in (tmp_path / "labels").glob("*.png")]
    assert len(labels) == 2 and all(label.shape == (64, 64) for label in labels)


@pytest.mark.slow
def test_what_our_script_leaves_in_the_work_dir_runs_in_mmsegs_own(
    tool, tiny_options, ticket18_file, tmp_path, starter: Starter
) -> None:
    """Also after a resumed run. A stock config imports nothing of ours by itself."""
    Path(tmp_path / "stock.py").write_text(
        f"_base_ = [{DIGITS!r}]\ncustom_imports = dict(_delete_=True, imports=['mmseg.models'])\n"
        "custom_hooks = []\nmodel = dict(backbone=dict(type='ResNet', init_cfg=None))\n"
    )
    work_dir = ["--work-dir", str(tmp_path / "run")]
    command = [str(tmp_path / "stock.py"), "--ticket", str(ticket18_file), *work_dir]
    options = cfg_options({**tiny_options, "log_level": "INFO"})
    train = tool("seg").main
    assert train([*command, *cfg_options({**tiny_options, "train_cfg.max_iters": 1})]) == 0
    assert train([*command, "--resume", *options]) == 0
    dumped = tmp_path / "run/stock.py"
    arguments = [dumped, tmp_path / "run/iter_2.pth", "--work-dir", tmp_path / "test"]
    printed = run(TOOLS / "test.py", *arguments)
    assert "mIoU" in printed and "unexpected key" not in printed
    arguments = ["--work-dir", tmp_path / "again", "--cfg-options", "resume=False"]
    assert starter.run([TOOLS / "train.py", dumped, *arguments]) == 0, starter.said()
    assert (tmp_path / "again/final.ticket").exists()


def test_the_config_of_a_training_imports_what_it_names(ticket18_file) -> None:
    from lth_plugins.mmseg import apply_ticket, make_resumable

    folder = Path(mmseg.__file__).parent / ".mim/configs/fcn"
    for found in (None, dict(imports="mmseg.models"), dict(imports=["mmseg.models"])):
        cfg = Config.fromfile(folder / "fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py")
        if found is not None:
            cfg.custom_imports = found
        apply_ticket(cfg, str(ticket18_file))
        make_resumable(cfg)
        kept = [] if found is None else ["mmseg.models"]
        assert cfg.custom_imports.imports == [*kept, "lth_plugins.mmseg"]


@pytest.fixture(scope="module")
def channels_file(ticket18: lth.Ticket, tmp_path_factory: pytest.TempPathFactory) -> Path:
    ticket = structured(ticket18, Channels(multiple=8))
    return ticket.save(tmp_path_factory.mktemp("channels") / "channels.ticket")


AUGMENTED = f"""
_base_ = ["{DIGITS}"]
custom_hooks = [dict(type="TicketHook"), dict(type="EMAHook")]
tta_model = dict(type="SegTTAModel")
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale_factor=1.0, keep_ratio=True)],
            [dict(type="RandomFlip", prob=0.0)],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
"""
"""Test-time augmentation by the image as it is; and averages, made when a run begins."""


def labels(folder: Path) -> list[np.ndarray]:
    """The label maps that were written to a folder."""
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def test_test_seg_compacts_a_segmentor_and_tests_it_from_its_file(
    tool, tiny_options, channels_file: Path, scenes: Path, tmp_path: Path
) -> None:
    work_dir = ["--work-dir", str(tmp_path / "run")]
    options = cfg_options({**tiny_options, "train_cfg.max_iters": 1})
    train, test = tool("seg").main, tool("test_seg").main
    assert train([DIGITS, "--ticket", str(channels_file), *work_dir, *options]) == 0

    wide, small = str(tmp_path / "run/iter_1.pth"), str(tmp_path / "small.pth")
    augmented = str(tmp_path / "augmented.py")
    Path(augmented).write_text(AUGMENTED)
    for name, arguments in {
        "masked": [DIGITS, wide],
        "compacted": [augmented, wide, "--compact", small],
        "loaded": [DIGITS, small],
        "augmented": [augmented, small, "--tta"],
    }.items():
        outputs = ["--out", str(tmp_path / name)]
        assert test([*arguments, *outputs, *work_dir, *options]) == 0
    masked = labels(tmp_path / "masked")
    assert len(masked) == 2
    for name in ("compacted", "loaded", "augmented"):
        found = labels(tmp_path / name)
        assert all(np.array_equal(one, other) for one, other in zip(masked, found, strict=True))
    assert Path(small).stat().st_size < 0.5 * Path(wide).stat().st_size

    # Nothing but the config and the file is needed to export it.
    cfg = Config.fromfile(DIGITS)
    init_default_scope("mmseg")
    model = MODELS.build({**cfg.model, "backbone": {**cfg.model.backbone, "init_cfg": None}})
    state = torch.load(small, weights_only=False)["state_dict"]
    narrow_to(model, state)
    model.load_state_dict(state)
    files = sorted((scenes / "images/test").iterdir())[:2]
    images = torch.stack([torch.from_numpy(np.array(Image.open(f))) for f in files])
    normalised = (images.permute(0, 3, 1, 2).float() / 255 - 0.45) / 0.225
    assert export_onnx(model.eval(), normalised, tmp_path / "model.onnx") <= 1e-4


def test_the_main_process_alone_writes_the_compacted_checkpoint(
    tool, tiny_config, channels_file: Path, tmp_path: Path
) -> None:
    cfg = tiny_config({"model.backbone.init_cfg.checkpoint": str(channels_file)})
    runner = Runner.from_cfg(cfg)
    for rank in (1, 0):
        dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        try:
            tool("test_seg.run").compact(runner, {}, str(tmp_path / "out/small.pth"))
        finally:
            dist.destroy_process_group()
        assert (tmp_path / "out").exists() == (rank == 0)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["small.pth"]


def test_the_input_is_the_tickets_in_training_and_in_testing(
    tool, tiny_options, ticket18, tmp_path
) -> None:
    raw = lth.InputSpec("BGR", (0, 0, 0), (1, 1, 1))
    meta = lth.TicketMeta("resnet18", input=raw)
    file = lth.Ticket(ticket18.masks, ticket18.weights, meta).save(tmp_path / "raw.ticket")
    work_dir = ["--work-dir", str(tmp_path)]
    options = cfg_options({**tiny_options, "train_cfg.max_iters": 1})
    assert tool("seg").main([DIGITS, "--ticket", str(file), *work_dir, *options]) == 0
    assert "bgr_to_rgb=False" in (tmp_path / "fcn_r18_ticket.py").read_text()
    # TicketHook refuses a checkpoint of another input than the model has.
    assert tool("test_seg").main([DIGITS, str(tmp_path / "iter_1.pth"), *work_dir, *options]) == 0


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_config_of_a_search_is_trained_as_it_is_where_it_asks_for_no_rounds(
    rounds: int, tool, tiny_options, dense18_file, tmp_path
) -> None:
    command = [DIGITS, "--ticket", str(dense18_file), "--work-dir", str(tmp_path)]
    options = {**tiny_options, "train_cfg.max_iters": 1, "imp.fraction": 0.3}
    options["imp.structure.kind"] = ""  # what detectron2 has for none
    imp_rounds = ["--imp-rounds", str(rounds)]
    assert tool("seg").main([*command, *imp_rounds, *cfg_options(options)]) == 0
    assert (tmp_path / "final.ticket").exists() == (rounds == 0)
    assert (tmp_path / "round_01.ticket").exists() == (rounds == 1)
    logs = [path.relative_to(tmp_path).parts[0] for path in tmp_path.glob("train_*/*/*.log")]
    assert sorted(logs) == ["train_00", "train_01"][: 2 * rounds]


def test_a_stock_config_takes_a_ticket(ticket18_file, tmp_path) -> None:
    from lth_plugins.mmseg import apply_ticket

    folder = Path(mmseg.__file__).parent / ".mim/configs/fcn"
    cfg = Config.fromfile(folder / "fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py")
    apply_ticket(cfg, str(ticket18_file))
    assert cfg.model.pretrained is None
    assert cfg.model.backbone.init_cfg == dict(type="Ticket", checkpoint=str(ticket18_file))
    assert cfg.custom_hooks == [dict(type="TicketHook")]
    assert cfg.model.backbone.type == "TicketResNetV1c", "it checks what is loaded into it"

    cfg = Config.fromfile(folder / "fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py")
    cfg.default_scope = "mmpretrain"  # whose ResNet is another one
    apply_ticket(cfg, str(ticket18_file))
    assert cfg.model.backbone.type == "ResNetV1c"


@pytest.mark.parametrize("init_cfg", [{}, dict(type="Pretrained", checkpoint="r18", prefix="a.")])
def test_options_of_the_ticket_beside_it_are_kept_whatever_the_config_had(
    init_cfg, ticket18_file, dense18_file
) -> None:
    """As --cfg-options model.backbone.init_cfg.random=True … merges them: no baseline is lost."""
    from lth_plugins.mmseg import apply_ticket

    folder = Path(mmseg.__file__).parent / ".mim/configs/fcn"
    cfg = Config.fromfile(folder / "fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py")
    options = dict(random=True, weights=str(dense18_file))
    for name, value in {**init_cfg, **options}.items():
        cfg.merge_from_dict({f"model.backbone.init_cfg.{name}": value})
    apply_ticket(cfg, str(ticket18_file))
    assert cfg.model.backbone.init_cfg == dict(
        type="Ticket", checkpoint=str(ticket18_file), **options
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--ticket FILE"),
        (["--ticket", "missing.ticket"], "missing.ticket"),
        (["--ticket", "no_such_name"], "catalog name"),
    ],
)
def test_a_mistake_is_one_message_and_no_traceback(
    tool, tiny_options, arguments, message, tmp_path, capfd
) -> None:
    command = [DIGITS, *arguments, "--work-dir", str(tmp_path / "run")]
    assert tool("seg").main([*command, *cfg_options(tiny_options)]) == 2
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ddp_wraps_before_the_ticket_is_attached(tiny_config, tmp_path) -> None:
    tiny_config().dump(tmp_path / "config.py")
    script = Path(__file__).with_name("ddp_steps.py")
    with ThreadPoolExecutor(2) as ranks:
        printed = ranks.map(
            lambda rank: run(script, tmp_path / "config.py", tmp_path / "store", rank), range(2)
        )
    assert all("pruned weights are zero on both ranks" in text for text in printed)


def test_configs_and_checkpoints_that_cannot_be_read_are_one_line(
    tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, junk = tmp_path / "broken.py", tmp_path / "junk.pth"
    broken.write_text("model = dict(")
    junk.write_text("no checkpoint")
    for name, command, said in (
        (
            "seg",
            ["nowhere.py", "--ticket", "a.ticket"],
            "expected a configuration, found none at",
        ),
        ("seg", [str(broken), "--ticket", "a.ticket"], "SyntaxError"),
        (
            "test_seg",
            ["nowhere.py", str(junk)],
            "expected a configuration, found none at",
        ),
        ("test_seg", [DIGITS, str(tmp_path / "nowhere.pth")], "nowhere.pth, found no such file"),
        ("test_seg", [DIGITS, str(junk)], "junk.pth, found a file that cannot be read"),
    ):
        capsys.readouterr()
        assert tool(name).main([*command, "--work-dir", str(tmp_path / "out")]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert (
            lines[-1].startswith(f"lth {name.replace('_', '-')}: error: ") and said in lines[-1]
        ), lines
    assert not (tmp_path / "out").exists()


def test_a_config_of_the_project_is_inherited_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "mmseg/fcn_r50_cityscapes_ticket.py"
    bases = (f'"{lth.config_path(name)}"', f'__import__("lth_plugins").config_path("{name}")')
    for base in bases:
        Path("mine.py").write_text(f"_base_ = {base}\ntrain_cfg = dict(max_iters=7)\n")
        cfg = Config.fromfile("mine.py")
        assert cfg.train_cfg.max_iters == 7
        assert cfg.model.backbone.type == "TicketResNet"
