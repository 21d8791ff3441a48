"""`train_step`: one compiled update for a core, a host and many hosts."""

from collections.abc import Callable
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from optax_ranger._core import labels
from optax_ranger._core import states
from optax_ranger._core import validate
from optax_ranger._core.members import init_members
from optax_ranger._core.sharding import place
from optax_ranger._core.shards import ROWS
from optax_ranger._core.tree import is_nnx_module
from optax_ranger._core.types import Neighbors
from optax_ranger._core.types import PyTree
from optax_ranger._gradients import arguments
from optax_ranger._gradients.options import Options
from optax_ranger.training import _placement
from optax_ranger.training import _update

_WHOLE = _placement.WHOLE


def train_step(
  per_example_losses: Callable[..., Any],
  optimizer: optax.GradientTransformation,
  *,
  step: optax.GradientTransformation | None = None,
  find_neighbors: Callable[..., Neighbors] | None = None,
  has_aux: bool = False,
  row_args: tuple[str, ...] = (),
  statistics: tuple[str, ...] = (),
  mesh: Mesh | None = None,
  axis_name: str | tuple[str, ...] = "data",
  partition: str | None = "shard_map",
  num_micro_batches: int = 1,
  reduce: str = "every_call",
  shard_state: bool = False,
  batch_size: int | None = None,
  donate: bool = True,
  over: str = "examples",
) -> "TrainStep":
  r"""Builds the update of a training step: losses, gradient, optimizer, all compiled.

  The same call on a laptop, on eight devices, and on several hosts: `mesh` is
  what changes. Examples are split over devices and the step over them sees them
  all, so that the result is that of one device; what it needs of other devices
  is gathered (rows of neighbors, weights, features, never gradients), and the
  gradient is reduced once, however many micro-batches there are.

  .. math::
    g = \sum_{i} c_i \nabla l_i, \qquad c = L^T 1 \text{ over the whole batch}

  An example whose loss, but none of its inputs, is not finite has weight zero; with a
  `step` and several micro-batches others do not make up for it. If the derivative of
  that loss is not finite either, no example of its device is usable.

  Args:
    per_example_losses: ``(params, batch, **extra) -> losses [n]``, or ``(losses,
      aux)``, as in ``value_and_grad``. If it takes ``smoothed=``, it gets the
      smoothed predictions of the batch's ``example_ids``, ``float32 [n, C]``.
    optimizer: any Optax transformation, such as ``ranger(...)``.
    step: per-example steps that end in a linear aggregation, such as
      ``ranger_head()``; None for ``aggregate_by_mean()``. A step that is not
      linear works where there is one device and one micro-batch.
    find_neighbors: makes ``neighbors=`` for `step` of the whole batch. Its
      arguments name what it is given, of all devices: items of the batch, of
      ``aux`` and extra args, and ``smoothed``. Rows that are padding or not
      finite come as NaN. Each device runs it, on n of all rows: n x d numbers
      are sent for features.
    has_aux: whether the losses come with a dictionary. Its items hold one row an
      example, but for scalars and `statistics`. They reach ``optimizer.update`` as
      extra args under their names (``predictions=``); rows that are numbers, floats
      or booleans of shape ``[n]``, are metrics too. Over tasks all items are
      metrics, and the optimizer does not get them.
    row_args: names of extra args of your own that hold one row an example.
    statistics: names of items of aux that belong to the batch as a whole, arrays or
      trees such as new batch statistics. They come back as metrics: floats as the
      mean over micro-batches and devices, weighted as their examples are, integers
      as the sum. Without a usable example, an extra arg of the same name comes back.
    mesh: None for one device. Axes may be explicit or automatic.
    axis_name: the mesh axis, or axes, over which examples are split. Other axes
      are the caller's, for parameters: the step keeps how these are split.
    partition: ``"shard_map"``: examples are split by hand, and communication is
      what the table says. ``"jit"``: the compiler splits everything, for models
      that bring shardings of their own; it gathers what it sees fit. It reduces
      gradients once in every micro-batch; on explicit meshes once in a call, if
      parameters are not split, all axes split examples, and JAX has types for it
      (``training.collectives`` shows). None: the update itself, neither compiled nor
      placed, for a ``jax.pmap`` or ``jax.shard_map`` of yours over `axis_name`;
      prediction tables are then whole on each device.
    num_micro_batches: pieces of each device's part of the batch whose activations
      are held at once; a static Python integer.
    reduce: ``"every_call"``, or ``"on_emission"``: with an `optimizer` that is
      ``accumulate(...)``, alone or after steps that pass gradients through,
      devices keep their own parts, and meet on emission only. Other steps before
      it would see parts.
    shard_state: splits optimizer and smoothing state over the devices (ZeRO-1):
      a reduce-scatter and an all-gather take the place of the all-reduce.
    batch_size: rows that every batch is padded to, over all processes, so that a
      smaller last one is not compiled anew; None for the next multiple.
    donate: whether parameters and state are updated in place; those that were
      passed are gone then. The arrays of an NNX model are copied once, at the first
      call, so that the model keeps its own.
    over: ``"examples"``, or ``"tasks"``: `per_example_losses` returns the losses of
      tasks, ``[T]``, and `step` is over these, such as ``aggregate_by_upgrad()``. The
      leaves of the batch may differ in their rows; on a mesh, which needs
      ``partition="jit"``, a leaf is split over devices where they divide its rows,
      and else copied, or refused if there are several processes. ``member_weights``
      has length T, and ``"losses"`` is one more metric.

  ===================================== =================================
  sent in a call, on n examples         bytes, each device
  ===================================== =================================
  gradient: all-reduce                  once the parameters
  with ``shard_state``                  reduce-scatter and all-gather, each
                                        once the parameters
  with ``"jit"``                        the same, on explicit meshes if JAX has
                                        types for it; else in each micro-batch
  ``"on_emission"``, nothing emitted    0
  neighbors given / found               8 n k / 4 n d of the features
  smoothed predictions read / written   4 n C each
  weights, finiteness, metrics          some numbers an example
  ===================================== =================================

  Returns:
    A ``TrainStep``: call it, ``update(params, state, batch, **extra) -> (params,
    state, metrics)``; ``update.init(params)`` makes the state, and
    ``update.lower(...)`` is jit's. Batches may be NumPy arrays or arrays of one
    device; on several processes each gives its own rows, equally many unless
    there is a `batch_size`. Extra args named ``neighbors``, ``member_weights``,
    ``regions``, ``example_ids``, ``features``, ``labels`` and ``beliefs``, and
    `row_args`, hold one row an example; all others are the same on all devices. A
    typed key (``jax.random.key``) reaches the losses folded with the index of the
    micro-batch and, unless ``partition="jit"``, of the device. Metrics: ``"loss"``, the
    weighted mean over finite examples, ``"weight"``, ``"num_dropped"`` in this call,
    and what ``aux`` has.
    The optimizer gets ``weight=``, the sum of ``member_weights``, and
    ``value=``, the loss, unless they are passed. Gradients of complex parameters are
    conjugated first, as optimizers expect.

    Without a usable example, parameters and the optimizer's state stay as they are,
    ``"loss"`` is NaN and ``"weight"`` 0; but ``last=True`` closes an open window.

  Guarantees:
    * Parameters equal those of one device.
    * A batch size that is no multiple of devices and micro-batches is padded and
      masked; the result is exact.
    * One reduction of gradient size for any number of micro-batches, none while
      ``accumulate`` waits.

  Raises:
    ValueError: for arguments that do not fit together, rows of another number
      than the batch's, and a batch beyond ``batch_size``.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optax_ranger as ranger
    >>> losses = lambda w, batch: (w * batch["x"] - batch["y"]) ** 2
    >>> update = ranger.train_step(
    ...     losses, optax.sgd(0.1), mesh=jax.make_mesh((1,), ("data",)))
    >>> w = jnp.array(2.0)
    >>> state = update.init(w)
    >>> batch = {"x": jnp.array([1.0, 2.0]), "y": jnp.array([1.0, 2.0])}
    >>> w, state, metrics = update(w, state, batch)
    >>> print(w, metrics["loss"])  # 2 - 0.1 * (2 + 8) / 2
    1.5 2.5

  References:
    Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion
    Parameter Models, 2020, https://arxiv.org/abs/1910.02054, section 5.1.
  """
  validate.choice("partition", partition, ("shard_map", "jit", None))
  validate.choice("reduce", reduce, ("every_call", "on_emission"))
  validate.static_count("num_micro_batches", num_micro_batches)
  if batch_size is not None:
    validate.static_count("batch_size", batch_size)
  on_emission = reduce == "on_emission"
  if on_emission and (mesh is None or partition != "shard_map" or shard_state):
    raise ValueError(
      'reduce="on_emission" needs mesh=, partition="shard_map" and shard_state=False,'
      f" got {mesh=}, {partition=} and {shard_state=}."
    )
  if shard_state and mesh is None:
    raise ValueError("shard_state=True needs mesh=, got None.")
  if partition is None and mesh is not None:
    raise ValueError(
      f"partition=None leaves the mapping to the caller: mesh must be None, got {mesh}."
    )
  tasks = over == "tasks"
  validate.choice("over", over, ("examples", "tasks"))
  if tasks:
    _check_tasks(
      {
        "find_neighbors": (find_neighbors, None),
        "row_args": (tuple(row_args), ()),
        "num_micro_batches": (num_micro_batches, 1),
        "reduce": (reduce, "every_call"),
        "batch_size": (batch_size, None),
      }
    )
    if mesh is not None and partition != "jit":
      raise ValueError(
        f"over='tasks' on a mesh needs partition='jit', got {partition=}: the compiler"
        " splits the batch."
      )
  body = _update.Update(
    per_example_losses,
    optax.with_extra_args_support(optimizer),
    None if step is None else optax.with_extra_args_support(step),
    Options(
      has_aux=has_aux,
      find_neighbors=find_neighbors,
      num_micro_batches=num_micro_batches,
      row_args=tuple(row_args),
      statistics=None if tasks else tuple(statistics),
      tasks=tasks,
    ),
  )
  return TrainStep(
    body,
    _placement.Placement(mesh, axis_name, shard_state=shard_state),
    partition=partition,
    reduce_on_emission=on_emission,
    batch_size=batch_size,
    donate=donate,
  )


