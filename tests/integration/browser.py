"""Chromium without a window, told what to do over its debugging pipe: JSON messages that end in NUL."""

import json
import os
import shutil
import subprocess
import time
from base64 import b64encode
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "google-chrome", "chromium-browser")


def find() -> str | None:
    """Return the browser that is installed, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser that is closed at the end of a `with` block."""

    def __init__(self, program: str, profile: Path) -> None:
        self._number = 0
        self._rest = b""
        reads, self._to = os.pipe()
        self._from, writes = os.pipe()
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe")
        command = [program, *flags, f"--user-data-dir={profile}", "--window-size=1600,4000"]
        # the pipe is on descriptors 3 and 4, by agreement
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{reads} 4>&{writes}', "bash", *command],
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        target = self._do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def open(self, url: str, *, login: str) -> None:
        """Go to a page as somebody who gave `user:password` to the browser."""
        headers = {"Authorization": f"Basic {b64encode(login.encode()).decode()}"}
        self._do("Network.enable", session=self._session)
        self._do("Network.setExtraHTTPHeaders", session=self._session, headers=headers)
        self._do("Page.navigate", session=self._session, url=url)

    def shown(self, words: tuple[str, ...], *, seconds: float = 60) -> str:
        """Wait until the page shows all words; return what it shows in any case."""
        end = time.monotonic() + seconds
        while True:
            found = self._do("Runtime.evaluate", session=self._session, expression="document.body.innerText")
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
                return dict(answer["result"])

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
