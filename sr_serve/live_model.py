"""The network that answers now: follows an alias of the registry, and changes over only to a version that works."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sr_data.errors import StorageError
from sr_models.architectures import architecture_name
from sr_models.errors import ModelError
from sr_models.inference import placed
from sr_models.network import SRNetwork
from sr_models.weights import weights_digest
from sr_serve.messages import ModelFacts
from sr_train.checkpoint import CheckpointError
from sr_train.model_registry import RegisteredVersion
from sr_train.tracking_server import TrackingError, resolve_tracking_uri
from sr_train.upscaler import REGISTRY_PREFIX, UpscalerError, open_network, pinned

_EXPECTED = (UpscalerError, ModelError, CheckpointError, StorageError, TrackingError, OSError, RuntimeError)
"""What makes a version unusable, with words for users; RuntimeError is PyTorch's: no room, a kernel that fails."""
_MAX_RETRY_S = 300.0
_PROBE_PX_LR = 16


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Loaded:
    """A network on its device, and what it is. Whoever holds one finishes with it, whatever comes after."""

    network: SRNetwork
    facts: ModelFacts


class LiveModel:
    """MODEL, loaded; with `models:/name@alias` the version that the alias is at now.

    `current` may be read by any thread. `say` is told, in one line each and once, what changes: a new version, one that
    can't be used, a registry that is away or back.
    """

    def __init__(
        self, model: str, *, tracking_uri: str | None, device: torch.device, say: Callable[[str], None]
    ) -> None:
        """Loads it; raises what `open_network` does, ModelError if it does not work, RuntimeError of the device."""
        self._model = model
        self._tracking_uri = resolve_tracking_uri(tracking_uri) if model.startswith(REGISTRY_PREFIX) else None
        self._device = device
        self._say = say
        self._said: str | None = None
        self._bad_version: str | None = None
        self._polls_to_skip = self._skip_next = 0
        self._stopped = threading.Event()
        uri, registered = pinned(model, tracking_uri=self._tracking_uri)
        self._follows_alias = uri != model
        self._current = self._load(uri, registered)

    @property
    def current(self) -> Loaded:
        """The network that answers; hold on to it for the length of a request."""
        return self._current

    def watch(self, poll_s: float) -> None:
        """Looks at the alias every `poll_s` seconds from now on, in a thread; a version never changes."""
        if self._follows_alias:
            threading.Thread(target=self._watch, args=(poll_s,), name="watch-alias", daemon=True).start()

    def stop(self) -> None:
        """Ends `watch`."""
        self._stopped.set()

    def refresh(self, *, poll_s: float = 0.0) -> bool:
        """Looks at the alias once; True if another version answers from now on.

        Raises nothing: a registry that is away, an alias that is gone and a version that does not work leave everything
        as it is. A version that failed is tried again, at intervals that double up to five minutes (`poll_s` is how far
        calls are apart).
        """
        current = self._current.facts
        try:
            uri, registered = pinned(self._model, tracking_uri=self._tracking_uri)
        except (TrackingError, UpscalerError) as error:  # it is away, or the alias is gone
            self._say_once(f"{error}; {current.label()} goes on answering")
            return False
        if registered is None or registered.version == current.version:
            self._settled()
            return False
        if registered.version == self._bad_version and self._polls_to_skip > 0:
            self._polls_to_skip -= 1
            return False
        try:
            loaded = self._load(uri, registered)
        except Exception as error:  # noqa: BLE001  of damaged files, object stores and devices; the old one must go on
            self._put_off(registered.version, poll_s)
            reason = _reason(error).removeprefix(f"{uri}: ")
            self._say_once(f"{uri} can't be used ({reason}); {current.label()} goes on answering")
            return False
        self._current = loaded  # one assignment: a reader sees the old one or the new one
        self._said = None
        self._settled()
        scale = "" if loaded.facts.scale == current.scale else f", x{loaded.facts.scale} instead of x{current.scale}"
        self._say(f"{loaded.facts.label()} answers now, after version {current.version}{scale}")
        return True

    def _put_off(self, version: str, poll_s: float) -> None:
        """Says for how many polls a version that failed is left alone."""
        if version != self._bad_version:
            self._bad_version, self._skip_next = version, 0
        self._polls_to_skip = min(self._skip_next, int(_MAX_RETRY_S / poll_s) if poll_s else 0)
        self._skip_next = 2 * self._skip_next + 1

    def _watch(self, poll_s: float) -> None:
        while not self._stopped.wait(poll_s):
            try:
                self.refresh(poll_s=poll_s)
            except Exception as error:  # noqa: BLE001  the thread's end would mean that no champion is seen ever again
                label = self._current.facts.label()
                self._say_once(f"{self._model} could not be looked at ({_reason(error)}); {label} goes on answering")

    def _settled(self) -> None:
        self._bad_version, self._polls_to_skip = None, 0
        if self._said is not None:
            self._said = None
            self._say(f"the registry is as it should be again: {self._current.facts.label()}")

    def _say_once(self, message: str) -> None:
        """Once until something else is said, or all is well again: a poll comes every few seconds."""
        if message != self._said:
            self._said = message
            self._say(message)

    def _load(self, uri: str, registered: RegisteredVersion | None) -> Loaded:
        network = open_network(uri, tracking_uri=self._tracking_uri)
        facts = _facts(network, model=self._model, registered=registered)
        network = placed(network, self._device)
        _try(network, uri)
        return Loaded(network=network, facts=facts)


def _reason(error: Exception) -> str:
    """The first line; of what is not meant for users with its kind, without which a KeyError says nothing."""
    line = str(error).partition("\n")[0]
    return line if isinstance(error, _EXPECTED) else f"{type(error).__name__}: {line}"


def _facts(network: SRNetwork, *, model: str, registered: RegisteredVersion | None) -> ModelFacts:
    return ModelFacts(
        model=model,
        name=registered.name if registered else model.rstrip("/").rpartition("/")[2],
        version=registered.version if registered else None,
        scale=network.config.scale,
        architecture=architecture_name(network.config),
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        weights=weights_digest(network),
    )


def _try(network: SRNetwork, model: str) -> None:
    """A small forward pass; ModelError unless it gives finite numbers of the right shape."""
    parameter = next(network.parameters())
    ramp = torch.linspace(0.0, 1.0, _PROBE_PX_LR, device=parameter.device, dtype=parameter.dtype)
    with torch.inference_mode():
        sr_NCHW = network(ramp.expand(1, 3, _PROBE_PX_LR, _PROBE_PX_LR))
    side = network.config.scale * _PROBE_PX_LR
    if sr_NCHW.shape != (1, 3, side, side) or not bool(sr_NCHW.isfinite().all()):
        finite = "" if bool(sr_NCHW.isfinite().all()) else ", not all of them finite"
        raise ModelError(f"{model}: a ramp of {_PROBE_PX_LR} px became {tuple(sr_NCHW.shape)} numbers{finite}")
