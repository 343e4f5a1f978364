"""What the tests of the refinement ops share."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from condgen_fast import _library

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

needs_library = pytest.mark.skipif(not _library.load(), reason="the compiled library is not built")
SELECTIONS = [pytest.param("auto", marks=needs_library), "reference"]
IMPLS = [*SELECTIONS, "triton"]

FLOATS = st.sampled_from([-INF, -2.5, -1.0, -0.0, 0.0, 0.25, 0.5, 1.0, INF, NAN]) | st.floats(width=32)

many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def generator(device: str, seed: int = 1) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


@st.composite
def row_sets(draw):
    batch, width = draw(st.integers(0, 4)), draw(st.integers(0, 12))

    def table(element):
        return draw(st.lists(st.lists(element, min_size=width, max_size=width), min_size=batch, max_size=batch))

    return batch, width, table(FLOATS), table(st.booleans()), draw(st.integers(0, 2**32))
