"""The laws of the house, each over every step of the registry."""

import ast
import functools
import inspect
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
from jax import tree_util
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

import optax_ranger as ranger
from optax_ranger import testing
from tests.helpers import close
from tests.helpers import same
from tests.laws import registry

each_case = pytest.mark.parametrize(
  "case", registry.CASES, ids=[case.name for case in registry.CASES]
)
_COUNTERS = (
  "num_skipped",
  "num_skipped_in_a_row",
  "num_dropped",
  "num_left_out",
  "num_overflowed",
)


@pytest.fixture(autouse=True)
def _promotion_of_foreign_optimizers(request):
  """Optax's adam raises under strict promotion; our own arithmetic never does."""
  case = getattr(request.node, "callspec", None) and request.node.callspec.params.get(
    "case"
  )
  if case is not None and case.foreign:
    with jax.numpy_dtype_promotion("standard"):
      yield
  else:
    yield


def types(tree: Any) -> list[Any]:
  """Shape, data type, weak type and sharding of every leaf."""
  return [jax.typeof(leaf) for leaf in jax.tree.leaves(tree)]


def counters_aside(state: Any) -> Any:
  named = tree_util.tree_flatten_with_path(state)[0]
  return {
    tree_util.keystr(path): leaf
    for path, leaf in named
    if not tree_util.keystr(path).endswith(_COUNTERS)
  }


_slow = functools.partial(pytest.param, marks=pytest.mark.slow)
# On one device only: `test_devices.py` has meshes for it.
_ON_MESHES = ("explicit mesh", "explicit mesh, last axis")
# Others break with them.
_SLOW_LAWS = (
  "explicit mesh, last axis",
  "float16 agrees with float32",
  "pmap equals loop",
)
# States that carry the law of checkpoints: counters, copies, windows, tables, options.
_SAVED = (
  "accumulate-bfloat16",
  "aggregate_by_worst_regions",
  "ranger-whole",
  "scale_by_ngs",
  "skip_anomalies",
  "smooth_by_lookahead",
  "smooth_predictions",
)


def _is_slow(law: str, case: registry.Case) -> bool:
  return law in _SLOW_LAWS or (law == "checkpoint" and case.name not in _SAVED)


each_law_and_case = pytest.mark.parametrize(
  ("law", "case"),
  [
    _slow(law, case) if _is_slow(law, case) else (law, case)
    for law in testing.LAWS
    for case in registry.CASES
  ],
  ids=[f"{law}-{case.name}" for law in testing.LAWS for case in registry.CASES],
)


@pytest.mark.guarantees(
  "smooth_by_ema", "The average shares no buffer with the parameters"
)
@each_law_and_case
def test_law(law, case):
  if case.axis is not None and law in _ON_MESHES:
    pytest.skip("JAX has no collectives of a vmapped axis over explicit meshes")
  try:
    testing.LAWS[law](registry.subject(case.name))
  except testing.SkippedError as reason:
    pytest.skip(str(reason))


def test_a_state_holds_no_buffer_twice():
  """Of any form of any step; it could not be donated otherwise."""
  params = registry.params()
  for case in registry.CASES:
    leaves = jax.tree.leaves((params, case.make().init(params)))
    buffers = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    assert len(set(buffers)) == len(buffers), case.name


def test_registry_is_complete():
  assert registry.factories() == {case.factory for case in registry.CASES}
  assert len({case.name for case in registry.CASES}) == len(registry.CASES)


def _is_private(statement):
  names = getattr(statement, "names", [])
  return bool(names) and all((one.asname or "").startswith("_") for one in names)


@pytest.mark.parametrize("room", registry.ROOMS.values(), ids=list(registry.ROOMS))
def test_public_names_are_imported_and_nothing_else(room):
  doc, *imports = ast.parse(inspect.getsource(room)).body
  assert isinstance(doc, ast.Expr)
  imports = [each for each in imports if not isinstance(each, ast.Try)]  # extras
  version = lambda each: isinstance(each, ast.Assign) and hasattr(room, "__version__")
  imports = [each for each in imports if not version(each)]
  if room is ranger:  # `layers` and `testing` are imported on first use.
    *imports, late = [each for each in imports if not _is_private(each)]
    assert isinstance(late, ast.If)
  assert all(isinstance(statement, ast.ImportFrom) for statement in imports)
  names = [alias for statement in imports for alias in statement.names]
  assert all(alias.name == alias.asname for alias in names)
  public = {name for name in vars(room) if not name.startswith("_")}
  public -= {"layers", "testing"}  # Imported by themselves.
  assert public == {alias.name for alias in names}


