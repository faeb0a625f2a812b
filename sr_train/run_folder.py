"""What lies where in a run's folder, on disk or in a bucket."""

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
