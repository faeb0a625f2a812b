"""Everything of a run in one atomic file, and which files are kept.

One safetensors file per checkpoint: tensors as `GROUP/NAME`, all the rest as JSON in the file's header. One file is one
write, so on object storage and on disk a checkpoint is there whole or not at all; reading it runs no code.
"""

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from sr_data.storage import Store
from sr_models.architectures import config_from_dict
from sr_models.network import ModelConfig

FORMAT = 1
_SUFFIX = ".safetensors"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another kind than asked for; the message names it."""


@dataclass(frozen=True)
class Checkpoint:
    """All of a run at one step."""

    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    """Groups of named tensors: "model", "ema" (where there is one), "optimizer"."""
    meta: Mapping[str, Any]
    """Plain JSON: step, patches_seen, architecture, model_config, config, best, and what else the run needs to go
    on."""

    @property
    def step(self) -> int:
        return int(self.meta["step"])


def key_of_step(step: int) -> str:
    """`step-000001234.safetensors`; sorting keys sorts steps."""
    return f"step-{step:09d}{_SUFFIX}"


def step_of_key(key: str) -> int | None:
    """The step in a checkpoint's key; None for any other file."""
    stem = key.removeprefix("step-").removesuffix(_SUFFIX)
    return int(stem) if key == f"step-{stem}{_SUFFIX}" and stem.isdigit() else None


def checkpoint_bytes(checkpoint: Checkpoint) -> bytes:
    """The file that `write_checkpoint` writes."""
    flat = {
        f"{group}/{name}": tensor.detach().cpu().contiguous()
        for group, tensors in checkpoint.tensors.items()
        for name, tensor in tensors.items()
    }
    header = {"format": str(FORMAT), "meta": json.dumps(checkpoint.meta, sort_keys=True)}
    return save(flat, header)


def write_checkpoint(store: Store, checkpoint: Checkpoint) -> str:
    """Writes it whole or raises StorageError and leaves what was there; returns its key."""
    key = key_of_step(checkpoint.step)
    store.write(key, checkpoint_bytes(checkpoint))
    return key


def read_checkpoint(store: Store, key: str) -> Checkpoint:
    """Raises StorageError if it can't be fetched, CheckpointError if it is no checkpoint of ours."""
    data = store.read(key)
    try:
        flat = load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{store.uri_of(key)}: not a whole safetensors file ({error})") from error
    if header.get("format") != str(FORMAT):
        found = header.get("format", "none")
        raise CheckpointError(f"{store.uri_of(key)}: checkpoint format {found}, this version reads {FORMAT}")
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in flat.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = tensor
    return Checkpoint(tensors=groups, meta=json.loads(header["meta"]))


def list_keys(store: Store) -> list[str]:
    """Keys of all checkpoints in the store, oldest first; none if the folder does not exist yet."""
    return sorted(entry.key for entry in store.list() if step_of_key(entry.key) is not None)


def latest_key(store: Store) -> str | None:
    """Key of the newest checkpoint; None if there is none."""
    keys = list_keys(store)
    return keys[-1] if keys else None


def newest_whole(store: Store) -> str | None:
    """Key of the newest checkpoint that can be read; None if there is none at all.

    A damaged one (a disk that lies, a file edited by hand) is passed over with a warning: an older one costs some
    steps. CheckpointError if all are damaged.
    """
    damaged: list[str] = []
    for key in reversed(list_keys(store)):
        try:
            read_checkpoint(store, key)
        except CheckpointError as error:
            logging.getLogger(__name__).warning("passed over: %s", error)
            damaged.append(str(error))
        else:
            return key
    if damaged:
        raise CheckpointError(f"no checkpoint of this run is whole: {'; '.join(damaged)}")
    return None


def keep(store: Store, *, last: int, spared: Collection[str]) -> list[str]:
    """Deletes all but the newest `last` checkpoints and those spared (the best one); returns what was deleted."""
    keys = list_keys(store)
    spare = [key for key in keys[: max(0, len(keys) - last)] if key not in spared]
    for key in spare:
        store.delete(key)
    return spare


def inference_weights(checkpoint: Checkpoint) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """The network's config and the weights to use it with: the moving average where the run kept one."""
    weights = checkpoint.tensors.get("ema") or checkpoint.tensors["model"]
    return config_from_dict(checkpoint.meta["architecture"], checkpoint.meta["model_config"]), dict(weights)
