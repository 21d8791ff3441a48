"""Optax gradient transformations for data that is noisy and batches that don't fit."""

from optax_ranger._acceleration import AccelerateState as AccelerateState
from optax_ranger._acceleration import NgsState as NgsState
from optax_ranger._acceleration import accelerate as accelerate
from optax_ranger._acceleration import scale_by_ngs as scale_by_ngs
from optax_ranger._accumulation import AccumulateState as AccumulateState
from optax_ranger._accumulation import accumulate as accumulate
from optax_ranger._accumulation import large_step as large_step
from optax_ranger._aggregation import WorstRegionsState as WorstRegionsState
from optax_ranger._aggregation import aggregate_by_max as aggregate_by_max
from optax_ranger._aggregation import aggregate_by_mean as aggregate_by_mean
from optax_ranger._aggregation import aggregate_by_regions as aggregate_by_regions
from optax_ranger._aggregation import aggregate_by_sum as aggregate_by_sum
from optax_ranger._aggregation import (
  aggregate_by_worst_regions as aggregate_by_worst_regions,
)
from optax_ranger._averaging import average_neighbors as average_neighbors
from optax_ranger._collectives import Collective as Collective
from optax_ranger._collectives import collectives as collectives
from optax_ranger._confusion import confusion_spread as confusion_spread
from optax_ranger._confusion import forward_corrected_loss as forward_corrected_loss
from optax_ranger._confusion import label_confusion as label_confusion
from optax_ranger._confusion import neighbor_beliefs as neighbor_beliefs
from optax_ranger._devices import across_devices as across_devices
from optax_ranger._evaluation import eval_params as eval_params
from optax_ranger._fusion import example_weights as example_weights
from optax_ranger._fusion import value_and_grad as value_and_grad
from optax_ranger._guarding import SkipNonFiniteState as SkipNonFiniteState
from optax_ranger._guarding import SkipState as SkipState
from optax_ranger._guarding import skip_anomalies as skip_anomalies
from optax_ranger._guarding import skip_nonfinite as skip_nonfinite
from optax_ranger._linear import NotLinearError as NotLinearError
from optax_ranger._lookahead import LookaheadState as LookaheadState
from optax_ranger._lookahead import smooth_by_lookahead as smooth_by_lookahead
from optax_ranger._members import MemberState as MemberState
from optax_ranger._micro_batching import MicroBatchReport as MicroBatchReport
from optax_ranger._micro_batching import micro_batched as micro_batched
from optax_ranger._neighbors import WeightReport as WeightReport
from optax_ranger._neighbors import label_support as label_support
from optax_ranger._neighbors import nearest_neighbors as nearest_neighbors
from optax_ranger._neighbors import sample_neighbors as sample_neighbors
from optax_ranger._neighbors import weigh_neighbors as weigh_neighbors
from optax_ranger._neighbors import weight_report as weight_report
from optax_ranger._predictions import PredictionState as PredictionState
from optax_ranger._predictions import smooth_predictions as smooth_predictions
from optax_ranger._predictions import smoothed_predictions as smoothed_predictions
from optax_ranger._ranger import ranger as ranger
from optax_ranger._ranger import ranger_head as ranger_head
from optax_ranger._ranger_radam import RangerRadamState as RangerRadamState
from optax_ranger._ranger_radam import ranger_radam as ranger_radam
from optax_ranger._rates import geometric_restart_schedule as geometric_restart_schedule
from optax_ranger._regions import Clusters as Clusters
from optax_ranger._regions import graph_regions as graph_regions
from optax_ranger._regions import grid_regions as grid_regions
from optax_ranger._regions import kmeans_regions as kmeans_regions
from optax_ranger._regions import time_regions as time_regions
from optax_ranger._robust import (
  aggregate_by_geometric_median as aggregate_by_geometric_median,
)
from optax_ranger._robust import aggregate_by_krum as aggregate_by_krum
from optax_ranger._robust import aggregate_by_median as aggregate_by_median
from optax_ranger._robust import aggregate_by_trimmed_mean as aggregate_by_trimmed_mean
from optax_ranger._smoothing import EmaState as EmaState
from optax_ranger._smoothing import smooth_by_ema as smooth_by_ema
from optax_ranger._smoothing import uniform_decay_schedule as uniform_decay_schedule
from optax_ranger._targets import (
  early_learning_regularizer as early_learning_regularizer,
)
from optax_ranger._targets import refine_targets as refine_targets
from optax_ranger._training import TrainStep as TrainStep
from optax_ranger._training import train_step as train_step
from optax_ranger._types import Neighbors as Neighbors
from optax_ranger._update import TrainStepState as TrainStepState
