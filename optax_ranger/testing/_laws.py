"""The laws. Each takes a `Subject`, and raises where the step breaks it."""

from collections.abc import Callable
from collections.abc import Mapping
import functools
import inspect
import pathlib
import tempfile
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax

from optax_ranger._core.types import PyTree
from optax_ranger.testing._compare import close
from optax_ranger.testing._compare import finite
from optax_ranger.testing._compare import numbers
from optax_ranger.testing._compare import same
from optax_ranger.testing._compare import same_types
from optax_ranger.testing._subject import SkippedError
from optax_ranger.testing._subject import Subject

Law = Callable[[Subject], None]

# The laws by name, in the order in which they are run.
LAWS: dict[str, Law] = {}

_NOTHING: Mapping[str, Any] = types.MappingProxyType({})


def _law(name: str, *args: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
  """Enters a law under a name; `args` follow the subject."""

  def enter(function):
    LAWS[name] = lambda subject: function(subject, *args)
    return function

  return enter


def _takes_any(update: Callable[..., Any]) -> bool:
  parameters = inspect.signature(update).parameters.values()
  return any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)


@_law("protocol")
def _protocol(subject: Subject) -> None:
  """``init(params)``, and ``update(updates, state, params=None, **extra_args)``."""
  step = subject.step
  assert isinstance(step, optax.GradientTransformation), type(step)
  parameters = inspect.signature(step.update).parameters
  first = ["updates", "state", "params"]
  assert list(parameters)[:3] == first, f"update takes {list(parameters)}"
  assert parameters["params"].default is None, "params has no default of None"
  for one in list(parameters.values())[3:]:
    named = one.kind in (one.KEYWORD_ONLY, one.VAR_KEYWORD)
    assert named, f"{one.name} may be given by position"
  if isinstance(step, optax.GradientTransformationExtraArgs):
    assert _takes_any(step.update), "update takes no **extra_args"


@_law("compiled loop")
def _compiled_loop(subject: Subject) -> None:
  """Five compiled calls are traced once: the state's types don't change."""
  try:
    count = subject.first_run.num_traces
  except SkippedError as failed:
    raise failed.__cause__ or failed from None
  assert count == 1, f"traced {count} times"


@_law("unknown extra args change nothing")
def _unknown_extra_args(subject: Subject) -> None:
  if not _takes_any(subject.step.update):
    raise SkippedError("the step takes no extra args")
  params = subject.params
  unknown = {"unheard_of": 1, "value_of_another_step": lambda p: p}
  update = lambda *args, **extra: subject.step.update(*args, **extra, **unknown)
  if _program(subject, update) == _program(subject, subject.step.update):
    return
  results, _ = subject.run(params, 1, jax.jit(update))
  same("updates", results, subject.first_run.results[:1])


def _program(
  subject: Subject, update: Callable[..., Any], beside: Mapping[str, Any] = _NOTHING
) -> tuple[str, PyTree]:
  """What the first call computes, and the form of its updates, without compiling.

  With entries `beside` the parameters, the others are under ``"params"``.
  """
  gradients, extra = subject.inputs(0, subject.params)
  params = subject.params
  if beside:
    gradients, params = ({"params": tree, **beside} for tree in (gradients, params))
  trace = jax.make_jaxpr(functools.partial(update, **extra), return_shape=True)
  program, (updates, _) = trace(gradients, subject.step.init(params), params)
  constants = [numbers(const).tobytes() for const in program.consts]
  return f"{program} {constants}", updates


@_law("pure")
def _pure(subject: Subject) -> None:
  """The same inputs give the same results, and are left as they are."""
  params, step = subject.params, subject.step
  copied = lambda leaf: leaf.copy() if hasattr(leaf, "copy") else leaf
  given = jax.tree.map(copied, params)
  gradients, extra = subject.inputs(0, params)
  state = step.init(params)
  same("the parameters after init", params, given)
  before = jax.tree.map(copied, (gradients, params, state, extra))
  first = subject.first_run.update(gradients, state, params, **extra)
  second = subject.first_run.update(gradients, state, params, **extra)
  same("results", second, first)
  same("inputs", (gradients, params, state, extra), before)
  same("a second init", step.init(params), state)


