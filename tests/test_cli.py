"""Every tool ends alike on Ctrl-C and on SIGTERM: it saves, says so in one line, and exits.

The signals go to the whole process group, as a terminal sends them, workers of data loaders
included.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lth_plugins import TicketError, cli
from lth_plugins.resilience.sigterm import REPEATED, Stopped
from tests.reliability.test_kill import ROOT, detect, segment
from tests.resilience.test_sigterm import start

FIND = "data.size=16 data.subset=64 batch_size=16 rounds=1 pretrain.epochs=500 data.workers=2"


def find(data: Path, out: Path) -> list[str]:
    config = "configs/pretrain/digits_supervised.yaml"
    return ["tools/find_ticket.py", config, f"out={out}", *FIND.split()]


def classify(data: Path, out: Path) -> list[str]:
    settings = "data.size=16 data.subset=32 batch_size=16 data.workers=1 training.epochs=500"
    config, ticket = "configs/transfer/digits_r18.yaml", f"ticket={data}/dense.ticket"
    return ["tools/train_cls.py", config, ticket, f"out={out}", *settings.split()]


def scenes(data: Path, out: Path) -> list[str]:
    return ["tools/make_digit_scenes.py", "--out", f"{out}", "--train", "100000"]


def demo(data: Path, out: Path) -> list[str]:
    return ["tools/demo.py", "--out", f"{out}"]


def study(data: Path, out: Path) -> list[str]:
    return ["tools/study.py", "run", "configs/study/digits.yaml", f"out={out}"]


def long(command: Callable[[Path, Path], list[str]]) -> Callable[[Path, Path], list[str]]:
    """A training of a host's, without IMP, that does not end by itself."""

    def make(data: Path, out: Path) -> list[str]:
        made = command(data, out)
        at = made.index("--imp-rounds")
        made[at : at + 2] = []
        made = [text.replace("max_iters=4", "max_iters=4000") for text in made]
        made = [text.replace("log_level=WARNING", "log_level=INFO") for text in made]
        made = [text.replace("_interval=2", "_interval=9000") for text in made]
        if "SOLVER.MAX_ITER" in made:
            made[made.index("SOLVER.MAX_ITER") + 1] = "4000"
            made[made.index("TEST.EVAL_PERIOD") + 1] = "0"
        return made

    return make


SOAK = pytest.mark.soak
TOOLS = [
    pytest.param(find, "epoch 1/", "stopped and saved .*last.ckpt; the same command", id="find"),
    pytest.param(scenes, "scene/s", "stopped; nothing was written", id="scenes"),
    pytest.param(classify, "epoch 1/", "saved .*last.ckpt; the same", id="cls", marks=SOAK),
    pytest.param(
        long(detect),
        "iter: 19",
        r"saved .*model_\d+\.pth; .* --resume",
        id="det",
        marks=[SOAK, pytest.mark.detectron2],
    ),
    pytest.param(
        long(segment),
        "20/4000]",
        r"saved .*iter_\d+\.pth; .* --resume",
        id="seg",
        marks=[SOAK, pytest.mark.mmseg],
    ),
    pytest.param(demo, "runs done", "stopped; the same command", id="demo", marks=SOAK),
    pytest.param(study, "runs done", "stopped; the same command", id="study", marks=SOAK),
]


def wait_for(text: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while text not in log.read_text():
        assert time.monotonic() < deadline and process.poll() is None, log.read_text()
        time.sleep(0.02)


@pytest.fixture
def data(tmp_path: Path, ticket18) -> Path:
    ticket18.with_masks(ticket18.masks.ones(ticket18.arch.prunable), {}).save(
        tmp_path / "dense.ticket"
    )
    command = ["tools/make_digit_scenes.py", "--train", "8", "--test", "4"]
    command += ["--out", f"{tmp_path}/digit_scenes"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    return tmp_path


@pytest.mark.parametrize(("command", "moment", "said"), TOOLS)
def test_ctrl_c_saves_and_ends_with_one_line(
    command: Callable[[Path, Path], list[str]], moment: str, said: str, tmp_path: Path, request
) -> None:
    alone = command in (find, scenes, demo, study)
    data = tmp_path if alone else request.getfixturevalue("data")
    log = tmp_path / "log.txt"
    process = start(command(data, tmp_path / "out"), data, log)
    wait_for(moment, process, log)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == 130, log.read_text()
    lines = log.read_text().strip().splitlines()
    assert "Traceback" not in log.read_text(), log.read_text()
    assert re.search(said, lines[-1]), lines[-3:]


def caught(pid: int) -> int:
    """The set of signals that a process has handlers for; Linux alone says it."""
    return int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_while_a_tool_is_imported_is_one_line(
    signum: int, code: int, tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    process = start(["tools/ticket.py", "show", "nowhere.ticket"], tmp_path, log)
    while not caught(process.pid) & 1 << signal.SIGTERM - 1:
        time.sleep(0.005)
    os.killpg(process.pid, signum)
    assert process.wait(60) == code
    assert log.read_text() == "stopped\n"


def body(*signals: int, pause: float = 0.0) -> Callable[[], int]:
    def run() -> int:
        for signum in signals:
            os.kill(os.getpid(), signum)
            time.sleep(pause)
        return 0

    return run


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_is_one_line_and_a_code(
    signum: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signum)
    assert cli.run(body(signum), "tool.py", cli.RESUMES) == code
    assert capsys.readouterr().err == "tool.py: stopped; the same command resumes\n"
    assert signal.getsignal(signum) is before


def test_what_was_saved_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def save() -> int:
        stopped = Stopped(signal.SIGINT)
        stopped.saved = Path("out/last.ckpt")
        raise stopped

    assert cli.run(save, "tool.py", cli.RESUMES_WITH_OPTION) == 130
    expected = "tool.py: stopped and saved out/last.ckpt; the same command with --resume resumes\n"
    assert capsys.readouterr().err == expected


def test_a_ticket_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise TicketError("expected this, found that: do so")

    assert cli.run(fail, "tool.py", "") == 2
    assert capsys.readouterr().err == "tool.py: error: expected this, found that: do so\n"


TWICE = f"""
import os, signal, sys, time
from lth_plugins import cli
from lth_plugins.resilience.sigterm import Sigterm
def body():
    sigterm = Sigterm()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # as a launcher passes on what the terminal sent to all
    os.kill(os.getpid(), signal.SIGTERM)
    print("saving", flush=True)
    time.sleep({REPEATED} + 0.1)
    os.kill(os.getpid(), signal.SIGINT)
    print("saved", flush=True)
sys.exit(cli.run(body, "tool.py", cli.RESUMES))
"""


def test_a_second_ctrl_c_ends_at_once_and_a_repeated_one_does_not() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "saving\n"), done.stderr
    assert done.stderr == "stopped at once\n"


def test_ctrl_c_stays_ignored_where_it_was() -> None:
    with_ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert cli.run(body(signal.SIGINT), "tool.py", cli.RESUMES) == 0
    finally:
        signal.signal(signal.SIGINT, with_ignored)


@pytest.mark.parametrize("tool", ["find", "cls", "study"])
def test_what_is_optional_is_not_called_required(
    tool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = {"study": ["run"]}.get(tool, [])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"lth_plugins.commands.{tool}").main(command)
    assert ended.value.code == 2
    assert "required: config\n" in capsys.readouterr().err
