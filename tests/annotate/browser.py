"""A headless Chromium over the WebDriver protocol, as far as the page's tests need it."""

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def programs() -> tuple[str, str]:
    """Paths of the browser and its driver; the test is skipped where there are none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no chromium and chromedriver on the PATH")
    return browser, driver


class Driver:
    """The driver's process, which starts browsers."""

    def __init__(self, log: Path) -> None:
        self.browser, driver = programs()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.process = subprocess.Popen([driver, f"--port={port}", f"--log-path={log}"])
        self.address = f"http://127.0.0.1:{port}"
        for _ in range(200):
            try:
                if self.ask("GET", "/status")["ready"]:
                    return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError("chromedriver did not start")

    def ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()[:600]) from None

    def open(self, folder: Path, *, size=(1280, 900), phone=False, dark=False) -> "Browser":
        """A browser of its own, with a new and empty profile in `folder`."""
        flags = [*FLAGS, f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}"]
        if dark:
            flags.append("--force-dark-mode")
        options = {"binary": self.browser, "args": flags}
        if phone:
            metrics = {"width": size[0], "height": size[1], "pixelRatio": 2, "touch": True}
            options["mobileEmulation"] = {"deviceMetrics": metrics}
        wanted = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}
        session = self.ask("POST", "/session", {"capabilities": wanted})["sessionId"]
        return Browser(self, f"/session/{session}")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)


class Browser:
    """One browser with one window."""

    def __init__(self, driver: Driver, path: str) -> None:
        self.driver, self.path = driver, path

    def ask(self, method, path, body=None):
        return self.driver.ask(method, self.path + path, body)

    def go(self, url):
        self.ask("POST", "/url", {"url": url})

    def run(self, script, *args):
        """What JavaScript returns."""
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(args)})

    def find(self, css):
        element = self.ask("POST", "/element", {"using": "css selector", "value": css})
        return f"/element/{element[ELEMENT]}"

    def click(self, css):
        self.ask("POST", self.find(css) + "/click", {})

    def type(self, css, text):
        self.ask("POST", self.find(css) + "/value", {"text": text})

    def press(self, key):
        """A key pressed and let go, wherever the focus is."""
        acts = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": acts}]})

    def text(self, css):
        return self.run("return document.querySelector(arguments[0]).textContent", css)

    def until(self, script, *args, seconds=20):
        """Wait for JavaScript that returns something true; returns it."""
        end = time.monotonic() + seconds
        while not (found := self.run(script, *args)):
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds} s: {script}")
            time.sleep(0.03)
        return found

    def shot(self, path: Path) -> None:
        import base64

        path.write_bytes(base64.b64decode(self.ask("GET", "/screenshot")))

    def close(self) -> None:
        self.ask("DELETE", "")
