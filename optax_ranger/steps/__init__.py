r"""The five steps, each an Optax gradient transformation, one idea a file.

== =================== ================== ======================================
\  step                file               use it for
== =================== ================== ======================================
1  neighbor averaging  `_averaging`       examples whose neighbors disagree
2  accumulation        `_accumulation`    batches that do not fit
\                      `_noise_scale`     how many micro-batches the noise asks for
\                      `_large_step`      learning rates for large steps
\                      `_guarding`        spikes, and non-finite gradients
3  NGS                 `_acceleration`    a learning rate that is a guess
\                      `_factor`          its learned acceleration factor
\                      `_masking`         updates that contradict the gradient
4  aggregation         `_aggregation`     many gradients that become one
\                      `_robust`          members that send corrupted gradients
\                      `_devices`         devices as members
\                      `_tasks`           tasks that conflict
\                      `_mixing`          members that differ, some of them corrupted
\                      `_clipping`        examples with large gradients
5  smoothing           `_ema`             averaged parameters
\                      `_lookahead`       slow and fast parameters
\                      `_predictions`     smoothed predictions of every example
== =================== ================== ======================================

NGS is short for Nesterov gradient scaling. A step imports `_core`,
`_gradients.linear` and `neighbors`, and never another step; `_factor`
and `_noise_scale` are parts of one.
"""

from optax_ranger._core.members import MemberState as MemberState
from optax_ranger.steps._acceleration import AccelerateState as AccelerateState
from optax_ranger.steps._acceleration import NgsState as NgsState
from optax_ranger.steps._acceleration import accelerate as accelerate
from optax_ranger.steps._acceleration import scale_by_ngs as scale_by_ngs
from optax_ranger.steps._accumulation import AccumulateState as AccumulateState
from optax_ranger.steps._accumulation import accumulate as accumulate
from optax_ranger.steps._aggregation import WorstRegionsState as WorstRegionsState
from optax_ranger.steps._aggregation import aggregate_by_max as aggregate_by_max
from optax_ranger.steps._aggregation import aggregate_by_mean as aggregate_by_mean
from optax_ranger.steps._aggregation import aggregate_by_regions as aggregate_by_regions
from optax_ranger.steps._aggregation import aggregate_by_sum as aggregate_by_sum
from optax_ranger.steps._aggregation import (
  aggregate_by_worst_regions as aggregate_by_worst_regions,
)
from optax_ranger.steps._averaging import average_neighbors as average_neighbors
from optax_ranger.steps._clipping import ClipExamplesState as ClipExamplesState
from optax_ranger.steps._clipping import clip_examples as clip_examples
from optax_ranger.steps._devices import across_devices as across_devices
from optax_ranger.steps._ema import EmaState as EmaState
from optax_ranger.steps._ema import smooth_by_ema as smooth_by_ema
from optax_ranger.steps._ema import uniform_decay_schedule as uniform_decay_schedule
from optax_ranger.steps._guarding import SkipNonFiniteState as SkipNonFiniteState
from optax_ranger.steps._guarding import SkipState as SkipState
from optax_ranger.steps._guarding import skip_anomalies as skip_anomalies
from optax_ranger.steps._guarding import skip_nonfinite as skip_nonfinite
from optax_ranger.steps._large_step import large_step as large_step
from optax_ranger.steps._large_step import scale_by_window as scale_by_window
from optax_ranger.steps._lookahead import LookaheadState as LookaheadState
from optax_ranger.steps._lookahead import smooth_by_lookahead as smooth_by_lookahead
from optax_ranger.steps._masking import MaskState as MaskState
from optax_ranger.steps._masking import mask_contradictions as mask_contradictions
from optax_ranger.steps._mixing import mix_nearest as mix_nearest
from optax_ranger.steps._noise_scale import NoiseScaleRule as NoiseScaleRule
from optax_ranger.steps._noise_scale import NoiseScaleState as NoiseScaleState
from optax_ranger.steps._noise_scale import by_noise_scale as by_noise_scale
from optax_ranger.steps._predictions import PredictionState as PredictionState
from optax_ranger.steps._predictions import smooth_predictions as smooth_predictions
from optax_ranger.steps._predictions import smoothed_predictions as smoothed_predictions
from optax_ranger.steps._robust import (
  aggregate_by_geometric_median as aggregate_by_geometric_median,
)
from optax_ranger.steps._robust import aggregate_by_krum as aggregate_by_krum
from optax_ranger.steps._robust import aggregate_by_median as aggregate_by_median
from optax_ranger.steps._robust import (
  aggregate_by_trimmed_mean as aggregate_by_trimmed_mean,
)
from optax_ranger.steps._tasks import aggregate_by_cagrad as aggregate_by_cagrad
from optax_ranger.steps._tasks import aggregate_by_mgda as aggregate_by_mgda
from optax_ranger.steps._tasks import aggregate_by_upgrad as aggregate_by_upgrad
