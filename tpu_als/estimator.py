"""The estimator: parameters, the fit, and scikit-learn's and implicit's rules around it."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import numpy as np
from scipy import sparse
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import metadata_routing
from sklearn.utils.validation import validate_data

from . import _digest, holdout, initial, parameters, placing, progress, structure, validation
from ._saving import Saving
from ._serving import Serving
from ._training import Training, settings_of
from .checkpoint import Checkpoints
from .early_stopping import EarlyStopping
from .fitted import FactorTable, FittedModel, tables_of
from .metrics import popularity_of
from .refusals import require_matrix
from .resident import Table
from .shards import ShardedMatrix

log = logging.getLogger("tpu_als")


@parameters.with_defaults
class TPUAlternatingLeastSquares(
    Serving, Saving, ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator
):
    """Alternating least squares for implicit feedback, on one or many devices.

    Takes the place of ``implicit.als.AlternatingLeastSquares`` and is a scikit-learn transformer:
    rows are users, columns are items, and stored values are confidences.

    Parameters
    ----------
    factors : int, default=100
        Number of latent factors.
    regularization : float, default=0.01
        Ridge of every row's system.
    alpha : float, default=1.0
        Factor on the stored values.
    dtype : np.float32, np.float64 or "bfloat16", default=np.float32
        Storage of the tables in `fit`. With "bfloat16" sums are float32, and so is what one reads.
    use_native : bool, default=True
        Whether "cg" runs on a CPU in loops that numba compiles, with the same result in less time,
        where the extra ``native`` is installed and one process works in float32 or float64; several
        CPU devices then work as threads, unless `table_layout` says how a table should lie on them.
    use_cg : bool, default=True
        Whether `linear_solver=None` means "cg" rather than "cholesky".
    iterations : int, default=15
        Number of iterations, each of which solves all users and then all items.
    calculate_training_loss : bool, default=False
        Compute the loss at each iteration, for `history_`, the callback, the bar and the log.
    num_threads : int, default=0
        Threads on a single CPU device; 0 means all cores that the process may use, by its affinity,
        its control group and LOKY_MAX_CPU_COUNT. More than 16, and than cores, help nothing and
        are cut down.
    random_state : int, RandomState, Generator or None, default=None
        Seed of the initial tables; an integer gives the same ones as in implicit.
    objective : {"implicit", "ials"}, default="implicit"
        Hu, Koren, Volinsky (2008) in implicit's convention, where a negative value is a dislike;
        or iALS of Rendle et al. (2022), where an observed cell pays on top of the unobserved term.
    unobserved_weight : float, default=1.0
        Weight of a cell without an entry.
    regularization_exponent : float, default=None
        The ridge of a row with n entries is ``regularization * (n + unobserved_weight *
        n_columns) ** regularization_exponent``. None means 0 for "implicit" and 1 for "ials".
    linear_solver : {None, "auto", "cg", "cholesky", "subspace"}, default=None
        How the rows' systems are solved in `fit`. Fold-in is always exact.
    cg_steps : int, default=3
        Steps of "cg".
    devices : None, int, list of jax.Device or jax.sharding.Mesh, default=None
        None takes all devices of JAX's default backend, a number the first so many.
    table_layout : {"auto", "replicated", "sharded"}, default="auto"
        How the table held fixed stands on several devices: a copy on each for a half-epoch, or in
        parts, rows travelling to where they are needed. "auto" goes by a device's memory.
    over_relaxation : float, default=1.0
        How far `fit` moves rows towards their solution. 1 is ALS; 1.6 takes about half as many
        iterations to the same loss. Between 0 and 2; the first and last of `iterations` use 1.
    warm_start : bool, default=False
        Start `fit` from the present tables, as implicit always does.
    use_gpu : bool, default=None
        True requires that JAX runs on a GPU; None and False leave JAX's choice.
    block_size : int, default=64
        Factors that a block solver solves at once.
    early_stopping : bool, default=False
        Stop when NDCG@10 on held-out entries no longer rises, and keep the best tables.
    validation_fraction : float, default=0.1
        Part of each row's entries to hold out for early stopping.
    n_iter_no_change : int, default=3
        Iterations without improvement before stopping.
    tol : float, default=1e-4
        Least gain in NDCG@10 that counts as improvement.
    approximate_recall : float, default=None
        Between 0 and 1: rank many queries approximately, expecting to find this part of the best
        items. Faster on a TPU; other devices rank exactly all the same. None ranks exactly.
    checkpoint_dir : str or path-like, default=None
        Directory, or bucket, from which `fit` resumes where it was cut off with the same
        parameters and data, be it on other devices. Others may share it: each has a folder of its
        own, of which three stay besides the latest. Needs the extra ``checkpoint``.
    checkpoint_every : int, default=1
        Iterations between checkpoints, of which the last three are kept; the last is always made.
    verbose : bool, default=None
        Whether `fit` shows a bar where its `show_progress` is None. None shows it on a terminal and
        in a notebook. The environment variable TQDM_DISABLE=1 hides it in any case.

    Attributes
    ----------
    user_factors : ndarray of shape (n_users, factors)
        User table; None before fit. One that is assigned is where the next fit starts.
    item_factors : ndarray of shape (n_items, factors)
        Item table; likewise.
    n_features_in_ : int
        Number of items.
    feature_names_in_ : ndarray of str and shape (n_items,)
        Column names, where `fit` saw a DataFrame with string names.
    item_popularity_ : ndarray of int and shape (n_items,)
        Users with a positive entry for each item, where `fit` saw a matrix in memory.
    n_iter_ : int
        Iterations run.
    history_ : dict of list
        Per iteration, "seconds"; "loss" with `calculate_training_loss`; "ndcg" with
        `early_stopping`.

    Notes
    -----
    A bar or a callback costs nothing to speak of; tables leave the devices when they are read.
    A subclass may have further parameters; those of these that it does not set have their defaults.

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

    # implicit's name for a callback that `fit` falls back to.
    fit_callback: Callable[[int, float, float | None], Any] | None = None
    # The last fit's data, and whether another fit on them has warned.
    _fitted_to: tuple[initial.Identity, bool] | None = None
    # scikit-learn takes `fit`'s first argument for metadata, because it is not called X.
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
        devices: Any = None,
        table_layout: str = "auto",
        over_relaxation: float = 1.0,
        warm_start: bool = False,
        use_gpu: bool | None = None,
        block_size: int = 64,
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
        self.devices = devices
        self.table_layout = table_layout
        self.over_relaxation = over_relaxation
        self.warm_start = warm_start
        self.use_gpu = use_gpu
        self.block_size = block_size
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
        y: Any = None,
        show_progress: bool | None = None,
        callback: Callable[[int, float, float | None], Any] | None = None,
    ) -> Self:
        """Factorize a matrix of users by items.

        Parameters
        ----------
        user_items : csr_matrix, csr_array or array-like of shape (n_users, n_items)
            Confidences. Stored zeros are entries, duplicates are summed, and values are used as
            float32. Other sparse formats are converted, with a ParameterWarning. Or a
            `tpu_als.shards.ShardedMatrix`, of which each process reads its part; tables then
            begin with values drawn on the devices.
        y : None
            Ignored. A bool is taken for `show_progress`, so that implicit's positional calls work.
        show_progress : bool, default=None
            Show a bar. None goes by the parameter `verbose`.
        callback : callable, optional
            Called as ``callback(iteration, seconds, loss)`` after each iteration; loss is None
            unless computed. The model is usable in it as it stands then. To stop, raise: the
            error passes on, and the last finished iteration stays fitted.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For parameters or data out of range, before any work; where all checkpoints are damaged.
        ModelFitError
            Where factors became infinite or NaN. The model stays as it was before the call.
        RuntimeError
            Where another process that takes part has ended.
        """
        arguments = (y, show_progress, callback, self.fit_callback)
        show_progress, callback = validation.fit_arguments(*arguments)
        validation.warn_if_converted(user_items)
        with contextlib.ExitStack() as at_end:
            at_end.callback(lambda: self._fitted.settle())
            training, fitted = self._training(user_items, at_end)
            at_end.callback(training.data.memory.clear)  # before tables are copied
            is_other = training.data.place.process != 0
            hides = is_other or progress.is_disabled(show_progress, self.verbose)
            with progress.bar(self.iterations, training.done, hides) as bar:
                self._train(training, fitted, callback, bar)
            self._fitted_to = training.fitted_to
        return self

    def _train(
        self,
        training: Training,
        fitted: FittedModel,
        callback: Callable[[int, float, float | None], Any] | None,
        bar: Any,
    ) -> None:
        """Run the iterations, and publish the model whole.

        After an error it is the model before `fit`; after an interruption, or an error of the
        callback, that of the last finished iteration.
        """
        before, has_published, is_calling = vars(self).get("_fitted"), False, False
        try:
            fitted = _after(training, fitted)
            while not training.is_over:
                with training.data.place.watched():
                    report = training.step()
                fitted = _after(training, fitted)
                progress.advance(bar, report)
                log.debug("iteration %d: %s", training.done - 1, report)
                if callback:
                    self._publish(fitted)
                    has_published = is_calling = True
                    callback(training.done - 1, report["seconds"], report.get("loss"))
                    is_calling = False
            self._publish(self._finished(training, fitted))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and fitted.n_iter:
                self._publish(fitted)
            elif has_published and not is_calling:
                self._publish(before)
            raise

    def transform(self, X: Any) -> np.ndarray:
        """Compute factors of rows, seen in `fit` or not, exactly (fold-in).

        Parameters
        ----------
        X : csr_matrix, csr_array or array-like of shape (n_rows, n_items)
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_rows, factors)
            Each row depends on that row of X only, bit for bit where the table is on one device.
        """
        fitted = self._complete()
        return self._fold_in(fitted.item, self._validated(X, fitted))

    def score(self, X: Any, y: Any = None) -> float:
        """Mean NDCG@10 of items hidden from rows that need not have been seen in `fit`.

        Of each row's positive entries a fifth, always the same, is hidden; the rest is folded
        in; the hidden ones are then looked for among all items that were not folded in. Rows with
        fewer than two positive entries do not count.

        Parameters
        ----------
        X : csr_matrix, csr_array or array-like of shape (n_rows, n_items)
            As in `fit`.
        y : None
            Ignored.

        Returns
        -------
        float
            Between 0 and 1, larger is better.
        """
        fitted = self._complete()
        kept, hidden = holdout.for_scoring(self._validated(X, fitted))
        solved = self._fold_in(fitted.item, kept)
        ids, _ = self._rank(solved, fitted.item, holdout.CUTOFF, seen=kept)
        return holdout.mean_ndcg(ids, hidden)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = []  # but for the model's own
        with contextlib.suppress(ValueError):
            name = parameters.storage_dtype(self.dtype)
            tags.transformer_tags.preserves_dtype = [name.replace("bfloat16", "float32")]
        return tags

    @property
    def _n_features_out(self) -> int:
        return self._complete("item").item.shape[1]

    def _checked_params(self) -> placing.AlsParams:
        """Interpret the constructor's parameters, or raise for one that is wrong."""
        parameters.check(self)
        return placing.AlsParams(
            factors=int(self.factors),
            dtype=parameters.storage_dtype(self.dtype),
            linear_solver=self._linear_solver(),
            cg_steps=int(self.cg_steps),
            block_size=int(self.block_size),
            positive=self.objective == "ials",
            native=bool(self.use_native),
        )

    def _validated(self, X: Any, fitted: FittedModel) -> sparse.csr_matrix:
        """scikit-learn's checks of X against what a fitted model knows, then canonical CSR."""
        return _checked(self._view(fitted), X, reset=False)

    def _view(self, fitted: FittedModel) -> Self:
        """Copy this estimator with another fitted model; all else is shared."""
        view = copy.copy(self)
        view._fitted = fitted
        return view

    def _interactions(
        self, user_items: Any
    ) -> tuple[sparse.csr_matrix | ShardedMatrix, FittedModel]:
        """What `fit` learns from, and the model to come with a record of the columns."""
        before = vars(self).get("_fitted")
        view = self._view(FittedModel() if before is None else FittedModel(lock=before.lock))
        if not isinstance(user_items, ShardedMatrix):
            rows = _checked(view, user_items, reset=True)
            return rows, replace(view._fitted, popularity=popularity_of(rows))
        if self.early_stopping:
            raise ValueError(
                "early_stopping=True needs a matrix in memory, got a ShardedMatrix: measure on "
                "its held_out() in a callback"
            )
        return user_items, replace(view._fitted, n_features=user_items.shape[1])

    def _training(
        self, user_items: Any, at_end: contextlib.ExitStack
    ) -> tuple[Training, FittedModel]:
        """Check everything, lay out the data, and stand where training starts or goes on."""
        params, before, checkpoints, monitor = self._checked_params(), self._fitted, None, None
        if self.checkpoint_dir is not None:
            checkpoints = Checkpoints(self.checkpoint_dir, self.checkpoint_every)
            at_end.callback(checkpoints.close)
        rows, fitted = self._interactions(user_items)
        identity, settings = initial.identity(rows), {}
        given = self._given_tables(before)
        if given[1] is not None:
            initial.check_columns(before.feature_names, fitted.feature_names)
        if checkpoints is not None:
            on_devices = isinstance(rows, ShardedMatrix)
            settings = settings_of(
                self, self._objective(), self._linear_solver(), given, on_devices
            )
        fitted_to = identity, initial.warn_if_restarted(self, identity)
        if self.early_stopping:
            rows, hidden = holdout.hide(rows, self.validation_fraction)
            fraction = float(self.validation_fraction)
            monitor = EarlyStopping(rows, hidden, self.n_iter_no_change, self.tol, fraction)
            if checkpoints is not None:
                settings["held out (digest)"] = f"{_digest.entries(hidden):016x}"
        place = self._place()
        with place.watched():
            training = Training(
                placing.place(rows, params, place, with_digest=checkpoints is not None),
                self._objective(),
                iterations=int(self.iterations),
                over_relaxation=float(self.over_relaxation),
                with_loss=bool(self.calculate_training_loss),
                monitor=monitor,
                checkpoints=checkpoints,
                settings=settings,
                fitted_to=fitted_to,
            )
            if not training.resume():
                on_devices = isinstance(rows, ShardedMatrix)
                training.state = self._start(before, training.data, on_devices)
        return training, fitted

    def _finished(self, training: Training, fitted: FittedModel) -> FittedModel:
        """The model at the end of a fit: with early stopping, the best one."""
        if training.monitor is not None and training.monitor.best is not None:
            users, items = (
                FactorTable(on_devices=table) if isinstance(table, Table) else FactorTable(table)
                for table in training.monitor.best
            )
            fitted = replace(fitted, user=users, item=items)
        losses = training.history.get("loss")
        if losses:
            log.info("final training loss %.4f", losses[-1])
        return fitted


def _after(training: Training, fitted: FittedModel) -> FittedModel:
    """The model after the iterations that a training has run."""
    tables = tables_of(training.state, training.data)
    return fitted.trained(tables, training.done, training.history)


def _checked(estimator: TPUAlternatingLeastSquares, X: Any, reset: bool) -> sparse.csr_matrix:
    name = "user_items" if reset else "X"
    require_matrix(X, name)
    # A sparse matrix without rows is data without users; an empty array is a mistake.
    least = 0 if sparse.issparse(X) else 1
    X = validate_data(
        estimator,
        structure.checked(X, name, widen=True),
        reset=reset,
        accept_sparse="csr",
        dtype=[np.float64, np.float32],
        ensure_min_samples=least,
        ensure_min_features=least,
        ensure_all_finite=False,  # our own message: scikit-learn's points to other estimators
    )
    return validation.canonical_csr(X, name)


# implicit's wrappers check for its class; it is an ABC, so no inheritance is needed.
with contextlib.suppress(ImportError):
    from implicit.cpu.als import AlternatingLeastSquares as _Implicit

    _Implicit.register(TPUAlternatingLeastSquares)
