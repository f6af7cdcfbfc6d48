"""A fit in progress: the loop over iterations, early stopping, checkpoints."""
