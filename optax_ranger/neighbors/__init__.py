"""Nearest neighbors as arrays, found here or elsewhere, and what they weigh.

Imports `_core`.
"""

from optax_ranger.neighbors._convert import from_distances as from_distances
from optax_ranger.neighbors._convert import from_graph as from_graph
from optax_ranger.neighbors._nearest import nearest as nearest
from optax_ranger.neighbors._nearest import sample as sample
from optax_ranger.neighbors._weights import WeightReport as WeightReport
from optax_ranger.neighbors._weights import weigh as weigh
from optax_ranger.neighbors._weights import weight_report as weight_report
