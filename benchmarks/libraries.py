"""The compared libraries, behind one interface: build, `step`, `tables`, `reset`.

All libraries are built from the same matrix and the same initial tables. One `step` is one
iteration, users first. The time to build a library is its set-up time.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from unittest import mock

import numpy as np
from scipy import sparse

from tpu_als.engine import als
from tpu_als.engine.choice import Wishes, choose
from tpu_als.engine.data import AlsParams, Side
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import row_kernels, tile_products
from tpu_als.engine.xla.data import XlaData, XlaSide


@dataclass(frozen=True)
class Problem:
    """One fit of implicit's objective."""

    matrix: sparse.csr_matrix
    factors: int
    alpha: float
    regularization: float
    seed: int = 0

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Initial tables, as implicit draws them."""
        rng = np.random.default_rng(self.seed)
        sizes = [(n, self.factors) for n in self.matrix.shape]
        users, items = (rng.random(size, dtype=np.float32) * np.float32(0.01) for size in sizes)
        return users, items

    def confidences(self) -> sparse.csr_matrix:
        """The matrix times alpha."""
        return (self.matrix * np.float32(self.alpha)).tocsr().astype(np.float32)


class Library(Protocol):
    """Interface of a library."""

    def step(self) -> None:
        """Run one iteration, and return when it has finished."""

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the current tables."""

    def reset(self) -> None:
        """Go back to the initial tables."""


class Ours:
    """The engine on the backend that `fit` would choose, or on XLA's with `native=False`.

    Other options are `devices`, `num_threads`, `with_kernels` (False: a GPU runs XLA's own
    programs), `with_tiles` (True: any device computes products as a TPU does) and those of
    `AlsParams`.
    """

    def __init__(
        self,
        problem: Problem,
        solver: str = "cg",
        over_relaxation: float = 1.0,
        *,
        native: bool = True,
        **options: Any,
    ) -> None:
        self.problem, self.over_relaxation = problem, over_relaxation
        self.with_kernels = options.pop("with_kernels", True)
        self.with_tiles = options.pop("with_tiles", False)
        wishes = {key: options.pop(key) for key in ("devices", "num_threads") if key in options}
        params = AlsParams(problem.factors, linear_solver=solver, **options)
        backend = choose(Wishes(use_native=native, **wishes), params.linear_solver)
        with (
            mock.patch.object(row_kernels, "kernels_for", self._kernels_for()),
            mock.patch.object(tile_products, "tiles_for", self._tiles_for()),
        ):
            self.data = backend.place(problem.matrix, params)
            if isinstance(self.data, XlaData):
                self.data.products  # noqa: B018 - cached while patched
        self.objective = Objective.of("implicit", problem.regularization, problem.alpha)
        self.reset()

    def _kernels_for(self) -> Callable[..., Any]:
        return row_kernels.kernels_for if self.with_kernels else lambda *_: None

    def _tiles_for(self) -> Callable[..., Any]:
        tiles = tile_products.TileProducts()
        return (lambda *_: tiles) if self.with_tiles else tile_products.tiles_for

    def reset(self) -> None:
        self.state = als.start(self.data, *self.problem.tables())
        self.relaxation = 1.0

    def step(self) -> None:
        # The iteration has ended, because the host has read the counts of failed rows.
        self.state, failed = als.epoch(self.state, self.data, self.objective, self.relaxation)
        self.relaxation = self.over_relaxation
        if any(failed):
            raise FloatingPointError(f"{failed} rows are not finite")

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        return als.user_factors(self.state, self.data), als.item_factors(self.state, self.data)


class Implicit:
    """implicit's CPU solvers, called as its `fit` calls them."""

    def __init__(self, problem: Problem, use_cg: bool) -> None:
        from implicit.cpu.als import AlternatingLeastSquares

        model = AlternatingLeastSquares(
            problem.factors, regularization=problem.regularization, use_cg=use_cg
        )
        self.problem, self.solver = problem, model.solver
        self.user_items = problem.confidences()
        self.item_users = self.user_items.T.tocsr()
        self.reset()

    def reset(self) -> None:
        self.users, self.items = self.problem.tables()

    def step(self) -> None:
        ridge = self.problem.regularization
        self.solver(self.user_items, self.users, self.items, ridge, num_threads=0)
        self.solver(self.item_users, self.items, self.users, ridge, num_threads=0)

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        return self.users, self.items


