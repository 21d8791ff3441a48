"""Wrong use is refused where it is built or traced, by name and value."""

import equinox as eqx
from flax import nnx
from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ranger as ranger
from tests.laws import registry

FEATURES = np.random.default_rng(0).standard_normal([6, 3]).astype(np.float32)
NEIGHBORS = ranger.neighbors.nearest(FEATURES, 2)
ROWS = jnp.ones([6, 4])


def call(step, updates=ROWS, params=None, **extra):
  return step.update(updates, step.init(updates), params, **extra)


def predict(predictions, ids):
  step = ranger.smooth_predictions(3, 2)
  call(step, {}, predictions=predictions, example_ids=ids)


REFUSALS = {
  "k = n": (
    lambda: ranger.neighbors.nearest(FEATURES, 6),
    ValueError,
    "k must be less than the number of examples, n = 6, got 6",
  ),
  "k > n": (
    lambda: ranger.neighbors.nearest(FEATURES, 7),
    ValueError,
    "n = 6, got 7",
  ),
  "k < 1": (
    lambda: ranger.neighbors.nearest(FEATURES, 0),
    ValueError,
    "k must be a whole number of at least 1, got 0",
  ),
  "k a float": (
    lambda: ranger.neighbors.nearest(FEATURES, 2.0),
    TypeError,
    "k sets the shape of an array and must be a Python integer, got 2.0",
  ),
  "features 1-D": (
    lambda: ranger.neighbors.nearest(FEATURES[:, 0], 2),
    ValueError,
    r"features must have shape \[n, d\], d at least 1, got \[6\]",
  ),
  "features 3-D": (
    lambda: ranger.neighbors.nearest(FEATURES[None], 2),
    ValueError,
    r"features must have shape \[n, d\], d at least 1, got \[1, 6, 3\]",
  ),
  "features complex": (
    lambda: ranger.neighbors.nearest(FEATURES + 1j, 2),
    TypeError,
    "features must be real, got complex64",
  ),
  "metric": (
    lambda: ranger.neighbors.nearest(FEATURES, 2, metric="manhattan"),
    ValueError,
    "metric must be one of 'euclidean', 'cosine'; got 'manhattan'",
  ),
  "block_size": (
    lambda: ranger.neighbors.nearest(FEATURES, 2, block_size=0),
    ValueError,
    "block_size must be a whole number of at least 1, got 0",
  ),
  "labels too short": (
    lambda: ranger.labels.label_support(NEIGHBORS, np.zeros(5, np.int32)),
    ValueError,
    r"labels must have shape \[6\], got \[5\]",
  ),
  "labels of floats": (
    lambda: ranger.neighbors.weigh(NEIGHBORS, labels=np.full(6, 0.5, np.float32)),
    TypeError,
    "labels must hold integers, got float32",
  ),
  "beliefs too short": (
    lambda: ranger.neighbors.weigh(NEIGHBORS, beliefs=np.zeros([5, 2], np.float32)),
    ValueError,
    r"beliefs must have shape \[6, C\], got \[5, 2\]",
  ),
  "kernel": (
    lambda: ranger.neighbors.weigh(NEIGHBORS, kernel="box"),
    ValueError,
    "kernel must be one of 'uniform', 'inverse_distance', 'gaussian'; got 'box'",
  ),
  "bandwidth": (
    lambda: ranger.neighbors.weigh(NEIGHBORS, kernel="gaussian", bandwidth=0.0),
    ValueError,
    r"bandwidth must lie in \(0, inf\], got 0.0",
  ),
  "drawing none": (
    lambda: ranger.neighbors.sample(jax.random.key(0), NEIGHBORS, 0),
    ValueError,
    "k must be a whole number of at least 1, got 0",
  ),
  "drawing too many": (
    lambda: ranger.neighbors.sample(jax.random.key(0), NEIGHBORS, 3),
    ValueError,
    "k must be at most the 2 neighbors given, got 3",
  ),
  "normalize": (
    lambda: ranger.average_neighbors(normalize="row"),
    ValueError,
    "normalize must be one of 'batch', 'graph', None; got 'row'",
  ),
  "no neighbors": (
    lambda: call(ranger.average_neighbors()),
    ValueError,
    "average_neighbors needs neighbors=",
  ),
  "no graph weight": (
    lambda: call(ranger.average_neighbors(normalize="graph"), neighbors=NEIGHBORS),
    ValueError,
    "average_neighbors needs graph_weight=",
  ),
  "neighbors of other examples": (
    lambda: call(ranger.average_neighbors(), jnp.ones([5, 4]), neighbors=NEIGHBORS),
    ValueError,
    r"neighbors.indices must have shape \[5, k\].*got \[6, 2\]",
  ),
  "neighbors past the end": (
    lambda: call(
      ranger.average_neighbors(),
      neighbors=NEIGHBORS._replace(indices=NEIGHBORS.indices + 6),
    ),
    ValueError,
    "neighbors.indices must be less than n = 6, got 11",
  ),
  "float indices": (
    lambda: call(
      ranger.average_neighbors(),
      neighbors=NEIGHBORS._replace(indices=NEIGHBORS.distances),
    ),
    TypeError,
    "neighbors.indices must hold integers, got float32",
  ),
  "weights of another shape": (
    lambda: call(
      ranger.average_neighbors(),
      neighbors=NEIGHBORS._replace(weights=jnp.ones([6, 1])),
    ),
    ValueError,
    r"neighbors.weights must have shape \[6, 2\], got \[6, 1\]",
  ),
  "leading axes": (
    lambda: call(ranger.aggregate_by_mean(), {"a": ROWS, "b": jnp.ones([5])}),
    ValueError,
    r"updates\['a'\] has 6 and updates\['b'\] has 5",
  ),
  "scalar leaf": (
    lambda: call(ranger.aggregate_by_mean(), {"a": jnp.ones([])}),
    ValueError,
    r"updates\['a'\] is a scalar",
  ),
  "integer gradients": (
    lambda: call(ranger.aggregate_by_mean(), {"a": jnp.ones([6], jnp.int32)}),
    TypeError,
    r"got int32 at updates\['a'\]",
  ),
  "member weights": (
    lambda: call(ranger.aggregate_by_mean(), member_weights=jnp.ones([5])),
    ValueError,
    r"member_weights must have shape \[6\], got \[5\]",
  ),
  "fraction": (
    lambda: ranger.aggregate_by_trimmed_mean(0.5),
    ValueError,
    r"fraction must lie in \[0, 0.5\), got 0.5",
  ),
  "rounds": (
    lambda: ranger.aggregate_by_geometric_median(0),
    ValueError,
    "rounds must be a whole number of at least 1, got 0",
  ),
  "smoothing": (
    lambda: ranger.aggregate_by_geometric_median(smoothing=0.0),
    ValueError,
    r"smoothing must lie in \(0, inf\), got 0.0",
  ),
  "num_corrupt": (
    lambda: ranger.aggregate_by_krum(-1),
    ValueError,
    "num_corrupt must be a whole number of at least 0, got -1",
  ),
  "directions": (
    lambda: call(
      ranger.aggregate_by_upgrad(), directions=(jnp.ones([6]), jnp.ones([5, 5]))
    ),
    ValueError,
    r"directions\[1\] must have shape \[6, 6\], got \[5, 5\]",
  ),
  "radius": (
    lambda: ranger.aggregate_by_cagrad(1.0),
    ValueError,
    r"radius must lie in \[0, 1\), got 1.0",
  ),
  "too many corrupt to mix": (
    lambda: call(ranger.mix_nearest(ranger.aggregate_by_mean(), 6)),
    ValueError,
    "num_corrupt must be less than the number of members, n = 6, got 6",
  ),
  "norm to clip to": (
    lambda: ranger.clip_examples(0.0),
    ValueError,
    r"norm must lie in \(0, inf\), got 0.0",
  ),
  "quantile": (
    lambda: ranger.clip_examples(quantile=1.5),
    ValueError,
    r"quantile must lie in \[0, 1\], got 1.5",
  ),
  "norms": (
    lambda: call(ranger.clip_examples(), norms=jnp.ones([5])),
    ValueError,
    r"norms must have shape \[6\], got \[5\]",
  ),
  "over": (
    lambda: ranger.value_and_grad(
      lambda p, b: p, ranger.aggregate_by_mean(), over="rows"
    ),
    ValueError,
    "over must be one of 'examples', 'tasks'; got 'rows'",
  ),
  "over tasks on an axis": (
    lambda: ranger.value_and_grad(
      lambda p, b: p, ranger.aggregate_by_mean(), over="tasks", axis_name="data"
    ),
    ValueError,
    "over='tasks' needs axis_name=None",
  ),
  "tasks without a loss each": (
    lambda: ranger.value_and_grad(
      lambda p, b: p.sum(), ranger.aggregate_by_mean(), over="tasks"
    )(jnp.ones(3), None),
    ValueError,
    r"the losses must have shape \[tasks\], got \[\]",
  ),
  "weights of tasks": (
    lambda: ranger.value_and_grad(
      lambda p, b: p, ranger.aggregate_by_mean(), over="tasks"
    )(jnp.ones(3), None, member_weights=jnp.ones(4)),
    ValueError,
    r"member_weights must have shape \[3\], got \[4\]",
  ),
  "micro-batches of tasks": (
    lambda: ranger.train_step(
      lambda p, b: p, optax.sgd(1.0), over="tasks", num_micro_batches=2
    ),
    ValueError,
    "over='tasks' needs num_micro_batches=1, got 2",
  ),
  "tasks by hand on a mesh": (
    lambda: ranger.train_step(
      lambda p, b: p, optax.sgd(1.0), over="tasks", mesh=jax.make_mesh((1,), ("data",))
    ),
    ValueError,
    "over='tasks' on a mesh needs partition='jit', got partition='shard_map'",
  ),
  "too many corrupt": (
    lambda: call(ranger.aggregate_by_krum(2)),
    ValueError,
    r"needs n >= 2 num_corrupt \+ 3 members, got n = 6 and num_corrupt = 2",
  ),
  "too many selected": (
    lambda: call(ranger.aggregate_by_krum(1, 6)),
    ValueError,
    "num_selected must be at most n - num_corrupt = 5, got 6",
  ),
  "gramian": (
    lambda: call(ranger.aggregate_by_krum(1), gramian=jnp.ones([5, 5])),
    ValueError,
    r"gramian must have shape \[6, 6\], got \[5, 5\]",
  ),
  "num_regions": (
    lambda: ranger.aggregate_by_regions(0),
    ValueError,
    "num_regions must be a whole number of at least 1, got 0",
  ),
  "within": (
    lambda: ranger.aggregate_by_regions(2, within="median"),
    ValueError,
    "within must be one of 'mean', 'sum', 'max'; got 'median'",
  ),
  "no regions": (
    lambda: call(ranger.aggregate_by_regions(2)),
    ValueError,
    "aggregate_by_regions needs regions=",
  ),
  "regions too short": (
    lambda: call(ranger.aggregate_by_regions(2), regions=jnp.zeros([5], jnp.int32)),
    ValueError,
    r"regions must have shape \[6\], got \[5\]",
  ),
  "region weights": (
    lambda: call(
      ranger.aggregate_by_regions(2),
      regions=jnp.zeros([6], jnp.int32),
      region_weights=jnp.ones([3]),
    ),
    ValueError,
    r"region_weights must have shape \[2\], got \[3\]",
  ),
  "rate": (
    lambda: ranger.aggregate_by_worst_regions(2, -1.0),
    ValueError,
    r"rate must lie in \[0, inf\), got -1.0",
  ),
  "no losses": (
    lambda: call(
      ranger.aggregate_by_worst_regions(2), regions=jnp.zeros([6], jnp.int32)
    ),
    ValueError,
    "aggregate_by_worst_regions needs losses=",
  ),
  "grid of other positions": (
    lambda: ranger.regions.by_grid(FEATURES, (2, 2)),
    ValueError,
    r"positions must have shape \[n, 2\].*got \[6, 3\]",
  ),
  "parts": (
    lambda: ranger.regions.by_grid(FEATURES, (2, 2, 0)),
    ValueError,
    r"parts\[2\] must be a whole number of at least 1, got 0",
  ),
  "times 2-D": (
    lambda: ranger.regions.by_time(FEATURES, 2),
    ValueError,
    r"times must have shape \[n\], got \[6, 3\]",
  ),
  "more clusters than examples": (
    lambda: ranger.regions.by_kmeans(FEATURES, 7),
    ValueError,
    "num_regions must be at most the 6 examples with finite features, got 7",
  ),
  "edges to nowhere": (
    lambda: ranger.regions.by_graph(np.array([[0, 3]]), 3, 2),
    ValueError,
    r"edges must join nodes in \[0, 3\), got 0 to 3",
  ),
  "more regions than nodes": (
    lambda: ranger.regions.by_graph(np.array([[0, 1]]), 3, 4),
    ValueError,
    "num_regions must be at most num_nodes = 3, got 4",
  ),
  "every": (
    lambda: ranger.accumulate(optax.sgd(0.1), 0),
    ValueError,
    "every must be a whole number of at least 1, got 0",
  ),
  "every a fraction": (
    lambda: ranger.accumulate(optax.sgd(0.1), 1.5),
    ValueError,
    "every must be a whole number of at least 1, got 1.5",
  ),
  "reduce": (
    lambda: ranger.accumulate(optax.sgd(0.1), 2, reduce="max"),
    ValueError,
    "reduce must be one of 'mean', 'sum'; got 'max'",
  ),
  "momentum": (
    lambda: ranger.scale_by_ngs(1.0),
    ValueError,
    r"momentum must lie in \[0, 1\), got 1.0",
  ),
  "hyper_rate": (
    lambda: ranger.scale_by_ngs(hyper_rate=-0.1),
    ValueError,
    r"hyper_rate must lie in \[0, inf\), got -0.1",
  ),
  "hyper_rate nan": (
    lambda: ranger.scale_by_ngs(hyper_rate=float("nan")),
    ValueError,
    "hyper_rate must be a number, got nan",
  ),
  "bounds": (
    lambda: ranger.scale_by_ngs(bounds=(0.0, 2.0)),
    ValueError,
    r"bounds\[0\] must lie in \(0, inf\), got 0.0",
  ),
  "bounds turned": (
    lambda: ranger.scale_by_ngs(bounds=(2.0, 0.5)),
    ValueError,
    r"bounds\[0\] must lie in \[0, 0.5\], got 2.0",
  ),
  "acceleration": (
    lambda: ranger.scale_by_ngs(acceleration=5.0, bounds=(0.5, 2.0)),
    ValueError,
    r"acceleration must lie in \[0.5, 2\], got 5.0",
  ),
  "acceleration below bounds": (
    lambda: ranger.scale_by_ngs(bounds=(0.5, 2.0)),
    ValueError,
    r"acceleration must lie in \[0.5, 2\], got 0.001",
  ),
  "shrink": (
    lambda: ranger.scale_by_ngs(shrink=0.0),
    ValueError,
    r"shrink must lie in \(0, 1\], got 0.0",
  ),
  "hurry": (
    lambda: ranger.accelerate(optax.sgd(0.1), hurry=0.5),
    ValueError,
    r"hurry must lie in \[1, inf\), got 0.5",
  ),
  "per_leaf": (
    lambda: ranger.accelerate(optax.sgd(0.1), per_leaf="yes"),
    ValueError,
    "per_leaf must be one of False, True; got 'yes'",
  ),
  "initial": (
    lambda: ranger.geometric_restart_schedule(0.0, 1.0, 10),
    ValueError,
    r"initial must lie in \(0, inf\), got 0.0",
  ),
  "maximum": (
    lambda: ranger.geometric_restart_schedule(0.5, 0.25, 10),
    ValueError,
    r"maximum must lie in \[0.5, inf\), got 0.25",
  ),
  "period": (
    lambda: ranger.geometric_restart_schedule(0.5, 1.0, 0),
    ValueError,
    "period must be a whole number of at least 1, got 0",
  ),
  "decay": (
    lambda: ranger.smooth_by_ema(1.0),
    ValueError,
    r"decay must lie in \[0, 1\), got 1.0",
  ),
  "decay below 0": (
    lambda: ranger.smooth_predictions(3, 2, decay=-0.5),
    ValueError,
    r"decay must lie in \[0, 1\), got -0.5",
  ),
  "decay a string": (
    lambda: ranger.smooth_by_ema("0.9"),
    TypeError,
    "decay must be a number, got '0.9'",
  ),
  "warmup": (
    lambda: ranger.smooth_by_ema(0.9, warmup=-1),
    ValueError,
    r"warmup must lie in \[0, inf\), got -1",
  ),
  "start": (
    lambda: ranger.smooth_by_ema(0.9, start=-1),
    ValueError,
    "start must be a whole number of at least 0, got -1",
  ),
  "averaging every": (
    lambda: ranger.smooth_by_ema(0.9, every=0),
    ValueError,
    "every must be a whole number of at least 1, got 0",
  ),
  "lookahead every": (
    lambda: ranger.smooth_by_lookahead(0),
    ValueError,
    "every must be a whole number of at least 1, got 0",
  ),
  "step_size": (
    lambda: ranger.smooth_by_lookahead(6, 1.5),
    ValueError,
    r"step_size must lie in \[0, 1\], got 1.5",
  ),
  "lookahead without params": (
    lambda: call(ranger.smooth_by_lookahead()),
    ValueError,
    "smooth_by_lookahead needs params",
  ),
  "b1": (
    lambda: ranger.ranger_radam(0.1, b1=1.0),
    ValueError,
    r"b1 must lie in \[0, 1\), got 1.0",
  ),
  "b2": (
    lambda: ranger.ranger_radam(0.1, b2=0.0),
    ValueError,
    r"b2 must lie in \(0, 1\), got 0.0",
  ),
  "eps": (
    lambda: ranger.ranger_radam(0.1, eps=0.0),
    ValueError,
    r"eps must lie in \(0, inf\), got 0.0",
  ),
  "threshold of RAdam": (
    lambda: ranger.ranger_radam(0.1, threshold=3.9),
    ValueError,
    r"threshold must lie in \[4, inf\), got 3.9",
  ),
  "output_axis a float": (
    lambda: ranger.ranger_radam(0.1, output_axis=1.0),
    TypeError,
    "output_axis must be a Python integer, got 1.0",
  ),
  "output_axis that is not there": (
    lambda: call(ranger.ranger_radam(0.1, output_axis=2), {"a": ROWS}, {"a": ROWS}),
    ValueError,
    r"output_axis must be an axis of updates\['a'\] of shape \[6, 4\], got 2",
  ),
  "output_axis that is not there in a layer": (
    lambda: call(
      ranger.ranger_radam(0.1, output_axis=2, stack_axes=1),
      {"a": jnp.ones([2, 3, 4])},
      {"a": jnp.ones([2, 3, 4])},
    ),
    ValueError,
    r"output_axis must be an axis of updates\['a'\] of shape \[2, 3, 4\] after 1"
    " stack_axes, got 2",
  ),
  "weights of examples": (
    lambda: call(ranger.accumulate(optax.sgd(0.1), 2), weight=jnp.ones([6])),
    ValueError,
    r"weight must be one number for a micro-batch, got shape \[6\];.*member_weights=",
  ),
  "a row as weight": (
    lambda: call(ranger.accumulate(optax.sgd(0.1), 1), weight=np.ones([1])),
    ValueError,
    r"weight must be one number for a micro-batch, got shape \[1\]",
  ),
  "a table as weight": (
    lambda: call(ranger.ranger(0.1, every=2), weight=jnp.ones([6, 2])),
    ValueError,
    r"weight must be one number for a micro-batch, got shape \[6, 2\]",
  ),
  "losses as value": (
    lambda: call(ranger.accumulate(optax.sgd(0.1), 2), value=jnp.ones([6])),
    ValueError,
    r"value must be one number for a micro-batch, got shape \[6\];.*mean",
  ),
  "stack_axes a float": (
    lambda: ranger.ranger_radam(0.1, stack_axes=1.0),
    TypeError,
    "stack_axes must be a Python integer, got 1.0",
  ),
  "stack_axes negative": (
    lambda: ranger.ranger_radam(0.1, stack_axes={"a": 1, "b": -1}),
    ValueError,
    "stack_axes must be a whole number of at least 0, got -1",
  ),
  "stack_axes that are not there": (
    lambda: call(ranger.ranger_radam(0.1, stack_axes=3), {"a": ROWS}, {"a": ROWS}),
    ValueError,
    r"updates\['a'\] of shape \[6, 4\] has fewer than stack_axes=3 axes",
  ),
  "axes that are traced": (
    lambda: optax.inject_hyperparams(ranger.ranger_radam)(0.1).init(ROWS),
    TypeError,
    r"output_axis must be a Python integer.*static_args=\(\"output_axis\", ...\)",
  ),
  "stacked axes that are traced": (
    lambda: optax.inject_hyperparams(ranger.ranger_radam, static_args=("output_axis",))(
      0.1
    ).init(ROWS),
    TypeError,
    r"stack_axes must be a Python integer.*static_args=\(\"stack_axes\", ...\)",
  ),
  "type of the table": (
    lambda: ranger.smooth_predictions(3, 2, dtype="float16"),
    ValueError,
    "dtype must be one of 'float32', 'bfloat16'; got 'float16'",
  ),
  "smoothed of another shape": (
    lambda: ranger.labels.early_learning_regularizer(
      jnp.ones([4, 2]), jnp.ones([4, 3])
    ),
    ValueError,
    r"smoothed must have shape \[4, 2\], got \[4, 3\]",
  ),
  "logits 1-D": (
    lambda: ranger.labels.early_learning_regularizer(jnp.ones([4]), jnp.ones([4])),
    ValueError,
    r"logits must have shape \[n, C\], got \[4\]",
  ),
  "labels of targets": (
    lambda: ranger.labels.refine_targets(jnp.zeros([3]), jnp.ones([3, 2])),
    TypeError,
    "labels must hold integers, got float32",
  ),
  "labels of other examples": (
    lambda: ranger.labels.refine_targets(jnp.zeros([2], jnp.int32), jnp.ones([3, 2])),
    ValueError,
    r"labels must have shape \[3\], got \[2\]",
  ),
  "confusion": (
    lambda: ranger.labels.refine_targets(
      jnp.zeros([3], jnp.int32), jnp.ones([3, 2]), confusion=jnp.ones([3, 3])
    ),
    ValueError,
    r"confusion must have shape \[2, 2\], got \[3, 3\]",
  ),
  "support": (
    lambda: ranger.labels.refine_targets(
      jnp.zeros([3], jnp.int32), jnp.ones([3, 2]), support=jnp.ones([2])
    ),
    ValueError,
    r"support must have shape \[3\], got \[2\]",
  ),
  "beliefs of neighbors": (
    lambda: ranger.labels.neighbor_beliefs(NEIGHBORS, jnp.ones([6])),
    ValueError,
    r"beliefs must have shape \[n, C\], C at least 1, got \[6\]",
  ),
  "beliefs of no class": (
    lambda: ranger.labels.neighbor_beliefs(NEIGHBORS, jnp.ones([6, 0])),
    ValueError,
    r"beliefs must have shape \[n, C\], C at least 1, got \[6, 0\]",
  ),
  "neighbors of other beliefs": (
    lambda: ranger.labels.neighbor_beliefs(NEIGHBORS, jnp.ones([5, 2])),
    ValueError,
    r"neighbors.indices must have shape \[5, k\].*got \[6, 2\]",
  ),
  "labels of other beliefs": (
    lambda: ranger.labels.label_confusion(jnp.zeros([2], jnp.int32), jnp.ones([3, 2])),
    ValueError,
    r"labels must have shape \[3\], got \[2\]",
  ),
  "labels confused with floats": (
    lambda: ranger.labels.label_confusion(jnp.zeros([3]), jnp.ones([3, 2])),
    TypeError,
    "labels must hold integers, got float32",
  ),
  "sharpness": (
    lambda: ranger.labels.label_confusion(
      jnp.zeros([3], jnp.int32), jnp.ones([3, 2]), sharpness=0
    ),
    ValueError,
    r"sharpness must lie in \(0, inf\], got 0",
  ),
  "anchors": (
    lambda: ranger.labels.label_confusion(
      jnp.zeros([3], jnp.int32), jnp.ones([3, 2]), anchors=-1
    ),
    ValueError,
    r"anchors must lie in \[0, inf\), got -1",
  ),
  "confusion that is not square": (
    lambda: ranger.labels.confusion_spread(jnp.ones([3, 2])),
    ValueError,
    r"confusion must have shape \[2, 2\], got \[3, 2\]",
  ),
  "confusion of no class": (
    lambda: ranger.labels.confusion_spread(jnp.ones([0, 0])),
    ValueError,
    r"confusion must have shape \[n, C\], C at least 1, got \[0, 0\]",
  ),
  "logits to correct": (
    lambda: ranger.labels.forward_corrected_loss(
      jnp.ones([3]), jnp.zeros([3], jnp.int32), jnp.eye(2)
    ),
    ValueError,
    r"logits must have shape .n, C., or .*, C at least 1, got .3.",
  ),
  "exponent": (
    lambda: ranger.labels.forward_corrected_loss(
      jnp.ones([3, 2]), jnp.zeros([3], jnp.int32), jnp.eye(2), exponent=1.5
    ),
    ValueError,
    r"exponent must lie in \[0, 1\], got 1.5",
  ),
  "smoothing to the uniform": (
    lambda: ranger.labels.forward_corrected_loss(
      jnp.ones([3, 2]), jnp.zeros([3], jnp.int32), jnp.eye(2), smoothing=-0.1
    ),
    ValueError,
    r"smoothing must lie in \[0, 1\], got -0.1",
  ),
  "confusion of other classes": (
    lambda: ranger.labels.forward_corrected_loss(
      jnp.ones([3, 2]), jnp.zeros([3], jnp.int32), jnp.eye(3)
    ),
    ValueError,
    r"confusion must have shape \[2, 2\], got \[3, 3\]",
  ),
  "ema without params": (
    lambda: call(ranger.smooth_by_ema(0.9)),
    ValueError,
    "smooth_by_ema needs params",
  ),
  "no predictions": (
    lambda: call(ranger.smooth_predictions(3, 2), {}),
    ValueError,
    "smooth_predictions needs predictions=",
  ),
  "predictions of another shape": (
    lambda: predict(jnp.ones([4, 3]), jnp.zeros([4], jnp.int32)),
    ValueError,
    r"predictions must have shape \[4, 2\], got \[4, 3\]",
  ),
  "example ids of floats": (
    lambda: predict(jnp.ones([4, 2]), jnp.zeros([4])),
    TypeError,
    "example_ids must hold integers, got float32",
  ),
  "example ids 2-D": (
    lambda: predict(jnp.ones([4, 2]), jnp.zeros([4, 1], jnp.int32)),
    ValueError,
    r"example_ids must have shape \[n\], got \[4, 1\]",
  ),
  "no smoothed predictions": (
    lambda: ranger.smoothed_predictions(optax.sgd(0.1).init({})),
    ValueError,
    "exactly one smooth_predictions, got 0",
  ),
  "clip_norm": (
    lambda: ranger.ranger(0.1, clip_norm=0.0),
    ValueError,
    r"clip_norm must lie in \(0, inf\], got 0.0",
  ),
  "skip_spikes": (
    lambda: ranger.ranger(0.1, skip_spikes=-1.0),
    ValueError,
    r"threshold must lie in \(0, inf\], got -1.0",
  ),
  "num_classes alone": (
    lambda: ranger.ranger(0.1, num_classes=3),
    ValueError,
    "need num_examples and num_classes, got num_examples=None and num_classes=3",
  ),
  "empty batch": (
    lambda: ranger.value_and_grad(lambda p, b: p, ranger.aggregate_by_mean())(1.0, {}),
    ValueError,
    "batch must hold at least one array",
  ),
  "scalar loss": (
    lambda: ranger.value_and_grad(lambda p, b: p * b.sum(), ranger.aggregate_by_mean())(
      jnp.float32(1), jnp.ones([3])
    ),
    ValueError,
    r"per_example_losses must return losses of shape \[3\].*got \[\]",
  ),
}


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_refusals(name):
  wrong_use, error, message = REFUSALS[name]
  with pytest.raises(error, match=message):
    wrong_use()


