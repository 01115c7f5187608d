"""Pages in a real browser without its window: Chromium, spoken to over two pipes in its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
)
_SECONDS = 60


class Browser:
    """One process with one page, which goes from file to file.

    Attributes:
        errors: what the page said on its console, threw, or could not load since it was opened.
        loaded: every address that was asked for since then.
    """

    def __init__(self, program: str, profile: Path) -> None:
        # The browser reads commands from descriptor 3 and answers on 4, whatever ours are called.
        theirs_in, ours_out = (_above(one) for one in os.pipe())
        ours_in, theirs_out = (_above(one) for one in os.pipe())
        self._process = subprocess.Popen(
            [
                *("bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "browser"),
                *(program, *ARGUMENTS, f"--user-data-dir={profile}", "about:blank"),
            ],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out = ours_in, ours_out
        self._left = b""
        self._number = 0
        self._session: str | None = None
        self._events: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.loaded: list[str] = []
        pages = self._ask("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in pages if one["type"] == "page")
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")
        # Whatever a page asks for outside its own file fails, as on a machine without a network.
        conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self._ask("Network.emulateNetworkConditions", offline=True, **conditions)

    def close(self) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self._session = None
            self._ask("Browser.close")
        os.close(self._in)
        os.close(self._out)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def open(self, page: Path, width: int, height: int = 900) -> None:
        """Show a file in a window of that many CSS pixels, and wait until it is drawn."""
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.errors, self.loaded, self._events = [], [], []
        self._ask("Page.navigate", url=page.as_uri())
        until = time.monotonic() + _SECONDS
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._receive(until))
        self.evaluate(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )
        self._sort()

    def evaluate(self, expression: str) -> Any:
        """What JavaScript of that text gives, as JSON."""
        answer = self._ask(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        self._sort()
        return answer["result"].get("value")

    def picture(self, selector: str | None = None) -> Image.Image:
        """The whole page, or the first visible element of a selector, as it looks."""
        box = self.evaluate(
            "(() => {const all = %s; const root = document.documentElement.getBoundingClientRect();"
            "const box = all.map(one => one.getBoundingClientRect()).find(one => one.width > 0);"
            "return {x: box.x - root.x, y: box.y - root.y, width: box.width, height: box.height}})()"
            % (
                f"[...document.querySelectorAll({json.dumps(selector)})]"
                if selector
                else "[document.documentElement]"
            )
        )
        data = self._ask(
            "Page.captureScreenshot", clip={**box, "scale": 1}, captureBeyondViewport=True
        )
        return Image.open(io.BytesIO(base64.b64decode(data["data"]))).convert("RGB")

    def eyes(self, deficiency: str) -> None:
        """Show everything as with that colour vision: ``none``, ``achromatopsia``, ``deuteranopia`` ..."""
        self._ask("Emulation.setEmulatedVisionDeficiency", type=deficiency)

    def _sort(self) -> None:
        for event in self._events:
            found = event["params"]
            match event["method"]:
                case "Runtime.exceptionThrown":
                    self.errors.append(json.dumps(found["exceptionDetails"]))
                case "Runtime.consoleAPICalled":
                    self.errors.append(json.dumps(found["args"]))
                case "Log.entryAdded":
                    self.errors.append(found["entry"]["text"])
                case "Network.requestWillBeSent":
                    self.loaded.append(found["request"]["url"])
        self._events = []

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + _SECONDS
        while True:
            answer = self._receive(until)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            if "method" in answer:
                self._events.append(answer)

    def _receive(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._in], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"the browser said nothing for {_SECONDS} s"
            more = os.read(self._in, 1 << 20)
            assert more, f"the browser ended with {self._process.wait()}"
            self._left += more
        first, _, self._left = self._left.partition(b"\0")
        found: dict[str, Any] = json.loads(first)
        return found


def _above(descriptor: int) -> int:
    """The same pipe under a number that redirections of the shell do not take."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 20)
    os.close(descriptor)
    return moved


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A running browser; the test that asks is skipped where none is installed."""
    program = next((path for path in map(shutil.which, NAMES) if path is not None), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    running = Browser(program, profile)
    try:
        yield running
    finally:
        running.close()