class Irspack:
    """irspack's iALS, with settings for which its objective equals implicit's.

    In its "ORIGINAL" loss an observed cell has the weight alpha0 + value, so the value is c - 1.
    """

    def __init__(self, problem: Problem, solver: str) -> None:
        from irspack.recommenders.ials import IALSRecommender

        shifted = problem.confidences()
        shifted.data -= 1
        make: Any = IALSRecommender
        recommender = make(
            shifted,
            n_components=problem.factors,
            alpha0=1.0,
            reg=problem.regularization,
            nu=0.0,
            loss_type="ORIGINAL",
            solver_type=solver,
            max_cg_steps=3,
            ialspp_subspace_dimension=min(64, problem.factors),
            n_threads=len(os.sched_getaffinity(0)),
        )
        self.problem, self.trainer = problem, recommender._create_trainer()
        self.reset()

    def reset(self) -> None:
        self.trainer.core_trainer.user, self.trainer.core_trainer.item = self.problem.tables()

    def step(self) -> None:
        self.trainer.run_epoch()

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.trainer.core_trainer.user), np.array(self.trainer.core_trainer.item)


class ImplicitGpu:
    """implicit's CUDA kernels (CG only), called as its `fit` calls them."""

    def __init__(self, problem: Problem) -> None:
        import implicit.gpu
        from implicit.gpu.als import AlternatingLeastSquares

        self.gpu, self.problem = implicit.gpu, problem
        model = AlternatingLeastSquares(problem.factors, regularization=problem.regularization)
        self.solver, self.cg_steps = model.solver, model.cg_steps
        # its `fit` ignores alpha, so the values are multiplied by it
        confidences = problem.confidences()
        self.user_items = implicit.gpu.CSRMatrix(confidences)
        self.item_users = implicit.gpu.CSRMatrix(confidences.T.tocsr())
        self.gramian = implicit.gpu.Matrix.zeros(problem.factors, problem.factors)
        self.reset()

    def reset(self) -> None:
        self.users, self.items = (self.gpu.Matrix(table) for table in self.problem.tables())

    def step(self) -> None:
        for entries, target, source in (
            (self.user_items, self.users, self.items),
            (self.item_users, self.items, self.users),
        ):
            self.solver.calculate_yty(source, self.gramian, self.problem.regularization)
            self.solver.least_squares(entries, target, self.gramian, source, self.cg_steps)
        self.items[0:1].to_numpy()  # waits for the kernels, which run asynchronously

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        return self.users.to_numpy(), self.items.to_numpy()


BUILDERS: dict[str, Callable[[Problem], Library]] = {
    "tpu_als cg": lambda problem: Ours(problem, "cg"),
    "tpu_als relaxed": lambda problem: Ours(problem, "cg", over_relaxation=1.6),
    "tpu_als relaxed-4": lambda problem: Ours(problem, "cg", over_relaxation=1.5, cg_steps=4),
    "tpu_als relaxed-xla": lambda problem: Ours(problem, "cg", over_relaxation=1.6, native=False),
    "tpu_als xla": lambda problem: Ours(problem, native=False),
    "tpu_als xla bfloat16": lambda problem: Ours(problem, native=False, dtype="bfloat16"),
    "tpu_als tiles": lambda problem: Ours(
        problem, native=False, with_kernels=False, with_tiles=True
    ),
    "tpu_als tiles bfloat16": lambda problem: Ours(
        problem, native=False, with_kernels=False, with_tiles=True, dtype="bfloat16"
    ),
    "tpu_als without kernels": lambda problem: Ours(problem, with_kernels=False),
    "tpu_als exact": lambda problem: Ours(problem, "exact"),
    "tpu_als cholesky": lambda problem: Ours(problem, "cholesky"),
    "tpu_als auto": lambda problem: Ours(problem, "auto"),
    "implicit cg": lambda problem: Implicit(problem, use_cg=True),
    "implicit cholesky": lambda problem: Implicit(problem, use_cg=False),
    "irspack cg": lambda problem: Irspack(problem, "CG"),
    "irspack cholesky": lambda problem: Irspack(problem, "CHOLESKY"),
    "irspack ialspp": lambda problem: Irspack(problem, "IALSPP"),
    "implicit gpu": ImplicitGpu,
}


