"""Files: atomic writes, tensors, checkpoints, fingerprints."""
