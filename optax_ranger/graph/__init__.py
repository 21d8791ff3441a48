"""Neighbor graphs of whole data sets: built, kept, audited, refreshed and sampled.

Runs on the host. Imports `_core`, `neighbors` and `labels`.
"""

from optax_ranger.graph._audit import Audit as Audit
from optax_ranger.graph._audit import audit as audit
from optax_ranger.graph._balance import balance_classes as balance_classes
from optax_ranger.graph._batch_weights import BatchWeights as BatchWeights
from optax_ranger.graph._batch_weights import GraphWeights as GraphWeights
from optax_ranger.graph._batch_weights import batch_weights as batch_weights
from optax_ranger.graph._batch_weights import graph_weights as graph_weights
from optax_ranger.graph._build import BuildReport as BuildReport
from optax_ranger.graph._build import build as build
from optax_ranger.graph._build import measure_recall as measure_recall
from optax_ranger.graph._files import fingerprint as fingerprint
from optax_ranger.graph._files import load as load
from optax_ranger.graph._files import save as save
from optax_ranger.graph._held_out import held_out_predictions as held_out_predictions
from optax_ranger.graph._pipeline import NeighborBatches as NeighborBatches
from optax_ranger.graph._pipeline import add_neighbors as add_neighbors
from optax_ranger.graph._query import query as query
from optax_ranger.graph._refresh import embed as embed
from optax_ranger.graph._refresh import refresh as refresh
