"""What neighbors reveal about labels: support, beliefs, confusion, losses, targets.

Arrays in, arrays out. Imports `_core` and `neighbors`.
"""

from optax_ranger.labels._confusion import confusion_spread as confusion_spread
from optax_ranger.labels._confusion import (
  forward_corrected_loss as forward_corrected_loss,
)
from optax_ranger.labels._confusion import label_confusion as label_confusion
from optax_ranger.labels._confusion import neighbor_beliefs as neighbor_beliefs
from optax_ranger.labels._held_out import clean_beliefs as clean_beliefs
from optax_ranger.labels._held_out import held_out_beliefs as held_out_beliefs
from optax_ranger.labels._held_out import mix_beliefs as mix_beliefs
from optax_ranger.labels._regression import (
  robust_regression_loss as robust_regression_loss,
)
from optax_ranger.labels._regression import robust_scale as robust_scale
from optax_ranger.labels._regression import target_support as target_support
from optax_ranger.labels._support import label_support as label_support
from optax_ranger.labels._targets import (
  early_learning_regularizer as early_learning_regularizer,
)
from optax_ranger.labels._targets import refine_targets as refine_targets
