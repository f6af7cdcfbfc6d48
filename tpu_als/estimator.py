"""The estimator: parameters and `fit`, by the conventions of scikit-learn and implicit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import numpy as np
from scipy import sparse
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import metadata_routing

from tpu_als import engine_options, parameters
from tpu_als.evaluation.metrics import popularity_of
from tpu_als.implicit_api.attributes import Attributes
from tpu_als.implicit_api.new_rows import NewRows
from tpu_als.implicit_api.ranking import Ranking
from tpu_als.implicit_api.saving import Saving
from tpu_als.implicit_api.side_features import SideFeatures
from tpu_als.serving.fitted import FittedModel
from tpu_als.shards import ShardedMatrix
from tpu_als.training import initial, loop, preparing, progress
from tpu_als.transforming import Transforming
from tpu_als.validation import arguments
from tpu_als.validation.estimators import checked_rows

__all__ = ["TPUAlternatingLeastSquares"]


@parameters.with_defaults
class TPUAlternatingLeastSquares(
    Ranking,
    NewRows,
    SideFeatures,
    Saving,
    Transforming,
    Attributes,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    BaseEstimator,
):
    """Alternating least squares for implicit feedback, on one or many devices.

    Replaces ``implicit.als.AlternatingLeastSquares`` and is a scikit-learn transformer. Rows are
    users, columns are items, and stored values are confidences.

    Parameters
    ----------
    factors : int, default=100
        Number of latent factors.
    regularization : float, default=0.01
        Ridge of every row's system.
    alpha : float, default=1.0
        The stored values are multiplied by it.
    dtype : np.float32, np.float64 or "bfloat16", default=np.float32
        Dtype of the tables in `fit`. "bfloat16" halves their memory; sums, and the factors that
        you read, are float32.
    use_native : bool, default=True
        Whether a CPU runs loops compiled by numba, without JAX, instead of XLA's programs. They
        give the same result up to rounding, in less time. In `fit` they need "cg" or "exact", and a
        single process. Several CPU devices then become threads, unless `table_layout` is set. Where
        numba does not load, one DataWarning says so and XLA does the work.
    use_cg : bool, default=True
        Whether `linear_solver=None` means "cg" rather than "exact".
    iterations : int, default=15
        Number of iterations, each of which solves all users and then all items.
    calculate_training_loss : bool, default=False
        Compute the loss of each iteration, for `history_`, the callback, the progress bar and the
        log.
    num_threads : int, default=0
        Threads on a CPU; 0 means all cores that the process may use, by its affinity, its control
        group and LOKY_MAX_CPU_COUNT. The number is limited to 16 or the number of cores, whichever
        is larger, as more threads do not help. If JAX has several CPU devices and they are used,
        each is one thread.
    random_state : int, RandomState, Generator or None, default=None
        Seed of the initial tables; an integer gives the same ones as in implicit.
    objective : {"implicit", "ials"}, default="implicit"
        Hu, Koren, Volinsky (2008) in implicit's convention, where a negative value is a dislike; or
        iALS of Rendle et al. (2022), which adds the loss of an entry to the unobserved term.
    unobserved_weight : float, default=1.0
        Weight of a cell without an entry.
    regularization_exponent : float, default=None
        The ridge of a row with n entries is ``regularization * (n + unobserved_weight *
        n_columns) ** regularization_exponent``. None means 0 for "implicit" and 1 for "ials".
    linear_solver : {None, "auto", "cg", "exact", "cholesky"}, default=None
        How the rows' systems are solved in `fit`. Fold-in is always exact. None means "cg", unless
        `use_cg` is False. "exact" solves each row to rounding: on a CPU by CG to convergence,
        elsewhere by "cholesky". "auto" chooses "cg" or "cholesky", whichever a cost model predicts
        to be faster. If `regularization` and `unobserved_weight` are negligible beside `alpha`, the
        others mean "cholesky".
    cg_steps : int, default=3
        Steps of "cg".
    feature_regularization : float, default=1.0
        Ridge of the weights of features, at least 0, for a fit with `user_features` or
        `item_features`. Larger values shrink the effect of features, of rare ones first.
    feature_weight : float, default=1.0
        Above 0. On a side with features, `regularization` is multiplied by it. The ridge draws rows
        to what their features predict, so that a larger weight relies more on features.
    devices : None, int, list of jax.Device or jax.sharding.Mesh, default=None
        None uses all devices of JAX's default backend if JAX may have an accelerator or other
        processes (see Notes); otherwise it uses the CPU without JAX. 1 chooses in the same way and
        uses one device. A larger number n uses the first n devices of JAX.
    table_layout : {"auto", "replicated", "sharded"}, default="auto"
        How several devices store the table that is fixed in a half-epoch. "replicated": each has a
        copy. "sharded": each has a part, and rows are sent where they are needed. "auto" chooses by
        a device's memory.
    over_relaxation : float, default=1.0
        How far `fit` moves rows towards their solution, between 0 and 2. 1 is plain ALS; 1.6
        reaches the same loss in about half the iterations. The first and last iteration use 1.
    warm_start : bool, default=False
        Start `fit` from the current tables, as implicit always does.
    use_gpu : bool, default=None
        True requires that JAX runs on a GPU. None and False have no effect: use `devices`.
    early_stopping : bool, default=False
        Stop when NDCG@10 on held-out entries no longer rises, and keep the best tables.
    validation_fraction : float, default=0.1
        Part of each row's entries to hold out for early stopping.
    n_iter_no_change : int, default=3
        Iterations without improvement before stopping.
    tol : float, default=1e-4
        Smallest gain in NDCG@10 that counts as improvement.
    approximate_recall : float, default=None
        Between 0 and 1: the expected fraction of the best items that an approximate ranking of many
        queries finds. Faster on a TPU; other devices always rank exactly. None ranks exactly.
    checkpoint_dir : str or path-like, default=None
        Directory or bucket to save checkpoints in. A fit with the same parameters and data resumes
        from it, also on other devices. Fits with other parameters or data may share the directory:
        each has its own folder, and three of them are kept besides that of the current fit. Needs
        the extra ``checkpoint``, and imports JAX.
    checkpoint_every : int, default=1
        Iterations between checkpoints. The last iteration is always saved; the latest three
        checkpoints are kept.
    verbose : bool, default=None
        Whether `fit` shows a progress bar if its `show_progress` is None. None shows it on a
        terminal and in a notebook. The environment variable TQDM_DISABLE=1 always hides it.

    Attributes
    ----------
    user_factors : ndarray of shape (n_users, factors)
        User table; None before fit. The next fit starts from an assigned table.
    item_factors : ndarray of shape (n_items, factors)
        Item table; as `user_factors`.
    n_features_in_ : int
        Number of items.
    feature_names_in_ : ndarray of str and shape (n_items,)
        Column names, if `fit` was given a DataFrame with string names.
    item_popularity_ : ndarray of int and shape (n_items,)
        For each item, the number of users with a positive entry, if `fit` was given a matrix in
        memory.
    n_iter_ : int
        Number of iterations run.
    history_ : dict of list
        Per iteration, "seconds"; "loss" with `calculate_training_loss`; "ndcg" with
        `early_stopping`.

    Notes
    -----
    On a CPU, fit, fold-in, ranking, `save` and `load` do not import JAX, so the process may be
    forked. JAX is imported for `devices` other than None and 1, ``use_gpu=True``,
    ``use_native=False`` and a `table_layout` other than "auto"; in `fit` also for
    `checkpoint_dir` and a `ShardedMatrix` whose tables are drawn; after
    ``jax.distributed.initialize()``; and if a JAX plugin for an accelerator is installed, unless
    the environment has ``JAX_PLATFORMS=cpu``.

    `YtY`, `XtX`, the norms and copies of tables on an accelerator are computed once. They are
    computed again after a table is fitted or assigned. After writing into a table, assign it again:
    ``model.item_factors = model.item_factors``.

    A progress bar or callback costs little: tables are copied from the devices only when read. A
    subclass may have additional parameters. Parameters of this class that it does not set have
    their defaults.

    References
    ----------
    .. [1] Hu, Koren, Volinsky. Collaborative filtering for implicit feedback datasets. ICDM 2008.
    .. [2] Mehta, Rendle, Krichene, Zhang. ALX: large scale matrix factorization on TPUs. 2021.
    .. [3] Rendle, Krichene, Zhang, Koren. Revisiting the performance of iALS on item
       recommendation benchmarks. RecSys 2022.

    Examples
    --------
    >>> from scipy.sparse import csr_matrix
    >>> from tpu_als import TPUAlternatingLeastSquares
    >>> plays = csr_matrix([[3, 1, 0, 0], [1, 4, 1, 0], [0, 0, 2, 5]])
    >>> model = TPUAlternatingLeastSquares(factors=2, alpha=10, random_state=0)
    >>> ids, scores = model.fit(plays, show_progress=False).recommend(0, plays[0], N=2)
    >>> ids.tolist()
    [2, 3]
    """

    # As in implicit, `fit` calls this if it gets no callback.
    fit_callback: Callable[[int, float, float | None], Any] | None = None
    # Identity of the data of the last fit, and whether a repeated fit on them has warned.
    _fitted_to: tuple[initial.Identity, bool] | None = None
    # The first argument of `fit` is not called X, so scikit-learn would take it for metadata.
    __metadata_request__fit = {"user_items": metadata_routing.UNUSED}  # noqa: RUF012

    def __init__(
        self,
        factors: int = 100,
        regularization: float = 0.01,
        alpha: float = 1.0,
        dtype: Any = np.float32,
        use_native: bool = True,
        use_cg: bool = True,
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
        warm_start: bool = False,
        use_gpu: bool | None = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 3,
        tol: float = 1e-4,
        approximate_recall: float | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 1,
        verbose: bool | None = None,
    ) -> None:
        self.factors = factors
        self.regularization = regularization
        self.alpha = alpha
        self.dtype = dtype
        self.use_native = use_native
        self.use_cg = use_cg
        self.iterations = iterations
        self.calculate_training_loss = calculate_training_loss
        self.num_threads = num_threads
        self.random_state = random_state
        self.objective = objective
        self.unobserved_weight = unobserved_weight
        self.regularization_exponent = regularization_exponent
        self.linear_solver = linear_solver
        self.cg_steps = cg_steps
        self.feature_regularization = feature_regularization
        self.feature_weight = feature_weight
        self.devices = devices
        self.table_layout = table_layout
        self.over_relaxation = over_relaxation
        self.warm_start = warm_start
        self.use_gpu = use_gpu
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.approximate_recall = approximate_recall
        self.checkpoint_dir = checkpoint_dir
        self.checkpoint_every = checkpoint_every
        self.verbose = verbose

    def fit(
        self,
        user_items: Any,
        y: object = None,
        show_progress: bool | None = None,
        callback: Callable[[int, float, float | None], Any] | None = None,
        *,
        user_features: Any = None,
        item_features: Any = None,
    ) -> Self:
        """Factorize a matrix of users by items.

        Parameters
        ----------
        user_items : csr_matrix, csr_array or array-like of shape (n_users, n_items)
            Confidences. Stored zeros are entries, duplicates are summed, and values are converted
            to float32. Other sparse formats are converted, with a ParameterWarning. Or a
            `tpu_als.shards.ShardedMatrix`, of which each process reads its part; the initial
            tables are then drawn on the devices.
        y : None
            Ignored. A bool is treated as `show_progress`, so that implicit's positional calls work.
        show_progress : bool, default=None
            Whether to show a progress bar. None follows the parameter `verbose`.
        callback : callable, optional
            Called as ``callback(iteration, seconds, loss)`` after each iteration; loss is None
            unless computed. It may use the model, which has the factors of that iteration. To stop
            the fit, raise an error: `fit` raises it too, and the model keeps the last iteration.
        user_features, item_features : matrix, DataFrame or FeatureTable, optional
            Numbers that describe the users, (n_users, n_user_features), and the items, (n_items,
            n_item_features). The ridge then draws the factors of a row to a linear function of its
            features, which is fitted too. Rows without entries get the value of that function, so
            that new items can be recommended. docs/math.md has the equations.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For parameters or data out of range, before any work; if all checkpoints are damaged.
        ModelFitError
            If factors became infinite or NaN. The model stays as it was before the call.
        RuntimeError
            If another process of the job has ended.
        """
        given = (y, show_progress, callback, self.fit_callback)
        show_progress, callback = arguments.fit_arguments(*given)
        arguments.warn_if_converted(user_items)
        with contextlib.ExitStack() as at_exit:
            at_exit.callback(lambda: self._fitted.settle())
            params = engine_options.training_params(self)
            rows, fitted = self._interactions(user_items)
            features = preparing.feature_tables(self, rows.shape, user_features, item_features)
            training = preparing.prepare(self, rows, fitted, params, features, at_exit)
            hides = training.hides_progress or progress.is_disabled(show_progress, self.verbose)
            with progress.bar(self.iterations, training.done, hides) as bar:
                loop.run(self, training, fitted, callback, bar)
            self._fitted_to = training.fitted_to
        return self

    def fit_transform(
        self, X: Any, y: object = None, *, user_features: Any = None, item_features: Any = None
    ) -> np.ndarray:
        """Fit to a matrix and return the factors of its rows: `fit`, and then `transform`.

        Parameters
        ----------
        X, y, user_features, item_features
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_users, factors)
        """
        self.fit(X, y, user_features=user_features, item_features=item_features)
        return self.transform(X, user_features=user_features)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = []  # only the model's own dtype is preserved
        with contextlib.suppress(ValueError):
            name = parameters.storage_dtype(self.dtype)
            tags.transformer_tags.preserves_dtype = [name.replace("bfloat16", "float32")]
        return tags

    def _interactions(
        self, user_items: Any
    ) -> tuple[sparse.csr_matrix | ShardedMatrix, FittedModel]:
        """Check the data of `fit`; return them and a new fitted model with their columns."""
        before = vars(self).get("_fitted")
        view = self._view(FittedModel() if before is None else FittedModel(lock=before.lock))
        if not isinstance(user_items, ShardedMatrix):
            rows = checked_rows(view, user_items, "user_items", reset=True)
            return rows, replace(view._fitted, popularity=popularity_of(rows))
        if self.early_stopping:
            raise ValueError(
                "early_stopping=True needs a matrix in memory, got a ShardedMatrix: set it to "
                "False, and measure on held_out() in a callback"
            )
        return user_items, replace(view._fitted, n_features=user_items.shape[1])


# implicit's wrappers check for its class; it is an ABC, so no inheritance is needed.
with contextlib.suppress(ImportError):
    from implicit.cpu.als import AlternatingLeastSquares as _Implicit

    _Implicit.register(TPUAlternatingLeastSquares)


def __dir__() -> list[str]:
    return sorted(__all__)
