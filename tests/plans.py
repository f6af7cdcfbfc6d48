"""Plans of layouts, for tests over many of them."""

from __future__ import annotations

from hypothesis import strategies as st

from tpu_als.engine.layout import Plan

PLANS = st.builds(
    Plan,
    lengths=st.sampled_from([(8,), (8, 16), (8, 24, 64), (2, 3, 5), (1,)]),
    chunk=st.sampled_from([1, 8, 32, 256]),
    most_rows=st.sampled_from([1, 3, 1 << 30]),
    n_shards=st.integers(1, 4),
)
