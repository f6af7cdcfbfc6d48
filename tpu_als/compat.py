"""The estimator with implicit's behaviour wherever scikit-learn's conventions differ."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from tpu_als.estimator import TPUAlternatingLeastSquares

__all__ = ["AlternatingLeastSquares"]


class AlternatingLeastSquares(TPUAlternatingLeastSquares):
    """`TPUAlternatingLeastSquares` with the behaviour that code written for implicit expects.

    Parameters are in the order of the function ``implicit.als.AlternatingLeastSquares``, with
    `use_gpu` before `iterations`. `warm_start` is True by default: each call of `fit` continues
    from the current tables, so that 15 fits of one iteration equal one fit of 15. If the matrix has
    more rows or columns than the tables, factors of the new ones are drawn; if it has fewer, `fit`
    raises a ValueError. With ``warm_start=False`` each fit starts from new tables. Everything else,
    including the description of the parameters, is as in `TPUAlternatingLeastSquares`.

    Examples
    --------
    >>> from scipy.sparse import csr_matrix
    >>> from tpu_als.compat import AlternatingLeastSquares
    >>> plays = csr_matrix([[3, 1, 0, 0], [1, 4, 1, 0], [0, 0, 2, 5]])
    >>> model = AlternatingLeastSquares(factors=2, alpha=10, iterations=1, random_state=0)
    >>> for _ in range(15):
    ...     _ = model.fit(plays, show_progress=False)
    >>> model.recommend(0, plays[0], N=2)[0].tolist()
    [2, 3]
    """

    def __init__(
        self,
        factors: int = 100,
        regularization: float = 0.01,
        alpha: float = 1.0,
        dtype: Any = np.float32,
        use_native: bool = True,
        use_cg: bool = True,
        use_gpu: bool | None = None,
        iterations: int = 15,
        calculate_training_loss: bool = False,
        num_threads: int = 0,
        random_state: Any = None,
        *,
        objective: str = "implicit",
        unobserved_weight: float = 1.0,
        regularization_exponent: float | None = None,
        linear_solver: str | None = None,
        cg_steps: int = 3,
        feature_regularization: float = 1.0,
        feature_weight: float = 1.0,
        devices: Any = None,
        table_layout: str = "auto",
        over_relaxation: float = 1.0,
        warm_start: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 3,
        tol: float = 1e-4,
        approximate_recall: float | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 1,
        verbose: bool | None = None,
    ) -> None:
        super().__init__(
            factors=factors,
            regularization=regularization,
            alpha=alpha,
            dtype=dtype,
            use_native=use_native,
            use_cg=use_cg,
            use_gpu=use_gpu,
            iterations=iterations,
            calculate_training_loss=calculate_training_loss,
            num_threads=num_threads,
            random_state=random_state,
            objective=objective,
            unobserved_weight=unobserved_weight,
            regularization_exponent=regularization_exponent,
            linear_solver=linear_solver,
            cg_steps=cg_steps,
            feature_regularization=feature_regularization,
            feature_weight=feature_weight,
            devices=devices,
            table_layout=table_layout,
            over_relaxation=over_relaxation,
            warm_start=warm_start,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            n_iter_no_change=n_iter_no_change,
            tol=tol,
            approximate_recall=approximate_recall,
            checkpoint_dir=checkpoint_dir,
            checkpoint_every=checkpoint_every,
            verbose=verbose,
        )


def __dir__() -> list[str]:
    return sorted(__all__)
