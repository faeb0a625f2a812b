"""From a dataset's URI to batches of aligned LR/HR patches."""
