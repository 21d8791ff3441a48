"""The one registry of what is under test: every public step, in each of its forms."""

from collections.abc import Callable
from collections.abc import Mapping
import functools
import importlib.util
import inspect
import types
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_ranger as ranger
from optax_ranger import testing

NUM_MEMBERS = 6
NUM_EXAMPLES = 10
NUM_CLASSES = 4


class Case(NamedTuple):
  """One step, and what it takes to call it.

  Attributes:
    name: what the test shows.
    factory: the public name.
    arguments: keyword arguments of the factory.
    members: whether updates have a leading axis of members.
    extra: extra args of `update`, by the number of the call.
    static: arguments that `inject_hyperparams` must leave alone.
    foreign: whether one of Optax's own optimizers is inside.
    absorbs: whether non-finite updates are kept from coming out.
    skips: whether a non-finite update is skipped as a whole, and zeros come out.
    by_entry: whether non-finite entries are skipped one by one.
    tolerance: how nearly results of other types must agree with those of float32.
    axis: the name of the axis of which the step takes each member as a device.
  """

  name: str
  factory: str
  arguments: Mapping[str, Any] = types.MappingProxyType({})
  members: bool = False
  extra: Callable[[int], dict[str, Any]] = lambda call: {}
  static: tuple[str, ...] = ()
  foreign: bool = False
  absorbs: bool = True
  skips: bool = False
  by_entry: bool = False
  tolerance: float = 1e-4
  axis: str | None = None

  def make(self) -> Any:
    return self.wrap(getattr(ranger, self.factory)(**self.arguments))

  def wrap(self, step: Any) -> Any:
    return step if self.axis is None else _over_axis(step, self.axis)


def _over_axis(step: Any, axis: str) -> Any:
  """Gives each member to a device of a vmapped axis, and returns the first's result."""

  def update(updates, state, params=None, *, member_weights=None, **extra_args):
    if not jax.tree.leaves(updates):
      return step.update(updates, state, params, **extra_args)
    n = jax.tree.leaves(updates)[0].shape[0]
    weights = jnp.ones([n]) if member_weights is None else member_weights
    one = lambda own, weight: step.update(
      own, state, params, weight=weight, **extra_args
    )
    results = jax.vmap(one, axis_name=axis)(updates, weights)
    return jax.tree.map(lambda leaf: leaf[0], results)

  return optax.GradientTransformationExtraArgs(step.init, update)


@functools.cache
def neighbors(call: int = 0, n: int = NUM_MEMBERS, k: int = 2) -> ranger.Neighbors:
  rng = np.random.default_rng(100 + call)
  features = rng.standard_normal([n, 3]).astype(np.float32)
  found = ranger.neighbors.nearest(jnp.asarray(features), k)
  return ranger.neighbors.weigh(found, kernel="gaussian")


def _with_neighbors(call: int) -> dict[str, Any]:
  return {"neighbors": neighbors(call), "graph_weight": 0.7}


def _with_regions(call: int) -> dict[str, Any]:
  rng = np.random.default_rng(call)
  return {
    "regions": jnp.asarray(rng.integers(0, 3, NUM_MEMBERS)),
    "losses": jnp.asarray(rng.uniform(0, 3, NUM_MEMBERS), jnp.float32),
  }


def _with_predictions(call: int) -> dict[str, Any]:
  rng = np.random.default_rng(call)
  return {
    "predictions": jnp.asarray(rng.dirichlet(np.ones(NUM_CLASSES), 3), jnp.float32),
    "example_ids": jnp.asarray(rng.integers(0, NUM_EXAMPLES, 3)),
  }


def _with_weight(call: int) -> dict[str, Any]:
  return {"weight": jnp.float32(1 + call % 3)}


def _member_case(factory: str, name: str = "", **arguments: Any) -> Case:
  static = tuple({"num_regions", "aggregator", "normalize"} & {*arguments})
  return Case(name or factory, factory, arguments, members=True, static=static)


_SIZES = {"num_examples": NUM_EXAMPLES, "num_classes": NUM_CLASSES}
_SIZE_NAMES = ("num_examples", "num_classes")

