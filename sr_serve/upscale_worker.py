"""One image after another: fetched, upscaled and stored by whoever holds the network, a process or an actor."""

import errno
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from sr_data.errors import StorageError
from sr_data.storage import Store, open_store
from sr_models.errors import ImageFileError
from sr_models.network import SRNetwork
from sr_models.upscaling import precision, upscale_file
from sr_serve.upscale_plan import Image

OVERLAP = 2
"""Images that are fetched or stored while others are computed."""


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

    def make(self, image: Image) -> str | None:
        """Writes the upscaled image to TARGET, whole or not at all.

        Returns what is wrong with the image, if something is. StorageError is about more than this image: TARGET can't
        be written, or SOURCE is away.
        """
        try:
            data = self._source.read(image.key)
        except StorageError as error:
            if _concerns_one_file(error, self._source):
                return str(error)
            raise
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
        except (torch.OutOfMemoryError, MemoryError) as error:
            reason = str(error).partition("\n")[0]
            return f"{image.key}: too large for the memory, lower --tile-px-lr ({reason})"
        self._target.write(image.target_key, larger)
        return None

    def stop(self) -> None:
        """No further image is begun: who has to wait for the threads waits for one image, not for all they hold."""
        self._stopped.set()


def _concerns_one_file(error: StorageError, source: Store) -> bool:
    """A disk refuses single files; a server that refuses, refuses everybody, unless it says that there is no such
    object.
    """
    if "://" in source.uri:
        return error.errno == errno.ENOENT
    return Path(source.uri).is_dir()  # else this node does not see SOURCE at all
