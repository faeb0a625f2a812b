"""The network that answers now: follows an alias of the registry, and changes over only to a version that works."""

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass

import safetensors.torch
import torch

from sr_data.errors import StorageError
from sr_models.architectures import architecture_name, config_to_dict
from sr_models.errors import ModelError
from sr_models.inference import placed
from sr_models.network import SRNetwork
from sr_serve.messages import ModelFacts
from sr_train.checkpoint import CheckpointError
from sr_train.model_registry import version_at
from sr_train.tracking_server import TrackingError, resolve_tracking_uri
from sr_train.upscaler import REGISTRY_PREFIX, UpscalerError, open_network

_LOAD_ERRORS = (UpscalerError, ModelError, CheckpointError, StorageError, TrackingError, OSError, RuntimeError)
"""What makes a version unusable; RuntimeError is PyTorch's: no room on the device, a kernel that fails."""
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
        self._alias = _alias_of(model)
        self._said: str | None = None
        self._bad_version: str | None = None
        self._polls_to_skip = self._skip_next = 0
        self._stopped = threading.Event()
        self._current = self._load(self._version_now() if self._alias else _version_of(model))

    @property
    def current(self) -> Loaded:
        """The network that answers; hold on to it for the length of a request."""
        return self._current

    def watch(self, poll_s: float) -> None:
        """Looks at the alias every `poll_s` seconds from now on, in a thread; a version never changes."""
        if self._alias is not None:
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
        try:
            version = self._version_now()
        except TrackingError as error:
            self._say_once(f"the registry can't be asked ({error}); {self._current.facts.label()} goes on answering")
            return False
        if version is None:
            self._say_once(f"{self._model}: no version has this alias now; {self._current.facts.label()} goes on")
            return False
        if version == self._current.facts.version:
            self._settled()
            return False
        if version == self._bad_version and self._polls_to_skip > 0:
            self._polls_to_skip -= 1
            return False
        return self._change_to(version, poll_s)

    def _change_to(self, version: str, poll_s: float) -> bool:
        before = self._current.facts
        try:
            loaded = self._load(version)
        except _LOAD_ERRORS as error:
            if version != self._bad_version:
                self._bad_version, self._skip_next = version, 0
            longest = int(_MAX_RETRY_S / poll_s) if poll_s else 0
            self._polls_to_skip = min(self._skip_next, longest)
            self._skip_next = 2 * self._skip_next + 1
            reason = str(error).partition("\n")[0]
            self._say_once(f"{before.name} version {version} can't be used ({reason}); {before.label()} goes on")
            return False
        self._current = loaded  # one assignment: a reader sees the old one or the new one
        self._settled()
        scale = "" if loaded.facts.scale == before.scale else f", x{loaded.facts.scale} instead of x{before.scale}"
        self._say(f"{loaded.facts.label()} answers now, after version {before.version}{scale}")
        return True

    def _watch(self, poll_s: float) -> None:
        while not self._stopped.wait(poll_s):
            self.refresh(poll_s=poll_s)

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

    def _version_now(self) -> str | None:
        if self._alias is None or self._tracking_uri is None:
            return self._current.facts.version
        return version_at(self._tracking_uri, *self._alias)

    def _load(self, version: str | None) -> Loaded:
        # By version: the alias may move on between asking and loading. Without one (no such alias), the error is made.
        name = self._alias[0] if self._alias else self._model.removeprefix(REGISTRY_PREFIX).partition("/")[0]
        registered = version is not None
        model = f"{REGISTRY_PREFIX}{name}/{version}" if registered else self._model
        network = open_network(model, tracking_uri=self._tracking_uri)
        facts = _facts(network, model=self._model, name=name if registered else _last(self._model), version=version)
        network = placed(network, self._device)
        _try(network, model)
        return Loaded(network=network, facts=facts)


def weights_digest(network: SRNetwork) -> str:
    """16 hex digits over architecture, config and weights: what registration puts into the tag `weights_sha256`."""
    config = network.config
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    weights = hashlib.sha256(safetensors.torch.save(state)).hexdigest()
    parts = [architecture_name(config), config_to_dict(config), weights]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _facts(network: SRNetwork, *, model: str, name: str, version: str | None) -> ModelFacts:
    return ModelFacts(
        model=model,
        name=name,
        version=version,
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


def _alias_of(model: str) -> tuple[str, str] | None:
    """(name, alias) of `models:/name@alias`; None for any other MODEL."""
    name, at, alias = model.removeprefix(REGISTRY_PREFIX).partition("@")
    return (name, alias) if model.startswith(REGISTRY_PREFIX) and at and name and alias else None


def _version_of(model: str) -> str | None:
    """Of `models:/name/version`; None for any other MODEL."""
    _, _, version = model.removeprefix(REGISTRY_PREFIX).rpartition("/")
    return version if model.startswith(REGISTRY_PREFIX) and version.isdecimal() else None


def _last(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]
