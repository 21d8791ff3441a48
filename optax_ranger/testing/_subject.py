"""What laws look at: a step, and what it takes to call it."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ranger._core.types import PyTree


class SkippedError(Exception):
  """A law does not apply here; the message says why."""


def default_params() -> PyTree:
  """A matrix that can be split over eight devices, and a vector."""
  rng = np.random.default_rng(7)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  return {"w": draw(8, 16), "b": draw(5)}


def random_like(call: int, params: PyTree) -> PyTree:
  """Draws normal numbers, the gradients for the call of this number.

  Args:
    call: a number, which seeds the draw.
    params: a pytree of arrays, or of their shapes and types.

  Returns:
    A pytree like `params`.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger.testing
    >>> print(optax_ranger.testing.random_like(0, {"w": jnp.ones([2, 3])})["w"].shape)
    (2, 3)
  """
  rng = np.random.default_rng(1000 + call)

  def draw(leaf: Any) -> jax.Array:
    values = rng.standard_normal(leaf.shape)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
      values = values + 1j * rng.standard_normal(leaf.shape)
    return jnp.asarray(values, leaf.dtype)

  return jax.tree.map(draw, params)


def no_extra_args(call: int) -> dict[str, Any]:
  """Of a step that needs none."""
  del call
  return {}


class FirstRun(NamedTuple):
  """The compiled update, its results, the last state, how often it was traced."""

  update: Any
  results: list[PyTree]
  state: PyTree
  num_traces: int


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
  """A step under test.

  Attributes:
    make: makes the step.
    params: the parameters, a pytree of arrays in float32.
    gradients: ``(call, params) -> updates`` for the call of this number. Updates may
      have a leading axis that the parameters lack, of examples or devices.
    extra: the extra args of ``update``, by the number of the call.
    factory: a public function that makes the step of ``arguments``, or None.
    arguments: its keyword arguments.
    static_args: those that are no numbers, for ``optax.inject_hyperparams``.
    wrap: applied to what the factory makes.
  """

  make: Callable[[], optax.GradientTransformation]
  params: PyTree = dataclasses.field(default_factory=default_params)
  gradients: Callable[[int, PyTree], PyTree] = random_like
  extra: Callable[[int], dict[str, Any]] = no_extra_args
  factory: Callable[..., optax.GradientTransformation] | None = None
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  static_args: tuple[str, ...] = ()
  wrap: Callable[[Any], Any] = lambda step: step

  @functools.cached_property
  def step(self) -> Any:
    return self.make()

  @functools.cached_property
  def first_run(self) -> FirstRun:
    """Five calls of a compiled update, which all laws share."""
    try:
      return self._run_first()
    except Exception as error:
      raise SkippedError("a compiled loop fails") from error

  def _run_first(self) -> FirstRun:
    traces = []

    def update(*args, **extra_args):
      traces.append(1)
      return self.step.update(*args, **extra_args)

    jitted = jax.jit(update)
    results, state = self.run(self.params, 5, jitted)
    return FirstRun(jitted, results, state, len(traces))

  def inputs(self, call: int, params: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """The updates and the extra args of the call of this number."""
    return self.gradients(call, params), self.extra(call)

  def run(
    self, params: PyTree, calls: int, update: Any = None, state: Any = None
  ) -> tuple[list[PyTree], PyTree]:
    """Calls the step several times; gives all updates, and the state."""
    update = self.first_run.update if update is None else update
    state = self.step.init(params) if state is None else state
    results = []
    for call in range(calls):
      gradients, extra_args = self.inputs(call, params)
      updates, state = update(gradients, state, params, **extra_args)
      results.append(updates)
    return results, state
