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


START_KEY = "start.txt"
"""Names the group of workers that trains: the last one that its driver has started."""


def claim_start(run: Store, owner: str) -> str:
    """Takes a driver's run for the workers that begin now, from those that began before: a node that was cut off comes
    back with workers that others have replaced. Returns the claim that `OwnedStore` checks.
    """
    _check_claim(run, OWNER_KEY, owner)
    start = uuid.uuid4().hex
    run.write(START_KEY, start.encode())
    return start


@dataclass(frozen=True, slots=True)
class OwnedStore(Store):
    """The checkpoints of a run that is this driver's and these workers': once others have claimed it, nothing is
    written or deleted.

    Two on one run (a job submitted again while it still runs) would delete each other's best checkpoint.
    """

    run: Store
    owner: str
    start: str

    def write(self, key: str, data: bytes) -> None:
        self._check()
        Store.write(self, key, data)

    def delete(self, key: str) -> None:
        self._check()
        Store.delete(self, key)

    def _check(self) -> None:
        _check_claim(self.run, OWNER_KEY, self.owner)
        _check_claim(self.run, START_KEY, self.start)


def _check_claim(run: Store, key: str, claim: str) -> None:
    if run.read_text(key) != claim:
        others = "another driver has" if key == OWNER_KEY else "workers that started later have"
        raise StorageError(f"{run.uri}: {others} taken this run over, so this one stops")
