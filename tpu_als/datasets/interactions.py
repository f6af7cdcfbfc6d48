"""A matrix of interactions with the ids of its rows and columns, and results with those ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import sparse

from tpu_als.validation import arguments

_NO_ID = -1  # the id of a place without a result
_NO_SCORE = -3.4e38  # the score of a place without a result; the smallest float32 is below it


@dataclass(frozen=True, eq=False)
class Interactions:
    """A matrix of interactions, and the ids of its rows and columns.

    It unpacks as ``matrix, users, items``. Two objects are equal only if they are the same object.

    Attributes
    ----------
    matrix : csr_matrix of shape (n_users, n_items)
        float32; repeated interactions are summed.
    users : Index of shape (n_users,)
        User id of each row, in ascending order unless the ids were given.
    items : Index of shape (n_items,)
        Item id of each column, in ascending order unless the ids were given.
    """

    matrix: sparse.csr_matrix
    users: pd.Index
    items: pd.Index

    def __iter__(self) -> Iterator[Any]:
        """Yield the matrix, the user ids and the item ids."""
        return iter((self.matrix, self.users, self.items))

    def decode(
        self, ids: ArrayLike, scores: ArrayLike, userid: ArrayLike | None = None
    ) -> pd.DataFrame:
        """Convert the ids and scores that `recommend` returns to a table with item ids.

        Places without a result are dropped: id -1, and excluded items, whose score is -3.4e38. The
        result of `similar_items` is converted in the same way.

        Parameters
        ----------
        ids : array of int and shape (N,), or (n, N) for several queries
            Columns of the matrix; -1 for places without a result.
        scores : array of float and the same shape
            Their scores.
        userid : int or array-like of int, optional
            The rows of the matrix that were passed to `recommend`, in the same order.

        Returns
        -------
        DataFrame
            One row for each result, best first, with the columns

            * "user": the user's id, if `userid` is given; otherwise "query": the position of the
              query in the call, from 0, if there are several;
            * "item": the item's id;
            * "rank": from 1;
            * "score": as given.

        Raises
        ------
        ValueError
            For ids and scores of different shapes or of other types, NaN in the scores, or another
            number of users than rows of ids.
        IndexError
            For an id that is not a column of the matrix, or a user who is not a row.

        Examples
        --------
        >>> from tpu_als.datasets import interactions_from_frame
        >>> frame = pd.DataFrame({"who": ["ann", "bob", "ann"], "what": ["tea", "tea", "jam"]})
        >>> purchases = interactions_from_frame(frame, "who", "what")
        >>> purchases.decode([[0, -1], [-1, -1]], [[0.5, -3.4e38], [-3.4e38, -3.4e38]], [1, 0])
          user item  rank  score
        0  bob  jam     1    0.5
        """
        at, values = _checked(ids, scores, len(self.items))
        labels: dict[str, Any] = {}
        if userid is not None:
            rows, is_scalar, _ = arguments.ids_of(userid, len(self.users))
            if len(rows) != len(at) or is_scalar != (np.ndim(ids) == 1):
                raise ValueError(
                    f"userid must hold the users that were passed to recommend: got {len(rows)} "
                    f"for ids of shape {np.shape(ids)}"
                )
            labels["user"] = self.users.take(rows)
        elif np.ndim(ids) == 2:
            labels["query"] = pd.RangeIndex(len(at))
        is_result = (at != _NO_ID) & (values > _NO_SCORE)
        query = np.nonzero(is_result)[0]
        table = {name: index.take(query) for name, index in labels.items()}
        table["item"] = self.items.take(at[is_result])
        table["rank"] = np.cumsum(is_result, axis=1)[is_result]
        return pd.DataFrame({**table, "score": values[is_result]})


def _checked(ids: ArrayLike, scores: ArrayLike, n_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Check ids and scores, and return both with the shape (n, N)."""
    at, values = np.asarray(ids), np.asarray(scores)
    if at.ndim not in (1, 2) or at.shape != values.shape:
        raise ValueError(
            "ids and scores must be the two arrays that recommend returns, of the same shape (N,) "
            f"or (n, N), got shapes {at.shape} and {values.shape}"
        )
    if not at.size:
        at, values = at.astype(np.int64), values.astype(np.float32)
    if np.ma.is_masked(ids) or at.dtype.kind not in "iu" or values.dtype.kind not in "fiu":
        raise ValueError(
            "ids must hold integers and scores must hold numbers, without masked values, got "
            f"dtypes {at.dtype} and {values.dtype}. Is the order ids, scores?"
        )
    wrong = np.flatnonzero((at < _NO_ID) | (at >= n_items))
    if len(wrong):
        raise IndexError(
            f"id {at.flat[wrong[0]]} is not an item of this object, which has ids 0 to "
            f"{n_items - 1} ({len(wrong)} of {at.size} ids are out of range): decode with the "
            "object whose matrix the model was fitted to"
        )
    if np.isnan(values).any():
        raise ValueError(f"scores must not be NaN: {np.isnan(values).sum()} of {values.size} are")
    return np.atleast_2d(at), np.atleast_2d(values)
