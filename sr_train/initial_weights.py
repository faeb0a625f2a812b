"""Weights that a new run starts from: those of another model, as far as they fit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sr_models.architectures import build_model
from sr_models.weights import load_matching
from sr_train.config import TrainConfig
from sr_train.upscaler import open_network


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialWeights:
    """A whole state dict of the run's network, and how much of it was taken over."""

    state: Mapping[str, Tensor]
    origin: str
    num_loaded: int
    num_fresh: int

    def __str__(self) -> str:
        fresh = f", {self.num_fresh} newly initialised" if self.num_fresh else ""
        return f"{self.origin}: {self.num_loaded} tensors taken over{fresh}"


def load_initial_weights(config: TrainConfig[Any], *, tracking_uri: str) -> InitialWeights | None:
    """The weights of `checkpoint.init_from` in this run's network; None if it starts from its own initialisation.

    Raises UpscalerError, CheckpointError, StorageError or TrackingError if there is no such model, ModelError if it is
    of another kind or size.
    """
    origin = config.checkpoint.init_from
    if origin is None:
        return None
    other = open_network(origin, tracking_uri=tracking_uri)
    network = build_model(config.model, seed=config.optim.seed)
    report = load_matching(network, other.state_dict(), config=other.config)
    return InitialWeights(
        state=network.state_dict(), origin=origin, num_loaded=len(report.loaded), num_fresh=len(report.fresh)
    )
