"""Step 3: the learned acceleration factor, all of its scalar arithmetic."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_ranger._core import numerics
from optax_ranger._core import states
from optax_ranger._core import validate
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._core.types import Schedule

# How fast `hurry` falls: each time the gradient points fully against the last
# direction, it is divided by the square root of two.
_COOLING = 0.5
# The running squared norm decays by a tenth per step, and a gradient counts
# for at most a hundred times it, so that an explosion does not dominate.
_MEMORY = 0.9
_LARGEST_GROWTH = 100.0


@states.exportable
class Factor(NamedTuple):
  """What the learned factor needs from step to step: scalars in float32 or better.

  Each is one scalar, or with ``per_leaf`` a tree of one scalar a leaf.

  Attributes:
    acceleration: the learned factor.
    hurry: the present multiple of the hyper rate; it cools down to 1.
    reference: a running mean of the gradient's squared norm; 0 is none yet.
  """

  acceleration: PyTree
  hurry: PyTree
  reference: PyTree


class Products(NamedTuple):
  """What a step knows of the gradient and the last direction.

  Each is one scalar, or with ``per_leaf`` a tree of one scalar a leaf.

  Attributes:
    agreement: their inner product, of a direction that points uphill.
    gradient_norm: the squared norm of the gradient.
    direction_norm: the squared norm of the last direction.
  """

  agreement: PyTree
  gradient_norm: PyTree
  direction_norm: PyTree


class Hyper(NamedTuple):
  """The hyperparameters of the factor, as they were given.

  `follows` is whether the factor only follows the schedule, which another step
  multiplies by.
  """

  acceleration: Any
  hyper_rate: Any
  bounds: tuple[Any, Any]
  shrink: Any = 0.2
  hurry: Any = 10.0
  per_leaf: bool = False
  schedule: Schedule | None = None
  follows: bool = False

  def check(self) -> None:
    """Refuses what is out of range."""
    top = float("inf")
    validate.in_range("hyper_rate", self.hyper_rate, 0, top, open_high=True)
    validate.in_range("shrink", self.shrink, 0, 1, open_low=True)
    validate.in_range("hurry", self.hurry, 1, top, open_high=True)
    validate.choice("per_leaf", self.per_leaf, (False, True))
    if self.schedule is not None and not callable(self.schedule):
      raise TypeError(
        "schedule must be a function of the number of the step, or None, got"
        f" {self.schedule!r}."
      )
    low, high = self.bounds
    for name, value in (("bounds[0]", low), ("bounds[1]", high)):
      validate.in_range(name, value, 0, top, open_low=True, open_high=True)
    if validate.is_known(low) and validate.is_known(high):
      validate.in_range("bounds[0]", low, 0, float(high))
      validate.in_range("acceleration", self.acceleration, float(low), float(high))

  def init(self, params: PyTree) -> Factor:
    """The factor before the first step."""
    dtype = numerics.widest_real(params)
    acceleration = numerics.scalar(self.acceleration, dtype)
    hurry = numerics.scalar(self.hurry)
    return Factor(
      acceleration=self.spread(acceleration, params),
      hurry=self.spread(hurry, params),
      reference=self.spread(jnp.zeros([], jnp.float32), params),
    )

  def spread(self, scalar: Array, tree: PyTree) -> PyTree:
    """A scalar, or with `per_leaf` a tree of it, leaf by leaf."""
    # Copies: no two leaves of a state may share a buffer, or donation fails.
    return jax.tree.map(lambda _: jnp.copy(scalar), tree) if self.per_leaf else scalar

  def total(self, numbers: list[Array], tree: PyTree) -> PyTree:
    """The sum of a number of each leaf, or with `per_leaf` the tree of them."""
    if self.per_leaf:
      return jax.tree.structure(tree).unflatten(numbers)
    return sum(numbers, jnp.zeros([], jnp.float32))

  def multiples(self, factor: Factor, tree: PyTree, count: Array) -> PyTree:
    """By what each leaf of `tree` is multiplied: the factor, and the schedule."""
    found = factor.acceleration
    if self.schedule is not None and not self.follows:
      share = self.schedule(count)
      found = jax.tree.map(lambda a: a * numerics.scalar(share, a.dtype), found)
    return found if self.per_leaf else jax.tree.map(lambda _: found, tree)

  def advance(
    self, factor: Factor, products: Products, good: Array, count: Array
  ) -> Factor:
    """One step of the factor.

    Args:
      factor: the factor so far.
      products: of the gradient and the last direction.
      good: whether these numbers are finite; if not, nothing changes.
      count: the number of the step.

    Returns:
      The new factor.
    """
    held = self._held(count)

    def one(*scalars: Array) -> Factor:
      old, products = Factor(*scalars[:3]), Products(*scalars[3:])
      new = self._one(old, products, held)
      return Factor(*(jnp.where(good, n, o) for n, o in zip(new, old, strict=True)))

    shape = jax.tree.structure(factor.acceleration)
    columns = (*factor, *products)
    rows = zip(*(shape.flatten_up_to(column) for column in columns), strict=True)
    new = [one(*row) for row in rows]
    return Factor(
      *(shape.unflatten([row[field] for row in new]) for field in range(len(factor)))
    )

  def _held(self, count: Array) -> Array | None:
    """Whether the schedule is falling; None without one."""
    if self.schedule is None:
      return None
    now, before = self.schedule(count), self.schedule(jnp.maximum(count - 1, 0))
    return jnp.asarray(now < before)

  def _one(self, factor: Factor, products: Products, held: Array | None) -> Factor:
    acceleration, hurry, reference = factor
    agreement, gradient_norm, direction_norm = products
    dtype = acceleration.dtype
    rate = numerics.scalar(self.hyper_rate)
    low, high = (numerics.scalar(bound, dtype) for bound in self.bounds)
    size = jnp.sqrt(gradient_norm)
    cosine = numerics.divide(agreement, size * jnp.sqrt(direction_norm))
    cosine = jnp.clip(cosine, -1, 1)
    against = jnp.minimum(cosine, 0)

    # Past 1 only where the gradient turns around *and* outgrows what is usual.
    growth = jnp.minimum(numerics.divide(size, jnp.sqrt(reference)), 1e30)
    explosion = jnp.maximum(-against * growth, 1)
    exploded = explosion > 1
    cooled = jnp.maximum(hurry * jnp.exp2(_COOLING * against), 1)
    hurry = jnp.where(exploded, jnp.ones_like(hurry), cooled)

    # It shrinks more slowly than it grows: at any useful learning rate, noise
    # alone turns the gradient against the last step.
    pull = jnp.where(cosine < 0, numerics.scalar(self.shrink) * cosine, cosine)
    brake = jnp.where(rate > 0, explosion, jnp.ones_like(explosion))
    if held is not None:
      started = hurry <= 1
      pull = jnp.where(jnp.logical_and(held, started), jnp.zeros_like(pull), pull)
    change = jnp.exp((rate * hurry * pull).astype(dtype))
    acceleration = acceleration * change / brake.astype(dtype)
    capped = jnp.minimum(gradient_norm, _LARGEST_GROWTH * reference)
    running = _MEMORY * reference + (1 - _MEMORY) * capped
    return Factor(
      acceleration=jnp.clip(acceleration, low, high),
      hurry=hurry,
      reference=jnp.where(reference > 0, running, gradient_norm),
    )


def all_finite(*trees: PyTree) -> Array:
  """Whether every scalar of these trees is finite."""
  checks = [jnp.isfinite(leaf) for leaf in jax.tree.leaves(trees)]
  return jnp.stack(checks).all() if checks else jnp.asarray(True)
