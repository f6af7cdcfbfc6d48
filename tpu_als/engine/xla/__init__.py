"""The XLA backend: devices, compiled programs, and collectives."""
