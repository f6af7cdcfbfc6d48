"""An accelerator that JAX has no plugin for is not ignored in silence."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest

from tpu_als.engine import choice


@pytest.mark.parametrize("present", ["an NVIDIA GPU", "an AMD GPU", "a TPU", "a network card"])
def test_one_warning(
    present: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    exists, files = os.path.exists, {"/dev/nvidiactl": "an NVIDIA GPU", "/dev/kfd": "an AMD GPU"}
    monkeypatch.setattr(
        os.path, "exists", lambda path: files[path] == present if path in files else exists(path)
    )
    (tmp_path / "0").mkdir()
    (tmp_path / "0/vendor").write_text("0x1ae0\n")
    (tmp_path / "0/device").write_text("0x0063\n" if present == "a TPU" else "0x0042\n")
    (tmp_path / "1").mkdir()
    (tmp_path / "1/vendor").write_text("0x1ae0\n")  # its device cannot be read
    monkeypatch.setattr(choice, "_PCI_VENDORS", str(tmp_path / "*/vendor"))
    monkeypatch.setattr(choice, "_has_plugin", lambda: False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    choice._tell_of_accelerator.cache_clear()
    with caplog.at_level(logging.WARNING, "tpu_als"):
        assert not choice.may_have_accelerator()
        assert not choice.may_have_accelerator()
    found = [record.getMessage().partition(",")[0] for record in caplog.records]
    assert found == [f"this machine has {present}"] * (present != "a network card")
    choice._tell_of_accelerator.cache_clear()