def padded_cells(side: Side) -> int:
    """Padded cells of a side, including those of long rows. The CPU backend does not pad."""
    if not isinstance(side, XlaSide):
        return int(side.lengths.sum())
    size = sum(rung.n_chunks * rung.rows * rung.length for rung in side.rows.rungs)
    size *= side.rows.n_shards
    if side.long is not None:
        blocks = sum(int((np.asarray(part) > 0).sum()) for part in side.long.n_entries)
        size += blocks * side.long.ids[0].shape[1]
    return size


def available(names: list[str]) -> list[str]:
    """Return the names whose library is installed and whose solver exists."""
    unknown = set(names) - set(BUILDERS)
    if unknown:
        raise SystemExit(f"no such libraries: {sorted(unknown)}; there are {sorted(BUILDERS)}")
    return [name for name in names if _exists(name)]


def _exists(name: str) -> bool:
    package, solver = name.split(maxsplit=1)
    if package == "tpu_als":
        return True
    if solver == "gpu" and importlib.util.find_spec("implicit"):
        import implicit.gpu

        return bool(implicit.gpu.HAS_CUDA)
    return importlib.util.find_spec(package) is not None


@dataclass
class Run:
    """A library that is stepped, and its measurements.

    Attributes
    ----------
    setup : float
        Seconds from the matrix to the first step: transposing, laying out, placing.
    steps, losses : list of float
        Seconds of each iteration, and the loss after it.
    """

    name: str
    library: Library
    setup: float
    steps: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @classmethod
    def prepared(cls, name: str, problem: Problem) -> Run:
        """Build and step a library to compile its code, and then build it again."""
        BUILDERS[name](problem).step()
        started = time.perf_counter()
        library = BUILDERS[name](problem)
        return cls(name, library, time.perf_counter() - started)

    def step(self, judge: Callable[[tuple[np.ndarray, np.ndarray]], float]) -> None:
        """Run one timed iteration; the measurement of the loss is not timed."""
        started = time.perf_counter()
        self.library.step()
        self.steps.append(time.perf_counter() - started)
        self.losses.append(judge(self.library.tables()))

    def reached(self, target: float) -> int | None:
        """Iterations until the loss was at most `target`."""
        for count, loss in enumerate(self.losses, 1):
            if loss <= target:
                return count
        return None

    def seconds_to(self, target: float) -> float | None:
        """Set-up and iterations until the loss was at most `target`."""
        count = self.reached(target)
        return None if count is None else self.setup + sum(self.steps[:count])

    def least_seconds_to(self, target: float) -> float:
        """As `seconds_to`; a run that has not reached the target counts with its time so far."""
        return self.setup + sum(self.steps[: self.reached(target)])


def race(
    problem: Problem,
    names: list[str],
    judge: Callable[[tuple[np.ndarray, np.ndarray]], float],
    reference: str,
    iterations: int,
    most: int,
) -> tuple[list[Run], float]:
    """Step all libraries alternately; those above the target continue, up to `most` iterations.

    The target is 1.001 times the loss of `reference` after `iterations`. If `reference` is not
    among the libraries, it is 1.001 times the lowest loss.
    """
    runs = [Run.prepared(name, problem) for name in names]
    for turn in range(iterations):
        for run in runs[:: 1 if turn % 2 == 0 else -1]:
            run.step(judge)
    losses = {run.name: run.losses[-1] for run in runs}
    target = 1.001 * losses.get(reference, min(losses.values()))
    for _ in range(iterations, most):
        for run in runs:
            if run.reached(target) is None:
                run.step(judge)
    return runs, target
