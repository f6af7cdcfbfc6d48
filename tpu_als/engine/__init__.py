"""ALS over arrays: pure functions for one CPU, one accelerator, or a pod."""
