"""Which optional framework a test needs, how many tests each framework got, and what runs at all.

A test that needs one of the frameworks of `INSTALL` carries the marker of that name. In
tests/<framework>/ it has the marker from its place, and its module may import the framework at the
top. Where the framework is missing such tests are skipped, and every run ends by saying what was
exercised. What is marked `soak` takes minutes and runs only, and alone, with ``--soak``.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import runpy
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path

# Set before torch is imported, and inherited by the scripts that tests start. The suite's processes
# work side by side, and more threads than cores wait for each other. And sums of several threads
# are added in an order that depends on the machine's load, where tests compare bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"  # transformers and timm would ask the hub for weights

import hypothesis
import pytest
import torch
import torchvision
from torch import Tensor

import lth_plugins as lth
from lth_plugins.ticket import Outside
from tests.reliability.starter import Starter

# No test cuts the power, and waiting for disks was an eighth of what a small search took.
os.fsync = lambda file: None

TESTS = Path(__file__).parent
WHEELS = os.environ.get("DETECTRON2_WHEELS") or "~/.cache/lth_plugins/wheels"
INSTALL = {
    "detectron2": f"put a detectron2-*.whl into {WHEELS}, then run `make setup`",
    "mmseg": "pip install -e '.[mmseg]', then pip install --no-deps mmcv-lite, both pinned with "
    "-c constraints.txt; `make setup` does",
    "mmdet": "pip install onedl-mmcv onedl-mmdetection (onedl-mmcv compiles for ten minutes)",
    # Its own requirement names another package, modelindex.
    "mmpretrain": "pip install --no-deps onedl-mmpretrain einops mat4py model-index ordered-set",
    "segmentation_models_pytorch": "pip install -e '.[smp]' -c constraints.txt",
    "transformers": "pip install -e '.[transformers]' -c constraints.txt",
}

# The scripts that tests start import this checkout, whatever the environment has installed.
PATHS = [str(TESTS.parent), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in PATHS if path)

# The first call of a torch operator may take longer than hypothesis' 200 ms.
hypothesis.settings.register_profile("lth_plugins", deadline=None)
hypothesis.settings.load_profile("lth_plugins")


@pytest.fixture(scope="module", autouse=True)
def _own_environment() -> Iterator[None]:
    """What a module leaves in the environment is not for others.

    mmseg's scripts set LOCAL_RANK, as ours do after them; Lightning then expects somebody else to
    start its processes, and waits for them.
    """
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


LOGGERS = ("", "lth_plugins", "detectron2", "fvcore")
"""Those that detectron2's ``setup_logger`` gives handlers, and the root's."""


@contextmanager
def logging_as_before() -> Iterator[None]:
    """What is set up for logging inside ends with it; what is removed comes back.

    A handler that detectron2's ``setup_logger`` adds writes to the standard output of that moment,
    which pytest has closed when the next test logs a line. And it adds none for a second call with
    the same arguments, unless it forgets the first.
    """
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(_handlers(logger), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        now = _handlers(logger)
        for handler in now - handlers:
            logger.removeHandler(handler)
        for handler in handlers - now:
            logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
    if "detectron2.utils.logger" in sys.modules:
        sys.modules["detectron2.utils.logger"].setup_logger.cache_clear()


def _handlers(logger: logging.Logger) -> set[logging.Handler]:
    """All but pytest's own, which it adds and removes itself in each phase of a test."""
    return {one for one in logger.handlers if type(one).__module__ != "_pytest.logging"}


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    with logging_as_before():
        yield


@pytest.fixture(scope="module", autouse=True)
def _own_logging_of_the_module() -> Iterator[None]:
    """The same for what fixtures of a module set up."""
    with logging_as_before():
        yield


@pytest.fixture(scope="session")
def _resnet18_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return torchvision.models.resnet18().state_dict()


