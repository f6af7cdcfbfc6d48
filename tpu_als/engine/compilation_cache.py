"""Where compiled programs are kept between processes."""

from __future__ import annotations

import os
import sys

from tpu_als.storage.private import private_directory

directory: str | None = None  # the directory that `enable_compilation_cache` was given


def enable_compilation_cache(path: str | os.PathLike[str]) -> None:
    """Keep compiled programs in a directory, so that later processes need not compile them again.

    This sets JAX's options for the whole process, and so for all JAX code in it; the package never
    does this by itself. Call it before the first fit. If JAX is not imported yet, the options are
    set when the package imports it. A file is reused only by the same version of JAX on the same
    kind of device. Loops compiled by numba, which are otherwise kept beside the package, are kept
    in the same directory.

    Parameters
    ----------
    path : path-like
        The directory. If it does not exist, it is created with mode 700. Its content is run as
        code, so nobody else may be able to write there.

    Raises
    ------
    PermissionError
        On POSIX, if the directory or anything in it belongs to another user or is writable by
        others, or if all users can replace one of its parents. No option is set then.
    """
    global directory
    directory = os.fspath(private_directory(path))
    if "jax" in sys.modules:
        apply_to_jax()


def apply_to_jax() -> None:
    """Set JAX's options for the directory, if there is one."""
    if directory is None:
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", directory)
    # The package has many small programs; by default JAX keeps only slow and large ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
