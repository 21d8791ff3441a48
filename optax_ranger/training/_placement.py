"""Where things live on a mesh: batches split by rows, states whole or split."""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from optax_ranger._core import numerics
from optax_ranger._core import states
from optax_ranger._core import validate
from optax_ranger._core.tree import unboxed
from optax_ranger._core.types import PyTree

WHOLE = PartitionSpec()
# Values of padding rows; other arrays repeat their last row.
_FILL = {"example_ids": -1, "member_weights": 0}


class Placement:
  """The places of a mesh, and who lives where."""

  def __init__(self, mesh: Mesh | None, axis_name: Any, *, shard_state: bool):
    self.mesh = mesh
    self.names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    if mesh is not None:
      for name in self.names:
        if name not in mesh.axis_names:
          raise ValueError(
            f"axis_name must be among the mesh's axes {mesh.axis_names}, got {name!r}."
          )
    self.rows = PartitionSpec(self.names if len(self.names) > 1 else self.names[0])
    self.num_devices = (
      1 if mesh is None else math.prod(mesh.shape[name] for name in self.names)
    )
    self.shard_state = shard_state

  def sharding(self, spec: PartitionSpec) -> NamedSharding:
    assert self.mesh is not None
    return NamedSharding(self.mesh, spec)

  def split_dim(self, leaf: Any) -> int | None:
    """The dimension over which a leaf of a split state is split: its largest."""
    taken = _spec_of(leaf)
    if any(not _names(entry).isdisjoint(self.names) for entry in taken):
      return None  # It is split already.
    fits = [
      (size, -dim)
      for dim, size in enumerate(jnp.shape(leaf))
      if size and size % self.num_devices == 0 and taken[dim] is None
    ]
    return -max(fits)[1] if fits else None

  def split_spec(self, leaf: Any) -> PartitionSpec:
    spec = list(_spec_of(leaf))
    dim = self.split_dim(leaf)
    if dim is not None:
      spec[dim] = self.rows[0]
    return PartitionSpec(*spec)

  def scatter_dim(self, leaf: Any) -> int:
    """Where a gradient is cut when it is reduced, -1 for nowhere."""
    # Over gloo, CPUs of several processes have no sound reduce-scatter.
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
      return -1
    dim = self.split_dim(leaf)
    return -1 if dim is None else dim

  def scatter(self, dims: PyTree) -> Callable[[PyTree], PyTree]:
    """Adds gradients up over devices, and leaves each its part of the sum."""

    def reduce(grads):
      leaves, structure = jax.tree.flatten(grads)
      cut = structure.flatten_up_to(dims)
      whole = jax.lax.psum(
        [leaf for leaf, dim in zip(leaves, cut, strict=True) if dim < 0], self.names
      )
      whole = iter(whole)
      return structure.unflatten(
        next(whole)
        if dim < 0
        else jax.lax.psum_scatter(leaf, self.names, scatter_dimension=dim, tiled=True)
        for leaf, dim in zip(leaves, cut, strict=True)
      )

    return reduce

  def scattered_specs(self, dims: PyTree) -> PyTree:
    spec = lambda dim: PartitionSpec(*[None] * dim, self.rows[0]) if dim >= 0 else WHOLE
    return jax.tree.map(spec, dims)

  def state_specs(self, state: PyTree, *, in_parts: bool) -> PyTree:
    """Over the data axes: tables by rows, windows in parts, the rest whole."""
    is_table, is_window = map(states.declares, ("split_by_rows", "open_window"))

    def rows_spec(leaf):
      rows = jnp.shape(unboxed(leaf))[0]
      return WHOLE if rows % self.num_devices else self.rows

    def node_spec(node):
      specs = jax.tree.map(lambda leaf: WHOLE, node)
      if is_table(node):
        fields = {name: getattr(node, name) for name in node.split_by_rows}
        specs = specs._replace(**jax.tree.map(rows_spec, fields))
      if is_window(node):
        inside = self.state_specs(getattr(node, node.inside), in_parts=False)
        specs = specs._replace(**{node.inside: inside})
        if in_parts:
          window = getattr(node, node.open_window)
          parts = jax.tree.map(lambda leaf: self.rows, window)
          specs = specs._replace(**{node.open_window: parts})
      return specs

    is_special = lambda node: is_table(node) or is_window(node)
    return jax.tree.map(node_spec, state, is_leaf=is_special)

  def automatic(self, function: Callable[..., Any], like: PyTree) -> Any:
    """Leaves explicit axes to the compiler inside of an update."""
    assert self.mesh is not None
    if AxisType.Explicit not in self.mesh.axis_types:
      return function
    params, state = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.sharding.auto_axes(
      function, out_sharding=(params, state, self.sharding(WHOLE))
    )

  def unreduced_axes(self, params: PyTree) -> tuple[str, ...]:
    """Explicit axes over which gradients may stay unreduced; none if they may not.

    Not beside other axes, nor for parameters that are split: XLA has reduced such
    gradients of embedding tables wrongly there (openxla/xla #42481, #40034), and does
    so beside an automatic axis in jaxlib 0.12.0.
    """
    assert self.mesh is not None
    kinds = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
    explicit = all(kinds[name] == AxisType.Explicit for name in self.names)
    if not explicit or self.mesh.size != self.num_devices:
      return ()
    entries = [entry for leaf in jax.tree.leaves(params) for entry in _spec_of(leaf)]
    return () if any(map(_names, entries)) else self.names

  def refuse_split_params(self, params: PyTree) -> None:
    """Refuses parameters that are split over the axes of the examples (FSDP)."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
      for entry in _spec_of(leaf):
        shared = _names(entry).intersection(self.names)
        if shared:
          raise ValueError(
            f"params{jax.tree_util.keystr(path)} is split over the mesh axis"
            f' {min(shared)!r}, as are the examples (FSDP): partition="shard_map"'
            ' needs it whole there. Use partition="jit", where the compiler gathers'
            " it."
          )

  def place_params(self, params: PyTree) -> PyTree:
    """Keeps what lies on the mesh, and copies what doesn't to every device."""
    if self.mesh is None:
      return params
    return jax.tree.map(lambda leaf: self._put(leaf, WHOLE), params)

  def place_shared(self, tree: PyTree) -> PyTree:
    """Copies arrays to every device."""
    if self.mesh is None:
      return tree
    put = lambda leaf: self._put(leaf, WHOLE) if isinstance(leaf, jax.Array) else leaf
    return jax.tree.map(put, tree)

  def place_state(self, state: PyTree, *, in_parts: bool) -> PyTree:
    """Puts the state where the update keeps it."""
    if self.mesh is None:
      return state

    def put(leaf, spec):
      if self.shard_state and spec == WHOLE:
        return self._put(leaf, self.split_spec(leaf), exactly=True)
      return self._put(leaf, spec, exactly=spec != WHOLE)

    return jax.tree.map(put, state, self.state_specs(state, in_parts=in_parts))

  def fit_windows(self, state: PyTree, like: PyTree, *, in_parts: bool) -> PyTree:
    """Brings sums of open windows into this run's form, whatever form they had.

    With `in_parts` each device has its own part: the sum goes to the first device, and
    the others start from zero.

    Args:
      state: the optimizer's, such as a checkpoint's of other devices.
      like: what ``init`` makes for one device, or its shapes.
      in_parts: whether the devices keep their own parts.
    """
    shapes = [leaf.shape for leaf in jax.tree.leaves(states.windows(like))]
    found = len(jax.tree.leaves(states.windows(state)))
    if found != len(shapes):
      raise ValueError(
        f"the state must have {len(shapes)} leaves in its open windows, as accumulate's"
        f" init makes them, got {found}: was it made with another every= or optimizer?"
      )
    wanted = iter(shapes)

    def fit(path, leaf):
      shape = next(wanted)
      parts = (self.num_devices, *shape)
      if jnp.shape(leaf) == (parts if in_parts else shape):
        return leaf
      if jnp.shape(leaf) != shape and jnp.shape(leaf)[1:] != shape:
        raise ValueError(
          f"accumulated{jax.tree_util.keystr(path)} must have the parameter's shape"
          f" {list(shape)}, or that after an axis over devices, got"
          f" {list(jnp.shape(leaf))}."
        )
      if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(parts if in_parts else shape, leaf.dtype)
      total = _on_host(leaf, f"accumulated{jax.tree_util.keystr(path)}")
      if total.shape != shape:
        total = total.sum(axis=0, dtype=numerics.wide(total.dtype)).astype(total.dtype)
      if not in_parts:
        return total
      return np.concatenate([total[None], np.zeros_like(total, shape=parts)[1:]])

    return states.map_windows(fit, state, with_path=True)

  @functools.cached_property
  def num_local_devices(self) -> int:
    """Of the data axes, those that this process feeds."""
    if self.mesh is None:
      return 1
    axes = [self.mesh.axis_names.index(name) for name in self.names]
    grid = np.moveaxis(self.mesh.devices, axes, range(len(axes)))
    me = jax.process_index()
    return sum(
      any(device.process_index == me for device in feeds)
      for feeds in grid.reshape(self.num_devices, -1)
    )

  def is_global(self, tree: PyTree) -> bool:
    """Whether arrays hold the rows of all processes already."""
    return any(
      isinstance(leaf, jax.Array)
      and validate.is_known(leaf)
      and not leaf.is_fully_addressable
      for leaf in jax.tree.leaves(tree)
    )

  def _put(self, leaf: Any, spec: PartitionSpec, *, exactly: bool = False) -> Any:
    wanted = self.sharding(spec)
    now = getattr(leaf, "sharding", None)
    if isinstance(now, NamedSharding) and now.mesh == self.mesh:
      kept = not exactly or now.is_equivalent_to(wanted, jnp.ndim(leaf))
      if kept:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=wanted)
    if jax.process_count() > 1 and getattr(leaf, "is_fully_addressable", True):
      leaf = np.asarray(leaf)
    elif isinstance(leaf, jax.Array):
      # What is donated later must not share a buffer with the caller's array;
      # may_alias=False does not see to that for several devices.
      leaf = jnp.copy(leaf)
    return jax.device_put(leaf, wanted)

  def place_rows(self, tree: PyTree) -> PyTree:
    """Splits rows over the devices; every process gives its own."""
    if self.mesh is None:
      return tree
    wanted = self.sharding(self.rows)

    def put(leaf):
      if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=wanted)
      now = getattr(leaf, "sharding", None)
      if isinstance(now, NamedSharding) and now.mesh == self.mesh:
        return leaf if now.spec == self.rows else jax.device_put(leaf, wanted)
      if jax.process_count() > 1:
        rows = jnp.shape(leaf)[0] * self.num_devices // self.num_local_devices
        return jax.make_array_from_process_local_data(
          wanted, np.asarray(leaf), (rows, *jnp.shape(leaf)[1:])
        )
      return jax.device_put(leaf, wanted)

    return jax.tree.map(put, tree)

  def place_rows_or_copies(self, tree: PyTree) -> PyTree:
    """Splits leaves whose rows the devices divide, and copies the others."""
    if self.mesh is None:
      return tree

    def put(path, leaf):
      rows = (jnp.shape(leaf) or (0,))[0]
      if rows > 0 and rows % self.num_local_devices == 0:
        return self.place_rows(leaf)
      # Those of one process are not those of another.
      if rows and jax.process_count() > 1 and not self.is_global(leaf):
        raise ValueError(
          f"batch{jax.tree_util.keystr(path)} has {rows} rows, which the"
          f" {self.num_local_devices} devices of this process do not divide. What is"
          " the same in all processes can be an extra arg."
        )
      return self._put(jnp.asarray(leaf), WHOLE)

    return jax.tree_util.tree_map_with_path(put, tree)