class TrainStep:
  """What ``train_step`` returns: call it to update."""

  def __init__(
    self,
    body: _update.Update,
    placement: _placement.Placement,
    *,
    partition: str | None,
    reduce_on_emission: bool,
    batch_size: int | None,
    donate: bool,
  ):
    self._body = body
    self._placement = placement
    self._partition = partition
    self._reduce_on_emission = reduce_on_emission
    self._batch_size = batch_size
    self._donate = donate
    self._compiled: dict[Any, Any] = {}
    self._window_shapes: list[Any] | None = None
    self._met_a_model = False
    self._spelled: set[frozenset[str]] = set()

  def init(self, params: PyTree) -> _update.TrainStepState:
    """The state at the start, placed on the mesh as ``update`` keeps it."""
    _check_params(params)
    params = self._placement.place_params(params)
    body = self._body
    over = init_members if body.step is None else body.step.init
    state = _update.TrainStepState(over(params), body.optimizer.init(params))
    if self._reduce_on_emission:
      if not jax.tree.leaves(states.windows(state)):
        raise ValueError(
          'reduce="on_emission" needs accumulate(...) in the optimizer, not with'
          " every=1."
        )
      count = self._placement.num_devices
      state = states.map_windows(
        lambda leaf: jnp.zeros([count, *leaf.shape], leaf.dtype), state
      )
    return self._placement.place_state(state, in_parts=self._reduce_on_emission)

  def __call__(
    self,
    params: PyTree,
    state: _update.TrainStepState,
    batch: PyTree,
    **extra_args: Any,
  ) -> tuple[PyTree, _update.TrainStepState, dict[str, Any]]:
    """``(params, state, batch, **extra) -> (params, state, metrics)``."""
    validate.state(state, _update.TrainStepState, "train_step")
    if self._partition is None:
      rows, shared = self._split_extra(extra_args)
      given = _update.Given(batch, rows, shared)
      return self._body(self._placement.names, False, params, state, given)
    params = self._apart_from_a_model(params)
    args = self._prepare(params, state, batch, extra_args)
    try:
      return self._jitted(*args[:2])(*args)
    except validate.MissingError as error:
      raise error.when_calling("update(params, state, batch") from None

  def lower(
    self,
    params: PyTree,
    state: _update.TrainStepState,
    batch: PyTree,
    **extra_args: Any,
  ) -> jax.stages.Lowered:
    """As ``jax.jit(...).lower``: for ``collectives``, and to compile ahead."""
    args = self._prepare(params, state, batch, extra_args)
    return self._jitted(*args[:2]).lower(*args)

  def _apart_from_a_model(self, params: PyTree) -> PyTree:
    """A copy of an NNX model's own arrays, which donation would delete."""
    is_model = type(params).__module__.startswith("flax.nnx")
    if not self._donate or self._met_a_model or not is_model:
      return params
    self._met_a_model = True
    return jax.tree.map(jnp.copy, params)

  def _prepare(self, params, state, batch, extra_args):
    placement = self._placement
    rows, shared = self._split_extra(extra_args)
    if self._body.options.tasks:
      given = _update.Given(
        placement.place_rows_or_copies(batch),
        placement.place_shared(rows),
        placement.place_shared(shared),
      )
      params = placement.place_params(params)
      return params, placement.place_state(state, in_parts=False), given
    n = validate.leading_axis("batch", batch)
    if n is None:
      raise ValueError("batch must hold at least one array, got none.")
    if n == 0 and self._batch_size is None:
      raise ValueError("batch must hold at least one example, got none.")
    rows = {name: _narrowed(name, arg) for name, arg in rows.items()}
    for name, arg in rows.items():
      validate.same_rows(name, arg, n)
    to = self._rows_to_pad_to(n, batch)
    if to != n or self._batch_size is not None:
      rows.setdefault("member_weights", jnp.ones([n], jnp.float32))
    batch = placement.place_rows(_placement.padded(batch, "batch", to))
    rows = {
      name: placement.place_rows(_placement.padded(arg, name, to))
      for name, arg in rows.items()
    }
    params = placement.place_params(params)
    in_parts = self._reduce_on_emission
    return (
      params,
      placement.place_state(self._fitted(params, state), in_parts=in_parts),
      _update.Given(batch, rows, placement.place_shared(shared)),
    )

  def _fitted(self, params, state):
    """The state of a run on other devices, in mid-window too, as this one keeps it."""
    shapes = lambda: [
      jnp.shape(leaf) for leaf in jax.tree.leaves(states.windows(state))
    ]
    if shapes() != self._window_shapes:
      like = jax.eval_shape(self._body.optimizer.init, params)
      fitted = self._placement.fit_windows(
        state.optimizer, like, in_parts=self._reduce_on_emission
      )
      state = state._replace(optimizer=fitted)
      self._window_shapes = shapes()
    return state

  def _rows_to_pad_to(self, n: int, batch: PyTree) -> int:
    """Rows that this process's part of the batch needs to be cut evenly."""
    placement, micro = self._placement, self._body.options.num_micro_batches
    if placement.is_global(batch):
      return n
    shares = placement.num_local_devices * micro
    if self._batch_size is None:
      return -(-n // shares) * shares
    to = self._batch_size * placement.num_local_devices // placement.num_devices
    if to % shares or n > to:
      raise ValueError(
        f"batch_size must hold the batch, {n} rows in this process, and give each"
        f" process a multiple of {shares} rows (devices times micro-batches), got"
        f" {self._batch_size}."
      )
    return to

  def _jitted(self, params: PyTree, state: _update.TrainStepState) -> Any:
    """The compiled update; results lie where the arguments do."""
    donated = (0, 1) if self._donate else ()
    if self._placement.mesh is None:
      key = None
    else:
      leaves, structure = jax.tree.flatten((params, state))
      key = (structure, tuple(leaf.sharding for leaf in leaves))
    if key not in self._compiled:
      _check_params(params)
      if self._donate:
        _refuse_one_buffer_twice({"params": params, "state": state})
      if key is None:
        function = functools.partial(self._body, None, False)
        self._compiled[key] = jax.jit(function, donate_argnums=donated)
      else:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
        self._compiled[key] = jax.jit(
          self._over_mesh(params, state),
          donate_argnums=donated,
          out_shardings=(*shardings, None),
        )
    return self._compiled[key]

  def _over_mesh(self, params: PyTree, state: _update.TrainStepState) -> Any:
    placement, body = self._placement, self._body
    rows = placement.rows
    given = _update.Given(rows, rows, _WHOLE)
    specs = placement.state_specs(state, in_parts=self._reduce_on_emission)
    manual = self._partition == "shard_map"
    map_ = functools.partial(
      jax.shard_map,
      mesh=placement.mesh,
      axis_names=set(placement.names),
      check_vma=True,
    )
    if manual:
      placement.refuse_split_params(params)
    else:
      unreduced = placement.unreduced_axes(params)
      body = body._replace(options=body.options._replace(unreduced=unreduced))
      update = functools.partial(body, None, False)
      if placement.shard_state:
        reduction = _update.Reduction(None, rows=False)
        update = self._with_split_state(
          params, functools.partial(body.forward, reduction)
        )
      return placement.automatic(update, (params, state))
    if not placement.shard_state:
      return map_(
        functools.partial(body, placement.names, self._reduce_on_emission),
        in_specs=(_WHOLE, specs, given),
        out_specs=(_WHOLE, specs, _WHOLE),
      )
    dims = jax.tree.map(placement.scatter_dim, params)
    reduction = _update.Reduction(placement.names, placement.scatter(dims), False)
    scattered = placement.scattered_specs(dims)
    forward = map_(
      functools.partial(body.forward, reduction),
      in_specs=(_WHOLE, _WHOLE, states.tables(specs), given),
      out_specs=_update.Forwarded(scattered, _WHOLE, _WHOLE, rows, _WHOLE, _WHOLE),
    )
    return self._with_split_state(params, forward)

  def _with_split_state(self, params: PyTree, forward: Any) -> Any:
    """The optimizer outside of what is mapped: the compiler splits its work."""
    placement = self._placement
    whole = jax.tree.map(lambda leaf: leaf.sharding, params)
    split = jax.tree.map(
      lambda leaf: placement.sharding(placement.split_spec(leaf)), params
    )

    def update(params, state, given):
      forwarded = forward(params, state.step, states.tables(state), given)
      params, grads = (
        jax.tree.map(place, tree, split) for tree in (params, forwarded.grads)
      )
      forwarded = forwarded._replace(grads=grads)
      params, state = self._body.apply(params, state, forwarded)
      # Split first: between parameters that shall be whole, a choice gathers both.
      params = jax.tree.map(place, params, split)
      return jax.tree.map(place, params, whole), state, forwarded.metrics

    return update

  def _split_extra(
    self, extra_args: dict[str, Any]
  ) -> tuple[dict[str, Any], dict[str, Any]]:
    """Extra args that hold one row an example, and the others."""
    for name, arg in extra_args.items():
      if callable(arg):
        raise ValueError(
          f"{name}= is a function, and train_step takes arrays: it computes losses and"
          " gradient itself, once a call, so optimizers with a line search"
          " (value_fn=, grad=) need a loop of their own."
        )
    self._refuse_misspelled(extra_args)
    if self._body.options.tasks:
      rows = {name: arg for name, arg in extra_args.items() if name == "member_weights"}
      return rows, {name: arg for name, arg in extra_args.items() if name not in rows}
    return arguments.split_rows(extra_args, self._body.options.row_args)

  def _refuse_misspelled(self, extra_args: dict[str, Any]) -> None:
    """Other names may be the optimizer's, and pass."""
    names = frozenset(extra_args)
    if names in self._spelled:
      return
    self._spelled.add(names)
    options = self._body.options
    known = {*ROWS, *options.row_args, *(options.statistics or ()), "weight", "value"}
    for function in (self._body.losses, options.find_neighbors):
      if function is not None:
        known |= {*inspect.signature(function).parameters}
    unknown = [name for name in extra_args if name not in known]
    validate.spelling(unknown, sorted(known), "train_step")


def _check_tasks(options: dict[str, tuple[Any, Any]]) -> None:
  """Refuses what cuts or reads the rows of a batch."""
  for name, (value, default) in options.items():
    if value != default:
      raise ValueError(f"over='tasks' needs {name}={default!r}, got {value!r}.")


def _check_params(params: PyTree) -> None:
  """Refuses leaves that cannot be trained, with what to do about each."""
  if is_nnx_module(params):
    raise TypeError(
      "params must hold arrays, got an NNX model: pass nnx.state(model, nnx.Param), and"
      " build the model from it in the losses, nnx.merge(nnx.graphdef(model), params)."
    )
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = f"params{jax.tree_util.keystr(path)}"
    if callable(leaf) and not hasattr(leaf, "dtype"):
      raise TypeError(
        f"{name} is a function, and parameters are arrays: pass those of the model,"
        " nnx.state(model, nnx.Param) or equinox.filter(model,"
        " equinox.is_inexact_array), and build the model from them in the losses."
      )
    if not hasattr(leaf, "dtype"):
      raise TypeError(
        f"{name} must be an array, got {leaf!r}: convert it with jnp.asarray, so"
        " that its type does not change from step to step."
      )


def _narrowed(name: str, arg: PyTree) -> PyTree:
  """Reads ids and labels on the host, before JAX cuts 64-bit integers to 32."""
  if name == "example_ids" and not hasattr(arg, "dtype"):
    return labels.read_ids(name, arg)
  if name == "labels" and not isinstance(arg, jax.Array | jax.ShapeDtypeStruct):
    return labels.read(name, arg, len(arg)).ids
  is_wide = lambda leaf: isinstance(leaf, np.ndarray) and leaf.dtype.kind in "iu"
  return jax.tree.map(
    lambda leaf: labels.fit(name, leaf) if is_wide(leaf) else leaf, arg
  )


def _refuse_one_buffer_twice(trees: dict[str, PyTree]) -> None:
  """Refuses two leaves that share a buffer: it could not be donated for both."""
  seen: dict[int, str] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
    known = isinstance(leaf, jax.Array) and validate.is_known(leaf) and leaf.size
    if not known or not leaf.addressable_shards:
      continue
    name = f"{path[0].key}{jax.tree_util.keystr(path[1:])}"
    first = seen.setdefault(
      leaf.addressable_shards[0].data.unsafe_buffer_pointer(), name
    )
    if first is not name:
      raise ValueError(
        f"{name} and {first} are one buffer, which cannot be updated in place twice:"
        " copy one with jnp.copy, or pass donate=False to train_step."
      )