@_law("state of arrays")
def _state_of_arrays(subject: Subject) -> None:
  """Each leaf of the state is a ``jax.Array``, so that it can be donated and saved."""
  states = {
    "init": subject.step.init(subject.params),
    "update": subject.first_run.state,
  }
  for path, leaf in jax.tree_util.tree_leaves_with_path(states):
    where = jax.tree_util.keystr(path)
    assert isinstance(leaf, jax.Array), f"state of {where}: {type(leaf).__name__}"


@_law("abstract init")
def _abstract_init(subject: Subject) -> None:
  """``jax.eval_shape`` of init gives the state's shapes and types."""
  abstract = jax.eval_shape(subject.step.init, subject.params)
  same_types("state", abstract, subject.step.init(subject.params))


@_law("jit equals eager")
def _jit_equals_eager(subject: Subject) -> None:
  """The second and third calls give the same outside of ``jax.jit``."""
  params, update = subject.params, subject.first_run.update
  _, state = subject.run(params, 1)
  for call in (1, 2):
    gradients, extra = subject.inputs(call, params)
    eager = subject.step.update(gradients, state, params, **extra)
    compiled = update(gradients, state, params, **extra)
    close(f"call {call}: results", compiled, eager)
    state = compiled[1]


def _cast(tree: PyTree, dtype: Any) -> PyTree:
  return jax.tree.map(
    lambda leaf: leaf.astype(dtype) if _is_float(leaf) else leaf, tree
  )


def _is_float(leaf: Any) -> bool:
  return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _like(updates: PyTree, gradients: PyTree, params: PyTree) -> PyTree:
  """What updates should look like: parameters where a leading axis is gone."""
  leaves = jax.tree.leaves(updates), jax.tree.leaves(gradients)
  if leaves[0] and leaves[0][0].ndim < leaves[1][0].ndim:
    return params
  return gradients


for _dtype in ("float32", "bfloat16", "float16", "float64", "complex64"):

  @_law(f"types are kept, {_dtype}", _dtype)
  def _types_are_kept(subject: Subject, dtype: str) -> None:
    """Updates have the gradients' types, and each state those of the first."""
    with jax.enable_x64(dtype == "float64"):
      params = _cast(subject.params, dtype)
      gradients, extra = subject.inputs(0, params)
      state = jax.eval_shape(subject.step.init, params)
      for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        where = jax.tree_util.keystr(path)
        assert not leaf.weak_type, f"state{where} of init is weakly typed"
      call = functools.partial(subject.step.update, **extra)
      updates, after = jax.eval_shape(call, gradients, state, params)
      same_types("updates", updates, _like(updates, gradients, params))
      same_types("state", after, state)


@_law("float16 agrees with float32", "float16")
@_law("bfloat16 agrees with float32", "bfloat16")
def _half_precision(subject: Subject, dtype: str) -> None:
  """To a tenth, which tells half precision from a wrong formula."""
  params = subject.params
  rounded = _cast(params, dtype)
  state = subject.step.init(rounded)
  for call, expected in enumerate(subject.first_run.results[:3]):
    gradients, extra = subject.inputs(call, params)
    gradients = _cast(gradients, dtype)
    updates, state = subject.first_run.update(gradients, state, rounded, **extra)
    close(f"call {call}: updates", _cast(updates, "float32"), expected, 0.1)


@_law("scan equals loop")
def _scan_equals_loop(subject: Subject) -> None:
  params, step = subject.params, subject.step
  calls = [subject.inputs(call, params) for call in range(5)]

  def body(state, inputs):
    gradients, extra = inputs
    updates, state = step.update(gradients, state, params, **extra)
    return state, updates

  state, results = jax.lax.scan(body, step.init(params), _stack(calls))
  close("updates", results, _stack(subject.first_run.results))
  close("state", state, subject.first_run.state)


def _stack(trees: list[PyTree]) -> PyTree:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@_law("pmap equals loop", True)
@_law("vmap equals loop", False)
def _map_equals_loop(subject: Subject, over_devices: bool) -> None:
  """Independent runs side by side, or on devices of their own."""
  count = 3
  if over_devices and jax.device_count() < count:
    raise SkippedError(f"needs {count} devices; {_MORE_DEVICES}")
  shifted = lambda i: jax.tree.map(lambda leaf: leaf + leaf.dtype.type(i), params)
  params = subject.params
  runs = [(*subject.inputs(i, params), shifted(i)) for i in range(count)]

  def call(inputs):
    gradients, extra, params = inputs
    state = subject.step.init(params)
    return subject.step.update(gradients, state, params, **extra)

  if over_devices:
    results = jax.pmap(call)(_stack(runs))
  else:
    results = jax.jit(jax.vmap(call))(_stack(runs))
  for i, (gradients, extra, own) in enumerate(runs):
    expected = subject.first_run.update(gradients, subject.step.init(own), own, **extra)
    actual = jax.tree.map(lambda leaf, i=i: leaf[i], results)
    close(f"run {i}", actual, expected)