def padded(tree: Any, name: str, to: int) -> Any:
  """Repeats the last row of every leaf, so that there are `to` rows.

  Where there is none, rows are ones: norms and logarithms have no gradient at zero.
  """

  def pad(leaf):
    missing = to - jnp.shape(leaf)[0]
    if missing == 0:
      return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct((to, *leaf.shape[1:]), leaf.dtype)
    library = jnp if isinstance(leaf, jax.Array) else np
    widths = [(0, missing)] + [(0, 0)] * (jnp.ndim(leaf) - 1)
    if name in _FILL:
      return library.pad(leaf, widths, constant_values=_FILL[name])
    if jnp.shape(leaf)[0]:
      return library.pad(leaf, widths, mode="edge")
    return library.ones((to, *jnp.shape(leaf)[1:]), leaf.dtype)

  return jax.tree.map(pad, tree)


def _on_host(leaf: Any, name: str) -> np.ndarray:
  everywhere = lambda leaf: leaf.is_fully_addressable or leaf.is_fully_replicated
  if isinstance(leaf, jax.Array) and not everywhere(leaf):
    raise ValueError(
      f"{name} of shape {list(leaf.shape)} was made on another number of devices or"
      " another reduce=, and no process has all of it: restore it whole on each."
    )
  return np.asarray(leaf)


def _names(entry: Any) -> frozenset[str]:
  """The mesh axes over which a dimension is split."""
  if entry is None:
    return frozenset()
  return frozenset((entry,) if isinstance(entry, str) else entry)


def _spec_of(leaf: Any) -> tuple[Any, ...]:
  """A leaf's partition, one entry a dimension."""
  spec = getattr(getattr(leaf, "sharding", None), "spec", ())
  return (*spec, *[None] * (jnp.ndim(leaf) - len(spec)))