# Steps with a state of their own, and the parameters that it is made for.
STEPS = {
  "accumulate": lambda: ranger.accumulate(optax.sgd(0.1), 2),
  "skip_anomalies": lambda: ranger.skip_anomalies(optax.sgd(0.1)),
  "scale_by_ngs": ranger.scale_by_ngs,
  "skip_nonfinite": lambda: ranger.skip_nonfinite(optax.sgd(0.1)),
  "accelerate": lambda: ranger.accelerate(optax.sgd(0.1)),
  "mask_contradictions": lambda: ranger.mask_contradictions(optax.sgd(0.1)),
  "smooth_by_ema": lambda: ranger.smooth_by_ema(0.9),
  "smooth_by_lookahead": ranger.smooth_by_lookahead,
  "ranger_radam": lambda: ranger.ranger_radam(0.1),
}
# They know no parameters.
GUARDS = ("skip_anomalies", "skip_nonfinite", "mask_contradictions")
COPIES = ("smooth_by_ema", "smooth_by_lookahead", "ranger_radam")
each_step = pytest.mark.parametrize("name", STEPS)


@each_step
def test_integer_parameters_are_refused(name):
  with pytest.raises(TypeError, match=r"got int32 at params\['step'\]"):
    STEPS[name]().init({"w": jnp.ones([3]), "step": jnp.zeros([], jnp.int32)})


