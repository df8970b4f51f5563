"""Read text files that people edit, and explain files that are not UTF-8."""

from __future__ import annotations

import codecs
import io
from pathlib import Path

from weighted_mtp_core.errors import WmtpError

_OTHER = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, because this mark begins with the mark of UTF-16
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_utf8(path: Path) -> str:
    """Return the contents of a UTF-8 file, without a byte order mark and with line feeds as line ends.

    Raises:
        WmtpError: The file has another encoding; the message contains this encoding, or the number of the
            line that is not UTF-8.
        OSError: The file cannot be read.
    """
    content = path.read_bytes()
    encoding = next((name for mark, name in _OTHER.items() if content.startswith(mark)), None)
    if encoding is None and b"\0" in content:
        encoding = "UTF-16 or binary"
    if encoding is not None:
        raise WmtpError(f"{path}: the file is {encoding}; expected UTF-8", hint="save it as UTF-8")
    try:
        return io.StringIO(content.decode("utf-8-sig"), newline=None).read()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise WmtpError(
            f"{path}: line {line}: not UTF-8 (byte 0x{byte:02x})", hint="save it as UTF-8"
        ) from error
