"""Super-resolution networks, their configs, their weights, and how to apply them to images."""
