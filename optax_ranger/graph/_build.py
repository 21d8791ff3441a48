"""`build`: one call for every way to a neighbor graph."""

import functools
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_ranger._core import draws
from optax_ranger._core import host
from optax_ranger._core import progress as _progress
from optax_ranger._core import validate
from optax_ranger._core.types import Neighbors
from optax_ranger.graph import _duplicates
from optax_ranger.graph import _exact
from optax_ranger.graph import _faiss
from optax_ranger.graph import _sharded
from optax_ranger.graph import _sparse
from optax_ranger.neighbors import _double
from optax_ranger.neighbors import _nearest

BACKENDS = ("auto", "faiss", "jax", "hnsw", "ivf")


class BuildReport(NamedTuple):
  """What a graph is, beside its arrays.

  Attributes:
    backend: what was used: ``"faiss"``, ``"jax"``, ``"sharded"``, ``"sparse"``,
      ``"hnsw"`` or ``"ivf"``.
    recall: the share of the true k nearest that was found, by distance, on a
      sample; 1.0 without measuring where the search is exact.
    num_repaired: examples that an exact search had to search for again, since
      rounding could have hidden a neighbor; slow when they are many.
    num_duplicates: examples that are equal to an earlier one; not counted, and 0,
      for sparse rows and with a mesh.
    num_dropped: examples whose features are not finite, in float32; they are no
      duplicates.
    seconds: how long it took.
  """

  backend: str
  recall: float
  num_repaired: int
  num_duplicates: int
  num_dropped: int
  seconds: float


