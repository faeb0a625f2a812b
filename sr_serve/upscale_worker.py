"""One image after another: fetched, upscaled and stored by whoever holds the network, a process or an actor."""

import errno
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from sr_data.errors import StorageError
from sr_data.storage import open_store
from sr_models.errors import ImageFileError
from sr_models.network import SRNetwork
from sr_models.upscaling import precision, upscale_file
from sr_serve.upscale_plan import Image, UpscaleError

OVERLAP = 2
"""Images that are fetched or stored while others are computed."""
_MAX_BYTES_PER_PX = 8  # 16-bit RGBA, not compressed: no kind of file that is read needs more
_MAX_BYTES_BESIDES = 64e6  # profile, EXIF, thumbnails
_MEMORY_WORDS = ("memory", "alloc")  # PyTorch's CPU allocator and cuBLAS raise RuntimeError, and say it in words only


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """How images are made: plain values, which travel to actors."""

    source_uri: str
    target_uri: str
    format: str | None
    """PNG, JPEG, WEBP; None: the source's own, or PNG."""
    max_mpx: float
    """Largest image that is read, in 10⁶ pixels."""
    tile_px_lr: int
    """Largest tile, in LR pixels."""
    self_ensemble: bool
    """Whether the eight flips and quarter turns are averaged."""
    precision: str
    """float32 or bfloat16."""
    witnesses: tuple[str, ...]
    """Keys below SOURCE of a few images: if they are there, a refusal is about one image, and not about SOURCE."""


class ImageMaker:
    """A network that is in place, and what it is to be used for. Safe to share between threads."""

    def __init__(self, network: SRNetwork, work: Work, *, num_computed: int = 1) -> None:
        """`num_computed` images may be decoded, upscaled and encoded at the same time: this bounds the memory."""
        self._network = network
        self._work = work
        self._source, self._target = open_store(work.source_uri), open_store(work.target_uri)
        self._autocast = precision(work.precision)
        self._computing = threading.Semaphore(num_computed)
        self._stopped = threading.Event()
        self._last_read: str | None = None

    def make(self, image: Image) -> str | None:
        """Writes the upscaled image to TARGET, whole or not at all.

        Returns what is wrong with the image, if something is. StorageError is about more than this image: TARGET can't
        be written, or SOURCE is away. UpscaleError: the GPU no longer works.
        """
        max_bytes = _MAX_BYTES_PER_PX * 1e6 * self._work.max_mpx + _MAX_BYTES_BESIDES
        if image.num_bytes is not None and image.num_bytes > max_bytes:
            limit = f"{max_bytes / 1e6:,.0f} MB, the most that {self._work.max_mpx:g} Mpx can take (--max-mpx)"
            return f"{image.key}: the file's {image.num_bytes / 1e6:,.0f} MB are more than {limit}"
        try:
            data = self._source.read(image.key)
        except StorageError as error:
            if (reason := self._reason(error, image.key)) is None:
                raise
            return reason
        except MemoryError as error:
            return _why_not_computed(error, image.key)
        self._last_read = image.key
        try:
            with self._computing:
                if self._stopped.is_set():
                    return f"{image.key}: not begun"
                larger = upscale_file(
                    self._network,
                    data,
                    name=image.key,
                    format=self._work.format,
                    max_mpx=self._work.max_mpx,
                    tile_px_lr=self._work.tile_px_lr,
                    self_ensemble=self._work.self_ensemble,
                    autocast=self._autocast,
                )
        except ImageFileError as error:
            return str(error)
        except (RuntimeError, MemoryError) as error:
            return _why_not_computed(error, image.key)
        self._target.write(image.target_key, larger)
        return None

    def stop(self) -> None:
        """No further image is begun: who has to wait for the threads waits for one image, not for all they hold."""
        self._stopped.set()

    def _reason(self, error: StorageError, key: str) -> str | None:
        """Why the image could not be read; None if that concerns more than this image.

        A disk refuses single files, and so does a server: by an object's owner, its KMS key, its place in an archive.
        """
        if "://" not in self._source.uri:
            sees_source = Path(self._source.uri).is_dir()  # else this node does not see SOURCE at all
            return str(error) if sees_source else None
        if error.errno == errno.ENOENT:
            return str(error)
        if error.errno in (errno.EHOSTUNREACH, errno.ETIMEDOUT):
            return None
        others = [other for other in (self._last_read, *self._work.witnesses) if other not in (None, key)]
        if any(self._is_there(other) for other in others):
            return f"{error}; others in SOURCE are not refused"
        return None

    def _is_there(self, key: str) -> bool:
        try:
            return self._source.exists(key)
        except StorageError:
            return False


def _why_not_computed(error: RuntimeError | MemoryError, key: str) -> str:
    said = str(error).partition("\n")[0] or type(error).__name__
    if isinstance(error, MemoryError) or any(word in said.lower() for word in _MEMORY_WORDS):
        return f"{key}: too large for the memory, lower --tile-px-lr or --max-mpx ({said})"
    if isinstance(error, torch.AcceleratorError):  # every image after it would fail as well
        raise UpscaleError(f"{key}: the GPU no longer works ({said})") from error
    return f"{key}: can't be upscaled ({type(error).__name__}: {said})"
