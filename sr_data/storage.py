"""One way to read, write and list bytes at a URI: `s3://bucket/prefix`, `file:///folder`, a path, `builtin://photos`.

`storage_local` and `storage_s3` do the work; what both promise is said here, once.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import unquote, urlsplit

from sr_data.errors import StorageError

_BUILTIN_ROOT = Path(__file__).parent  # builtin://photos → sr_data/photos, the same on every node


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file as the listing shows it."""

    key: str
    """Path below the store's URI, with `/` as separator."""
    num_bytes: int
    version: str
    """Changes when the content does: the ETag on S3, elsewhere the time of change in ns and the size."""


class Backend(Protocol):
    """What a kind of storage must be able to do. Every failure is a StorageError whose message starts with the URI."""

    def list(self, prefix: str) -> list[FileEntry]:
        """Of all files whose key starts with `prefix`, sorted by key."""

    def read(self, key: str) -> bytes:
        """The whole file."""

    def write(self, key: str, data: bytes) -> None:
        """Atomically."""

    def num_bytes(self, key: str) -> int:
        """Of the file, without reading it."""

    def exists(self, key: str) -> bool:
        """Whether there is a file."""

    def delete(self, key: str) -> None:
        """No error if there is none."""


@dataclass(frozen=True, slots=True)
class Store:
    """A folder on disk or a prefix in a bucket. Picklable, and safe to share between threads and across forks.

    It holds nothing but its URI: connections are opened when first used, per process, with the credentials that the
    process has in its environment then. Every method raises StorageError, whose `errno` is ENOENT for a missing key.
    """

    uri: str
    """As made by `open_store`: no trailing slash; an absolute path if it is local."""

    def list(self, prefix: str = "") -> list[FileEntry]:
        """Every file whose key starts with `prefix`, sorted by key, never from a cache.

        A folder that does not exist lists as empty, as it does on S3; a missing bucket is a StorageError.
        """
        return _backend(self.uri).list(_checked(self.uri, prefix) if prefix else "")

    def read(self, key: str) -> bytes:
        """The whole file. What arrives shorter than announced is fetched again."""
        return _backend(self.uri).read(_checked(self.uri, key))

    def num_bytes(self, key: str) -> int:
        """How large the file is, without reading it."""
        return _backend(self.uri).num_bytes(_checked(self.uri, key))

    def read_text(self, key: str) -> str:
        """The whole file, which must be UTF-8."""
        try:
            return self.read(key).decode("utf-8")
        except UnicodeDecodeError as error:
            raise StorageError(
                f"{self.uri_of(key)}: is not UTF-8 text ({error.reason} at byte {error.start})"
            ) from error

    def write(self, key: str, data: bytes) -> None:
        """Replaces the file at once: a reader, or a crash at any moment, sees the old content or the new one, whole."""
        _backend(self.uri).write(_checked(self.uri, key), data)

    def exists(self, key: str) -> bool:
        """Whether there is a file (not merely a folder) at `key`."""
        return _backend(self.uri).exists(_checked(self.uri, key))

    def delete(self, key: str) -> None:
        """Removes the file; no error if there is none."""
        _backend(self.uri).delete(_checked(self.uri, key))

    def uri_of(self, key: str) -> str:
        """The URI of one file."""
        return f"{self.uri.rstrip('/')}/{key}"

    def check_writable(self) -> None:
        """Writes and deletes a small file, so that a refusal shows now rather than at the first checkpoint."""
        probe = f".write-probe-{uuid.uuid4().hex}"
        try:
            self.write(probe, b"may be deleted")
            self.delete(probe)
        except StorageError as error:
            refused = StorageError(str(error).replace(f"/{probe}", ""))
            refused.errno = error.errno
            raise refused from error


def open_store(uri: str) -> Store:
    """The store at a URI: `s3://bucket/prefix`, `file:///folder`, `builtin://photos`, or a path (made absolute).

    Nothing is connected to or created yet. S3 endpoint, region and credentials come from the usual AWS_* variables.

    Raises:
        StorageError: an unknown scheme, a bucket without a name, credentials, a file URI of another host.
    """
    if "://" not in uri:
        if not uri:
            raise StorageError("'': an empty URI; give s3://bucket/prefix or a path")
        return Store(str(Path(uri).expanduser().absolute()))
    parts = urlsplit(uri, allow_fragments=False)
    if "@" in parts.netloc and parts.scheme != "file":  # not repeated: what stands before it may be a password
        shown = f"{parts.scheme}://***@{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise StorageError(
            f"{shown}: credentials don't belong into a URI, which is shown and recorded; give AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, a profile, or the role of an instance"
        )
    if parts.scheme in ("s3", "s3a"):
        if not parts.netloc:
            raise StorageError(f"{uri}: names no bucket; s3://bucket/prefix is expected")
        # Not parts.path: a key may contain "?", which a URL would split off.
        return Store("s3://" + uri.split("://", 1)[1].rstrip("/"))
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise StorageError(f"{uri}: a file URI has three slashes, file:///folder; {parts.netloc!r} reads as a host")
        return Store(str(Path(unquote(parts.path)).absolute()))
    if parts.scheme == "builtin":
        if uri.rstrip("/") != "builtin://photos":
            raise StorageError(f"{uri}: the only built-in dataset is builtin://photos")
        return Store("builtin://photos")
    raise StorageError(f"{uri}: can't read {parts.scheme}://; use s3://bucket/prefix, file:///folder or a path")


def split_uri(uri: str) -> tuple[Store, str]:
    """A file's URI as (store of its folder, key): `s3://b/p/x.png` → (`s3://b/p`, `x.png`)."""
    whole = open_store(uri).uri
    folder, _, key = whole.rpartition("/")
    if not key or folder.endswith(":/"):
        raise StorageError(f"{uri}: names a whole bucket or disk, not a file in it")
    return Store(folder or "/"), key


def _checked(uri: str, key: str) -> str:
    if not key or key.startswith("/") or ".." in PurePosixPath(key).parts:
        raise StorageError(f"{uri}: {key!r} is not a key below it")
    return key


def _backend(uri: str) -> Backend:
    # Imported here: s3fs takes half a second to import, which a run on local files need not spend.
    if uri.startswith("s3://"):
        from sr_data.storage_s3 import S3Prefix

        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        return S3Prefix(bucket, prefix)
    from sr_data.storage_local import LocalFolder

    if uri.startswith("builtin://"):
        return LocalFolder(_BUILTIN_ROOT / uri.removeprefix("builtin://"), uri=uri, read_only=True)
    return LocalFolder(Path(uri), uri=uri)
