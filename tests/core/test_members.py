"""Which members are absent, and how many are counted."""

import jax
import numpy as np

from optax_ranger._core import members


def test_weights_that_are_none_count_as_zero():
  """A weight that is no positive number, and a member that is not finite."""
  asked = np.array([1, 0, -1, np.nan, np.inf, 2], np.float32)
  finite = np.arange(6) != 5
  clean = jax.jit(lambda asked, finite: members.clean_weights(asked, 6, finite=finite))
  weights, declared, dropped = clean(asked, finite)
  np.testing.assert_array_equal(weights, [1, 0, 0, 0, 0, 0])
  assert (declared, dropped) == (3, 4)