def test_integer_parameters_of_a_recipe_are_refused():
  with pytest.raises(TypeError, match=r"got int32 at params\[1\]"):
    ranger.ranger(0.1).init([jnp.ones([3]), jnp.zeros([], jnp.int32)])


@each_step
def test_python_numbers_are_refused(name):
  step = STEPS[name]()
  for number, params in (
    (1.0, {"w": 1.0}),
    (2, {"w": jnp.ones([3]), "deep": [2]}),
    (True, (jnp.ones([3]), True)),
  ):
    with pytest.raises(TypeError, match=f"{name} needs arrays, got the Python number"):
      step.init(params)
    arrays = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    message = rf"number {number} at updates.*jnp.asarray\({number}\)"
    with pytest.raises(TypeError, match=message):
      step.update(params, step.init(arrays), arrays)


@each_step
def test_models_are_refused(name):
  """Functions are no parameters, nor are the keys and counters of dropout."""
  step, rngs = STEPS[name](), nnx.Rngs(0)
  function = rf"{name} needs arrays, got a function at params.activation.*eqx.filter"
  with pytest.raises(TypeError, match=function):
    step.init(eqx.nn.MLP(2, 3, 4, 2, key=jax.random.key(0)))
  with pytest.raises(TypeError, match=r"a function at params\['f'\].*nnx.state"):
    step.init({"w": jnp.ones([3]), "f": jnp.tanh})
  with pytest.raises(TypeError, match=r"uint32 at params.*nnx.state\(model, nnx.Param"):
    step.init(nnx.Dropout(0.5, rngs=rngs))
  with pytest.raises(TypeError, match="a str at params"):
    step.init({"w": jnp.ones([3]), "name": "mlp"})
  step.init(eqx.filter(eqx.nn.Linear(2, 3, key=jax.random.key(0)), eqx.is_array))
  step.init(nnx.state(nnx.Linear(2, 3, rngs=rngs), nnx.Param))


