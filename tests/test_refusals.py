"""Wrong use is refused where it is built or traced, by name and value."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ranger as ranger
from tests import registry

FEATURES = np.random.default_rng(0).standard_normal([6, 3]).astype(np.float32)
NEIGHBORS = ranger.nearest_neighbors(FEATURES, 2)
ROWS = jnp.ones([6, 4])


def call(step, updates=ROWS, params=None, **extra):
  return step.update(updates, step.init(updates), params, **extra)


def predict(predictions, ids):
  step = ranger.smooth_predictions(3, 2)
  call(step, {}, predictions=predictions, example_ids=ids)


REFUSALS = {
  "k = n": (
    lambda: ranger.nearest_neighbors(FEATURES, 6),
    ValueError,
    "k must be less than the number of examples, n = 6, got 6",
  ),
  "k > n": (
    lambda: ranger.nearest_neighbors(FEATURES, 7),
    ValueError,
    "n = 6, got 7",
  ),
  "k < 1": (
    lambda: ranger.nearest_neighbors(FEATURES, 0),
    ValueError,
    "k must be a whole number of at least 1, got 0",
  ),
  "k a float": (
    lambda: ranger.nearest_neighbors(FEATURES, 2.0),
    TypeError,
    "k sets the shape of an array and must be a Python integer, got 2.0",
  ),
  "features 1-D": (
    lambda: ranger.nearest_neighbors(FEATURES[:, 0], 2),
    ValueError,
    r"features must have shape \[n, d\], got \[6\]",
  ),
  "features 3-D": (
    lambda: ranger.nearest_neighbors(FEATURES[None], 2),
    ValueError,
    r"features must have shape \[n, d\], got \[1, 6, 3\]",
  ),
  "features complex": (
    lambda: ranger.nearest_neighbors(FEATURES + 1j, 2),
    TypeError,
    "features must be real, got complex64",
  ),
  "metric": (
    lambda: ranger.nearest_neighbors(FEATURES, 2, metric="manhattan"),
    ValueError,
    "metric must be one of 'euclidean', 'cosine'; got 'manhattan'",
  ),
  "block_size": (
    lambda: ranger.nearest_neighbors(FEATURES, 2, block_size=0),
    ValueError,
    "block_size must be a whole number of at least 1, got 0",
  ),
  "labels too short": (
    lambda: ranger.label_support(NEIGHBORS, np.zeros(5, np.int32)),
    ValueError,
    r"labels must have shape \[6\], got \[5\]",
  ),
  "labels of floats": (
    lambda: ranger.weigh_neighbors(NEIGHBORS, labels=np.zeros(6, np.float32)),
    TypeError,
    "labels must hold integers, got float32",
  ),
  "beliefs too short": (
    lambda: ranger.weigh_neighbors(NEIGHBORS, beliefs=np.zeros([5, 2], np.float32)),
    ValueError,
    r"beliefs must have shape \[6, C\], got \[5, 2\]",
  ),
  "kernel": (
    lambda: ranger.weigh_neighbors(NEIGHBORS, kernel="box"),
    ValueError,
    "kernel must be one of 'uniform', 'inverse_distance', 'gaussian'; got 'box'",
  ),
  "bandwidth": (
    lambda: ranger.weigh_neighbors(NEIGHBORS, kernel="gaussian", bandwidth=0.0),
    ValueError,
    r"bandwidth must lie in \(0, inf\], got 0.0",
  ),
  "drawing too many": (
    lambda: ranger.sample_neighbors(jax.random.key(0), NEIGHBORS, 3),
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
    r"the value of per_example_losses must have shape \[3\], got \[\]",
  ),
}


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_refusals(name):
  wrong_use, error, message = REFUSALS[name]
  with pytest.raises(error, match=message):
    wrong_use()


@pytest.mark.parametrize(
  "make",
  [
    lambda: ranger.accumulate(optax.sgd(0.1), 2),
    lambda: ranger.skip_anomalies(optax.sgd(0.1)),
    ranger.scale_by_ngs,
    lambda: ranger.smooth_by_ema(0.9),
    lambda: ranger.ranger(0.1),
  ],
)
def test_integer_parameters_are_refused(make):
  with pytest.raises(TypeError, match=r"got int32 at params\['step'\]"):
    make().init({"w": jnp.ones([3]), "step": jnp.zeros([], jnp.int32)})


def test_traced_numbers_pass():
  """Ranges are checked on numbers; a traced hyperparameter is data."""

  @jax.jit
  def init(decay):
    ranger.smooth_by_ema(decay)
    return ranger.scale_by_ngs(decay, hyper_rate=decay).init(registry.params())

  init(jnp.float32(0.5))
