"""Rows that occur more than once: searched once, then listed in order of index."""

from typing import NamedTuple

import numpy as np


class Groups(NamedTuple):
  """Rows that are equal, in groups.

  Attributes:
    first: ``[u]``, the first row of each group, rising.
    group: ``[n]``, the group of each row.
    members: ``[n]``, all rows, sorted by group and then by index.
    start: ``[u + 1]``, where the members of each group begin.
  """

  first: np.ndarray
  group: np.ndarray
  members: np.ndarray
  start: np.ndarray


def find(rows: np.ndarray) -> Groups:
  """Groups equal rows, by a hash that is then checked."""
  zero = np.zeros([], rows.dtype)  # -0.0 + 0.0 is 0.0.
  bits = np.ascontiguousarray(rows + zero).view(np.uint32)
  factors = np.random.default_rng(0).integers(0, 2**63, bits.shape[1], np.uint64) * 2
  hashes = np.zeros([len(rows)], np.uint64)
  for start in range(0, len(rows), 4096):
    part = bits[start : start + 4096].astype(np.uint64)
    hashes[start : start + 4096] = (part * (factors + np.uint64(1))).sum(axis=1)
  _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
  again = np.flatnonzero(first[group] != np.arange(len(rows)))
  alike = [(rows[i] == rows[first[group[i]]]).all() for i in again]
  # A collision of hashes: such rows count as groups of their own.
  apart = again[~np.asarray(alike, bool)] if len(again) else again
  group[apart] = len(first) + np.arange(len(apart))
  first = np.concatenate([first, apart])
  order = np.argsort(first, kind="stable")
  place = np.empty_like(order)
  place[order] = np.arange(len(order))
  group, first = place[group], first[order]
  members = np.argsort(group, kind="stable")
  start = np.searchsorted(group[members], np.arange(len(first) + 1))
  return Groups(first, group, members, start)


def expand(
  groups: Groups, distances: np.ndarray, indices: np.ndarray, k: int, same: float
) -> tuple[np.ndarray, np.ndarray]:
  """Neighbors among groups, [u, <= k], become neighbors among rows, [n, k].

  Args:
    groups: which rows are equal.
    distances: of the groups, nearest first.
    indices: of the groups; -1 for none.
    k: how many.
    same: the distance of equal rows.
  """
  n, width = len(groups.group), indices.shape[1]
  count = np.diff(groups.start)
  copies = int(min(count.max(), k + 1))
  out_distances = np.empty([n, k], distances.dtype)
  out_indices = np.empty([n, k], np.int32)
  chunk = max(1, 2**22 // ((width + 1) * copies))
  for start in range(0, n, chunk):
    rows = np.arange(start, min(start + chunk, n))
    own = groups.group[rows]
    among = np.concatenate([own[:, None], indices[own]], axis=1)
    far = np.concatenate([np.full([len(rows), 1], same), distances[own]], axis=1)
    number = np.arange(copies)
    exists = (among[:, :, None] >= 0) & (number < count[among][:, :, None])
    place = np.where(exists, groups.start[among][:, :, None] + number, 0)
    others = groups.members[place]
    exists &= others != rows[:, None, None]
    far = np.where(exists, far[:, :, None], np.inf).reshape(len(rows), -1)
    others = np.where(exists, others, n).reshape(len(rows), -1)
    if far.shape[1] < k:
      more = ((0, 0), (0, k - far.shape[1]))
      far = np.pad(far, more, constant_values=np.inf)
      others = np.pad(others, more, constant_values=n)
    order = np.lexsort((others, far))[:, :k]
    out_distances[rows] = np.take_along_axis(far, order, axis=1)
    others = np.take_along_axis(others, order, axis=1)
    out_indices[rows] = np.where(others < n, others, -1)
  return out_distances, out_indices
