"""Store token sets on disk; a token set is written once and mapped into memory by each run that needs it.

Each token set is stored with the data in a folder of `datasets_v2/<name>/<version>/derived/`. The name of the
folder contains a hash of the data, the options and the tokenizer, so the contents of a folder never change.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tokenizers

from weighted_mtp_core.api import DatasetVersion, Example, Split
from weighted_mtp_core.data.chats import TrainOn
from weighted_mtp_core.data.checks import data_key, derived_folder
from weighted_mtp_core.data.texts import TextCodec
from weighted_mtp_core.data.tokens import TokenSet, open_tokens, tokenise
from weighted_mtp_core.plugins.selection import SelectedComponent
from weighted_mtp_core.storage.manifest import MANIFEST, atomic_folder
from weighted_mtp_core.storage.verify_once import verify_once

_FORMAT = 7  # increase it when the arrays for the same examples and tokenizer would change

# Saved settings of a tokenizer that do not affect ids without special tokens: padding and truncation of the
# last call, and the folder that the tokenizer was loaded from.
_IRRELEVANT = frozenset({"padding", "truncation", "is_local", "local_files_only", "name_or_path"})


class TokenCache:
    """The token sets of one data source for one tokenizer.

    Args:
        storage: The storage root.
        version: Version of the data.
        data: The component of the data source; its options and its plugin's source code affect the examples.
        codec: Encodes the texts.
        max_tokens: Documents with more tokens are left out.
        train_on: Whether all turns of the assistant in a chat are learned, or only the last turn.

    Attributes:
        fingerprint: SHA-256 of everything that affects the tokens of a document.
    """

    def __init__(
        self,
        storage: Path,
        version: DatasetVersion,
        *,
        data: SelectedComponent,
        codec: TextCodec,
        max_tokens: int,
        train_on: TrainOn = "all",
    ) -> None:
        depends = [
            *(_FORMAT, data_key(version, data), tokenizer_fingerprint(codec.tokenizer)),
            *(codec.prefix, train_on),
        ]
        self.fingerprint = hashlib.sha256(json.dumps(depends).encode()).hexdigest()
        self._folder = derived_folder(storage, version)
        self._codec = codec
        self.max_tokens, self._train_on = max_tokens, train_on

    def open(self, purpose: str, split: Split, *, examples: Callable[[], Iterable[Example]]) -> TokenSet:
        """Return the tokens of a split; `examples` is called only if the tokens are not stored yet.

        Raises:
            WmtpError: `examples` fails, `tokenise` refuses the examples, for example because none is short
                enough, or the stored arrays were changed after they were written.
        """
        folder = self._folder_of(purpose, split)
        if not (folder / MANIFEST).is_file():
            with atomic_folder(folder) as temporary:
                tokenise(
                    examples(),
                    self._codec,
                    max_tokens=self.max_tokens,
                    folder=temporary,
                    train_on=self._train_on,
                )
        return open_tokens(folder, sha256=verify_once(folder))

    def has(self, purpose: str, split: Split) -> bool:
        """Return whether the tokens of a split are stored."""
        return (self._folder_of(purpose, split) / MANIFEST).is_file()

    def _folder_of(self, purpose: str, split: Split) -> Path:
        return self._folder / f"tokens-{self.fingerprint[:12]}-{self.max_tokens}-{purpose}-{split}"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a SHA-256 of all files and settings of the tokenizer that affect token ids."""
    digest = hashlib.sha256(f"{tokenizers.__version__} {tokenizer.eos_token_id}".encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(each for each in Path(folder).rglob("*") if each.is_file()):
            content = file.read_bytes()
            if file.suffix == ".json":
                table = json.loads(content)
                kept = {key: value for key, value in table.items() if key not in _IRRELEVANT}
                content = json.dumps(kept, sort_keys=True).encode()
            digest.update(f"{file.name} {hashlib.sha256(content).hexdigest()}".encode())
    return digest.hexdigest()
