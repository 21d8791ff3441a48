"""Optax gradient transformations for data that is noisy and batches that don't fit."""

from optax_ranger._acceleration import NgsState as NgsState
from optax_ranger._acceleration import scale_by_ngs as scale_by_ngs
from optax_ranger._accumulation import AccumulateState as AccumulateState
from optax_ranger._accumulation import accumulate as accumulate
from optax_ranger._aggregation import aggregate_by_max as aggregate_by_max
from optax_ranger._aggregation import aggregate_by_mean as aggregate_by_mean
from optax_ranger._aggregation import aggregate_by_regions as aggregate_by_regions
from optax_ranger._aggregation import aggregate_by_sum as aggregate_by_sum
from optax_ranger._averaging import average_neighbors as average_neighbors
from optax_ranger._fusion import NotLinearError as NotLinearError
from optax_ranger._fusion import example_weights as example_weights
from optax_ranger._fusion import value_and_grad as value_and_grad
from optax_ranger._members import MemberState as MemberState
from optax_ranger._neighbors import label_support as label_support
from optax_ranger._neighbors import nearest_neighbors as nearest_neighbors
from optax_ranger._neighbors import sample_neighbors as sample_neighbors
from optax_ranger._neighbors import weigh_neighbors as weigh_neighbors
from optax_ranger._ranger import ranger as ranger
from optax_ranger._ranger import ranger_head as ranger_head
from optax_ranger._smoothing import EmaState as EmaState
from optax_ranger._smoothing import PredictionState as PredictionState
from optax_ranger._smoothing import eval_params as eval_params
from optax_ranger._smoothing import smooth_by_ema as smooth_by_ema
from optax_ranger._smoothing import smooth_predictions as smooth_predictions
from optax_ranger._smoothing import smoothed_predictions as smoothed_predictions
from optax_ranger._types import Neighbors as Neighbors
