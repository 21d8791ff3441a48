"""Laws of how our functions look, and of the contract between engine and steps."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ranger as ranger
from optax_ranger._core.gramian import Directions
from optax_ranger._gradients import linear
from optax_ranger._gradients.told import Told
from tests.laws import registry

PACKAGE = pathlib.Path(ranger.__file__).parent
MOST_POSITIONAL = 6
MOST_UNNAMED = 4


def functions(tree):
  kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
  return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def own_returns(function):
  """The return statements of a function, not those of functions inside."""
  waiting = list(function.body)
  while waiting:
    node = waiting.pop()
    if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
      continue
    if isinstance(node, ast.Return) and node.value is not None:
      yield node
    waiting += ast.iter_child_nodes(node)


def too_long(source):
  """Functions with too many positional parameters, or results without names."""
  for function in functions(ast.parse(source)):
    names = [one.arg for one in (*function.args.posonlyargs, *function.args.args)]
    names = names[1:] if names[:1] in (["self"], ["cls"]) else names
    if len(names) > MOST_POSITIONAL:
      yield f"{function.name} takes {len(names)} positional parameters"
    for node in own_returns(function):
      if isinstance(node.value, ast.Tuple) and len(node.value.elts) > MOST_UNNAMED:
        yield f"{function.name} returns {len(node.value.elts)} things without names"


@pytest.mark.parametrize(
  "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_functions_are_short_of_parameters_and_results(path):
  assert list(too_long(path.read_text())) == []


def test_planted_functions_are_caught():
  planted = "def f(a, b, c, d, e, f, g): return 1, 2, 3, 4, 5"
  assert len(list(too_long(planted))) == 2
  fine = "class A:\n  def f(self, a, b, c, d, e, f, *, g): return (1, 2, 3, 4)"
  assert list(too_long(fine)) == []


LINEAR = [
  case
  for case in registry.CASES
  if case.members and case.axis is None and "max" not in case.name
]


@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.name)
def test_a_step_that_is_told_is_linear_or_refused(case):
  """With its bad members left out, and inner products given where it names them."""
  step, n = case.make(), registry.NUM_MEMBERS
  args = registry.extra_args(case, 0)
  state = step.init(registry.params())
  told = Told(jnp.ones([n]), jnp.int32(0), args["losses"])
  facts = {
    "gramian": jnp.eye(n),
    "norms": jnp.ones([n]),
    "directions": Directions(jnp.ones([n]), jnp.eye(n)),
  }
  about = linear.looks_at(step, n, state, {**args, **told.args()})
  if about:
    told = told._replace(**{about: facts[about]})
  told = {**args, **told.args()}
  sorting = ("aggregate_by_median", "aggregate_by_trimmed_mean", "mix_nearest-median")
  if case.name in sorting:
    with pytest.raises(linear.NotLinearError):
      linear.transpose(step, n, state, told)
    return
  apply = jax.jit(lambda leaf: step.update(leaf, state, None, **told)[0])
  rng = np.random.default_rng(0)
  a, b = (jnp.asarray(rng.standard_normal([n, 4]), jnp.float32) for _ in range(2))
  together = apply(2 * a - 3 * b)
  apart = 2 * apply(a) - 3 * apply(b)
  np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-5)
  if jax.eval_shape(apply, a).shape == (4,):  # It aggregates.
    weights = jax.jit(lambda told: linear.transpose(step, n, state, told))(told)
    np.testing.assert_allclose(weights @ a, apply(a), rtol=1e-4, atol=1e-5)
