"""Neighbor graphs of whole data sets: built, kept, audited, refreshed and sampled."""

from optax_ranger.graph._build import BuildReport as BuildReport
from optax_ranger.graph._build import build as build
from optax_ranger.graph._build import measure_recall as measure_recall
