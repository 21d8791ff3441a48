"""Step 4 across devices: each device's gradient is one member."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import gramian as gramian_lib
from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.members import clean_weights
from optax_ranger._core.sharding import after
from optax_ranger._core.sharding import vary
from optax_ranger._core.sharding import varying_axes
from optax_ranger._core.tree import all_finite
from optax_ranger._core.tree import inner_product
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._core.types import transformation
from optax_ranger._gradients import linear

_AxisName = str | tuple[str, ...]


def across_devices(
  aggregator: optax.GradientTransformation, axis_name: _AxisName
) -> optax.GradientTransformationExtraArgs:
  r"""Aggregates the gradients of the devices along an axis of a mesh.

  Each device's gradient is one member of `aggregator`, so that a device that
  fails, or a sender that lies, is one member of many. For use inside of
  ``jax.shard_map`` or ``jax.pmap``, at the head of an optimizer's chain: what
  comes in is each device's own gradient, what comes out is the same everywhere.

  Under ``shard_map``, JAX sums the gradient of parameters that are the same on
  all devices, honest or not; mark them first, so that gradients stay apart:
  ``jax.lax.pcast(params, axis_name, to="varying")``.

  =================================== ======================================
  aggregator                          what is sent, beside a few scalars
  =================================== ======================================
  mean, sum, regions: linear          one ``psum``
  Krum, geometric median              one ``all_gather`` a leaf, one ``psum``
  max, median, trimmed mean, others   one ``all_gather`` a leaf
  =================================== ======================================

  Args:
    aggregator: an ``aggregate_by_*``, or a chain that ends in one and treats
      every leaf alike. Without state of the parameters' shape.
    axis_name: the mesh axis, or axes, along which the devices are members.

  Extra args of ``update``:
    weight: one number, this device's ``member_weights``: its count of examples,
      say. None for one.

  Shapes:
    ``[*shape]`` to ``[*shape]``, types kept. Leaves are gathered one after the
    other: temporaries are those of the aggregator on the members of one leaf.
    The state is the aggregator's.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Guarantees:
    * The result is that of the aggregator on the stacked gradients of all devices.
    * Every device gets the same bits.
    * A device with a non-finite gradient is left out.

  Raises:
    ValueError: where gradients are the same on all devices already, and
      whatever `aggregator` refuses.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> step = ranger.across_devices(ranger.aggregate_by_sum(), "devices")
    >>> update = lambda gradient: step.update(gradient, step.init(gradient))[0]
    >>> print(jax.pmap(update, axis_name="devices")(jnp.array([2.5])))
    [2.5]
  """
  aggregator = optax.with_extra_args_support(aggregator)
  names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)

  def update(
    updates: PyTree,
    state: PyTree,
    params: PyTree = None,
    *,
    weight: Any = None,
    **extra_args: Any,
  ) -> tuple[PyTree, PyTree]:
    del params
    leaves, structure = jax.tree.flatten(updates)
    if not leaves:
      return updates, state
    validate.inexact_leaves("updates", updates, "across_devices")
    index = jax.lax.axis_index(names)
    # Replication is typed under shard_map(check_vma=True), and only there.
    typed = varying_axes(index) >= set(names)
    if typed:
      _refuse_reduced(updates, names)
    gather = lambda x: jax.lax.all_gather(
      x, names, to="invarying" if typed else "varying"
    )
    n = jax.lax.axis_size(names)
    types = (numerics.real(numerics.wide(leaf.dtype)) for leaf in leaves)
    dtype = numerics.widest(jnp.float32, *types)

    # Facts about each member, as numbers: its weight, soundness, and size.
    ones = {"member_weights": jnp.ones([n], dtype), "num_dropped": jnp.int32(0)}
    about = linear.looks_at(aggregator, n, state, {**extra_args, **ones})
    validate.shape("weight", 1 if weight is None else weight, ())
    own = [
      numerics.scalar(1 if weight is None else weight, dtype),
      all_finite(updates).astype(dtype),
    ]
    if about in ("gramian", "directions"):
      one_row = jax.tree.map(lambda leaf: leaf[None], updates)
      own.append(gramian_lib.sizes(one_row, 1)[0].astype(dtype))
    elif about == "norms":
      own.append(jnp.sqrt(inner_product(updates, updates)).astype(dtype))
    own = [vary(fact, names) if typed else fact for fact in own]
    facts = gather(jnp.stack(own))
    weights, _, num_dropped = clean_weights(
      facts[:, 0], n, dtype, finite=facts[:, 1] > 0
    )
    frame = None
    if about == "gramian":
      frame = gramian_lib.frame(facts[:, 2], weights)
      num_dropped = num_dropped + ((weights > 0) & (frame.weights == 0)).sum()
      weights = frame.weights
    elif about == "directions":
      frame = gramian_lib.own_frame(facts[:, 2], weights)
    present = weights[index] > 0
    keep = lambda leaf, present: jnp.where(present, leaf, jnp.zeros_like(leaf))

    args = {**extra_args, "member_weights": weights, "num_dropped": num_dropped}
    if about == "norms":
      args["norms"] = facts[:, 2]
    elif frame is not None:
      products = _gather_gramian(leaves, frame, index, present, gather)
      if about == "directions":
        products = gramian_lib.directions(products, frame, facts[:, 2])
      args[str(about)] = products
    try:
      shares = linear.transpose(aggregator, n, state, args)
    except linear.NotLinearError:
      linear.refuse_unless_entrywise(aggregator, n, state, args, _NOT_BY_LEAF)
      results = []
      for leaf in leaves:
        present = after(results[-1] if results else None, present)
        rows = gather(keep(leaf, present))
        result, new_state = aggregator.update([rows], state, None, **args)
        results.extend(jax.tree.leaves(result))
    else:
      wide = lambda leaf: leaf.astype(numerics.wide(leaf.dtype))
      part = lambda leaf: shares[index].astype(leaf.dtype) * leaf
      sums = jax.lax.psum([part(wide(keep(leaf, present))) for leaf in leaves], names)
      results = [
        total.astype(leaf.dtype) for total, leaf in zip(sums, leaves, strict=True)
      ]
      _, new_state = aggregator.update(jnp.zeros([n], dtype), state, None, **args)
    return jax.tree.unflatten(structure, results), new_state

  return transformation(aggregator.init, update)


_NOT_BY_LEAF = (
  "across_devices gathers one leaf at a time, so it needs an aggregator that treats"
  " every entry of the gradients alike, and by itself, or that is told of whole"
  " gradients by one of gramian=, norms= and directions=, and no chain of such."
)


def _gather_gramian(
  leaves: list[Array],
  frame: gramian_lib.Frame,
  index: Array,
  present: Array,
  gather: Any,
) -> Array:
  """Inner products of the devices' gradients, [n, n]; each computes its own row."""
  row = None
  for leaf in leaves:
    present = after(row, present)
    rows = gather(jnp.where(present, leaf, jnp.zeros_like(leaf)))
    own = gramian_lib.of_leaf(rows, frame, index)[0].astype(frame.weights.dtype)
    row = own if row is None else row + own
  gramian = gather(row)
  return (gramian + gramian.T) / 2


def _refuse_reduced(updates: PyTree, names: tuple[str, ...]) -> None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
    missing = set(names) - varying_axes(leaf)
    if missing:
      axes = ", ".join(repr(axis) for axis in sorted(missing))
      raise ValueError(
        f"updates{jax.tree_util.keystr(path)} is the same over the mesh axis"
        f" {axes}: JAX has already summed it over the devices."
        " Mark the parameters with jax.lax.pcast(params, axis,"
        " to='varying') before the gradient is computed."
      )
