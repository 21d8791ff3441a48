"""What a loader returns, and the error where data is missing."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
  """A data set, clean.

  Attributes:
    x: ``float [n, d]``.
    y: ``int [n]``, the right classes, or ``float [n]``.
    classes: the number of classes; 0 for regression.
    test: features and targets of a test set; None to split it off.
    next_class: ``int [C]``, the class that each class is mistaken for; None for the
      next one.
    given: labels that people gave, ``int [n]``, by the name of the noise.
  """

  x: np.ndarray
  y: np.ndarray
  classes: int
  test: tuple[np.ndarray, np.ndarray] | None = None
  next_class: np.ndarray | None = None
  given: Mapping[str, np.ndarray] = {}


class Missing(Exception):  # noqa: N818
  """Data is not there. The message says how to get it."""
