"""Errors that a user's data or storage can cause."""


class DataError(ValueError):
    """A dataset, a layout or an option about data is not as it must be."""


class ImageError(DataError):
    """One image file can't be used; the message starts with its name or URI."""


class StorageError(OSError):
    """A bucket, endpoint, credential or disk refuses; the message starts with the URI."""