def test_subpackages_come_with_the_package():
  code = "import optax_ranger as r; r.graph.build, r.labels, r.neighbors, r.regions"
  subprocess.run([sys.executable, "-c", code], check=True)


@each_case
@pytest.mark.parametrize(
  "dtype",
  [
    pytest.param("float64", marks=pytest.mark.slow),
    pytest.param("complex64", marks=pytest.mark.slow),
  ],
)
def test_types_agree_with_float32(case, dtype):
  if dtype == "complex64" and case.factory in ("aggregate_by_max",):
    pytest.skip("ties in magnitude are broken otherwise for complex numbers")
  expected, _ = registry.run(case, registry.params(), calls=4)
  with jax.enable_x64(dtype == "float64"):
    tree = registry.params(dtype)
    real = lambda tree: jax.tree.map(lambda leaf: jnp.real(leaf), tree)
    step = case.make()
    state = step.init(tree)
    for call in range(4):
      gradients = registry.gradients(case, call, registry.params())
      gradients = jax.tree.map(lambda leaf: leaf.astype(dtype), gradients)
      extra = registry.extra_args(case, call)
      updates, state = registry.jitted_update(case.name)(
        gradients, state, tree, **extra
      )
      close(
        jax.tree.map(lambda leaf: leaf.astype(np.float32), real(updates)),
        expected[call],
        case.tolerance,
        case.tolerance,
      )


@each_case
def test_members_may_be_sharded(case):
  if not case.members:
    pytest.skip("the step has no members")
  if case.axis is not None:
    pytest.skip("a vmapped axis is not split over devices: test_devices.py has meshes")
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
  expected, _ = registry.run(case, registry.params(), calls=1)
  with jax.set_mesh(mesh):
    tree = registry.params()
    gradients = jax.device_put(
      registry.gradients(case, 0, tree), NamedSharding(mesh, PartitionSpec("data"))
    )
    step = case.make()
    updates, _ = jax.jit(step.update)(
      gradients, step.init(tree), tree, **registry.extra_args(case, 0)
    )
    close(updates, expected[0], atol=1e-5)
    if jax.tree.leaves(updates)[0].ndim == 3:
      assert types(updates) == types(gradients)


def step_normalizes(case) -> bool:
  return case.arguments.get("normalize", "batch") == "batch"


def _poison(case, gradients, value):
  """Puts one bad entry into one leaf: of the second member, where there are any."""
  place = (1, 2, 3) if case.members else (2, 3)
  return {**gradients, "w": gradients["w"].at[place].set(value)}


@pytest.mark.guarantees(
  "accelerate", "A non-finite gradient gives zeros and changes only a"
)
@pytest.mark.guarantees(
  "mask_contradictions", "A non-finite gradient gives zeros and changes only a"
)
@pytest.mark.guarantees(
  "ranger", "A non-finite gradient gives zeros and changes only a"
)
@pytest.mark.guarantees(
  "ranger_radam", "A non-finite gradient gives zeros and changes only a"
)
@pytest.mark.guarantees(
  "scale_by_ngs", "A non-finite gradient gives zeros and changes only a"
)
@pytest.mark.guarantees(
  "skip_nonfinite", "A non-finite update, or one with an entry whose square"
)
@each_case
@pytest.mark.parametrize(
  "value",
  [
    np.nan,
    pytest.param(np.inf, marks=pytest.mark.slow),
    pytest.param(-np.inf, marks=pytest.mark.slow),
  ],
)
def test_nothing_poisons(case, value):
  """Later results equal those of a run that never saw what was not finite."""
  tree, step = registry.params(), case.make()
  normalizes = case.factory == "average_neighbors" and step_normalizes(case)
  if normalizes or case.factory == "clip_examples":
    # The others make up for the bad row, which the mean over all rows undoes; or the
    # mean drops it.
    step = optax.chain(step, ranger.aggregate_by_mean())
    update = jax.jit(step.update)
  else:
    update = registry.jitted_update(case.name)
  weight_zero = {"weight": jnp.float32(0)}
  absent = {"member_weights": jnp.ones(registry.NUM_MEMBERS).at[1].set(0)}
  state, expected_state = step.init(tree), step.init(tree)
  for call in range(6):
    gradients = registry.gradients(case, call, tree)
    extra = registry.extra_args(case, call)
    bad, never = gradients, {}
    if call in (1, 4):
      bad = _poison(case, gradients, value)
      never = absent if case.members else weight_zero
    updates, state = update(bad, state, tree, **extra)
    finite = [np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state))]
    if not case.absorbs:
      if call in (1, 4):
        same(updates, bad)
      finite = [np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)]
    assert all(finite)
    if case.skips and call in (1, 4):
      assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
      continue
    expected, expected_state = update(
      gradients, expected_state, tree, **{**extra, **never}
    )
    if case.by_entry:
      continue
    if case.absorbs:
      close(updates, expected, atol=1e-5)
    close(counters_aside(state), counters_aside(expected_state), atol=1e-5)
  counts = [
    int(leaf)
    for path, leaf in tree_util.tree_leaves_with_path(state)
    if tree_util.keystr(path).endswith(_COUNTERS)
  ]
  assert case.by_entry or max(counts, default=0) == 2 * case.absorbs


