"""How training works: loop, losses, metrics, checkpoints, tracking, and the Ray Train glue."""
