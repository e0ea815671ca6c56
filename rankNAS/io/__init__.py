"""Input and output: atomic writes, tensors, checkpoints, fingerprints."""
