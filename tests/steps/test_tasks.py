"""UPGrad, MGDA, CAGrad: against double precision, and what they promise."""

import functools

import hypothesis
from hypothesis import strategies
import jax
import numpy as np
import pytest
from scipy import optimize

import optax_ranger as ranger
from tests.helpers import close

MOST, WIDTH = 12, 20
STEPS = {
  "upgrad": ranger.aggregate_by_upgrad(),
  "mgda": ranger.aggregate_by_mgda(),
  "cagrad": ranger.aggregate_by_cagrad(),  # of radius 0.5
}


@functools.cache
def compiled(name):
  step = STEPS[name]
  return jax.jit(
    lambda rows, weights: step.update(rows, step.init(rows), member_weights=weights)
  )


def padded(matrix):
  rows = np.zeros([MOST, WIDTH], np.float32)
  rows[: len(matrix), : matrix.shape[1]] = matrix
  return rows


def run(name, matrix):
  """One program for matrices of all sizes: others are members of weight zero."""
  there = (np.arange(MOST) < len(matrix)).astype(np.float32)
  found, _ = compiled(name)(padded(matrix), there)
  return np.asarray(found, float)[: matrix.shape[1]]


def hard(kind, seed):
  """Matrices with parallel, opposite, zero and repeated rows, and uneven ones."""
  rng = np.random.default_rng(seed)
  n, width = rng.integers(3, MOST + 1), rng.integers(2, WIDTH + 1)
  rows = rng.standard_normal([n, width])
  if kind == "parallel":
    rows[1] = 3 * rows[0]
  elif kind == "opposite":
    rows[1] = -rows[0]
  elif kind == "zero":
    rows[n // 2] = 0
  elif kind == "repeated":
    rows[n // 2 :] = rows[: n - n // 2]
  elif kind == "uneven":
    rows *= 10.0 ** rng.uniform(-3, 3, [n, 1])
  return rows.astype(np.float32).astype(float)


KINDS = ("plain", "parallel", "opposite", "zero", "repeated", "uneven")
each_kind = pytest.mark.parametrize("kind", KINDS)


def upgrad(rows):
  norms = np.linalg.norm(rows, axis=1)
  units = rows / np.where(norms > 0, norms, 1)[:, None]
  project = lambda row: row + units.T @ optimize.nnls(units.T, -row, maxiter=10**5)[0]
  return np.mean([project(row) for row in rows], axis=0)


def mgda(rows):
  scale = np.linalg.norm(rows, axis=1).max()
  system = np.vstack([rows.T / scale, np.ones(len(rows))])
  weights, _ = optimize.nnls(system, np.eye(1, len(system), len(system) - 1)[0])
  return weights @ rows / weights.sum()


@each_kind
def test_upgrad_is_the_mean_of_projections(kind):
  for seed in range(8):
    rows = hard(kind, seed)
    largest = np.linalg.norm(rows, axis=1).max()
    assert np.linalg.norm(run("upgrad", rows) - upgrad(rows)) < 1e-4 * largest


@pytest.mark.guarantees(
  "aggregate_by_mgda", "No mean of the members has a norm that is smaller"
)
@each_kind
def test_mgda_is_the_shortest_mean(kind):
  for seed in range(8):
    rows = hard(kind, seed)
    largest = np.linalg.norm(rows, axis=1).max()
    found, least = run("mgda", rows), np.linalg.norm(mgda(rows))
    assert np.linalg.norm(found) < least + 1e-5 * largest
    # In the convex hull: its least-squares weights are those of a mean.
    system = np.vstack([rows.T / largest, np.ones(len(rows))])
    _, residual = optimize.nnls(system, np.append(found / largest, 1))
    assert residual < 1e-5


@pytest.mark.guarantees("aggregate_by_cagrad", "The result is within radius times")
@each_kind
def test_cagrad_pleases_the_worst_task(kind):
  """By duality: no direction near the mean is better than the bound of any weights."""
  for seed in range(3):
    rows = hard(kind, seed)
    rows /= np.linalg.norm(rows, axis=1).max()
    found, mean = run("cagrad", rows), rows.mean(axis=0)
    bound = 0.5 * np.linalg.norm(mean)
    assert np.linalg.norm(found - mean) <= bound * (1 + 1e-5) + 1e-7
    value = lambda w, rows=rows, mean=mean, bound=bound: (
      w @ rows @ mean + bound * np.linalg.norm(w @ rows)
    )
    best = min(
      optimize.minimize(
        value,
        start,
        bounds=[(0, 1)] * len(rows),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"maxiter": 500, "ftol": 1e-12},
      ).fun
      for start in (np.full(len(rows), 1 / len(rows)), np.eye(len(rows))[0])
    )
    # The minimizer of SciPy may stop early: its value is an upper bound.
    assert (rows @ found).min() > best - 1e-3
    assert (rows @ found).min() >= (rows @ mean).min() - 1e-6


@pytest.mark.guarantees("aggregate_by_cagrad", "radius=0 is aggregate_by_mean")
def test_without_a_radius_it_is_the_mean():
  rows = {"a": hard("uneven", 0).astype(np.float32)}
  weights = np.arange(len(rows["a"]), dtype=np.float32)
  results = [
    jax.jit(step.update)(rows, step.init(rows), member_weights=weights)[0]
    for step in (ranger.aggregate_by_cagrad(0.0), ranger.aggregate_by_mean())
  ]
  close(*results, rtol=1e-5)


@pytest.mark.guarantees(
  "aggregate_by_upgrad", "No member's inner product with the result is below"
)
@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
  strategies.integers(1, 5).flatmap(
    lambda width: strategies.lists(
      strategies.lists(
        strategies.floats(-1e3, 1e3, width=32), min_size=width, max_size=width
      ),
      min_size=1,
      max_size=MOST,
    )
  )
)
@hypothesis.example([[37.0], [-5.362324170578805e-38]])
@hypothesis.example([[0.0], [55.0], [-5.362324170578805e-38]])
@hypothesis.example([[1e3, 1.0], [-1e-25, 0.0]])
def test_no_task_gets_worse(rows):
  """Those of less than 2^-100 times the largest norm count as zero."""
  rows = np.asarray(rows, float)
  norms = np.linalg.norm(rows, axis=1)
  found = run("upgrad", rows)
  assert np.isfinite(found).all()
  rows[norms <= 2.0**-100 * norms.max()] = 0
  assert (rows @ found >= -1e-4 * norms * norms.max()).all()