_MORE_DEVICES = "set XLA_FLAGS=--xla_force_host_platform_device_count=8"


def _beside(subject: Subject, other: Any) -> tuple[list[PyTree], PyTree]:
  """Results with another entry beside the parameters, which has no gradient."""
  params = {"params": subject.params, "other": other}
  step, state = subject.step, subject.step.init(params)
  results = []
  for call in range(4):
    gradients, extra = subject.gradients(call, params), subject.extra(call)
    gradients = {**gradients, "params": subject.gradients(call, subject.params)}
    updates, state = jax.jit(step.update)(gradients, state, params, **extra)
    results.append(updates)
  return results, state


@_law("None leaves")
def _none_leaves(subject: Subject) -> None:
  """A None in the parameters stays None, and changes nothing else."""
  program, updates = _program(subject, subject.step.update, {"other": None})
  alone, _ = _program(subject, subject.step.update)
  if program == alone and updates["other"] is None:
    return
  for call, updates in enumerate(_beside(subject, None)[0]):
    assert updates["other"] is None, f"call {call}: None became {updates['other']}"
    close(f"call {call}: updates", updates["params"], subject.first_run.results[call])


@_law("zero-size leaves")
def _zero_size_leaves(subject: Subject) -> None:
  """A leaf without entries keeps its shape, and changes nothing else."""
  empty = jnp.zeros([0, 3], jnp.float32)
  for call, updates in enumerate(_beside(subject, empty)[0]):
    shape = updates["other"].shape
    assert shape[-2:] == (0, 3), f"call {call}: the leaf's shape is {list(shape)}"
    close(f"call {call}: updates", updates["params"], subject.first_run.results[call])


@_law("the empty tree")
def _empty_tree(subject: Subject) -> None:
  state = subject.step.init({})
  updates, _ = subject.step.update({}, state, {}, **subject.extra(0))
  assert updates == {}, f"updates are {updates}"


@_law("masked leaves")
def _masked_leaves(subject: Subject) -> None:
  """Under ``optax.masked`` the other leaves are left alone."""
  params = {"kept": subject.params, "other": jnp.ones([2, 3])}
  step = optax.masked(subject.step, {"kept": True, "other": False})
  gradients, extra = subject.gradients(0, params), subject.extra(0)
  gradients = {**gradients, "kept": subject.gradients(0, subject.params)}
  updates, _ = jax.jit(step.update)(gradients, step.init(params), params, **extra)
  close("updates", updates["kept"], subject.first_run.results[0])
  same("the masked leaf", updates["other"], gradients["other"])


@_law("explicit mesh, last axis", -1)
@_law("explicit mesh", 0)
def _explicit_mesh(subject: Subject, axis: int) -> None:
  """State and updates are split as the parameters are, and values stay."""
  count = 2
  if jax.device_count() < count:
    raise SkippedError(f"needs {count} devices; {_MORE_DEVICES}")
  mesh = jax.make_mesh(
    (count,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:count]
  )
  params, step = subject.params, subject.step
  splits = lambda p: p.ndim and p.shape[axis] and p.shape[axis] % count == 0
  if not any(map(splits, jax.tree.leaves(params))):
    raise SkippedError(f"no leaf has an axis {axis} that {count} devices divide")

  def place(leaf, like):
    spec: list[str | None] = [None] * leaf.ndim
    if splits(like):
      spec[leaf.ndim - like.ndim if axis == 0 else -1] = "data"
    return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

  expected = subject.first_run.results[:4]
  inputs = [subject.inputs(call, params) for call in range(4)]
  with jax.set_mesh(mesh):
    placed = jax.tree.map(place, params, params)
    state = jax.jit(step.init)(placed)
    same_types("state of init outside of jit", step.init(placed), state)
    update, first = jax.jit(step.update), state
    for call, (gradients, extra) in enumerate(inputs):
      gradients = jax.tree.map(place, gradients, params)
      updates, state = update(gradients, state, placed, **extra)
      like = _like(updates, gradients, placed)
      same_types(f"call {call}: updates", updates, like)
      same_types(f"call {call}: state", state, first)
      close(f"call {call}: updates", updates, expected[call])