CASES = (
  *(
    _member_case("average_neighbors", f"average_neighbors-{way}", normalize=way)
    for way in ("batch", "graph", None)
  ),
  _member_case("average_neighbors", "average_neighbors-only", include_self=False),
  _member_case("aggregate_by_mean"),
  _member_case("aggregate_by_sum"),
  _member_case("aggregate_by_max"),
  _member_case("aggregate_by_worst_regions", num_regions=4, rate=0.5),
  _member_case("aggregate_by_median"),
  _member_case("aggregate_by_trimmed_mean", fraction=0.2),
  _member_case("aggregate_by_geometric_median"),
  _member_case("aggregate_by_krum", num_corrupt=1),
  _member_case(
    "aggregate_by_krum", "aggregate_by_krum-3", num_corrupt=1, num_selected=3
  ),
  _member_case("clip_examples", norm=2.0),
  _member_case("clip_examples", "clip_examples-quantile", quantile=0.5),
  _member_case("clip_examples", "clip_examples-of-batch", quantile=0.5, rate=None),
  _member_case("aggregate_by_upgrad"),
  _member_case("aggregate_by_mgda"),
  _member_case("aggregate_by_cagrad"),
  _member_case(
    "mix_nearest",
    "mix_nearest-median",
    aggregator=ranger.aggregate_by_median(),
    num_corrupt=2,
  ),
  _member_case(
    "mix_nearest",
    "mix_nearest-krum",
    aggregator=ranger.aggregate_by_krum(1),
    num_corrupt=2,
  ),
  *(
    _member_case(
      "aggregate_by_regions",
      f"aggregate_by_regions-{within}-{across}",
      num_regions=4,
      within=within,
      across=across,
    )
    for within, across in (
      ("mean", "mean"),
      ("sum", "sum"),
      ("mean", "max"),
      ("max", "mean"),
    )
  ),
  *(
    Case(
      f"across_devices-{name}",
      "across_devices",
      {"aggregator": aggregator, "axis_name": "devices"},
      members=True,
      static=("aggregator", "axis_name"),
      axis="devices",
    )
    for name, aggregator in (
      ("mean", ranger.aggregate_by_mean()),
      ("median", ranger.aggregate_by_median()),
      ("krum", ranger.aggregate_by_krum(1)),
    )
  ),
  _member_case("ranger_head"),
  Case(
    "accumulate-bfloat16",
    "accumulate",
    {
      "inner": optax.sgd(0.1, momentum=0.9),
      "every": ranger.by_noise_scale(4, decay=0.5),
      "accumulator_dtype": "bfloat16",
    },
    extra=_with_weight,
    static=("inner", "every", "accumulator_dtype"),
    tolerance=2e-2,
  ),
  Case(
    "accumulate-sgd",
    "accumulate",
    {"inner": optax.sgd(0.1, momentum=0.9), "every": 3},
    extra=_with_weight,
    static=("inner", "every"),
  ),
  Case(
    "accumulate-adam-sum",
    "accumulate",
    {
      "inner": optax.adam(0.1, eps=1e-3),
      "every": lambda step: 1 + step,
      "reduce": "sum",
    },
    static=("inner", "every"),
    foreign=True,
  ),
  Case(
    "scale_by_window",
    "scale_by_window",
    # Of 1 where a law compares what passes through.
    extra=lambda call: {"micro_batches": jnp.int32((3, 1, 2)[call % 3])},
    static=("rule",),
    absorbs=False,
  ),
  Case(
    "skip_anomalies",
    "skip_anomalies",
    {"inner": optax.sgd(0.1, momentum=0.9), "warmup": 2, "max_in_a_row": 2},
    static=("inner", "warmup", "max_in_a_row"),
    skips=True,
  ),
  Case(
    "skip_nonfinite",
    "skip_nonfinite",
    {"inner": optax.sgd(0.1, momentum=0.9)},
    static=("inner",),
    skips=True,
  ),
  Case(
    "scale_by_ngs",
    "scale_by_ngs",
    {"momentum": 0.8, "acceleration": 1.0},
    skips=True,
  ),
  Case(
    "scale_by_ngs-per-leaf",
    "scale_by_ngs",
    {"acceleration": 1.0, "per_leaf": True},
    skips=True,
  ),
  Case(
    "accelerate-sgd",
    "accelerate",
    {"inner": optax.sgd(0.1, momentum=0.9), "acceleration": 1.0},
    static=("inner",),
    skips=True,
  ),
  Case(
    "accelerate-adam-per-leaf",
    "accelerate",
    {"inner": optax.adam(0.1, eps=1e-3), "acceleration": 1.0, "per_leaf": True},
    static=("inner",),
    foreign=True,
    skips=True,
  ),
  Case(
    "mask_contradictions-sgd",
    "mask_contradictions",
    {"inner": optax.sgd(0.1, momentum=0.9)},
    static=("inner",),
    skips=True,
  ),
  Case(
    "mask_contradictions-adam",
    "mask_contradictions",
    {"inner": optax.adam(0.1, eps=1e-3)},
    static=("inner",),
    foreign=True,
    skips=True,
  ),
  Case("smooth_by_ema", "smooth_by_ema", {"decay": 0.9}, absorbs=False, by_entry=True),
  Case(
    "smooth_by_ema-uniform",
    "smooth_by_ema",
    {"decay": ranger.uniform_decay_schedule(), "warmup": 2, "start": 1, "every": 2},
    static=("decay",),
    absorbs=False,
    by_entry=True,
  ),
  Case(
    "smooth_by_lookahead",
    "smooth_by_lookahead",
    {"every": 3},
    absorbs=False,
    by_entry=True,
  ),
  Case(
    "smooth_by_lookahead-momentum",
    "smooth_by_lookahead",
    {"every": 3, "momentum": 0.5},
    absorbs=False,
    by_entry=True,
  ),
  Case(
    "smooth_predictions",
    "smooth_predictions",
    _SIZES,
    extra=_with_predictions,
    static=_SIZE_NAMES,
    absorbs=False,
  ),
  Case(
    "ranger_radam",
    "ranger_radam",
    {"learning_rate": 0.1, "weight_decay": 1e-2, "every": 3, "threshold": 4.0},
    static=("output_axis", "stack_axes"),
    skips=True,
  ),
  Case(
    "ranger-whole",
    "ranger",
    {
      "learning_rate": 0.1,
      "acceleration": 1.0,
      "weight_decay": 1e-2,
      "weight_decay_mask": lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
      "clip_norm": 5.0,
      "skip_spikes": 6.0,
      "every": 2,
      "ema_decay": 0.9,
      **_SIZES,
    },
    extra=_with_predictions,
    static=("every", "weight_decay_mask", *_SIZE_NAMES),
  ),
  Case(
    "ranger-plain",
    "ranger",
    {"learning_rate": 0.1, "acceleration": 1.0},
    static=("every",),
  ),
)


