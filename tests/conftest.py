"""Fixtures that are dear to start and therefore shared by the whole session."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
from pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Eight real worker processes over gloo."""
    pool = Pool(8)
    yield pool
    pool.close()