@_law("donation")
def _donation(subject: Subject) -> None:
  """A training step may reuse the memory of the state and of the parameters."""
  step = subject.step

  # What a step never reads would not be donated otherwise.
  @functools.partial(jax.jit, donate_argnums=(0, 1), keep_unused=True)
  def train(params, state, gradients, extra):
    updates, state = step.update(gradients, state, params, **extra)
    flat = lambda u, p: u.reshape(-1, *p.shape)[0] if u.ndim > p.ndim else u
    updates = jax.tree.map(flat, updates, params)
    return optax.apply_updates(params, updates), state

  params = jax.tree.map(jnp.copy, subject.params)
  state = step.init(params)
  for call in range(4):
    gradients, extra = subject.inputs(call, params)
    donated = {"params": params, "state": state}
    params, state = train(params, state, gradients, extra)
    for path, leaf in jax.tree_util.tree_leaves_with_path(donated):
      where = jax.tree_util.keystr(path)
      assert leaf.is_deleted(), f"call {call}: {where} was not reused"
    finite(f"call {call}: params", params)


@_law("checkpoint")
def _checkpoint(subject: Subject) -> None:
  """A state that Orbax saved after two calls goes on as if nothing had happened."""
  try:
    import orbax.checkpoint as ocp
  except ImportError:
    raise SkippedError("needs orbax-checkpoint") from None
  _, state = subject.run(subject.params, 2)
  if not jax.tree.leaves(state):
    raise SkippedError("the state has no leaf")
  with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as saver:
    # In a dictionary, since Orbax takes no bare array.
    saver.save(pathlib.Path(folder) / "state", {"state": state})
    saver.wait_until_finished()
    template = {"state": jax.eval_shape(subject.step.init, subject.params)}
    restored = saver.restore(pathlib.Path(folder) / "state", template)["state"]
  same("state", restored, state)
  tail = subject.run(subject.params, 2, state=restored)
  same("later calls", tail, subject.run(subject.params, 2, state=state))


for _value in (np.nan, np.inf, -np.inf):

  @_law(f"recovers from {_value}", _value)
  def _recovers(subject: Subject, value: float) -> None:
    """One bad entry in one gradient leaves the state finite, and later updates."""
    params, state = subject.params, subject.step.init(subject.params)
    for call in range(3):
      gradients, extra = subject.inputs(call, params)
      if call == 1:
        gradients = _poison(gradients, value)
      updates, state = subject.first_run.update(gradients, state, params, **extra)
      finite("state", state)
      if call > 1:
        finite("the next updates", updates)


def _poison(gradients: PyTree, value: float) -> PyTree:
  """Puts a value into the middle of the largest leaf."""
  leaves, structure = jax.tree.flatten(gradients)
  largest = max(range(len(leaves)), key=lambda i: leaves[i].size)
  leaf = leaves[largest]
  place = tuple(length // 2 for length in leaf.shape)
  leaves[largest] = leaf.at[place].set(value)
  return jax.tree.unflatten(structure, leaves)


@_law("inject_hyperparams")
def _inject_hyperparams(subject: Subject) -> None:
  """Numbers may be data: ``optax.inject_hyperparams`` changes no result."""
  if subject.factory is None:
    raise SkippedError("needs functools.partial(factory, name=value) as the step")
  make = optax.inject_hyperparams(subject.factory, static_args=subject.static_args)
  step = subject.wrap(make(**subject.arguments))
  state = step.init(subject.params)
  results, state = subject.run(subject.params, 3, jax.jit(step.update), state)
  close("updates", results, subject.first_run.results[:3])
  for name, value in subject.arguments.items():
    if isinstance(value, float) and name not in subject.static_args:
      assert name in state.hyperparams, f"{name} is no hyperparameter"


@_law("no tracer leaks")
def _no_tracer_leaks(subject: Subject) -> None:
  with jax.checking_leaks():
    step = subject.make()
    gradients, extra = subject.inputs(0, subject.params)
    state = step.init(subject.params)
    jax.jit(lambda *args, **extra: step.update(*args, **extra)).lower(
      gradients, state, subject.params, **extra
    )