def extra_args(case: Case, call: int) -> dict[str, Any]:
  """What `update` needs at its call of this number."""
  if not case.members:
    return case.extra(call)
  return {**_with_neighbors(call), **_with_regions(call)}


_FLAX = ("layers",) if importlib.util.find_spec("flax") else ()
ROOMS = {
  "": ranger,
  **{
    f"{name}.": importlib.import_module(f"optax_ranger.{name}")
    for name in (
      *("graph", "labels", "neighbors", "recipes", "regions", "steps"),
      *("testing", "training", *_FLAX),
    )
  },
}


def public_names() -> dict[str, Any]:
  """Functions and classes of all rooms by name, once each, flat names first."""
  found: dict[int, tuple[str, Any]] = {}
  for prefix, room in ROOMS.items():
    for name, value in sorted(vars(room).items()):
      if not name.startswith("_") and not inspect.ismodule(value):
        found.setdefault(id(value), (prefix + name, value))
  return dict(found.values())


def factories() -> set[str]:
  """The public functions that make a transformation, in whatever room."""
  made = optax.GradientTransformationExtraArgs
  return {
    name
    for name, function in public_names().items()
    if inspect.isfunction(function)
    and inspect.signature(function).return_annotation is made
  }


def params(dtype: Any = jnp.float32) -> dict[str, Any]:
  return jax.tree.map(lambda leaf: leaf.astype(dtype), testing.Subject(list).params)


def gradients(case: Case, call: int, tree: Any) -> Any:
  """Random gradients for the parameters in `tree`, with members where needed."""
  if case.members:
    lead = lambda leaf: jax.ShapeDtypeStruct((NUM_MEMBERS, *leaf.shape), leaf.dtype)
    tree = jax.tree.map(lead, tree)
  return testing.random_like(call, tree)


@functools.cache
def subject(name: str) -> testing.Subject:
  """What laws are checked on: one for all tests, which saves its compilation."""
  (case,) = (case for case in CASES if case.name == name)
  return testing.Subject(
    case.make,
    gradients=functools.partial(gradients, case),
    extra=functools.partial(extra_args, case),
    factory=getattr(ranger, case.factory),
    arguments=case.arguments,
    static_args=case.static,
    wrap=case.wrap,
  )


def jitted_update(name: str) -> Any:
  return subject(name).first_run.update


def run(
  case: Case, tree: Any, calls: int = 5, update: Any = None, state: Any = None
) -> tuple[list[Any], Any]:
  """Calls a step several times in a plain loop; returns all updates and the state."""
  return subject(case.name).run(tree, calls, update, state)
