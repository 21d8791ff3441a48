"""Studies run with JAX as people have it."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _as_people_run_it():
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    yield
