"""A headless Chromium to look at pages with: whatever a page draws, types into and points at, as a person would."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from tornado.websocket import WebSocketClientConnection, websocket_connect

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
"""The browser of this machine; empty where there is none."""

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-sync", "--disable-component-update",
)  # fmt: skip
"""Options that every test starts it with."""


class Tab:
    """The page of a browser, by Chromium's own protocol."""

    def __init__(self, wire: WebSocketClientConnection) -> None:
        self.wire, self.n = wire, 0

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol; gives its answer."""
        self.n += 1
        await self.wire.write_message(json.dumps({"id": self.n, "method": method, "params": parameters}))
        while True:  # what is told in between is of no interest
            text = await self.wire.read_message()
            assert text is not None, f"the browser ended during {method}"
            answer = json.loads(text)
            if answer.get("id") == self.n:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    async def js(self, expression: str) -> Any:
        """The value of an expression on the page, waited for if it is a promise."""
        answer = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
        return answer["result"].get("value")

    async def until(self, expression: str, seconds: float = 120) -> Any:
        """Wait until an expression is true on the page; gives its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := await self.js(expression):
                return value
            await asyncio.sleep(0.1)
        raise TimeoutError(f"not so after {seconds} s: {expression}\nthe page shows: {await self.js(SHOWN)}")

    async def middle(self, selector: str) -> tuple[float, float]:
        """Where the middle of an element is, once it has been scrolled to."""
        box = f"document.querySelector({json.dumps(selector)})"
        await self.js(f"{box}.scrollIntoView({{block: 'center'}})")
        x, y, wide, high = await self.js(f"(r => [r.x, r.y, r.width, r.height])({box}.getBoundingClientRect())")
        return x + wide / 2, y + high / 2

    async def point(self, x: float, y: float, *, click: bool = False) -> None:
        """Move the mouse there; and press it."""
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def press(self, key: str, code: int = 0) -> None:
        """A key of the keyboard: a letter, or one with a name and the number that Windows gives it."""
        named = {"windowsVirtualKeyCode": code, "code": key} if code else {"text": key}
        await self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **named)
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **named)


SHOWN = "document.body.innerText.slice(-2000)"


@contextlib.asynccontextmanager
async def browsing(profile: Path, *, width: int = 1400, height: int = 1000) -> AsyncIterator[Tab]:
    """A browser with an empty page of a size in pixels, for a while; it keeps what it keeps in `profile`."""
    options = [*QUIET, f"--window-size={width},{height}", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    with ended(subprocess.Popen([CHROMIUM, *options, "about:blank"], stderr=subprocess.DEVNULL)) as process:
        port = await there(process, lambda: (profile / "DevToolsActivePort").read_text(encoding="utf-8").split()[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            page = next(each for each in json.load(answer) if each["type"] == "page")
        wire = await websocket_connect(page["webSocketDebuggerUrl"], max_message_size=2**26)
        tab = Tab(wire)
        await tab.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        yield tab
        wire.close()


@contextlib.contextmanager
def ended(process: subprocess.Popen) -> Any:
    """A process that does not outlive what is done with it."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def there(process: subprocess.Popen, read: Callable[[], Any], seconds: float = 120) -> Any:
    """What a process writes as it starts, once it is there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
            return read()
        await asyncio.sleep(0.05)
    raise TimeoutError(f"{process.args} did not start")
