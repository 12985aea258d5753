"""The reports in a real browser: no error, no request, figures drawn, nothing wider than a phone.

Chromium is spoken to over a pipe, in the DevTools protocol, so nothing but it has to be installed.
"""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium is installed: apt-get install chromium",
)

SIZES = {"desktop": (1200, 900), "tablet": (800, 900), "phone": (390, 844)}

CLIPPED = """
[...document.querySelectorAll('h1, h2, h3, p, li, figcaption, summary')].filter(e =>
  e.getBoundingClientRect().right > document.documentElement.clientWidth).map(e => e.textContent)
"""

BOXES = """
[...document.querySelectorAll('.scroll')].map(e => [e.clientWidth, e.scrollWidth])
"""

FIGURES = """
[...document.images].map(i => i.complete && i.naturalWidth > 0
  && i.getBoundingClientRect().width > 100 && i.getBoundingClientRect().height > 60)
"""


class Browser:
    """A page of a headless Chromium, and what it reported."""

    def __init__(self, process: subprocess.Popen, write: int, read: int) -> None:
        self.process, self.write, self.stream = process, write, os.fdopen(read, "rb")
        self.events: list[dict[str, Any]] = []
        self.session: dict[str, str] = {}
        self.count = 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters, **self.session}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self.stream.read(1)) != b"\0":
            assert byte, "Chromium ended"
            message += byte
        answer = json.loads(message)
        if "method" in answer:
            self.events.append(answer)
        return answer

    def open(self, path: Path, width: int, height: int) -> None:
        """Load a page and wait until it is there."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self.of("Page.loadEventFired"):
            self._receive()

    def of(self, method: str) -> list[dict[str, Any]]:
        """What was reported under this name."""
        return [event["params"] for event in self.events if event["method"] == method]

    def evaluate(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"]["value"]


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()

    def pipes() -> None:
        # Chromium reads from descriptor 3 and writes to 4. Ours may have these numbers: move away.
        moved = [os.dup2(fd, fd + 100, inheritable=False) for fd in (theirs_in, theirs_out)]
        for fd, number in zip(moved, (3, 4), strict=True):
            os.dup2(fd, number)

    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    process = subprocess.Popen(
        [CHROMIUM, *options, f"--user-data-dir={profile}"],
        stderr=subprocess.DEVNULL,
        preexec_fn=pipes,
        close_fds=False,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Browser(process, ours_out, ours_in)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("report", ["demo_report", "study_report"])
def test_a_browser_shows_the_report(
    browser: Browser, report: str, size: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(report)
    browser.open(path, *SIZES[size])

    assert browser.of("Log.entryAdded") == browser.of("Runtime.exceptionThrown") == []
    assert browser.of("Runtime.consoleAPICalled") == []
    requested = [event["request"]["url"] for event in browser.of("Network.requestWillBeSent")]
    assert path.resolve().as_uri() in requested
    assert {url.split(":")[0] for url in requested} <= {"file", "data"}
    assert [url for url in requested if url.startswith("file:")] == [path.resolve().as_uri()]

    drawn = browser.evaluate(FIGURES)
    assert drawn and all(drawn)
    # What is wider scrolls inside itself, and nothing that is read from left to right does.
    assert browser.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    assert browser.evaluate(CLIPPED) == []
    if size == "desktop":
        assert all(width == whole for width, whole in browser.evaluate(BOXES))


def test_a_browser_would_notice(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<img src="gone.png"><img src="https://localhost:1/x.png"><p>text</p>')
    browser.open(page, *SIZES["phone"])
    assert len(browser.of("Log.entryAdded")) == 2
    assert len(browser.of("Network.requestWillBeSent")) == 3
    assert browser.evaluate(FIGURES) == [False, False]
