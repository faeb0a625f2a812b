"""What lies where in a run's folder, on disk or in a bucket."""

import errno
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
"""Names the group of workers that trains: the driver's claim, and the number of the newest start that wrote there."""


class TakenOverError(StorageError):
    """The run is another driver's by now, or that of workers that started later."""


def claim_start(run: Store, owner: str, start: int) -> None:
    """Takes a driver's run for the workers of its start of that number, from those that began before: a node that was
    cut off comes back with workers that others have replaced.

    Raises TakenOverError if the run is another driver's, or if a later start has taken it: who was cut off may have
    waited for storage as long.
    """
    _check_claims(run, owner, start)
    run.write(START_KEY, f"{owner} {start}".encode())


def is_owned(run: Store, owner: str) -> bool:
    """Whether the run is still that driver's. StorageError where storage can't tell."""
    return run.read_text(OWNER_KEY) == owner


def seems_owned(uri: str, owner: str) -> bool:
    """Whether no other driver has taken the run in that folder over, as far as storage can tell."""
    try:
        return is_owned(open_store(uri), owner)
    except StorageError:
        return True


@dataclass(frozen=True, slots=True)
class OwnedStore(Store):
    """The checkpoints of a run that is this driver's and these workers': once others have claimed it, nothing is
    written or deleted.

    Two on one run (a job submitted again while it still runs) would delete each other's best checkpoint.
    """

    run: Store
    owner: str
    start: int

    def write(self, key: str, data: bytes) -> None:
        self._check()
        Store.write(self, key, data)

    def delete(self, key: str) -> None:
        self._check()
        Store.delete(self, key)

    def _check(self) -> None:
        _check_claims(self.run, self.owner, self.start)


def _check_claims(run: Store, owner: str, start: int) -> None:
    if not is_owned(run, owner):
        raise TakenOverError(f"{run.uri}: another driver has taken this run over, so this one stops")
    if _newest_start(run, owner) > start:
        raise TakenOverError(f"{run.uri}: workers that started later have taken this run over, so this one stops")


def _newest_start(run: Store, owner: str) -> int:
    """Of that driver's, as far as it is known; 0 where another's is written, which may have come late."""
    try:
        held_by, _, number = run.read_text(START_KEY).partition(" ")
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise
        return 0
    return int(number) if held_by == owner else 0
