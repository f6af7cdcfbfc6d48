"""Input from the caller: canonical arrays, or an error that says what to do."""
