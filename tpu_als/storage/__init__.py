"""Files: models, atomic writes, locks."""
