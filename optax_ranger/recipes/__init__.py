"""Recipes: steps in the order in which they work, and schedules.

Imports `_core`, `labels` and `steps`.
"""

from optax_ranger.recipes._ranger import ranger as ranger
from optax_ranger.recipes._ranger import ranger_head as ranger_head
from optax_ranger.recipes._ranger_radam import RangerRadamState as RangerRadamState
from optax_ranger.recipes._ranger_radam import ranger_radam as ranger_radam
from optax_ranger.recipes._robust_labels import KnownLabels as KnownLabels
from optax_ranger.recipes._robust_labels import RobustLabels as RobustLabels
from optax_ranger.recipes._robust_labels import robust_labels as robust_labels
from optax_ranger.recipes._schedules import (
  geometric_restart_schedule as geometric_restart_schedule,
)
