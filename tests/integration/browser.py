"""Headless Chromium, driven by its own protocol over a pair of pipes."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

_WAIT = 60.0  # seconds, for an answer, and for a page to come to what is waited for
# pages in a sandbox stay in the process of the page around them, so that their scripts can be asked
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-features=IsolateSandboxedIframes", "--no-first-run", "--remote-debugging-pipe",
)  # fmt: skip


def chromium() -> str | None:
    """Return the browser's program; None if there is none."""
    return shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """A page in a browser; a context manager.

    `addresses` are those that the page has asked for, `contexts` the numbers of the script contexts
    of its frames, by frame.
    """

    def __init__(self, folder: Path, *, width: int = 1280, height: int = 1600) -> None:
        """Start the browser with a profile in `folder`, of which it makes a new one."""
        program = chromium()
        assert program is not None
        (down, self._out), (self._in, up) = os.pipe(), os.pipe()
        words = [program, *_FLAGS, f"--user-data-dir={folder}", f"--window-size={width},{height}"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{down} 4>&{up}', *words, "about:blank"],
            pass_fds=(down, up), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(down)
        os.close(up)
        self._numbers, self._rest, self._session = itertools.count(1), b"", ""
        self.addresses: list[str] = []
        self.contexts: dict[str, int] = {}
        targets = self.ask("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "DOM"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def ask(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol and return its result."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + _WAIT
        while b"\0" not in self._rest:
            left = deadline - time.monotonic()
            assert left > 0, "the browser does not answer"
            if select.select([self._in], [], [], left)[0]:
                self._rest += os.read(self._in, 2**16)
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        event = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.addresses.append(event["request"]["url"])
        elif message.get("method") == "Runtime.executionContextCreated":
            context = event["context"]
            self.contexts[context["auxData"]["frameId"]] = context["id"]
        return message

    def run(self, script: str, context: int | None = None) -> Any:
        """Return the value of an expression in the page, or in another context."""
        where = {} if context is None else {"contextId": context}
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, **where)
        assert "exceptionDetails" not in found, (script, found)
        return found["result"].get("value")

    def wait(self, script: str, context: int | None = None) -> Any:
        """Wait until an expression is true, and return its value."""
        return self.wait_for(lambda: self.run(script, context), script)

    def wait_for(self, found: Callable[[], Any], what: str) -> Any:
        """Wait until a function returns what is true, and return that."""
        deadline = time.monotonic() + _WAIT
        while not (value := found()):
            assert time.monotonic() < deadline, f"never true: {what}"
            time.sleep(0.05)
        return value

    def open(self, address: str) -> None:
        """Go to an address."""
        self.ask("Page.navigate", url=address)

    def give_file(self, selector: str, path: Path) -> None:
        """Choose a file in an input of the page."""
        root = self.ask("DOM.getDocument")["root"]["nodeId"]
        node = self.ask("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        assert node, selector
        self.ask("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def click(self, x: float, y: float) -> None:
        """Click a point of the window, in its pixels."""
        at = {"x": x, "y": y, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, **at)

    def type(self, selector: str, text: str) -> None:
        """Replace the text of an input, and press Enter."""
        self.run(f"document.querySelector({selector!r}).focus()")
        self.run(f"document.querySelector({selector!r}).select()")
        self.ask("Input.insertText", text=text)
        for kind in ("rawKeyDown", "char", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r",
                     windowsVirtualKeyCode=13)  # fmt: skip

    def picture(self, path: Path) -> None:
        """Write what the page looks like as PNG, whole."""
        found = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))