@pytest.fixture
def resnet18_state(_resnet18_weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a torchvision ResNet-18, classifier included; the test's own copy."""
    return {name: value.clone() for name, value in _resnet18_weights.items()}


@pytest.fixture(scope="session")
def ticket18(_resnet18_weights: dict[str, Tensor]) -> lth.Ticket:
    """A ResNet-18 ticket of about 67 % sparsity that knows all of its θ."""
    meta = lth.TicketMeta("resnet18", source="test", round=5)
    return lth.Ticket(lth.prune(_resnet18_weights, 1 - 0.8**5), _resnet18_weights, meta)


@pytest.fixture(scope="session")
def ticket18_file(ticket18: lth.Ticket, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ticket18.save(tmp_path_factory.mktemp("tickets") / "round_05.ticket")


@pytest.fixture(scope="session")
def dense18_file(ticket18: lth.Ticket, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The round-0 ticket that `ticket18` was pruned from."""
    dense = lth.Ticket.dense(ticket18.weights, source="test")
    return dense.save(tmp_path_factory.mktemp("tickets") / "dense.ticket")


@pytest.fixture(scope="session")
def bands18_file(ticket18: lth.Ticket, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ticket18` on a stem that reads the 13 bands of Sentinel-2, as their files hold them."""
    bands = "B1,B2,B3,B4,B5,B6,B7,B8,B8A,B9,B10,B11,B12"
    spec = lth.InputSpec(bands, (0.0,) * 13, (10000.0,) * 13, scale=1)
    torch.manual_seed(0)
    weights = {**ticket18.weights, "conv1.weight": torch.randn(64, 13, 7, 7)}
    ticket = lth.Ticket(ticket18.masks, weights, replace(ticket18.meta, input=spec))
    return ticket.save(tmp_path_factory.mktemp("tickets") / "bands.ticket")


@pytest.fixture(scope="session")
def whole18(_resnet18_weights: dict[str, Tensor]) -> lth.Ticket:
    """A ResNet-18 ticket that also prunes the model's classifier, ranked together; knows its θ."""
    dense = lth.Ticket.dense(_resnet18_weights, source="test")
    rest = Outside.dense({"fc.weight": (1000, 512)}, _resnet18_weights)
    start = replace(dense, outside=rest)
    return start.with_masks(lth.prune(_resnet18_weights, 0.9, start.all_masks), {})


@pytest.fixture
def ticket_tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run tools/ticket.py with these arguments, as if started, but in this process.

    In its own, importing PyTorch would take longer than nearly all that it does. It writes into a
    pipe, with this ``$COLUMNS`` or none.
    """

    def run(*arguments: object, columns: str | None = "120") -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        command = ["ticket.py", *map(str, arguments)]
        code: object = 0
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command)
            patch.delenv("COLUMNS", raising=False)
            if columns is not None:
                patch.setenv("COLUMNS", columns)
            try:
                runpy.run_path(str(TESTS.parent / "tools/ticket.py"), run_name="__main__")
            except SystemExit as exit:
                code = exit.code or 0
        out, err = capsys.readouterr()
        if not isinstance(code, int):  # Python prints what is no number, and ends with 1
            code, err = 1, f"{err}{code}\n"
        return subprocess.CompletedProcess(command, code, out, err)

    return run


@pytest.fixture(scope="session")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """Runs scripts in processes of their own that need not import the frameworks first."""
    starter = Starter(tmp_path_factory.mktemp("starter"))
    yield starter
    starter.close()


@cache
def missing(framework: str) -> str | None:
    """Why tests of this framework cannot run here; None where it is installed, even if broken."""
    spec = importlib.util.find_spec(framework)
    if spec is not None and spec.origin is not None:  # a mere folder of that name has no origin
        return None
    return f"{framework} is not installed: {INSTALL[framework]}"


def framework_of_folder(path: Path) -> str | None:
    folders = path.relative_to(TESTS).parts[:-1] if path.is_relative_to(TESTS) else ()
    return next((name for name in INSTALL if name in folders), None)


class SkippedModule(pytest.Module):
    """A test module that cannot be imported here."""

    def collect(self) -> list[pytest.Item]:
        reason = missing(framework_of_folder(self.path))
        raise pytest.skip.Exception(reason, allow_module_level=True)


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    framework = framework_of_folder(module_path)
    if framework and missing(framework):
        return SkippedModule.from_parent(parent, path=module_path)
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the long soaks, and nothing else")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    soak = config.getoption("soak")
    others = [item for item in items if bool(item.get_closest_marker("soak")) != soak]
    config.hook.pytest_deselected(items=others)
    items[:] = heavy_first(i for i in items if bool(i.get_closest_marker("soak")) == soak)
    for item in items:
        folder = framework_of_folder(item.path)
        if folder and not item.get_closest_marker(folder):
            item.add_marker(folder)
        for name in INSTALL:
            if item.get_closest_marker(name):
                item.user_properties.append(("framework", name))
                if reason := missing(name):
                    item.add_marker(pytest.mark.skip(reason=reason))


def heavy_first(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Order whole modules: first those with the most slow tests, then those with the most tests.

    pytest-xdist hands out modules in this order (``--no-loadscope-reorder``). What is short comes
    last, so that all workers end together.
    """
    modules: dict[Path, list[pytest.Item]] = defaultdict(list)
    for item in items:
        modules[item.path].append(item)

    def weight(tests: list[pytest.Item]) -> tuple[int, int]:
        return sum(bool(test.get_closest_marker("slow")) for test in tests), len(tests)

    return [item for tests in sorted(modules.values(), key=weight, reverse=True) for item in tests]


def count_outcomes(stats: dict[str, list]) -> dict[str, Counter[str]]:
    """For each framework, how many of its tests passed, failed, were skipped."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in INSTALL}
    for outcome in ("passed", "failed", "error", "skipped", "xfailed", "xpassed"):
        for report in stats.get(outcome, ()):
            for key, value in getattr(report, "user_properties", ()):
                if key == "framework":
                    counts[value][outcome] += 1
    return counts


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    yield  # after everything else: only pytest's own last line follows
    write = terminalreporter.write_line
    terminalreporter.section("frameworks exercised")
    distributions = metadata.packages_distributions()
    for name, outcomes in count_outcomes(terminalreporter.stats).items():
        if reason := missing(name):
            write(f"{name:<11} 0 tests ran: {reason}")
            continue
        ran = outcomes.total() - outcomes["skipped"]
        details = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items() if count)
        version = metadata.version(distributions[name][0])
        write(f"{name:<11} {ran} tests ran: {details or 'none selected'}  {version}")
    if missing("detectron2"):
        alarm = {"red": True, "bold": True}
        terminalreporter.section("detectron2 IS NOT INSTALLED", "!", **alarm)
        write("The detectron2 plug-in was NOT tested: its tests were skipped.", **alarm)
        write(f"To test it: {INSTALL['detectron2']}.", **alarm)
        terminalreporter.write_sep("!", **alarm)
