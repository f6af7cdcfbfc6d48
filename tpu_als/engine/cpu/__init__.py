"""The CPU backend: compiled loops over rows as they come. Nothing here imports JAX."""
