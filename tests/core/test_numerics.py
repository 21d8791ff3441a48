"""Types wide enough for what is computed."""

import jax.numpy as jnp
import numpy as np
import pytest

from optax_ranger._core import numerics


@pytest.mark.parametrize(
  ("dtypes", "expected"),
  [
    ([], np.float32),
    ([jnp.bfloat16], np.float32),
    ([np.float32, np.float64], np.float64),
    ([np.float64, np.float32], np.float64),
    ([jnp.bfloat16, np.complex128], np.float64),
    ([np.complex64], np.float32),
  ],
)
def test_the_widest_real_type_is_that_of_all_leaves(dtypes, expected):
  leaves = [np.zeros(2, dtype) for dtype in dtypes]
  assert numerics.widest_real(leaves) == expected
