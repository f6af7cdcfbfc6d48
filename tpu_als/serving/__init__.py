"""A fitted model: its tables and the values derived from them."""
