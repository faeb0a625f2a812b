"""A published weight file in torch.hub's cache, downloaded if it is not there; a network that gives no answer is said
within seconds.
"""

import contextlib
import logging
import re
import socket
import sys
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from queue import Empty, SimpleQueue
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import urlopen

import torch

_log = logging.getLogger(__name__)


class DownloadError(OSError):
    """A published file can't be downloaded; the message starts with its URL."""


def hash_in_name(name: str) -> str | None:
    """The beginning of the sha256 that torchvision writes into its files' names: `vgg19-dcbb9e9d.pth` → `dcbb9e9d`."""
    match = re.search(r"-([0-9a-f]{8,64})\.pth$", name)
    return match[1] if match else None


def file_name(url: str) -> str:
    """The last part of a URL's path."""
    return PurePosixPath(urlsplit(url).path).name


def hub_file(url: str, *, answer_within_s: float = 10.0, stalled_after_s: float = 30.0) -> Path:
    """The file of a URL in torch.hub's cache, where torchvision looks for it too (`TORCH_HOME` moves the cache).

    torch.hub downloads under another name and compares the hash before it renames, so half a file is never found here
    later. What lies in the cache already is returned as it is.

    Raises:
        DownloadError: no connection, no answer within `answer_within_s`, silence for `stalled_after_s` in the middle, a
            wrong hash, no place to write to.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", file_name(url))
    if path.is_file():
        return path
    if refusal := _refusal(url, within_s=answer_within_s):
        raise DownloadError(f"{url}: {refusal}")
    _log.info("downloading %s to %s", url, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _socket_timeout(stalled_after_s):
            torch.hub.download_url_to_file(url, str(path), hash_in_name(path.name), progress=sys.stderr.isatty())
    except (OSError, RuntimeError, HTTPException) as error:
        raise DownloadError(f"{url}: {error or type(error).__name__}") from error
    return path


def _refusal(url: str, *, within_s: float) -> str | None:
    """Why the server does not begin to send the file, or None.

    In a thread, because a timeout of `urlopen` holds for each of a name's addresses and not at all for looking the name
    up: without internet that can be minutes.
    """
    answers: SimpleQueue[str | None] = SimpleQueue()

    def ask() -> None:
        try:
            with urlopen(url, timeout=within_s):
                answers.put(None)
        except (OSError, HTTPException, ValueError) as error:
            answers.put(str(error) or type(error).__name__)

    Thread(target=ask, name="hub-probe", daemon=True).start()
    try:
        return answers.get(timeout=within_s)
    except Empty:
        return f"no answer within {within_s:g} s"


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torch.hub opens its connection without a timeout and takes none; the process's default is the one way to it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
