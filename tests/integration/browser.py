"""Headless Chromium, controlled over its debugging pipe with JSON messages that end in NUL."""

import json
import os
import shutil
import subprocess
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "google-chrome", "chromium-browser")
TEXT = "document.body.innerText"


def find() -> str | None:
    """Return the path of an installed browser; None if there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class RefusedError(Exception):
    """The browser refused a command, for example because its page has just been closed."""


class Browser:
    """One page of a browser, which is closed at the end of a `with` block."""

    def __init__(self, program: str, profile: Path) -> None:
        self._number = 0
        self._rest = b""
        reads, self._to = os.pipe()
        self._from, writes = os.pipe()
        flags = ("--headless", "--no-sandbox", "--no-first-run", "--disable-gpu", "--remote-debugging-pipe")
        # about:blank, because the page of a new tab has frames of its own
        command = [program, *flags, f"--user-data-dir={profile}", "--window-size=1600,4000", "about:blank"]
        # Chromium expects the pipe on descriptors 3 and 4
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{reads} 4>&{writes}', "bash", *command],
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        target = self._do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._attach(target)
        self._frames: dict[str, str] = {}
        self.complaints: list[dict[str, Any]] = []
        self.requests: list[str] = []
        for domain in ("Runtime", "Log", "Network"):
            self._do(f"{domain}.enable", session=self._session)

    def open(self, url: str, *, login: str | None = None) -> None:
        """Open a page, with the login `user:password` if one is given."""
        if login is not None:
            headers = {"Authorization": f"Basic {b64encode(login.encode()).decode()}"}
            self._do("Network.setExtraHTTPHeaders", session=self._session, headers=headers)
        self._do("Page.navigate", session=self._session, url=url)

    def prefer(self, scheme: str) -> None:
        """Set the preferred colour scheme, `light` or `dark`."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._do("Emulation.setEmulatedMedia", session=self._session, features=[feature])

    def tell(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        found = self._do("Runtime.evaluate", session=self._session, expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def point(self, x: float, y: float, *, click: bool = False) -> None:
        """Move the mouse to a position in the window, and click if asked to."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased")[: 3 if click else 1]:
            self._do(
                "Input.dispatchMouseEvent",
                session=self._session,
                type=kind,
                x=x,
                y=y,
                button="left" if kind != "mouseMoved" else "none",
                clickCount=int(kind != "mouseMoved"),
            )

    def picture(self, path: Path) -> None:
        """Save a screenshot as PNG."""
        found = self._do("Page.captureScreenshot", session=self._session, format="png")
        path.write_bytes(b64decode(found["data"]))

    def shown(self, words: tuple[str, ...], *, seconds: float = 60) -> str:
        """Wait until the page shows all words; return the text of the page, also if the wait times out."""
        return self._waited(lambda: self._session, words, seconds)

    def shown_in_frame(self, scheme: str, words: tuple[str, ...], *, seconds: float = 60) -> str:
        """Do the same as `shown` for the frame with a URL of this scheme, such as `blob`."""
        return self._waited(lambda: self._frame(scheme), words, seconds)

    def _frame(self, scheme: str) -> str | None:
        """Return the session of the frame with a URL of this scheme; None if there is none."""
        for target in self._do("Target.getTargets")["targetInfos"]:
            if target["type"] == "iframe" and target["url"].startswith(f"{scheme}:"):
                name = target["targetId"]
                self._frames[name] = self._frames.get(name) or self._attach(name)
                return self._frames[name]
        return None

    def _attach(self, target: str) -> str:
        return str(self._do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])

    def _waited(self, find: Callable[[], str | None], words: tuple[str, ...], seconds: float) -> str:
        end = time.monotonic() + seconds
        while True:
            text = ""
            with suppress(RefusedError):  # a frame can be replaced between two commands
                session = find()
                if session is not None:
                    found = self._do("Runtime.evaluate", session=session, expression=TEXT)
                    text = str(found["result"].get("value", ""))
            if all(word in text for word in words) or time.monotonic() > end:
                return text
            time.sleep(0.2)

    def _do(self, method: str, *, session: str | None = None, **params: object) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RefusedError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        """Record the requests, errors and warnings of the page."""
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        wrong = {
            "Runtime.exceptionThrown": True,
            "Runtime.consoleAPICalled": params.get("type") in {"error", "warning", "assert"},
            "Log.entryAdded": params.get("entry", {}).get("level") in {"error", "warning"},
        }
        if wrong.get(str(event.get("method"))):
            self.complaints.append(event)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = os.read(self._from, 65536)
            assert chunk, "the browser is gone"
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._to)
        os.close(self._from)
