"""The types that every file shares, and `Neighbors`."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import numpy as np
import optax

Array = jax.Array
ArrayLike = jax.Array | np.ndarray | float | int | bool
PyTree = Any
# A number that may be traced, such as a hyperparameter.
Scalar = ArrayLike
Schedule = Callable[[Any], Any]
ScalarOrSchedule = Scalar | Schedule


class Neighbors(NamedTuple):
  """The k nearest neighbors of n examples, or any other k of their neighbors.

  A negative index is an empty place; its weight is zero and its distance
  infinite. Weights already contain any 1/k.

  Shapes:
    indices: ``int32 [n, k]``, positions of the neighbors among the n examples.
    distances: ``float [n, k]``, in the units of the features.
    weights: ``float [n, k]``, not negative.
  """

  indices: Array
  distances: Array
  weights: Array


def transformation(
  init: Callable[..., Any], update: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
  """Makes a transformation of functions that type their state more narrowly."""
  return optax.GradientTransformationExtraArgs(init, update)
