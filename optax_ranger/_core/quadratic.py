"""Small quadratic programs over nonnegative vectors, a fixed number of rounds.

The matrix is a Gramian of unit vectors, so its diagonal is one; it may be singular.
"""

import functools

import jax
import jax.numpy as jnp

from optax_ranger._core.types import Array

# Of the primal-dual method: enough for float32 on the matrices of the tests.
_ROUNDS = 25
# Added to the diagonal: solutions that differ by a vector of the null space are one.
_RIDGE = 1e-5
# How far a round goes of the way to the boundary.
_NEARLY = 0.99
_REFINEMENTS = 3
# How often the set of positive entries is corrected, after the first guess.
_CORRECTIONS = 3


@functools.partial(jax.jit, inline=True)  # Traced once for each shape.
def nonnegative(matrix: Array, linear: Array) -> Array:
  r"""The minimizer of :math:`\frac12 x^T A x - b^T x` over :math:`x \ge 0`.

  A primal-dual interior-point method finds out which entries are positive; these
  then solve their linear system, with iterative refinement, and entries with the
  wrong sign change sides. Of all results, the one nearest to optimality is taken.

  Args:
    matrix: A, ``float [n, n]``, symmetric and positive semidefinite, its diagonal
      around one.
    linear: b, ``float [n]``, in the range of A or bounded by ``x >= 0``.

  Returns:
    ``float [n]``.

  References:
    Mehrotra, On the Implementation of a Primal-Dual Interior Point Method, 1992.
  """
  ridge = _RIDGE * jnp.eye(linear.shape[0], dtype=linear.dtype)
  start, slack = _interior_point(matrix + ridge, linear)

  def correct(_, carry):
    best, positive = carry
    exact = _solve_positive(matrix, linear, positive)
    better = _violation(matrix, linear, exact) < _violation(matrix, linear, best)
    # Entries that came out negative are zero, and where the gradient falls, positive.
    falls = jnp.logical_and(_product(matrix, exact) < linear, exact == 0)
    return jnp.where(better, exact, best), jnp.logical_or(exact > 0, falls)

  best, _ = jax.lax.fori_loop(0, _CORRECTIONS, correct, (start, start > slack))
  return best


def _interior_point(matrix: Array, linear: Array) -> tuple[Array, Array]:
  """The minimizer and its gradient, both positive."""
  start = jnp.ones_like(linear)

  def one_round(_, point):
    x, z = point
    gap = jnp.vdot(x, z) / x.size
    residual = _product(matrix, x) - linear - z
    solve = _solver(matrix + jnp.diag(z / x))

    def direction(target):
      along = solve(target - residual)
      return along, target - (z / x) * along

    dx, dz = direction(-z)
    far = x + _step(x, dx) * dx, z + _step(z, dz) * dz
    centering = (jnp.vdot(*far) / x.size / gap) ** 3
    dx, dz = direction((centering * gap - dx * dz) / x - z)
    length = jnp.minimum(_step(x, dx), _step(z, dz))
    good = jnp.logical_and(jnp.isfinite(dx).all(), jnp.isfinite(dz).all())
    least = jnp.asarray(jnp.finfo(x.dtype).tiny ** 0.5, x.dtype)
    move = lambda old, d: jnp.where(good, jnp.maximum(old + length * d, least), old)
    return move(x, dx), move(z, dz)

  return jax.lax.fori_loop(0, _ROUNDS, one_round, (start, start))


def _step(x: Array, direction: Array) -> Array:
  """How far to go, at most one, so that all entries stay positive."""
  falls = direction < 0
  room = jnp.where(falls, -x / jnp.where(falls, direction, -1), jnp.inf)
  return jnp.minimum(_NEARLY * room.min(), 1)


def _solver(matrix: Array):
  """Solves systems with a matrix that is scaled very unevenly."""
  scale = jax.lax.rsqrt(jnp.diagonal(matrix))
  scaled = matrix * scale[:, None] * scale[None]
  tiny = jnp.finfo(matrix.dtype).eps * jnp.eye(len(scale), dtype=matrix.dtype)
  factor = jnp.linalg.cholesky(scaled + tiny)
  solve = lambda b: jax.scipy.linalg.cho_solve((factor, True), b)

  def refined(b):
    first = solve(b * scale)
    return scale * (first + solve(b * scale - _product(scaled, first)))

  return refined


def _solve_positive(matrix: Array, linear: Array, positive: Array) -> Array:
  """Solves for the entries that are positive; the others are zero."""
  both = jnp.logical_and(positive[:, None], positive[None])
  ridge = jnp.where(positive, jnp.asarray(0.1 * _RIDGE, linear.dtype), 1)
  factor = jnp.linalg.cholesky(jnp.where(both, matrix, 0) + jnp.diag(ridge))

  def refine(_, x):
    residual = jnp.where(positive, linear - _product(matrix, x), 0)
    return x + jax.scipy.linalg.cho_solve((factor, True), residual)

  solution = jax.lax.fori_loop(0, 1 + _REFINEMENTS, refine, jnp.zeros_like(linear))
  return jnp.maximum(solution, 0)


def _violation(matrix: Array, linear: Array, x: Array) -> Array:
  """How far from optimality: of the gradient's sign, and of complementarity."""
  gradient = _product(matrix, x) - linear
  return jnp.maximum((-gradient).max(), jnp.abs(x * gradient).max())


def _product(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
