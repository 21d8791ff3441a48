"""Partitions of examples into regions: by k-means, on a grid, in time, of a graph.

Imports `_core`.
"""

from optax_ranger.regions._partitions import Clusters as Clusters
from optax_ranger.regions._partitions import by_graph as by_graph
from optax_ranger.regions._partitions import by_grid as by_grid
from optax_ranger.regions._partitions import by_kmeans as by_kmeans
from optax_ranger.regions._partitions import by_time as by_time
