"""The blob store: files named by the BLAKE3 of their bytes.

Invariant: a file under its digest's name is complete and verified; anything else in the folder is an upload that has not finished.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, cast

import blake3

from protocol.messages import CHUNK_BYTES
from protocol.weights import BlobRef

MAX_BLOB_BYTES: Final = 1 << 40


class BlobStore:
    """Blobs in one folder. Used by one thread at a time, except `add` and `read`, which any thread may call."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def path(self, digest: str) -> Path:
        """Where the blob is, or would be."""
        return self._folder / digest

    def add(self, data: bytes) -> BlobRef:
        """Store `data` and name it."""
        ref = BlobRef(blake3.blake3(data).hexdigest(), len(data))
        if not self.path(ref.digest).exists():
            partial = self._folder / f"{ref.digest}.{os.getpid()}.partial"
            try:
                partial.write_bytes(data)
                _name_durably(partial, self.path(ref.digest))
            except OSError:  # what is left of it would take room from what comes after
                partial.unlink(missing_ok=True)
                raise
        return ref

    def link(self, path: Path) -> BlobRef:
        """Store an existing file without copying it where the file system allows. The file must not change afterwards."""
        ref = BlobRef(file_digest(path), path.stat().st_size)
        if not self.path(ref.digest).exists():
            try:
                os.link(path.resolve(), self.path(ref.digest))
            except OSError:
                shutil.copyfile(path, self.path(ref.digest))
        return ref

    def read(self, digest: str, offset: int = 0, length: int = -1) -> bytes | None:
        """Up to `length` bytes (all if negative) from `offset`, None if the store does not have the blob."""
        try:
            with self.path(digest).open("rb") as file:
                if offset > os.fstat(file.fileno()).st_size:
                    return b""
                file.seek(offset)
                return file.read(length)
        except FileNotFoundError:
            return None

    def size(self, digest: str) -> int | None:
        """The size of a blob in bytes, None if the store does not have it."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def holds(self, blob: BlobRef) -> bool:
        """Whether the blob is here and has the bytes that its name says; one that has others is removed."""
        if self.size(blob.digest) is None:
            return False
        if file_digest(self.path(blob.digest)) == blob.digest:
            return True
        self.remove(blob.digest)
        return False

    def sweep(self, keep: set[str], before: float) -> int:
        """Remove files that are not in `keep` and were not changed since `before` (seconds since 1970); how many those were."""
        removed = 0
        for path in self._folder.iterdir():
            if path.name not in keep and path.stat().st_mtime < before:
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    @contextlib.contextmanager
    def incoming(self, digest: str) -> Iterator[BinaryIO]:
        """An open file for a blob that is being received; gone afterwards unless `keep` has named it."""
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=f"{digest[:16]}.", suffix=".partial") as file:
            yield cast(BinaryIO, file)

    def keep(self, digest: str, file: BinaryIO) -> bool:
        """Give what was received its name, if its bytes have that digest; otherwise False."""
        if file_digest(Path(file.name)) != digest:
            return False
        os.fsync(file.fileno())
        named = Path(f"{file.name}.named")
        os.link(file.name, named)
        named.replace(self.path(digest))  # of what may bear the name already we do not know whether it is whole
        return True

    def remove(self, digest: str) -> None:
        """Forget a blob, if it is there. Whoever is fetching it is told so at its next piece."""
        self.path(digest).unlink(missing_ok=True)

    def remove_unused(self, before: float) -> None:
        """Remove blobs that nobody has fetched since `before` (seconds since 1970)."""
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):
                if path.stat().st_atime < before and path.stat().st_mtime < before:
                    path.unlink()

    def put_chunk(self, digest: str, size: int, offset: int, data: bytes | memoryview) -> tuple[int, bool]:
        """Take a piece of an upload; answers how many bytes are there and whether the blob is stored.

        A piece that does not start where the last one ended is ignored: the answer tells the sender where to go on. An upload whose
        bytes do not have the announced digest is thrown away and starts at 0 again. What was written when an OSError is raised is kept.
        """
        if self.path(digest).exists():
            return size, True
        partial = self._folder / f"{digest}.partial"
        have = partial.stat().st_size if partial.exists() else 0
        if size > MAX_BLOB_BYTES or have > size:
            return have, False
        if offset == have and have + len(data) <= size:
            with partial.open("ab") as file:
                file.write(data)
            have += len(data)
        if have < size or not partial.exists():
            return have, False
        if file_digest(partial) != digest:
            partial.unlink()
            return 0, False
        _name_durably(partial, self.path(digest))
        return size, True


def file_digest(path: Path) -> str:
    """BLAKE3 of a file's bytes, in hexadecimal."""
    hasher = blake3.blake3()
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            hasher.update(block)
    return hasher.hexdigest()


def _name_durably(partial: Path, final: Path) -> None:
    """Rename after the bytes, and then the name, are on the disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
