"""A GPU that JAX has no plugin for is not ignored in silence."""

from __future__ import annotations

import logging
import os
import sys

import pytest

from tpu_als.engine import choice


@pytest.mark.parametrize("has_gpu", [True, False])
def test_one_warning(
    has_gpu: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exists = os.path.exists
    monkeypatch.setattr(
        os.path, "exists", lambda path: has_gpu if path == "/dev/nvidiactl" else exists(path)
    )
    monkeypatch.setattr(choice, "_has_plugin", lambda: False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    choice._tell_of_gpu.cache_clear()
    with caplog.at_level(logging.WARNING, "tpu_als"):
        assert not choice.may_have_accelerator()
        assert not choice.may_have_accelerator()
    assert [record.message[:34] for record in caplog.records] == [
        "this machine has an NVIDIA GPU, bu"
    ] * has_gpu
    choice._tell_of_gpu.cache_clear()
