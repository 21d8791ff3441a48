"""Graphs in files: arrays, a version, a checksum, a fingerprint of the features."""

import hashlib
import os
import pathlib
from typing import Any
import zipfile

import jax.numpy as jnp
import numpy as np

from optax_ranger._core.types import Neighbors
from optax_ranger.graph import _sparse

_FORMAT = "optax_ranger.graph"
_VERSION = 1
_FIELDS = ("format", "version", "indices", "distances", "weights", "fingerprint", "sum")


def fingerprint(features: Any) -> str:
  """A short text that changes with the features' shape, type, or any entry.

  Args:
    features: an array, or SciPy's sparse rows.

  Returns:
    64 hexadecimal digits (SHA-256).

  Examples:
    >>> import numpy as np
    >>> from optax_ranger import graph
    >>> graph.fingerprint(np.zeros([2, 2])) == graph.fingerprint(np.eye(2))
    False
  """
  if _sparse.is_sparse(features):
    rows = features.tocsr()
    parts = (rows.indptr, rows.indices, rows.data)
    shape = rows.shape
  else:
    parts, shape = (features,), np.shape(features)
  digest = hashlib.sha256(repr(shape).encode())
  for part in parts:
    array = np.ascontiguousarray(part)
    digest.update(f"{array.dtype.str}{array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def save(
  path: str | os.PathLike[str], neighbors: Neighbors, *, features: Any = None
) -> None:
  """Writes a graph to a file, all or nothing.

  Args:
    path: where to; NumPy's ``.npz`` form, whatever its name.
    neighbors: ``[n, k]``.
    features: what the graph was built of, for their fingerprint; None leaves it
      out.

  Guarantees:
    * What is loaded is what was saved.

  Examples:
    >>> import numpy as np, tempfile, pathlib
    >>> from optax_ranger import graph
    >>> points = np.arange(6.0)[:, None]
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "graph.npz"
    >>> graph.save(path, graph.build(points, 2, backend="jax"), features=points)
    >>> print(graph.load(path, features=points).indices[:2].tolist())
    [[1, 2], [0, 2]]
  """
  path = pathlib.Path(path)
  arrays = {
    name: np.asarray(leaf)
    for name, leaf in zip(neighbors._fields, neighbors, strict=True)
  }
  known = "" if features is None else fingerprint(features)
  unfinished = path.with_name(path.name + ".unfinished")
  with unfinished.open("wb") as file:
    np.savez(
      file,
      format=np.array(_FORMAT),
      version=np.array(_VERSION),
      fingerprint=np.array(known),
      sum=np.array(_checksum(arrays, known)),
      **arrays,  # pyrefly: ignore
    )
  unfinished.replace(path)


def load(path: str | os.PathLike[str], *, features: Any = None) -> Neighbors:
  """Reads a graph that ``save`` wrote; nothing in the file is executed.

  Args:
    path: of the file.
    features: what the graph should have been built of; None does not look.

  Returns:
    ``Neighbors``.

  Guarantees:
    * A damaged file, a foreign one, one of a later version, and one of other features
      are refused, with its name.

  Raises:
    ValueError: for such files.
    FileNotFoundError: where there is none.

  Examples:
    >>> import pathlib, tempfile
    >>> from optax_ranger import graph
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "notes.txt"
    >>> _ = path.write_text("hello")
    >>> try:
    ...   graph.load(path)
    ... except ValueError as error:
    ...   print(str(error).removeprefix(str(path)))
    is not a graph of optax_ranger.
  """
  path = pathlib.Path(path)
  if path.stat() and not zipfile.is_zipfile(path):
    raise ValueError(f"{path} is not a graph of optax_ranger.")
  try:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
      found = {name: content[name] for name in _FIELDS if name in content.files}
  except (zipfile.BadZipFile, ValueError, EOFError, AttributeError) as error:
    raise ValueError(f"{path} is damaged.") from error
  if str(found.get("format")) != _FORMAT:
    raise ValueError(f"{path} is not a graph of optax_ranger.")
  if int(found.get("version", 0)) != _VERSION:
    raise ValueError(
      f"{path} has version {found.get('version')}, and this optax_ranger reads"
      f" version {_VERSION}."
    )
  arrays = {name: found.get(name) for name in Neighbors._fields}
  known = str(found.get("fingerprint"))
  complete = all(array is not None for array in arrays.values())
  if not complete or str(found.get("sum")) != _checksum(arrays, known):
    raise ValueError(f"{path} is damaged: its checksum differs.")
  if features is not None and known != fingerprint(features):
    raise ValueError(f"{path} is for other features.")
  return Neighbors(**{name: jnp.asarray(arrays[name]) for name in arrays})


def _checksum(arrays: dict[str, Any], known: str) -> str:
  digest = hashlib.sha256(known.encode())
  for name in Neighbors._fields:
    digest.update(fingerprint(arrays[name]).encode())
  return digest.hexdigest()
