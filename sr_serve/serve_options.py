"""Options of serving, validated."""

from dataclasses import dataclass
from typing import Literal

from sr_serve.http_api import MAX_TILE_PX_LR, MIN_TILE_PX_LR

_AT_LEAST_ONE = ("num_replicas", "max_batch", "max_ongoing", "max_queued")
_ABOVE_ZERO = ("max_mb", "max_mpx", "timeout_s", "upload_timeout_s", "poll_s")


class ServeError(ValueError):
    """The application can't be started as asked; the message names the flag."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """How a model is served."""

    host: str = "127.0.0.1"
    """Address to listen on. There is no password: with 0.0.0.0 whoever reaches this machine can use it."""
    port: int = 8000
    """TCP port."""
    name: str = "sr-ray"
    """Of the application within Ray Serve; a cluster may run several."""
    route_prefix: str = "/"
    """Path below which page and API are."""
    max_mb: float = 10.0
    """Largest upload in MB."""
    max_mpx: float = 16.0
    """Most pixels of an upload, in millions. The result has scale² as many, of 3 bytes of memory each, 8 with 16
    bits and alpha, and as much again while it is written."""
    num_replicas: int = 1
    """Processes that hold the model."""
    gpus_per_replica: float = 0.0
    """GPUs of a replica; 0.5 lets two share one, 0 computes on the CPU."""
    cpus_per_replica: int | None = None
    """CPUs of a replica. When not given: those that are free, divided among the replicas; with a GPU, 1."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is faster on hardware that knows it, and within its rounding of the same."""
    tile_px_lr: int = 192
    """Largest tile where a request names none, in pixels of the upload: bounds memory, does not change the result."""
    max_batch: int = 8
    """Most images of one size that go through the network at once; together they are never more than one tile."""
    max_ongoing: int = 16
    """Requests that a replica has in hand at once."""
    max_queued: int = 32
    """Requests that may wait for a replica; what comes on top is told at once to come back later (503)."""
    timeout_s: float = 300.0
    """After how many seconds a request is given up (504)."""
    upload_timeout_s: float = 60.0
    """How long a client may take to send its image, in seconds (408)."""
    poll_s: float = 10.0
    """How often the registry is asked whether the alias has moved, in seconds."""

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in _ABOVE_ZERO:
            _require(getattr(self, name) > 0, name, getattr(self, name), "more than 0")
        gpus, cpus, prefix = self.gpus_per_replica, self.cpus_per_replica, self.route_prefix
        _require(1 <= self.port <= 65535, "port", self.port, "1 to 65535")
        tile = f"{MIN_TILE_PX_LR} to {MAX_TILE_PX_LR}"
        _require(MIN_TILE_PX_LR <= self.tile_px_lr <= MAX_TILE_PX_LR, "tile_px_lr", self.tile_px_lr, tile)
        _require(0 <= gpus <= 1 or (gpus > 1 and gpus % 1 == 0), "gpus_per_replica", gpus, "0 to 1 or a whole number")
        _require(cpus is None or cpus >= 1, "cpus_per_replica", cpus, "at least 1")
        _require(bool(self.name), "name", repr(self.name), "a word")
        is_path = prefix == "/" or (prefix.startswith("/") and not prefix.endswith("/"))
        _require(is_path, "route_prefix", repr(prefix), "/ or a path like /sr")


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ServeError(f"--{name.replace('_', '-')} {value}: must be {allowed}")
