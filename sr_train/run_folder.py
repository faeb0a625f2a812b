"""What lies where in a run's folder, on disk or in a bucket."""

import uuid
from dataclasses import dataclass

from sr_data.errors import StorageError
from sr_data.storage import Store, open_store

CONFIG_KEY = "config.json"
"""The resolved config; its presence says that the run exists."""
DATASETS_KEY = "datasets.json"
"""Fingerprints of what it is trained and validated on."""
TRACKING_KEY = "tracking.json"
"""The MLflow run that belongs to it."""
RESULT_KEY = "result.json"
"""How the run ended: scores, best checkpoint, registered version."""
COMPARISON_KEY = "comparison.png"
"""LR, bicubic, SR and HR of a validation image, by the best checkpoint."""


def checkpoint_store(run_uri: str) -> Store:
    """Where a run's checkpoints lie."""
    return open_store(f"{run_uri}/checkpoints")


OWNER_KEY = "owner.txt"
"""Names the driver that the run belongs to: the last one that was started for it."""


def claim(run: Store) -> str:
    """Takes the run for this driver, from whichever had it; returns the claim that `OwnedStore` checks."""
    owner = uuid.uuid4().hex
    run.write(OWNER_KEY, owner.encode())
    return owner


@dataclass(frozen=True, slots=True)
class OwnedStore(Store):
    """The checkpoints of a run that is this driver's: once another driver has claimed it, nothing is written or
    deleted.

    Two drivers on one run (a job submitted again while it still runs) would delete each other's best checkpoint.
    """

    run: Store
    owner: str

    def write(self, key: str, data: bytes) -> None:
        self._check()
        Store.write(self, key, data)

    def delete(self, key: str) -> None:
        self._check()
        Store.delete(self, key)

    def _check(self) -> None:
        if self.run.read_text(OWNER_KEY) != self.owner:
            raise StorageError(f"{self.run.uri}: another driver has taken this run over, so this one stops")
