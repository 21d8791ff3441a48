"""Flax: NNX layers that compute in regions of the input, and Linen's train state.

Imports `_core` and `regions`.
"""

try:
  import flax as _flax  # noqa: F401
except ImportError as error:
  raise ImportError(
    "optax_ranger.layers needs Flax: pip install 'optax-ranger[flax]'."
  ) from error

from optax_ranger.layers._partitions import Centers as Centers
from optax_ranger.layers._partitions import Graph as Graph
from optax_ranger.layers._partitions import Grid as Grid
from optax_ranger.layers._partitions import TimeWindows as TimeWindows
from optax_ranger.layers._regional import RegionalAggregator as RegionalAggregator
from optax_ranger.layers._train_state import TrainState as TrainState
