"""The extra args that a step reads, gathered over devices where needed."""

from collections.abc import Callable
import inspect
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core.members import clean_weights
from optax_ranger._core.sharding import per_row
from optax_ranger._core.shards import ROWS
from optax_ranger._core.shards import Shards
from optax_ranger._core.types import Array
from optax_ranger._core.types import Neighbors
from optax_ranger._core.types import PyTree
from optax_ranger._gradients import linear
from optax_ranger._gradients.options import Options
from optax_ranger._gradients.told import Told


class Known(NamedTuple):
  """What is known of this device's examples: losses and aux only after a forward pass.

  Attributes:
    finite: ``bool [n]``, which examples can be used.
    losses: ``float [n]``, or None.
    aux: what came with the losses, or None.
  """

  finite: Array
  losses: Array | None = None
  aux: Any = None


class Plan(NamedTuple):
  """What a step gets, and what of it is sent between devices.

  Attributes:
    whole: extra args that are the same on every device.
    rows: extra args with this device's rows.
    reads: like `rows` and ``"losses"``, whether the step reads each leaf.
    items: what ``find_neighbors`` may ask for, besides items of aux.
    options: of the engine.
    dtype: of the weights.
  """

  whole: dict[str, Any]
  rows: dict[str, Any]
  reads: dict[str, Any]
  items: dict[str, Any]
  options: Options
  dtype: Any


class Gathered(NamedTuple):
  """Rows of all devices, the same on each; what no step reads is left out.

  Attributes:
    rows: by the name of the extra arg, the leaves that are read.
    finite: ``bool [total]``.
    losses: ``float [total]``, or None.
    found: what ``find_neighbors`` asked for.
    along: items of aux that were wanted.
  """

  rows: dict[str, list[Array]]
  finite: Array
  losses: Array | None
  found: dict[str, Any]
  along: dict[str, Any]


def accepted_names(function: Callable[..., Any]) -> Callable[[str], bool]:
  """Which keywords a function takes."""
  parameters = inspect.signature(function).parameters.values()
  if any(one.kind is one.VAR_KEYWORD for one in parameters):
    return lambda name: True
  names = {one.name for one in parameters if one.kind is not one.VAR_POSITIONAL}
  return lambda name: name in names


