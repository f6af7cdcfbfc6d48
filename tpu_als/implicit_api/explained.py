"""A user and an item whose score `explain` and `explain_features` split."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from tpu_als import engine_options
from tpu_als.engine.cpu import systems
from tpu_als.engine.objective import Objective, confidence, ridge
from tpu_als.serving.factor_table import FactorTable
from tpu_als.serving.features import Prior, prior_for
from tpu_als.serving.fitted import FittedModel
from tpu_als.validation import arguments, matrices
from tpu_als.validation.structure import SparseMatrix


class ExplainedPair(NamedTuple):
    """What the explanation of a user's score of an item needs.

    Attributes
    ----------
    row : csr_matrix (1, N)
        The user's row.
    item : int
        The item.
    prior : Prior or None
        What the user is drawn to.
    objective : Objective
        Equations (1)-(2) of users.
    lam : float
        The user's ridge (2).
    liked : array (E, K)
        Factors of the user's items.
    wanted : float64 array (K,)
        Factors of the item.
    """

    row: sparse.csr_matrix
    item: int
    prior: Prior | None
    objective: Objective
    lam: float
    liked: np.ndarray
    wanted: np.ndarray

    @property
    def targets(self) -> np.ndarray:
        """Weighted targets v (E,) of the user's entries, in float64."""
        return confidence(self.objective, self.row.data.astype(np.float64))[1]

    def system(self, table: FactorTable) -> tuple[np.ndarray, np.ndarray]:
        """Matrix and right side of equation (1) for the user, without the prior."""
        gram, at = table.gramian().astype(np.float64), np.arange(self.row.nnz)
        return systems.system(self.liked, at, self.row.data, gram, self.objective, self.lam)

    def top(self, scores: np.ndarray, n: int) -> list[tuple[int, float]]:
        """The n items with the largest contributions (E,); disliked items are omitted."""
        row = self.row
        order = [i for i in np.argsort(-scores, kind="stable") if row.data[i] >= 0][:n]
        return [(int(row.indices[i]), float(scores[i])) for i in order]


def pair_of(
    estimator: Any,
    fitted: FittedModel,
    ids: tuple[int, int],
    user_items: SparseMatrix,
    user_features: Any,
) -> ExplainedPair:
    """Check the arguments of `explain`: the ids of a user and an item, rows, and features."""
    table, n_items = fitted.item, fitted.item.shape[0]
    user = arguments.one_id(ids[0], None, "userid")
    item = arguments.one_id(ids[1], n_items, "itemid")
    row = matrices.explained_row(user_items, user, n_items)
    prior = prior_for(fitted.features("user"), "user", user_features, 1)
    objective = engine_options.objective_for(estimator, prior is not None)
    lam = ridge(objective, float(row.nnz), float(n_items))
    wanted = table.rows(np.array([item]))[0].astype(np.float64)
    return ExplainedPair(row, item, prior, objective, lam, table.rows(row.indices), wanted)
