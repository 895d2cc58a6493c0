"""A headless Chromium, spoken to by its DevTools protocol: what a page logs, asks for, measures and looks like."""

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
START_S, ANSWER_S = 60, 60


def find_browser():
    """Path of a browser of the Chromium family; skips the test where there is none."""
    named = os.environ.get("MIFUSE_BROWSER")
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: put one of {', '.join(NAMES[:3])} on PATH, or name it in MIFUSE_BROWSER")
    return found


@contextlib.contextmanager
def running_browser():
    """Address of the DevTools socket of a browser with a profile of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}", "--no-first-run"]
        flags += ["--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions", "--hide-scrollbars"]
        # As root, and in containers, Chromium refuses to run with a sandbox; what it opens here is our own page.
        flags += ["--no-sandbox"]
        log = Path(profile) / "browser.log"
        with log.open("wb") as output:
            process = subprocess.Popen([find_browser(), *flags], stdout=output, stderr=subprocess.STDOUT)
        try:
            yield _address(Path(profile) / "DevToolsActivePort", process, log)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(note, process, log):
    for _ in range(START_S * 20):
        lines = note.read_text().split() if note.exists() else []
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise AssertionError(f"the browser did not start: {log.read_text(errors='replace')[-2000:]}")


class Page:
    """One page.

    Attributes
    ----------
    complaints : list of str
        Errors and warnings of scripts, of the page's policy and of the network.
    requests : list of str
        Addresses that it asked for, its own among them.
    """

    def __init__(self, socket):
        self.socket, self.numbers = socket, itertools.count(1)
        self.session, self.complaints, self.requests, self.loaded = None, [], [], False

    async def ask(self, method, **params):
        """Send a command and give its answer; events that come in between are noted."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        await self.socket.send_json(message if self.session is None else {**message, "sessionId": self.session})
        while True:
            found = await self._next()
            if found.get("id") == number:
                assert "error" not in found, found
                return found["result"]

    async def _next(self):
        found = json.loads((await asyncio.wait_for(self.socket.receive(), ANSWER_S)).data)
        kind, about = found.get("method"), found.get("params", {})
        if kind == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif kind == "Page.loadEventFired":
            self.loaded = True
        elif kind == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(about["exceptionDetails"]))
        elif kind == "Log.entryAdded" or (kind == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning")):
            self.complaints.append(json.dumps(about))
        return found

    async def open(self, path, width, height=800, dark=False):
        """Open a file from disk on a screen of this size."""
        target = await self.ask("Target.createTarget", url="about:blank")
        attached = await self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.ask(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.ask("Emulation.setEmulatedMedia", features=scheme)
        self.loaded = False
        await self.ask("Page.navigate", url=Path(path).resolve().as_uri())
        while not self.loaded:
            await self._next()

    async def value(self, expression):
        """Value of a JavaScript expression."""
        found = await self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def click(self, selector):
        """Press and release the mouse over an element, as a person does."""
        script = f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: "center"}});
            const box = element.getBoundingClientRect();
            return [box.left + Math.min(box.width / 2, 10), box.top + box.height / 2];
        }})()"""
        x, y = await self.value(script)
        for kind in ("mousePressed", "mouseReleased"):
            await self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def screenshot(self, whole=False):
        """PNG of what the screen shows, or of the whole page."""
        found = await self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(found["data"])


@contextlib.asynccontextmanager
async def opened(address, path, width, **options):
    """Open a file in a new page of a running browser."""
    async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
        page = Page(socket)
        await page.open(path, width, **options)
        yield page