def split_rows(
  extra_args: dict[str, Any], row_args: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Extra args that hold one row an example, by their name, and the others."""
  given = {name: arg for name, arg in extra_args.items() if arg is not None}
  declared = {*ROWS, *row_args}
  rows = {name: arg for name, arg in given.items() if name in declared}
  return rows, {name: arg for name, arg in given.items() if name not in rows}


def needs_values(options: Options, batch: Any, extra_args: dict[str, Any]) -> bool:
  """Whether neighbors are found by what the model says."""
  if options.find_neighbors is None:
    return False
  known = {*(batch if isinstance(batch, dict) else ()), *extra_args}
  return not set(inspect.signature(options.find_neighbors).parameters) <= known


def make_plan(
  step: optax.GradientTransformationExtraArgs,
  state: PyTree,
  shards: Shards,
  plan: Plan,
) -> Plan:
  """Finds out, by tracing the step, which rows it reads: only those are sent."""
  plan = plan._replace(rows=jax.tree.map(jnp.asarray, plan.rows))
  if shards.axis_name is None:
    reads = jax.tree.map(lambda _: True, {**plan.rows, "losses": 0})
    return plan._replace(reads=reads)
  args = blank_arguments(plan, shards.total)
  blank = {name: args[name] for name in (*plan.rows, "losses")}
  return plan._replace(reads=linear.reads(step, shards.total, state, args, blank))


def gather(
  shards: Shards, plan: Plan, known: Known, before: Gathered | None = None
) -> Gathered:
  """Brings the rows of all devices together, in one collective.

  What `before` holds is not sent again, but for what is known better now.
  """
  aux = _items(known.aux)
  local: dict[str, Any] = {"finite": known.finite}
  if known.losses is not None:
    if plan.reads["losses"]:
      local["losses"] = known.losses
    local["along"] = {name: aux[name] for name in plan.options.along if name in aux}
  if before is None:
    local["rows"] = {
      name: [leaf for leaf, read in _flags(arg, plan.reads[name]) if read]
      for name, arg in plan.rows.items()
    }
    if plan.options.find_neighbors is not None:
      local["found"] = _named(plan.options.find_neighbors, {**aux, **plan.items})
  everywhere = shards.gather(local)
  if before is None:
    before = Gathered(everywhere["rows"], known.finite, None, {}, {})
  return before._replace(
    finite=everywhere["finite"],
    losses=everywhere.get("losses", before.losses),
    found=everywhere.get("found", before.found),
    along=everywhere.get("along", before.along),
  )


def step_arguments(plan: Plan, gathered: Gathered) -> dict[str, Any]:
  """The extra args of the step, over the examples of all devices."""
  total = gathered.finite.shape[0]
  args = {**plan.whole, **_blank_rows(plan, total)}
  for name, leaves in gathered.rows.items():
    found, structure = iter(leaves), jax.tree.structure(args[name])
    args[name] = structure.unflatten(
      next(found) if read else blank
      for blank, read in _flags(args[name], plan.reads[name])
    )
  weights, _, num_dropped = clean_weights(
    args.get("member_weights"), total, plan.dtype, gathered.finite
  )
  losses = jnp.zeros([total]) if gathered.losses is None else gathered.losses
  args.update(Told(weights, num_dropped, losses).args())
  if plan.options.find_neighbors is not None:
    args["neighbors"] = _find(plan.options.find_neighbors, gathered.found, weights)
  return args


def blank_arguments(plan: Plan, total: int) -> dict[str, Any]:
  """As `step_arguments`, of examples of which nothing is known."""
  told = Told(jnp.ones([total]), jnp.int32(0), jnp.zeros([total]))
  args = {**plan.whole, **told.args(), **_blank_rows(plan, total)}
  if plan.options.find_neighbors is not None:
    args["neighbors"] = _blank_neighbors(total)
  return args


def _blank_rows(plan: Plan, total: int) -> dict[str, Any]:
  blank = lambda leaf: jnp.zeros([total, *leaf.shape[1:]], leaf.dtype)
  return jax.tree.map(blank, plan.rows)


def _blank_neighbors(n: int) -> Neighbors:
  return Neighbors(
    jnp.full([n, 1], -1, jnp.int32), jnp.zeros([n, 1]), jnp.zeros([n, 1])
  )


def _flags(tree: PyTree, reads: PyTree) -> Any:
  leaves, structure = jax.tree.flatten(tree)
  return zip(leaves, structure.flatten_up_to(reads), strict=True)


def _items(tree: PyTree) -> dict[str, Any]:
  return dict(tree) if isinstance(tree, dict) else {}


def _named(find_neighbors: Callable[..., Any], items: dict[str, Any]) -> dict[str, Any]:
  """What a function asks for, or a refusal that names what is not there."""
  for one in inspect.signature(find_neighbors).parameters.values():
    required = one.default is one.empty and one.kind is not one.VAR_KEYWORD
    if required and one.name not in items:
      raise ValueError(
        f"find_neighbors asks for {one.name!r}, which is not in the batch, aux or the"
        f" extra args; available: {sorted(items)}."
      )
  accepts = accepted_names(find_neighbors)
  return {name: item for name, item in items.items() if accepts(name)}


def _find(
  find_neighbors: Callable[..., Neighbors],
  rows: dict[str, Any],
  weights: Array,
) -> Neighbors:
  """Neighbors among the rows of all devices; those that are absent have none."""

  def present(leaf):
    leaf = jax.lax.stop_gradient(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf
    here = per_row(weights > 0, leaf)
    return jnp.where(here, leaf, jnp.full_like(leaf, jnp.nan))

  return find_neighbors(**jax.tree.map(present, rows))
