"""`tools/demo.py`: its plan is made of real tools and configs."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tools/demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan(tool: ModuleType, **left_out: str) -> dict:
    config = OmegaConf.load(ROOT / "configs/demo/digits.yaml")
    demo = tool.describe(config, Path("out"), left_out)
    return {step.name: step for step in tool.plan(config, demo)}


def test_every_step_is_a_tool_of_the_repository_with_a_config_of_it(tool: ModuleType) -> None:
    steps = plan(tool)
    assert len(steps) == 1 + 3 + 8 + 4
    made = {path for step in steps.values() for path in step.outputs}
    for step in steps.values():
        assert (ROOT / step.command[0]).is_file()
        for path in step.inputs:
            assert path in made or (ROOT / path).is_file()


def test_the_random_mask_lies_over_the_dense_weights(tool: ModuleType) -> None:
    steps = plan(tool)
    dense, sparse = (Path(f"out/find/supervised/round_{k:02d}.ticket") for k in (0, 8))
    options = {
        "segment_supervised_random_08": f"model.backbone.init_cfg.weights={dense}",
        "detect_supervised_random_08": f"MODEL.TICKET.WEIGHTS {dense}",
    }
    for name, option in options.items():
        assert option in " ".join(steps[name].command)
        assert {dense, sparse} <= set(steps[name].inputs)
    assert not any(
        "andom" in " ".join(step.command) for n, step in steps.items() if "random" not in n
    )


def test_without_detectron2_the_rest_stays(tool: ModuleType) -> None:
    steps = plan(tool, detection="detectron2 is not installed.")
    names = [name.split("_")[0] for name in steps]
    assert names == ["scenes", *(3 * ["find"]), *(4 * ["segment"])]