def test_import_touches_no_backend():
  code = (
    "import jax; before = dict(jax.config.values); import optax_ranger;"
    "after = dict(jax.config.values);"  # Modules of JAX may add options.
    "assert {name: after[name] for name in before} == before"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    env={"JAX_PLATFORMS": "no_such_platform", "PATH": ""},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr


def _guarantees():
  """The guarantees of each public name: of its docstring, and of the docs page."""
  page = pathlib.Path("docs/guarantees.md").read_text()
  found = {
    section.split("`")[1]: section.split("\n- ")[1:]
    for section in page.split("\n## ")[1:]
  }
  for name, value in registry.public_names().items():
    doc = inspect.getdoc(value) or ""
    if "Guarantees:" in doc:
      section = re.split(r"\n(?=\w+:\n)", doc.split("Guarantees:\n")[1])[0]
      bullets = re.split(r"\n\s*\* ", "\n" + section)[1:]
      assert len(bullets) <= 3, name
      others = "The guarantees of ``"
      found.setdefault(name, []).extend(b for b in bullets if not b.startswith(others))
  return found


def test_each_guarantee_is_held_by_a_test():
  """A marker of a test names each guarantee, and no marker names another one."""
  promised, held = _guarantees(), set()
  plain = lambda text: " ".join(re.sub(r":math:|[`$]", "", text).split())
  for path in pathlib.Path("tests").rglob("test_*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef):
        for mark in node.decorator_list:
          if ast.unparse(mark).startswith("pytest.mark.guarantees("):
            name, text = (argument.value for argument in mark.args)
            if name.startswith("layers.") and "layers." not in registry.ROOMS:
              continue
            those = [
              line for line in promised.get(name, ()) if plain(line).startswith(text)
            ]
            assert len(those) == 1, (path, node.name, name, text, those)
            held.add((name, those[0]))
  missing = {(name, line) for name, lines in promised.items() for line in lines} - held
  assert not missing


def test_every_public_function_is_documented():
  silent = {"eval_params", "graph.save", "smoothed_predictions"}
  for name, value in registry.public_names().items():
    if not inspect.isfunction(value):
      continue
    doc = inspect.getdoc(value) or ""
    for section in ("Returns:", "Examples:", ">>> "):
      if name.split("optax_ranger.")[-1] in silent and section == "Returns:":
        continue
      assert section in doc, f"{name} lacks {section}"


@pytest.mark.guarantees(
  "smooth_by_ema", "On an explicit mesh, the state may have another sharding"
)
@each_case
@pytest.mark.parametrize(
  ("split", "calls"),
  [("state", 4), _slow("params", 4), _slow("state", 1), _slow("params", 1)],
)
def test_state_and_params_may_be_split_unlike(case, split, calls):
  """On an explicit mesh: one of both split, the other whole; eager where one call."""
  tree = {"w": registry.params()["w"]}
  is_large = lambda leaf: leaf.shape == tree["w"].shape
  if not any(map(is_large, jax.tree.leaves(case.make().init(tree)))):
    pytest.skip("the state holds nothing of the parameters' shape")
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
  put = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
  whole = lambda leaf: put(leaf, PartitionSpec())
  parts = lambda leaf: (
    put(leaf, PartitionSpec("data")) if is_large(leaf) else whole(leaf)
  )
  put_state, put_params = (parts, whole) if split == "state" else (whole, parts)
  expected, expected_state = registry.run(case, tree, calls=4)
  step, params = case.make(), jax.tree.map(put_params, tree)
  start = jax.tree.map(put_state, step.init(tree))
  update = jax.jit(step.update) if calls > 1 else step.update
  state = start
  for call in range(calls):
    gradients = jax.tree.map(put_params, registry.gradients(case, call, tree))
    extra = registry.extra_args(case, call)
    updates, state = update(gradients, state, params, **extra)
    assert types(updates) == types(params)
    assert types(state) == types(start)
    close(updates, expected[call], atol=1e-5)
  moved = ranger.eval_params(state, params)
  assert types(moved) == types(params)
  if calls > 1:
    close(state, expected_state, atol=1e-5)
    close(moved, ranger.eval_params(expected_state, tree), atol=1e-5)
