"""Label support: what is counted as the same label."""

import jax.numpy as jnp
import numpy as np

import optax_ranger as ranger


def test_wide_labels_differ():
  neighbors = ranger.neighbors.nearest(jnp.arange(3.0)[:, None], 2)
  support = ranger.labels.label_support(neighbors, np.array([1, 1 + 2**32, 1 + 2**33]))
  np.testing.assert_array_equal(support, 0)
