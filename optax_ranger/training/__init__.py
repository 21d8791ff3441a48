"""The compiled update on one device, a mesh or several hosts, and evaluation.

Imports every room but `recipes`, `graph` and `layers`.
"""

from optax_ranger.training._collectives import Collective as Collective
from optax_ranger.training._collectives import collectives as collectives
from optax_ranger.training._evaluation import eval_params as eval_params
from optax_ranger.training._train_step import TrainStep as TrainStep
from optax_ranger.training._train_step import train_step as train_step
from optax_ranger.training._update import TrainStepState as TrainStepState