def build(
  features: Any,
  k: int,
  *,
  backend: str = "auto",
  metric: str = "euclidean",
  mesh: jax.sharding.Mesh | None = None,
  axis_name: str | None = None,
  effort: int | None = None,
  recall_sample: int = 1000,
  seed: int = 0,
  with_report: bool = False,
  progress: bool = True,
) -> Any:
  """Builds the graph of the k nearest neighbors of a whole data set.

  Exact backends give the same graph bit for bit: candidates differ, but one
  function measures and orders them, and an example that rounding leaves in
  doubt is searched for again. Equal rows are searched once.

  Args:
    features: ``[n, d]``, of any real type; or SciPy's sparse rows, for
      ``metric="cosine"``. 64-bit numbers of NumPy keep their digits: they are
      shifted in their own type before they are rounded to float32, and where that
      is not exact, neighbors are measured and ordered in float64 on the host.
    k: how many, in [1, n - 1]; a static Python integer.
    backend: ``"faiss"``: exact, by FAISS's flat index (extra ``graph``);
      ``"jax"``: exact, by tiles, on any accelerator; ``"auto"``: FAISS where it
      is installed and JAX runs on the CPU, else JAX. ``"hnsw"`` and ``"ivf"``:
      approximate, by FAISS, for more than about a million examples.
    metric: ``"euclidean"`` (distances, not their squares) or ``"cosine"``.
    mesh: searches on all its devices, each of which holds its rows only; exact.
      In several processes pass features as one array that is split over them.
    axis_name: the mesh axis that rows are split over; None for its first.
    effort: of an approximate search: HNSW's ``efSearch``, IVF's ``nprobe``.
    recall_sample: on how many examples the recall is measured, where the search
      is approximate; 0 does not measure (recall NaN).
    seed: of IVF's training and of the sample.
    with_report: returns ``(neighbors, BuildReport)``.
    progress: a bar (tqdm) on whatever takes more than two seconds.

  Returns:
    ``Neighbors`` with arrays of ``[n, k]``, nearest first, uniform weights;
    with a mesh, split by rows. Memory is O(n k + n d + block).

  Guarantees:
    * Every exact backend, 8 devices, and two processes give one graph, bit for bit, and
      ties go to the lower index.
    * It is exact for clusters that lie thousands of radii apart, for any scale, and for
      duplicates.
    * Where float32 does not hold the features, it is the graph of the features in their
      own type.

  Raises:
    ValueError: for features that are not 2-D, k outside [1, n - 1], another
      backend or metric, sparse features with another metric than cosine.
    TypeError: for complex features, k that is not a Python integer.
    ImportError: for a FAISS backend without FAISS.

  Examples:
    >>> import numpy as np
    >>> from optax_ranger import graph
    >>> points = np.array([[0.0], [1.0], [3.0], [3.0]])
    >>> neighbors, report = graph.build(points, 2, backend="jax", with_report=True)
    >>> print(neighbors.indices.tolist(), report.recall, report.num_duplicates)
    [[1, 2], [0, 2], [3, 1], [2, 1]] 1.0 1

  References:
    Douze et al., The Faiss library, https://arxiv.org/abs/2401.08281.
  """
  started = time.perf_counter()
  if not hasattr(features, "shape"):
    features = np.asarray(features)
  if isinstance(features, jax.Array) and features.is_fully_addressable:
    # Integers beyond 24 bits are measured on the host.
    is_integer = jnp.issubdtype(features.dtype, jnp.integer)
    features = np.asarray(features) if is_integer else features
  _check(features, k, backend, metric, mesh, axis_name)
  validate.static_count("recall_sample", recall_sample, least=0)
  recall, repaired, duplicates = 1.0, 0, 0
  sparse = _sparse.is_sparse(features)
  given = features
  features, own = (features, None) if sparse else _double.narrow(features, metric)
  # Where float32 does not hold the features, more candidates are measured again.
  wanted, k = k, k if own is None else min(k + _double.SPARE, features.shape[0] - 1)
  if sparse:
    backend = "sparse"
    distances, indices = _sparse.build(features, k, progress)
    found = _uniform(distances, indices)
  elif mesh is not None:
    backend = "sharded"
    axis_name = mesh.axis_names[0] if axis_name is None else axis_name
    found, repaired = _sharded.build(features, k, metric, mesh, axis_name)
  else:
    if backend == "auto":
      on_host = jax.default_backend() == "cpu" and _faiss.is_installed()
      backend = "faiss" if on_host else "jax"
    engine = {"faiss": _faiss.flat, "jax": _exact.by_jax}.get(backend)
    if engine is None:
      engine = functools.partial(
        _faiss.approximate, kind=backend, effort=effort, seed=seed
      )
    exact = _exact.build(features, k, metric, progress, engine)
    found = _uniform(exact.distances, exact.indices)
    repaired, duplicates = exact.num_repaired, exact.num_duplicates
  approximate = backend in ("hnsw", "ivf")
  if own is not None:
    found, again = _settled(found, own, wanted, metric, not approximate, progress)
    repaired = max(repaired, again)
    if mesh is None:
      distinct = _duplicates.find(own.values[own.alive]).first
      duplicates = int(own.alive.sum()) - len(distinct)
  if approximate:
    recall = measure_recall(
      found, given, sample=recall_sample, metric=metric, seed=seed
    )
  if not with_report:
    return found
  dropped = int((found.indices[:, 0] < 0).sum())
  seconds = time.perf_counter() - started
  return found, BuildReport(backend, recall, repaired, duplicates, dropped, seconds)


def _settled(
  found: Neighbors,
  own: _double.Rows,
  k: int,
  metric: str,
  exact: bool,
  progress: bool,
) -> tuple[Neighbors, int]:
  """The k nearest by the features in their own type, split as before."""
  distances, indices = np.asarray(found.distances), np.asarray(found.indices)
  sure = np.ones([len(indices)], bool) if exact else None
  bar = lambda parts: _progress.bar(parts, "repairs", progress)
  distances, indices, again = _double.settle(
    own, own, np.arange(len(indices)), (distances, indices, sure), k, metric, bar=bar
  )
  settled = _uniform(distances, indices)
  return jax.device_put(settled, found.indices.sharding), again


