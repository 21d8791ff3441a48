"""Optax gradient transformations for data that is noisy and batches that don't fit.

Steps, recipes and the engine are flat in this namespace. `labels`, `neighbors`,
`regions` and `graph` hold what works on arrays and data sets; `steps`, `recipes` and
`training` hold the classes of states and results besides. `layers` needs Flax, and is
imported on first use, as `testing` is.
"""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from optax_ranger import graph as graph
from optax_ranger import labels as labels
from optax_ranger import neighbors as neighbors
from optax_ranger import recipes as recipes
from optax_ranger import regions as regions
from optax_ranger import steps as steps
from optax_ranger import training as training
from optax_ranger._core.types import Neighbors as Neighbors
from optax_ranger._gradients.fusion import example_weights as example_weights
from optax_ranger._gradients.fusion import value_and_grad as value_and_grad
from optax_ranger._gradients.linear import NotLinearError as NotLinearError
from optax_ranger._gradients.micro_batching import MicroBatchReport as MicroBatchReport
from optax_ranger._gradients.micro_batching import micro_batched as micro_batched
from optax_ranger.recipes import (
  geometric_restart_schedule as geometric_restart_schedule,
)
from optax_ranger.recipes import ranger as ranger
from optax_ranger.recipes import ranger_head as ranger_head
from optax_ranger.recipes import ranger_radam as ranger_radam
from optax_ranger.recipes import robust_labels as robust_labels
from optax_ranger.steps import accelerate as accelerate
from optax_ranger.steps import accumulate as accumulate
from optax_ranger.steps import across_devices as across_devices
from optax_ranger.steps import aggregate_by_cagrad as aggregate_by_cagrad
from optax_ranger.steps import (
  aggregate_by_geometric_median as aggregate_by_geometric_median,
)
from optax_ranger.steps import aggregate_by_krum as aggregate_by_krum
from optax_ranger.steps import aggregate_by_max as aggregate_by_max
from optax_ranger.steps import aggregate_by_mean as aggregate_by_mean
from optax_ranger.steps import aggregate_by_median as aggregate_by_median
from optax_ranger.steps import aggregate_by_mgda as aggregate_by_mgda
from optax_ranger.steps import aggregate_by_regions as aggregate_by_regions
from optax_ranger.steps import aggregate_by_sum as aggregate_by_sum
from optax_ranger.steps import aggregate_by_trimmed_mean as aggregate_by_trimmed_mean
from optax_ranger.steps import aggregate_by_upgrad as aggregate_by_upgrad
from optax_ranger.steps import aggregate_by_worst_regions as aggregate_by_worst_regions
from optax_ranger.steps import average_neighbors as average_neighbors
from optax_ranger.steps import by_noise_scale as by_noise_scale
from optax_ranger.steps import clip_examples as clip_examples
from optax_ranger.steps import large_step as large_step
from optax_ranger.steps import mask_contradictions as mask_contradictions
from optax_ranger.steps import mix_nearest as mix_nearest
from optax_ranger.steps import scale_by_ngs as scale_by_ngs
from optax_ranger.steps import scale_by_window as scale_by_window
from optax_ranger.steps import skip_anomalies as skip_anomalies
from optax_ranger.steps import skip_nonfinite as skip_nonfinite
from optax_ranger.steps import smooth_by_ema as smooth_by_ema
from optax_ranger.steps import smooth_by_lookahead as smooth_by_lookahead
from optax_ranger.steps import smooth_predictions as smooth_predictions
from optax_ranger.steps import smoothed_predictions as smoothed_predictions
from optax_ranger.steps import uniform_decay_schedule as uniform_decay_schedule
from optax_ranger.training import eval_params as eval_params
from optax_ranger.training import train_step as train_step

__version__ = "0.1.0"

if not _TYPE_CHECKING:

  def __getattr__(name: str) -> _Any:
    if name in ("layers", "testing"):
      return _importlib.import_module(f"optax_ranger.{name}")
    raise AttributeError(f"module 'optax_ranger' has no attribute {name!r}")
