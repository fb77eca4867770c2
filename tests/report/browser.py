"""A headless Chromium that is told what to do over a pipe (the DevTools protocol): evaluate, press, drag, resize, look."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["CHROMIUM", "Browser"]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_LIMIT_S = 60.0


class Browser:
    """One page in one browser. Messages end with a zero byte; what is not an answer to a request is kept in `events`."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # The browser reads from its descriptor 3 and writes to 4: copies far from there first, so that neither covers the other.
        start = (
            "import fcntl, os, sys\n"
            "ends = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 50) for n in sys.argv[1:3]]\n"
            "os.dup2(ends[0], 3), os.dup2(ends[1], 4)\n"
            "os.execv(sys.argv[3], sys.argv[3:])"
        )
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        options.append(f"--user-data-dir={profile}")
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                start,
                str(theirs_in),
                str(theirs_out),
                CHROMIUM,
                *options,
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        pages = [each for each in self.ask("Target.getTargets")["targetInfos"] if each["type"] == "page"]
        target = pages[0]["targetId"] if pages else self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def ask(self, method: str, **parameters: Any) -> Any:
        """The answer to one request."""
        self._number += 1
        request = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            request["sessionId"] = self._session
        os.write(self._out, json.dumps(request).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        end_s = time.monotonic() + _LIMIT_S
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, end_s - time.monotonic()))[0]:
                raise TimeoutError(f"no answer from the browser in {_LIMIT_S} s")
            if not (more := os.read(self._in, 1 << 20)):
                raise RuntimeError("the browser has ended")
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, path: Path, width: int, height: int = 900, scheme: str = "light", media: str = "") -> None:
        """Show a file, `width` CSS pixels wide, for a reader of that colour scheme, or as it is printed (media="print")."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.ask(
            "Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        self.ask("Page.navigate", url=path.resolve().as_uri())
        end_s = time.monotonic() + _LIMIT_S
        while self.js("document.readyState + location.protocol") != "completefile:" and time.monotonic() < end_s:
            time.sleep(0.02)

    def js(self, expression: str) -> Any:
        """The value of an expression on the page."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            code = {"Enter": 13, "Tab": 9, "Escape": 27}.get(key, 0)
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def mouse(self, kind: str, x: float, y: float, *, held: bool = False) -> None:
        """`kind`: mousePressed, mouseMoved or mouseReleased, at CSS pixels of the window."""
        button = "none" if kind == "mouseMoved" and not held else "left"
        self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=int(held), clickCount=1)

    def picture(self) -> bytes:
        """A PNG of the whole page."""
        found = self.ask("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        return base64.b64decode(found["data"])