def measure_recall(
  neighbors: Neighbors,
  features: Any,
  *,
  sample: int = 1000,
  metric: str = "euclidean",
  seed: int = 0,
) -> float:
  """Measures which share of the true k nearest neighbors a graph holds.

  Distances are computed here, in float64, those of the graph are not read. A
  neighbor counts when it is not farther than the true k-th one, so that equal
  distances are not held against a graph. Distances count as equal within 1e-6 of
  their value, as float32 rounds them. An index out of range, a repeated one, and
  the example itself never count.

  Args:
    neighbors: ``[n, k]``, of any index; only ``indices`` are read.
    features: ``[n, d]``, those that the graph was built of.
    sample: on how many examples, drawn at random; 0 gives NaN.
    metric: as in ``build``.
    seed: of the draw.

  Returns:
    The recall, in [0, 1].

  Guarantees:
    * It equals the recall of a full search, also if the given distances are wrong.

  Raises:
    ValueError: for indices that are not ``[n, k]``.

  Examples:
    >>> import numpy as np
    >>> from optax_ranger import graph
    >>> points = np.array([[0.0], [1.0], [2.0], [7.0], [8.0], [9.0]])
    >>> print(graph.measure_recall(graph.build(points, 2, backend="jax"), points))
    1.0
  """
  if sample == 0:
    return float("nan")
  rows = _double.own_rows(features, metric)
  indices, n = np.asarray(neighbors.indices), len(rows.values)
  if indices.ndim != 2 or len(indices) != n:
    raise ValueError(
      f"neighbors.indices must have shape [{n}, k], one row for each of the rows of"
      f" features, got {list(indices.shape)}."
    )
  k = indices.shape[1]
  rng = draws.generator(seed)
  chosen = np.sort(rng.choice(n, min(sample, n), replace=False))
  queries = rows.take(chosen)
  truth, _ = _double.search(rows, queries, chosen, k, k, metric)
  last = np.sqrt(np.where(np.isfinite(truth), truth, -np.inf).max(axis=1).clip(0))
  found = indices[chosen]
  counts = (found >= 0) & (found < n) & (found != chosen[:, None])
  order = np.argsort(found, axis=1, kind="stable")
  ordered = np.take_along_axis(found, order, axis=1)
  repeated = np.zeros(found.shape, bool)
  np.put_along_axis(repeated[:, :], order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
  found = np.where(counts, found, 0)
  distances = np.sqrt(_double.squares_of(rows, found, queries, metric))
  near = last * (1 + 1e-6)
  if metric == "cosine" and not host.is_wide(features):
    near = near + 2**-21  # Unit rows in float32 are no finer.
  counts &= ~repeated & (distances <= near[:, None])
  return float(counts.sum() / max(1, np.isfinite(truth).sum()))


def _uniform(distances: np.ndarray, indices: np.ndarray) -> Neighbors:
  return _nearest.uniform(jnp.asarray(indices), jnp.asarray(distances))


def _check(features, k, backend, metric, mesh, axis_name) -> None:
  if len(features.shape) != 2 or not features.shape[1]:
    raise ValueError(
      "features must have shape [n, d], d at least 1, got"
      f" {list(features.shape)}; flatten each example first."
    )
  if jnp.issubdtype(features.dtype, jnp.complexfloating):
    raise TypeError(f"features must be real, got {features.dtype}.")
  validate.static_count("k", k)
  if k >= features.shape[0]:
    raise ValueError(
      "k must be less than the number of examples, n ="
      f" {features.shape[0]}, got {k}: an example is not its own neighbor."
    )
  validate.choice("backend", backend, BACKENDS)
  validate.choice("metric", metric, _nearest.METRICS)
  if mesh is not None:
    if backend not in ("auto", "jax"):
      raise ValueError(f"a mesh needs backend='auto' or 'jax', got {backend!r}.")
    if axis_name is not None:
      validate.choice("axis_name", axis_name, mesh.axis_names)
  other = metric != "cosine" or backend != "auto" or mesh is not None
  if _sparse.is_sparse(features) and other:
    raise ValueError(
      "sparse features need metric='cosine', backend='auto', mesh=None, got"
      f" {metric=}, {backend=}, {mesh=}."
    )
