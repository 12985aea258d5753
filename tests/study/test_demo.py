"""tools/demo.py on a study that is as `make demo`'s, with a few images and steps."""

from pathlib import Path

import pytest

from lth_plugins.commands import demo
from tests.study.reader import Reader

ROOT = Path(__file__).resolve().parents[2]

STUDY = """
out: any
archs: [resnet18]
seeds: [0]
rounds: [1]
sources:
  supervised:
    config: configs/pretrain/calm_digits_supervised.yaml
    overrides: [data.size=16, data.subset=32, batch_size=16, pretrain.epochs=1]
prepare:
  - tools/make_digit_scenes.py --out SCENES --look calm --max-size 96 --train 4 --test 2
tasks:
  segmentation:
    tool: segmentation
    config: configs/mmseg/digits/calm_fcn_r18_ticket.py
    inputs: [SCENES/scenes.json]
    overrides:
      - train_cfg.max_iters=2
      - train_cfg.val_interval=2
      - train_dataloader.batch_size=2
      - train_dataloader.dataset.data_root=SCENES
      - val_dataloader.dataset.data_root=SCENES
      - test_dataloader.dataset.data_root=SCENES
      - val_evaluator.output_dir={out}/predictions
    shown:
      images: SCENES/images/test
      truth: SCENES/labels/test
      classes: [background, "0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
      count: 1
"""


@pytest.mark.slow
@pytest.mark.mmseg
def test_a_small_demo_says_what_it_does_and_writes_a_report_with_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mmseg")
    monkeypatch.chdir(ROOT)  # the demo goes there
    monkeypatch.setenv("DETECTRON2_DATASETS", "elsewhere")
    monkeypatch.setattr("lth_plugins.progress.QUIET_SECONDS", 1.0)
    config = tmp_path / "study.yaml"
    config.write_text(STUDY.replace("SCENES", f"{tmp_path}/scenes"))

    assert demo.main(["--config", f"{config}", "--out", f"{tmp_path}/out"]) == 0
    said = capsys.readouterr().out
    assert "3 of 3 runs done" in said and f"{tmp_path}/out/report.html" in said
    assert "    find supervised resnet18, 1 rounds: " in said, "what a run does while it works"
    assert Reader(tmp_path / "out/report.html")
    assert (tmp_path / "out/overview.png").stat().st_size > 1000