@pytest.mark.guarantees(
  "aggregate_by_upgrad", "Gradients that do not conflict are averaged"
)
def test_without_conflicts_upgrad_is_the_mean():
  rows = np.abs(hard("plain", 1))
  close(run("upgrad", rows), rows.mean(axis=0), rtol=1e-4)


@pytest.mark.parametrize("name", sorted(STEPS))
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale(name, scale):
  rows = hard("opposite", 3)
  close(run(name, scale * rows) / scale, run(name, rows), atol=1e-5)


@pytest.mark.parametrize("name", ["mgda", "upgrad"])
def test_leaves_and_directions_that_are_told(name):
  """Over a tree it is the same as over its concatenation, and linear once told."""
  rows = hard("plain", 5).astype(np.float32)
  tree = {"a": rows[:, :1], "b": rows[:, 1:]}
  step = STEPS[name]
  whole = run(name, rows)
  parts, _ = jax.jit(step.update)(tree, step.init(tree))
  close(np.concatenate([parts["a"], parts["b"]]), whole, atol=1e-5)
  norms = np.linalg.norm(rows, axis=1)
  cosines = (rows @ rows.T) / (norms[:, None] * norms[None])
  weights = jax.jit(
    lambda *told: ranger.example_weights(step, len(rows), directions=told)
  )(norms, cosines)
  close(np.asarray(weights) @ rows, whole, atol=1e-4)


@pytest.mark.parametrize("name", sorted(STEPS))
def test_absent_and_zero_tasks(name):
  rows = hard("plain", 7)[: MOST - 2].astype(np.float32)
  bad = np.concatenate([rows, np.full_like(rows[:1], np.nan), 5 * rows[:1]])
  weights = (np.arange(MOST) < len(rows) + 1).astype(np.float32)
  found, state = compiled(name)(padded(bad), weights)
  close(found[: rows.shape[1]], run(name, rows), atol=1e-5)
  assert int(state.num_dropped) == 1
  assert not run(name, np.zeros([3, 4])).any()


def test_a_preference_counts_in_upgrad():
  """A task of weight three is as three tasks."""
  rows = hard("plain", 9).astype(np.float32)
  many = np.concatenate([rows, rows[:1], rows[:1]])
  rows = np.concatenate([rows, np.zeros([MOST - len(rows), rows.shape[1]])])
  weights = (np.abs(rows).sum(axis=1) > 0).astype(np.float32)
  weights[0] = 3
  found = compiled("upgrad")(padded(rows), weights)[0][: rows.shape[1]]
  close(found, run("upgrad", many), atol=1e-4)
