"""A folder on a local or mounted disk, as a storage backend."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sr_data.errors import StorageError
from sr_data.storage import FileEntry

_PARTIAL_SUFFIX = ".partial"

_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or choose another place. What was saved before is untouched",
    errno.EDQUOT: "the disk quota is used up; free some space. What was saved before is untouched",
    errno.EFBIG: "the file is larger than this disk or `ulimit -f` allows. What was saved before is untouched",
    errno.EROFS: "the disk is mounted read-only; choose another place",
    errno.EACCES: "this user may not do that; check the owner and the permissions",
    errno.EPERM: "this user may not do that; check the owner and the permissions",
    errno.ENOENT: "there is no such file",
    errno.EEXIST: "a part of this path is a file, not a folder",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EISDIR: "this is a folder, not a file",
}


@dataclass(frozen=True, kw_only=False, slots=True)
class LocalFolder:
    """Files below `root`. See `sr_data.storage.Store` for what each method promises."""

    root: Path
    uri: str
    """What error messages call the root."""
    read_only: bool = False

    def list(self, prefix: str) -> list[FileEntry]:
        """Walks from the deepest folder that `prefix` names; follows links to folders, each folder once."""
        start, entries = self.root / prefix.rpartition("/")[0], []
        with self._errors_about(prefix):
            for path, stat in _files_below(start):
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix):
                    version = f"{stat.st_mtime_ns}-{stat.st_size}"
                    entries.append(FileEntry(key=key, num_bytes=stat.st_size, version=version))
        return sorted(entries, key=lambda entry: entry.key)

    def read(self, key: str) -> bytes:
        """The file's bytes."""
        with self._errors_about(key):
            return (self.root / key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        """Under another name in the same folder, flushed to the disk, then renamed."""
        if self.read_only:
            raise _error(
                f"{self.uri}/{key}", errno.EROFS, "this dataset is part of the package and is never written to"
            )
        path = self.root / key
        # Beside the target, since a rename is atomic only within one file system.
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PARTIAL_SUFFIX}")
        with self._errors_about(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            except BaseException:  # also on Ctrl-C: nothing half-written may stay behind
                partial.unlink(missing_ok=True)
                raise
            _sync_folder(path.parent)

    def num_bytes(self, key: str) -> int:
        """Of the file that a link points at."""
        with self._errors_about(key):
            return (self.root / key).stat().st_size

    def exists(self, key: str) -> bool:
        """Whether it is a file, links followed."""
        with self._errors_about(key):
            return (self.root / key).is_file()

    def delete(self, key: str) -> None:
        """Removes the file; folders left empty stay."""
        with self._errors_about(key):
            (self.root / key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors_about(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"{self.uri}/{key}" if key else self.uri
            raise _error(where, error.errno, _REMEDIES.get(error.errno or 0, "the disk refuses"), error) from error


def _files_below(start: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Files and their facts, in no order. A folder that does not exist has none."""
    folders, seen = [start], set[tuple[int, int]]()
    while folders:
        folder = folders.pop()
        try:
            facts = folder.stat()
            children = list(os.scandir(folder))
        except FileNotFoundError:
            continue
        if (facts.st_dev, facts.st_ino) in seen:  # a link that leads back up
            continue
        seen.add((facts.st_dev, facts.st_ino))
        for child in children:
            if child.is_dir():
                folders.append(Path(child.path))
            elif child.is_file() and not child.name.endswith(_PARTIAL_SUFFIX):
                with contextlib.suppress(FileNotFoundError):  # deleted since
                    yield Path(child.path), child.stat()


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems can't, and need not
            raise
    finally:
        os.close(descriptor)


def _error(where: str, number: int | None, remedy: str, cause: OSError | None = None) -> StorageError:
    detail = f" ({cause.strerror})" if cause is not None and cause.strerror else ""
    error = StorageError(f"{where}: {remedy}{detail}")
    error.errno = number
    return error