@each_step
def test_abstract_parameters_are_copied_by_nobody(name):
  step = STEPS[name]()
  trees = [
    {"w": jax.ShapeDtypeStruct((3,), jnp.float32)},
    jax.ShapeDtypeStruct((), jnp.bfloat16),
    [jnp.ones([2]), jax.ShapeDtypeStruct((2, 3), jnp.float32)],
  ]
  for params in trees:
    jax.eval_shape(step.init, params)
    if name in COPIES:
      with pytest.raises(TypeError, match=r"is abstract.*jax.eval_shape\(tx.init"):
        step.init(params)
    else:
      assert all(
        isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(step.init(params))
      )


@pytest.mark.parametrize(
  ("other", "problem"),
  [
    ({"w": jnp.ones([3])}, r"\['deep'\]\['b'\] is missing"),
    ({}, r"\['deep'\]\['b'\] is missing"),
    (
      {"w": jnp.ones([3]), "deep": {"b": jnp.ones([1]), "c": jnp.ones([2])}},
      r"\['deep'\]\['b'\] has shape \[1\], not \[2, 2\]",
    ),
    (
      {"w": jnp.ones([3]), "deep": {"b": jnp.ones([2, 2]), "c": jnp.ones([2])}},
      r"\['deep'\]\['c'\] is not one of them",
    ),
  ],
)
@pytest.mark.parametrize("name", sorted(STEPS.keys() - GUARDS))
def test_gradients_unlike_the_parameters_are_refused(name, other, problem):
  step = STEPS[name]()
  params = {"w": jnp.ones([3]), "deep": {"b": jnp.ones([2, 2])}}
  state = step.init(params)
  with pytest.raises(ValueError, match=f"{name} needs updates like.*updates{problem}"):
    step.update(other, state, params)
  if name in COPIES:
    with pytest.raises(ValueError, match=f"{name} needs params like.*params{problem}"):
      step.update(params, state, other)


