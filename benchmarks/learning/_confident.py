"""Confident learning: which labels are wrong, by probabilities out of sample.

Northcutt, Jiang and Chuang, 2021, https://arxiv.org/abs/1911.00068, as cleanlab's
`find_label_issues(filter_by="prune_by_noise_rate")` does it.
"""

import numpy as np


def confident_joint(labels: np.ndarray, chances: np.ndarray) -> np.ndarray:
  """Counts of given labels (rows) and right ones (columns), their equations 1 and 2.

  An example counts for the likeliest class among those that it reaches the mean
  probability of, where the mean is over examples with that label. Rows are scaled to
  the number of examples with each label, their equation 3.
  """
  classes = chances.shape[1]
  own = [chances[labels == c, c] for c in range(classes)]
  means = np.array([part.mean() if len(part) else np.inf for part in own])
  reached = chances >= means - 1e-6
  guess = np.where(
    reached.sum(axis=1) > 1, chances.argmax(axis=1), reached.argmax(axis=1)
  )
  sure = reached.any(axis=1)
  joint = np.zeros([classes, classes])
  np.add.at(joint, (labels[sure], guess[sure]), 1)
  np.fill_diagonal(joint, np.diagonal(joint).clip(1))
  counts = np.bincount(labels, minlength=classes)
  return joint / joint.sum(axis=1, keepdims=True) * counts[:, None]


def prune_by_noise_rate(labels: np.ndarray, chances: np.ndarray) -> np.ndarray:
  """Marks labels as wrong, ``bool [n]``; their section 3.2, "prune by noise rate".

  For each pair of a given label and a right one, as many as the joint counts, those
  with the largest margin. A label that is the likeliest class is never marked.
  """
  joint = np.round(confident_joint(labels, chances)).astype(int)
  wrong = np.zeros(len(labels), bool)
  for given in range(len(joint)):
    rows = np.flatnonzero(labels == given)
    for right in np.flatnonzero(np.arange(len(joint)) != given):
      margin = chances[rows, right] - chances[rows, given]
      wrong[rows[np.argsort(-margin, kind="stable")[: joint[given, right]]]] = True
  return wrong & (chances.argmax(axis=1) != labels)
