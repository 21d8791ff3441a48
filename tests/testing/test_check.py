"""Each law catches a step that breaks it, and `check` reports what it found."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_ranger import testing

_MAPPED = jax.tree.map
_TRACED = []


def step(update=lambda leaf: leaf, init=lambda params: optax.EmptyState(), change=None):
  """A step of a function of leaves, with a state."""

  def update_all(updates, state, params=None, **extra_args):
    del params, extra_args
    new = state if change is None else change(updates, state)
    return _MAPPED(update, updates), new

  return optax.GradientTransformationExtraArgs(init, update_all)


def _traced(leaf):
  return isinstance(leaf, jax.core.Tracer)


def _named_otherwise():
  update = lambda grads, state, params=None: (grads, state)
  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _scaled_by_what_is_left_over():
  update = lambda updates, state, params=None, **extra_args: (
    _MAPPED(lambda leaf: leaf * (1 + len(extra_args)), updates),
    state,
  )
  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )


def _leaking():
  return step(lambda leaf: _TRACED.append(leaf) or leaf)


def _momentum():
  add = lambda updates, old: _MAPPED(lambda m, g: 0.9 * m + g, old, updates)
  return step(init=lambda params: _MAPPED(jnp.zeros_like, params), change=add)


def _ending_at_a_bad_entry():
  """The state stays finite, and later updates are NaN."""

  def update(updates, state, params=None, **extra_args):
    del params, extra_args
    finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates)]
    later = _MAPPED(lambda leaf: jnp.where(state, leaf, jnp.nan), updates)
    return later, jnp.logical_and(state, jnp.stack(finite).all())

  return optax.GradientTransformationExtraArgs(lambda params: jnp.bool(True), update)


def _counting_its_traces():
  """A compiled loop is traced once; whatever traces it again has another factor."""
  traces = []
  return step(lambda leaf: leaf * (traces.append(1) or len(traces)))


def _of_two_shapes():
  shape = lambda params: [2 if _traced(jax.tree.leaves(params)[0]) else 3]
  return step(init=lambda params: jnp.zeros(shape(params)))


def _of_two_types():
  float_of = lambda updates, old: old + jnp.float32(1)
  return step(init=lambda params: jnp.int32(0), change=float_of)


def _of_known_names():
  update = lambda updates, state, params=None: (
    {"w": updates["w"], "b": updates["b"]},
    state,
  )
  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _tiny(leaf):
  return jnp.asarray(1e-9, leaf.dtype)  # zero in float16


def _scaled(factor=1.0):
  return step(lambda leaf: leaf * factor if factor > 0 else leaf)


_float32 = lambda: step(lambda leaf: leaf.astype(jnp.float32))


def _with_an_extra_arg_by_position():
  def update(updates, state, params=None, scale=1.0, **extra_args):
    del params, extra_args
    return _MAPPED(lambda leaf: leaf * scale, updates), state

  return optax.GradientTransformationExtraArgs(lambda params: (), update)


BROKEN = {
  "protocol": _named_otherwise,
  "compiled loop": _of_two_types,
  "unknown extra args change nothing": _scaled_by_what_is_left_over,
  "pure": lambda: step(init=lambda params: jnp.float32(np.random.rand())),  # noqa: NPY002
  "state of arrays": lambda: step(init=lambda params: np.zeros(3)),
  "abstract init": _of_two_shapes,
  "jit equals eager": lambda: step(lambda leaf: leaf * (1.001 if _traced(leaf) else 1)),
  "types are kept, float32": lambda: step(init=lambda params: jnp.asarray(1.0)),
  "types are kept, bfloat16": _float32,
  "types are kept, float16": _float32,
  "types are kept, float64": _float32,
  "types are kept, complex64": lambda: step(lambda leaf: leaf.real),
  "bfloat16 agrees with float32": lambda: step(lambda leaf: leaf + 1000 - 1000),
  "float16 agrees with float32": lambda: step(
    lambda leaf: leaf / _tiny(leaf) * _tiny(leaf)
  ),
  "scan equals loop": _counting_its_traces,
  "vmap equals loop": _counting_its_traces,
  "pmap equals loop": _counting_its_traces,
  "None leaves": _of_known_names,
  "zero-size leaves": lambda: step(lambda leaf: leaf / jnp.abs(leaf).max()),
  "the empty tree": _of_known_names,
  "masked leaves": _of_known_names,
  "explicit mesh": lambda: step(lambda leaf: leaf * (leaf.T @ leaf).sum()),
  "explicit mesh, last axis": lambda: step(lambda leaf: leaf * (leaf @ leaf.T).sum()),
  "donation": lambda: step(init=lambda params: params),
  "checkpoint": _of_two_shapes,
  "recovers from nan": _momentum,
  "recovers from inf": _ending_at_a_bad_entry,
  "recovers from -inf": _ending_at_a_bad_entry,
  "inject_hyperparams": functools.partial(_scaled, factor=0.5),
  "no tracer leaks": _leaking,
}


def _subject(broken):
  if isinstance(broken, functools.partial):
    return testing.Subject(broken, factory=broken.func, arguments=broken.keywords)
  return testing.Subject(broken)


def test_each_law_has_a_step_that_breaks_it():
  assert set(BROKEN) == set(testing.LAWS)


@pytest.mark.parametrize("law", BROKEN)
def test_a_broken_step_is_caught(law):
  if law == "checkpoint":
    pytest.importorskip("orbax.checkpoint")
  with pytest.raises(Exception) as caught:  # noqa: PT011
    testing.LAWS[law](_subject(BROKEN[law]))
  assert not isinstance(caught.value, testing.SkippedError)


def _casting_its_state():
  cast = lambda updates, old: old.astype(jnp.float32)
  return step(init=lambda params: jnp.int32(0), change=cast)


def _of_a_python_number(factor=1.0):
  return step(lambda leaf: leaf * (1 if isinstance(factor, float) else 2))


def _filling_what_is_none():
  fill = lambda leaf: jnp.zeros([]) if leaf is None else leaf
  update = lambda updates, state, params=None, **extra_args: (
    _MAPPED(fill, updates, is_leaf=lambda leaf: leaf is None),
    state,
  )
  return optax.GradientTransformationExtraArgs(lambda params: (), update)


def _gathering():
  whole = jax.sharding.PartitionSpec()
  there = lambda leaf: not jax.typeof(leaf).sharding.mesh.empty
  return step(lambda leaf: jax.sharding.reshard(leaf, whole) if there(leaf) else leaf)


@pytest.mark.parametrize(
  ("law", "broken", "problem"),
  [
    ("compiled loop", _casting_its_state, "traced 2 times"),
    ("types are kept, float32", _casting_its_state, "state: the type is float32"),
    ("None leaves", _filling_what_is_none, "None became"),
    (
      "zero-size leaves",
      lambda: step(lambda leaf: leaf if leaf.size else leaf[:, :2]),
      r"shape is \[0, 2\]",
    ),
    ("explicit mesh", _gathering, "updates.*not float32.*split over"),
    ("donation", lambda: step(lambda leaf: leaf * jnp.nan), "entries are not finite"),
    (
      "inject_hyperparams",
      functools.partial(_of_a_python_number, factor=0.5),
      "updates.0.",
    ),
  ],
)
def test_other_ways_to_break_a_law(law, broken, problem):
  with pytest.raises(AssertionError, match=problem):
    testing.LAWS[law](_subject(broken))


def test_check_reports_each_law_and_where():
  with jax.numpy_dtype_promotion("standard"):
    report = testing.check(_momentum(), on_fail="report", skip={"protocol": "known"})
    assert [one.law for one in report.results] == list(testing.LAWS)
    assert [one.law for one in report.failed] == [
      f"recovers from {value}" for value in ("nan", "inf", "-inf")
    ]
    assert "state['w']: 1 of 128 entries" in report.failed[0].message
    lines = str(report).splitlines()
    assert lines[0].split() == ["skipped", "protocol", "known"]
    others = {law: "seen above" for law in testing.LAWS if "recovers" not in law}
    with pytest.raises(AssertionError, match="3 laws failed"):
      testing.check(_momentum(), skip=others)


def test_members_and_extra_args_are_passed_on():
  mean = lambda updates, state, params=None, *, weight, **extra_args: (
    jax.tree.map(lambda leaf: weight * leaf.mean(axis=0), updates),
    state,
  )
  init = lambda params: optax.EmptyState()
  lead = lambda leaf: jax.ShapeDtypeStruct((4, *leaf.shape), leaf.dtype)
  report = testing.check(
    optax.GradientTransformationExtraArgs(init, mean),
    params={"w": jnp.ones([8, 3])},
    extra={"weight": 2.0},
    gradients=lambda call, params: testing.random_like(
      call, jax.tree.map(lead, params)
    ),
    on_fail="report",
  )
  assert {one.law for one in report.failed} <= {"recovers from nan"} | {
    "recovers from inf", "recovers from -inf"
  }  # fmt: skip


def _without_a_default():
  update = lambda updates, state, params, **extra_args: (updates, state)
  return optax.GradientTransformationExtraArgs(lambda params: (), update)


def _without_extra_args():
  update = lambda updates, state, params=None: (updates, state)
  return optax.GradientTransformationExtraArgs(lambda params: (), update)


@pytest.mark.parametrize(
  ("broken", "problem"),
  [
    (_with_an_extra_arg_by_position, "scale may be given by position"),
    (_without_a_default, "params has no default of None"),
    (_without_extra_args, r"update takes no **extra_args"),
  ],
)
def test_signatures_are_told(broken, problem):
  skip = dict.fromkeys(set(testing.LAWS) - {"protocol"}, "another law")
  report = testing.check(broken(), skip=skip, on_fail="report")
  found = [result.message for result in report.results if result.law == "protocol"]
  assert problem in found[0]


def test_a_step_that_raises_fails_once():
  """The laws that need its results are skipped, and say why."""

  def fail(leaf):
    raise RuntimeError("no such step")

  report = testing.check(step(fail), on_fail="report")
  status = {one.law: one.status for one in report.results}
  assert status["compiled loop"] == "failed"
  message = next(one.message for one in report.failed if one.law == "compiled loop")
  assert message == "RuntimeError: no such step"
  skipped = [one for one in report.results if one.law == "jit equals eager"]
  assert skipped == [("jit equals eager", "skipped", "a compiled loop fails")]


def test_an_option_by_name_does_not_take_any_extra_arg():
  def update(updates, state, params=None, *, rate=0.1):
    return _MAPPED(lambda leaf: -rate * leaf, updates), state

  init = lambda params: optax.EmptyState()
  fine = lambda: optax.GradientTransformation(init, update)
  testing.LAWS["protocol"](testing.Subject(fine))
  with pytest.raises(testing.SkippedError, match="no extra args"):
    testing.LAWS["unknown extra args change nothing"](testing.Subject(fine))
  lacking = lambda: optax.GradientTransformationExtraArgs(init, update)
  with pytest.raises(AssertionError, match="no \\*\\*extra_args"):
    testing.LAWS["protocol"](testing.Subject(lacking))


@pytest.mark.parametrize("name", ["new", "new {}"])
def test_an_init_that_changes_the_parameters_is_not_pure(name):
  def init(params):
    params[name.format(len(params))] = jnp.zeros([2])
    return optax.EmptyState()

  with pytest.raises(AssertionError, match="the structure is"):
    testing.LAWS["pure"](testing.Subject(lambda: step(init=init)))


def test_a_state_of_one_array_and_keys_are_fine():
  """A typed key among the extra args, and a state that is nothing but a key."""

  def update(updates, state, params=None, *, key, **extra_args):
    del params, extra_args
    scale = 1 + jax.random.uniform(key) + jax.random.uniform(state)
    state = jax.random.fold_in(state, 1)
    return _MAPPED(lambda leaf: leaf * scale.astype(leaf.dtype), updates), state

  init = lambda params: jax.random.key(0)
  laws = ("unknown extra args change nothing", "None leaves", "pure", "checkpoint")
  report = testing.check(
    optax.GradientTransformationExtraArgs(init, update),
    extra=lambda call: {"key": jax.random.key(call)},
    skip=dict.fromkeys(set(testing.LAWS) - {*laws}, "another law"),
  )
  status = {one.law: one.status for one in report.results}
  assert all(status[law] == "passed" for law in laws)


def test_a_function_of_the_call_and_static_arguments_are_passed_on():
  """Each call has its extra args; a static argument stays a Python number."""
  seen = []

  def times(number, factor):
    update = lambda updates, state, params=None, *, scale, **extra_args: (
      _MAPPED(lambda leaf: leaf * (len(range(number)) * factor * scale), updates),
      state,
    )
    return optax.GradientTransformationExtraArgs(
      lambda params: optax.EmptyState(), update
    )

  def extra(call):
    seen.append(call)
    return {"scale": jnp.float32(call)}

  report = testing.check(
    functools.partial(times, number=2, factor=0.5),
    extra=extra,
    static_args=("number",),
    skip=dict.fromkeys(set(testing.LAWS) - {"inject_hyperparams"}, "another law"),
  )
  status = {one.law: one.status for one in report.results}
  assert status["inject_hyperparams"] == "passed"
  assert set(seen) == {0, 1, 2, 3, 4}


def test_gradients_of_calls_differ():
  params = {"w": np.zeros([3], np.float32), "z": np.zeros([2], np.complex64)}
  first, again, second = (testing.random_like(call, params) for call in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  for one, other in zip(*map(jax.tree.leaves, (first, second)), strict=True):
    assert (np.asarray(one) != np.asarray(other)).all()


def test_wrong_use_is_refused():
  with pytest.raises(TypeError, match="with names for all arguments"):
    testing.check(functools.partial(optax.sgd, 0.1))
  with pytest.raises(ValueError, match="a law in skip must be one of"):
    testing.check(optax.sgd(0.1), skip={"no such law": ""})
  with pytest.raises(ValueError, match="on_fail must be one of"):
    testing.check(optax.sgd(0.1), on_fail="ignore")


@testing.parametrize_with_laws(functools.partial(_scaled, factor=0.5), skip={
  "inject_hyperparams": "it branches on a number"
})  # fmt: skip
def test_laws_are_tests_under_pytest(law):
  law()