@each_step
def test_states_from_elsewhere_are_refused(name):
  """Of `MultiSteps`, restored without types, of a chain, of another step."""
  step, params = STEPS[name](), {"w": jnp.ones([3])}
  state = step.init(params)
  multi = optax.MultiSteps(optax.sgd(0.1), 2).init(params)
  for other in (multi, optax.EmptyState(), ranger.aggregate_by_mean().init(params)):
    got = f"{name} needs a .*State as its state, got a {type(other).__name__}: that of"
    with pytest.raises(TypeError, match=got + r".*tx.init\(params\)"):
      step.update(params, other, params)
  for other in (state._asdict(), list(state), tuple(state), dict(enumerate(state))):
    got = f"{name} needs a .*State as its state, got a {type(other).__name__}: a check"
    with pytest.raises(TypeError, match=got + r".*jax.eval_shape\(tx.init, params\)"):
      step.update(params, other, params)


@each_step
def test_a_state_goes_through_msgpack(name):
  """With the template that the refusal names; as it comes back it is refused."""
  step, params = STEPS[name](), {"w": jnp.ones([3])}
  _, state = step.update(params, step.init(params), params)
  restored = serialization.msgpack_restore(serialization.to_bytes(state))
  with pytest.raises(TypeError, match="got a dict: a checkpoint restored without"):
    step.update(params, restored, params)
  state = step.update(params, state, params)
  restored = serialization.from_state_dict(step.init(params), restored)
  again = step.update(params, restored, params)
  jax.tree.map(np.testing.assert_array_equal, again, state)


def test_traced_numbers_pass():
  """Ranges are checked on numbers; a traced hyperparameter is data."""

  @jax.jit
  def init(decay):
    ranger.smooth_by_ema(decay)
    return ranger.scale_by_ngs(decay, hyper_rate=decay).init(registry.params())

  init(jnp.float32(0.5))
