"""Token ids as text, by the tokenizer of the run's own policy. Where there is none, ids are shown and the reason is told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import blake3
import numpy as np
from numpy.typing import NDArray

from analysis.recording import Recording

TOKENIZER_NAME: Final = "tokenizer.json"


class PolicyText:
    """Decodes ids. `missing` says why there is no text, empty if there is."""

    def __init__(self, tokenizer: Any, missing: str) -> None:
        self._tokenizer, self.missing = tokenizer, missing

    def text(self, ids: Sequence[int] | NDArray[np.int32]) -> str | None:
        """The text of token ids, special tokens included; None if there is no tokenizer."""
        return None if self._tokenizer is None else str(self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False))

    def shown(self, ids: Sequence[int]) -> str:
        """The text for a terminal, or the ids."""
        text = self.text(ids)
        return " ".join(map(str, ids)) if text is None else printable(text)


def find_text(recording: Recording, given: Path | None = None) -> PolicyText:
    """The tokenizer in the file `given`, or that of the recorded policy from the run's blobs."""
    if given is not None:
        try:
            return _load(given.read_bytes(), str(given))
        except OSError as error:
            return PolicyText(None, f"{given} cannot be read ({error.strerror})")
    blob = next((file.blob for file in recording.policy_files() if file.name == TOKENIZER_NAME), None)
    if blob is None:
        return PolicyText(None, f"run.json names no {TOKENIZER_NAME}; give one with --tokenizer")
    try:
        data = (recording.blobs / blob.digest).read_bytes()
    except OSError as error:
        return PolicyText(None, f"{TOKENIZER_NAME} is not among the run's blobs ({error.strerror}); give it with --tokenizer")
    if blake3.blake3(data).hexdigest() != blob.digest:
        return PolicyText(None, f"{TOKENIZER_NAME} among the run's blobs is damaged; give a copy with --tokenizer")
    return _load(data, TOKENIZER_NAME)


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: control characters are written out, lines stay lines."""
    return "".join(sign if sign.isprintable() or sign == "\n" else repr(sign)[1:-1] for sign in text)


def _load(data: bytes, name: str) -> PolicyText:
    from tokenizers import Tokenizer

    try:
        is_tokenizer = "model" in json.loads(data)
    except (ValueError, TypeError):
        is_tokenizer = False
    return PolicyText(Tokenizer.from_str(data.decode()), "") if is_tokenizer else PolicyText(None, f"{name} is not a tokenizer file")
