"""Checks of the sdist and the wheel, called by .ci/packaging."""

from __future__ import annotations

import re
import sys
import tarfile
import tempfile
import zipfile
from email import message_from_bytes
from pathlib import Path

# Tracked files that only a checkout needs.
_OF_CHECKOUTS = {".pre-commit-config.yaml"}
_CODE = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)


def description(wheel: str, readme: str) -> None:
    """Check that the links of the long description lead somewhere on an index page."""
    from readme_renderer.markdown import render

    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = message_from_bytes(archive.read(name)).get_payload(decode=True).decode()
    rendered = render(text)
    assert rendered, "the long description cannot be rendered"
    anchors = {f"#{name}" for name in re.findall(r'id="([^"]+)"', rendered)}
    targets = re.findall(r'(?:href|src)="([^"]*)"', rendered)
    lost = [
        t for t in targets if not t.startswith(("http:", "https:", "mailto:")) and t not in anchors
    ]
    assert not lost, f"links of the long description that lead nowhere: {lost}"
    code = _CODE.findall(Path(readme).read_text(encoding="utf-8"))
    assert _CODE.findall(text) == code, "the substitutions of pyproject.toml changed a code block"
    print(f"long description: {len(targets)} links, {len(code)} code blocks")


def contents(sdist: str, wheel: str) -> None:
    """Check that the sdist has all tracked files (standard input), and the wheel all modules."""
    tracked = {line.rstrip("\n") for line in sys.stdin} - _OF_CHECKOUTS
    assert tracked, "no names of files on standard input"
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    modules = {name for name in tracked if name.startswith("tpu_als/")}
    assert not tracked - in_sdist, f"not in the sdist: {sorted(tracked - in_sdist)}"
    assert not modules - in_wheel, f"not in the wheel: {sorted(modules - in_wheel)}"
    others = {name for name in in_wheel if not name.startswith(("tpu_als/", "tpu_als-"))}
    assert not others, f"the wheel has other files: {sorted(others)}"
    print(f"sdist: {len(in_sdist)} files; wheel: {len(in_wheel)} files")


def smoke() -> None:
    """Fit, recommend, save and load with the installed package, without JAX."""
    import numpy as np
    from scipy.sparse import csr_matrix

    import tpu_als

    assert Path(tpu_als.__file__).is_relative_to(sys.prefix), tpu_als.__file__
    counts = csr_matrix(np.random.default_rng(0).poisson(0.3, (50, 30)).astype(np.float32))
    model = tpu_als.TPUAlternatingLeastSquares(factors=4, iterations=3, random_state=0).fit(counts)
    ids, scores = model.recommend([0, 1], counts[:2], N=5)
    assert ids.shape == scores.shape == (2, 5) and np.isfinite(scores).all()
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.npz")
        for cls in (tpu_als.TPUAlternatingLeastSquares, tpu_als.ServedModel):
            loaded = cls.load(f"{folder}/model.npz")
            np.testing.assert_array_equal(loaded.recommend([0, 1], counts[:2], N=5)[0], ids)
    assert "jax" not in sys.modules, "JAX was imported"
    print(f"tpu_als {tpu_als.__version__} from {tpu_als.__file__}")


if __name__ == "__main__":
    {"description": description, "contents": contents, "smoke": smoke}[sys.argv[1]](*sys.argv[2:])
