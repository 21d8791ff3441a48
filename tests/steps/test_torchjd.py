"""UPGrad, MGDA and CAGrad against TorchJD, if it is installed.

`.venv/bin/pip install "torchjd[cagrad,quadprog_projector]"`; `-s` prints the figures.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ranger as ranger

torch = pytest.importorskip(
  "torch",
  reason="TorchJD is not installed: pip install 'torchjd[cagrad,quadprog_projector]'",
)
aggregation = pytest.importorskip(
  "torchjd.aggregation",
  reason="TorchJD is not installed: pip install 'torchjd[cagrad,quadprog_projector]'",
)

COUNT, MOST, WIDTH, RADIUS = 200, 32, 64, 0.5


def matrices():
  """Parallel, opposite, zero and repeated rows, and norms of six decades."""
  rng = np.random.default_rng(0)
  for i in range(COUNT):
    n, width = rng.integers(2, MOST + 1), rng.integers(2, WIDTH + 1)
    rows = rng.standard_normal([n, width])
    if i % 6 == 1:
      rows[1] = 3 * rows[0]
    elif i % 6 == 2:
      rows[1] = -rows[0]
    elif i % 6 == 3:
      rows[n // 2] = 0
    elif i % 6 == 4:
      rows[n // 2 :] = rows[: n - n // 2]
    elif i % 6 == 5:
      rows *= 10.0 ** rng.uniform(-3, 3, [n, 1])
    rows /= np.linalg.norm(rows, axis=1).max()
    yield rows.astype(np.float32).astype(float)


def ours(step):
  rows, there = np.zeros([COUNT, MOST, WIDTH], np.float32), np.zeros([COUNT, MOST])
  for i, matrix in enumerate(matrices()):
    rows[i, : len(matrix), : matrix.shape[1]] = matrix
    there[i, : len(matrix)] = 1
  one = lambda rows, weights: step.update(
    rows, step.init(rows), member_weights=weights
  )[0]
  found = jax.jit(jax.vmap(one))(rows, jnp.asarray(there, jnp.float32))
  pairs = zip(np.asarray(found, float), matrices(), strict=True)
  return [result[: matrix.shape[1]] for result, matrix in pairs]


def theirs(aggregator):
  return [aggregator(torch.tensor(matrix)).numpy() for matrix in matrices()]


def projected(rows):
  """The mean of the projections onto the dual cone, in double precision."""
  from scipy import optimize

  norms = np.linalg.norm(rows, axis=1)
  units = rows / np.where(norms > 0, norms, 1)[:, None]
  one = lambda row: row + units.T @ optimize.nnls(units.T, -row, maxiter=10**5)[0]
  return np.mean([one(row) for row in rows], axis=0)


def test_upgrad():
  reference = [projected(matrix) for matrix in matrices()]
  distance = lambda found: np.array(
    [np.linalg.norm(a - b) for a, b in zip(found, reference, strict=True)]
  )
  mine = distance(ours(ranger.aggregate_by_upgrad()))
  other = distance(theirs(aggregation.UPGrad()))
  print(
    f"UPGrad, distance from double precision, largest of {COUNT}: {mine.max():.1e};"
    f" TorchJD {other.max():.1e}, {(other < 1e-4).sum()} below 1e-4"
  )
  assert (mine < 1e-4).all()


def test_mgda_is_never_longer():
  norms = lambda found: np.array([np.linalg.norm(x) for x in found])
  mine = norms(ours(ranger.aggregate_by_mgda()))
  other = norms(theirs(aggregation.MGDA()))
  print(f"MGDA, norm beyond TorchJD's: at most {(mine - other).max():.1e}")
  assert (mine <= other + 2e-6).all()


def test_cagrad_is_as_good_for_the_worst_task():
  mine = ours(ranger.aggregate_by_cagrad(RADIUS))
  other = theirs(aggregation.CAGrad(c=RADIUS))
  worst = lambda found: np.array(
    [(m @ x).min() for m, x in zip(matrices(), found, strict=True)]
  )
  gap = worst(other) - worst(mine)
  apart = np.array([np.linalg.norm(a - b) for a, b in zip(mine, other, strict=True)])
  # At a point where no direction helps all, TorchJD returns zeros.
  moved = np.array([np.linalg.norm(x) > 0 for x in other])
  print(
    f"CAGrad, the worst task's gain below TorchJD's: at most {gap[moved].max():.1e};"
    f" {(apart[moved] < 1e-4).sum()} of {moved.sum()} results equal to 1e-4"
  )
  assert (gap[moved] < 1e-4).all()
  assert (apart[moved] < 1e-4).all()
