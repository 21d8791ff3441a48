"""Label support: what is counted as the same label."""

import numpy as np

import optax_ranger as ranger


def test_wide_labels_differ():
  ones = np.ones([3, 2], np.float32)
  neighbors = ranger.Neighbors(np.int32([[1, 2], [0, 2], [1, 0]]), ones, ones)
  support = ranger.labels.label_support(neighbors, np.array([1, 1 + 2**32, 1 + 2**33]))
  np.testing.assert_array_equal(support, 0)
