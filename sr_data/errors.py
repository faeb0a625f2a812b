"""Errors that a user's data or storage can cause."""

from typing import Any


class DataError(ValueError):
    """A dataset, a layout or an option about data is not as it must be."""


class ImageError(DataError):
    """One image file can't be used; the message starts with its name or URI."""


class StorageError(OSError):
    """A bucket, endpoint, credential or disk refuses; the message starts with the URI."""

    def __reduce__(self) -> tuple[Any, ...]:
        # OSError's own forgets an `errno` that was set later: between processes, nobody could tell what may pass.
        return _restored, (type(self), self.args, self.errno)


def _restored(kind: type[StorageError], args: tuple[Any, ...], number: int | None) -> StorageError:
    error = kind(*args)
    error.errno = number
    return error
