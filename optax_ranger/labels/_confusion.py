"""The confusion matrix of the labels, estimated by neighbors, and losses with it."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.sharding import automatic
from optax_ranger._core.sharding import first_sharded
from optax_ranger._core.sharding import per_row
from optax_ranger._core.types import Array
from optax_ranger._core.types import Neighbors
from optax_ranger._core.types import Scalar
from optax_ranger.labels import _rows
from optax_ranger.neighbors import _weights

# Of the interval in which a power lies.
_HALVINGS = 12


def neighbor_beliefs(neighbors: Neighbors, beliefs: Any) -> Array:
  r"""Returns what the neighbors of each example believe its class to be.

  The example's own belief has no part in it (leave-one-out): a network that has
  memorized a label believes in it, and only others can tell that it is wrong.
  It helps where neighbors share a class; where they don't, it is as smeared as
  the neighborhood.

  .. math::
    b_i = \sum_j w_{ij} \, p_{N(i, j)} \, / \, \sum_j w_{ij},
    \qquad N(i, j) \neq i, \quad p_{N(i, j)} \neq 0

  Args:
    neighbors: ``Neighbors`` with arrays of ``[n, k]``. Left out are empty places,
      weights that are not positive and finite, and the example itself, where it
      is among its own neighbors. Copies of an example are other examples, and
      confirm it.
    beliefs: ``float [n, C]``, not negative, of any scale, such as the rows of
      ``smoothed_predictions``. A row of zeros, or one that is not finite, is no
      belief: that neighbor is left out, from the denominator too.

  Shapes:
    One neighbor is added at a time: memory is O(n (C + k)), not O(n k C).

  Returns:
    ``float32 [n, C]`` (float64 for such beliefs); a row of zeros, "no belief",
    where no neighbor has one. No gradient flows through it.

  Guarantees:
    * The weighted mean of the others' normalized beliefs.
    * An example's row does not depend on its own belief.
    * Rows are non-negative, and sum to one or are zeros, for any input.

  Raises:
    ValueError: for shapes that do not fit.
    TypeError: for indices that are not integers.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> points = jnp.array([[0.0], [1.0], [2.0]])
    >>> neighbors = ranger.neighbors.nearest(points, k=2)
    >>> beliefs = jnp.array([[0.0, 1.0], [0.5, 0.5], [0.0, 0.0]])  # the last: none
    >>> print(ranger.labels.neighbor_beliefs(neighbors, beliefs))
    [[0.5  0.5 ]
     [0.   1.  ]
     [0.25 0.75]]

  References:
    Bahri et al., Deep k-NN for Noisy Labels, 2020,
    https://arxiv.org/abs/2004.12289, for votes of neighbors; here they vote with
    beliefs instead of labels.
  """
  rows = _rows.distributions("beliefs", beliefs)
  n = rows.shape[0]
  places, weights = _weights.usable(neighbors, n, rows.dtype)
  others = places != jnp.arange(n, dtype=places.dtype)[:, None]
  weights = jnp.where(others, weights, jnp.zeros_like(weights))
  if not places.size:
    return jnp.zeros_like(rows)
  weights = numerics.to_peak(weights)  # Sums stay in range then.
  on = first_sharded(rows, places)
  add = automatic(_weights.add_neighbors, on, on)
  total = add(jnp.zeros_like(rows), rows, places, weights)
  # Each neighbor's belief sums to one or to zero, so the sum is the denominator.
  return jax.lax.stop_gradient(_rows.normalized(total))


def label_confusion(
  labels: Any, beliefs: Any, *, sharpness: Scalar = 8.0, anchors: Scalar = 100.0
) -> Array:
  r"""Estimates how labels get confused: the chance of each label, given the class.

  Each class's row is told by the examples that are most confident of that class,
  its anchors. Examples between look-alikes count for neither: their share would
  leak from row to row and make T too flat, and estimating anew with the beliefs
  that T gives would only confirm itself. Give T to ``forward_corrected_loss`` or
  to ``refine_targets``. It helps where some classes are mistaken for certain
  others. It is wrong where confident beliefs are.

  .. math::
    T_{cy} \propto \sum_i w_i(c) \, [y_i = y], \qquad
    w_i(c) = r_i(c)^{s_c} \Big( \frac{r_i(c)}{\max_j r_i(j)} \Big)^s, \qquad
    r_i(c) = \frac{b_i(c)}{\max_k b_k(c)}

  The second factor keeps an example from being an anchor of several classes.
  :math:`s_c` is s, or less where that leaves too few anchors.

  The beliefs must not have seen the labels, or they agree with them: those of a
  network that has memorized wrong labels make T the identity. So take the
  neighbors' beliefs, ``neighbor_beliefs(neighbors, beliefs)``, of which an
  example's own is no part; the network's own memory of its label may still have
  reached its neighbors.

  Args:
    labels: ``[n]``, integers in [0, C) or names, which count in sorted order. An
      example with -1, a missing value or a class beyond C has no label, and is
      left out. Or soft labels, ``float [n, C]``, as in ``forward_corrected_loss``:
      they are counted by their shares.
    beliefs: ``float [n, C]``, not negative, of any scale: rows are normalized. An
      example with a row of zeros, or one that is not finite, is left out.
    sharpness: s, positive. A smaller one makes T flatter, 4 already; a larger one
      noisier, 16 already, as fewer examples tell each row. Infinity counts the most
      confident alone, several if they are equally so.
    anchors: not negative, how many examples shall tell each row, effectively:
      :math:`(\sum_i r_i^{s_c})^2 / \sum_i r_i^{2 s_c}`. Where they are fewer,
      :math:`s_c` falls until they are as many, but not below 1. With 0 it is s.

  Returns:
    ``float32 [C, C]`` (float64 for such beliefs), T[c, y]. A class that nobody
    believes in has the row of the identity: where nothing is known, labels are
    trusted. One that nobody is confident of gets its row from examples of others.
    No gradient flows through it.

  Guarantees:
    * Rows are non-negative and sum to one, for any input.
    * With the true classes as beliefs it is their confusion matrix, counted.
    * Split over devices by rows, the same.

  Raises:
    ValueError: for shapes that do not fit, a sharpness that is not positive, negative
      anchors, and labels below -1 or beyond int32 where they are known.
    TypeError: for labels that are neither integers nor names.

  Examples:
    Of class 0, half bears the label 1; nobody knows of class 2.

    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> labels = jnp.array([0, 1, 1])
    >>> beliefs = jnp.array([[4.0, 0, 0], [4, 0, 0], [0, 1, 0]])
    >>> print(ranger.labels.label_confusion(labels, beliefs))
    [[0.5 0.5 0. ]
     [0.  1.  0. ]
     [0.  0.  1. ]]

  References:
    Patrini et al., Making Deep Neural Networks Robust to Label Noise, 2017,
    https://arxiv.org/abs/1609.03683, theorem 3, where the most confident example
    of a class tells its row, here made soft; Northcutt et al., Confident Learning,
    2021, https://arxiv.org/abs/1911.00068, a relative, which counts confident
    examples.
  """
  validate.in_range("sharpness", sharpness, 0, float("inf"), open_low=True)
  validate.in_range("anchors", anchors, 0, float("inf"), open_high=True)
  rows = _rows.distributions("beliefs", beliefs)
  label = _rows.label_rows(labels, rows)
  rows = jnp.where(label.any(axis=1, keepdims=True), rows, jnp.zeros_like(rows))
  rows = numerics.to_peak(rows, axis=0)  # The peak's power is one, whatever s.
  most = numerics.scalar(sharpness, rows.dtype)
  powers = _enough(rows, most, numerics.scalar(anchors, rows.dtype))
  own = numerics.to_peak(rows, axis=1)
  rows = jnp.where(rows > 0, rows**powers * own**most, rows)
  count = lambda rows, label: jnp.matmul(rows.T, label, precision="highest")
  counts = automatic(count, rows, jnp.zeros([]))(rows, label)
  return jax.lax.stop_gradient(_stochastic(counts))


def _enough(rows: Array, most: Array, anchors: Array) -> Array:
  """Powers of columns, [1, C], that leave so many rows with weight, effectively.

  ``most`` if that does, and otherwise less, but not below 1.
  """

  def is_enough(inverse):
    weights = rows ** (1 / inverse)
    total = weights.sum(axis=0, keepdims=True)
    squares = (weights * weights).sum(axis=0, keepdims=True)
    return total * total >= anchors * squares

  def halve(bounds, _):
    few, enough = bounds
    middle = (few + enough) / 2
    there = is_enough(middle)
    return (jnp.where(there, few, middle), jnp.where(there, middle, enough)), None

  # Inverse powers, so that infinity is one of them.
  least = jnp.broadcast_to(1 / most, [1, rows.shape[1]])
  bounds = least, jnp.maximum(least, jnp.ones_like(least))
  _, enough = jax.lax.scan(halve, bounds, length=_HALVINGS)[0]
  return 1 / jnp.where(is_enough(least), least, enough)


def confusion_spread(confusion: Any) -> Array:
  r"""Returns how evenly wrong labels fall on the other classes, from 0 to 1.

  It is 1 for symmetric noise, and, of three classes or more, 0 where each is
  mistaken for one other only. That tells how robust a corrected loss may be:
  exponents keep a network from memorizing wrong labels; where these fall evenly,
  the likeliest class stays the likeliest, and where they don't, the wrong one may
  become it. Take ``exponent=0.4 * confusion_spread(confusion)``. It doesn't see
  that some classes have more wrong labels than others, nor anything in two, and
  of a matrix that is almost the identity it tells only where the error lies.

  .. math::
    s = \frac{-\sum_c \sum_{y \neq c} T[c, y] \log (T[c, y] / e_c)}
             {\log (C - 1) \, \sum_c e_c}, \qquad e_c = \sum_{y \neq c} T[c, y]

  Args:
    confusion: ``float [C, C]``, T[c, y], such as ``label_confusion(...)``, with
      rows as in ``forward_corrected_loss``.

  Returns:
    A scalar in [0, 1], float32 (float64 for such a matrix): the entropy of wrong
    labels given the class, over its largest value, mean over wrong labels. 0 where
    no label is wrong, and 1 for two classes where some are. No gradient flows
    through it.

  Guarantees:
    * 1 for symmetric noise of any rate, 0 for pairs.
    * Renaming classes changes nothing.
    * It is in [0, 1] for any input.

  Raises:
    ValueError: for a matrix that is not square, or empty.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> spread = jax.jit(ranger.labels.confusion_spread)
    >>> pairs = jnp.array([[0.6, 0.4, 0.0], [0.0, 0.6, 0.4], [0.4, 0.0, 0.6]])
    >>> even = jnp.array([[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]])
    >>> print(*(spread(t).round(3) for t in (pairs, even)))
    0.0 1.0

  References:
    Ghosh et al., Robust Loss Functions under Label Noise for Deep Neural Networks,
    2017, https://arxiv.org/abs/1712.09482, theorems 1 and 3: which noise a robust
    loss tolerates. The measure is ours.
  """
  confusion = jax.lax.stop_gradient(jnp.asarray(confusion))
  rows = _rows.distributions("confusion", confusion)
  validate.shape("confusion", rows, (rows.shape[1],) * 2)
  matrix = _stochastic(rows)
  classes, dtype = matrix.shape[1], matrix.dtype
  wrong = jnp.where(jnp.eye(classes, dtype=bool), jnp.zeros_like(matrix), matrix)
  total = wrong.sum()
  if classes <= 2:
    return (total > 0).astype(dtype)
  entropy = jax.scipy.special.entr(_rows.normalized(wrong)).sum(axis=1)
  spread = (wrong.sum(axis=1) * entropy).sum() / math.log(classes - 1)
  spread = spread / jnp.where(total > 0, total, jnp.ones_like(total))
  return jnp.clip(spread, 0, 1)


def forward_corrected_loss(
  logits: Any,
  labels: Any,
  confusion: Any,
  *,
  exponent: Scalar = 0.0,
  smoothing: Scalar = 0.0,
  mask: Any = None,
) -> Array:
  r"""Returns the loss of each label under what the network says of it.

  The network tells the class, the confusion matrix what label that class gets:
  so the network is fitted to the classes behind the labels. It helps where
  classes are confused systematically. A network with room for it memorizes wrong
  labels all the same, only later: an exponent keeps it from that, or stop early.

  .. math::
    u_i &= \sum_c p_i(c) \, T[c, y_i], \qquad
    p_i = \mathrm{softmax}(\mathrm{logits}_i) \\
    \ell_i &= \frac{1 - u_i^q}{q} - \frac{\lambda}{C} \sum_c \log p_i(c), \qquad
    \frac{1 - u^q}{q} \to -\log u \;\text{ as }\; q \to 0

  Theorem (Patrini et al.): over labels drawn from the classes by a T that can be
  inverted, the minimizer is the distribution of the *classes*, for q = 0 and
  :math:`\lambda = 0`.

  A soft label r, such as the shares of the votes of several raters, has the mean of
  the losses of its labels, :math:`\sum_y r_i(y) \, \ell_i(y)`. So the theorem holds
  for it too. It would not hold for :math:`-\log \sum_y r_i(y) u_i(y)`, which is
  least where the prediction is certain of the most frequent label.

  Args:
    logits: ``float [n, C]``; of tokens ``[n, T, C]``, of pixels ``[n, H, W, C]``.
    labels: ``[n]``, integers in [0, C) or names, which count in sorted order. An
      example with -1, a missing value or a class beyond C has no label, and loss
      and gradient zero. ``[n, T]`` or ``[n, H, W]`` for tokens and pixels. Or soft
      labels, real numbers in the shape of the logits: distributions of the *given*
      labels, votes over their number. A row of zeros, or with a number that is
      negative or not finite, is no label. Rows with other sums, such as those of
      several labels at once (multi-label), are refused, but normalized where they
      are traced.
    confusion: ``float [C, C]``, T[c, y], such as ``label_confusion(...)``. Its
      rows are normalized, and one that is blank, negative or not finite becomes
      that of the identity. No gradient flows into it.
    exponent: q in [0, 1], from cross-entropy (0) to mean absolute error (1).
      Examples that contradict the corrected prediction lose weight, to
      :math:`u^q` of what they have in cross-entropy, so that wrong labels are not
      memorized. The correction is unbiased at 0 only: with a confusion matrix
      that is far from symmetric, large exponents favor the label of the class
      that is confused most. ``confusion_spread`` tells how large it may be.
    smoothing: :math:`\lambda` in [0, 1], the pull of the prediction to the uniform
      distribution, the term that label smoothing adds: nothing saturates.
    mask: ``[n, T]`` or ``[n, H, W]`` (``[n]`` for logits ``[n, C]``), booleans or
      integers: zero where a token or pixel does not count, such as padding. None
      if all do.

  Shapes:
    Tokens are averaged: the loss of an example is the mean over its tokens that are
    labeled and not masked, zero without one, so that examples can be weighed.
    Memory is O(n T C). Soft labels take C times the time of integers.

  Returns:
    ``float32 [n]`` (float64 for such logits). A label that cannot be, as T is zero
    for all classes the network allows, has the largest loss that floats tell
    apart, that of the least normal u (87 in float32 for q = 0), and no gradient but
    that of the smoothing. A class whose log-probability is infinite is left out of
    the smoothing. Logits that are not numbers make a loss that is none, of this
    example only.

  Guarantees:
    * The minimizer over noisy labels is the clean posterior.
    * With the identity it is the softmax cross-entropy, and with an exponent the
      generalized one.
    * Finite logits have a finite loss and gradient, zeros in T or not.

  Raises:
    ValueError: for shapes that do not fit, an exponent or a smoothing out of
      range, labels below -1 or beyond int32, and soft labels that don't sum to 1.
      Traced, they may be any, of one compiled program.
    TypeError: for labels that are neither integers nor names, and a mask of floats.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> corrected = jax.jit(ranger.labels.forward_corrected_loss)
    >>> logits, labels = jnp.log(jnp.array([[0.5, 0.5]] * 2)), jnp.array([0, 1])
    >>> confusion = jnp.array([[0.5, 0.5], [0.0, 1.0]])  # half of 0 is called 1
    >>> loss = corrected(logits, labels, confusion)
    >>> print(jnp.exp(-loss))  # 1/2 1/2; 1/2 1/2 + 1/2
    [0.25 0.75]
    >>> loss = corrected(logits, labels, confusion, exponent=0.5)
    >>> print(loss.round(4))  # 2 (1 - 1/2); 2 (1 - 0.866)
    [1.     0.2679]

    Three votes of four for class 1: the mean of 3/4 log 4/3 and 1/4 log 4.

    >>> votes = jnp.array([[0.25, 0.75]])
    >>> print(f"{corrected(logits[:1], votes, confusion)[0]:.4f}")
    0.5623

  References:
    Patrini et al., Making Deep Neural Networks Robust to Label Noise, 2017,
    https://arxiv.org/abs/1609.03683, theorem 2; Zhang and Sabuncu, Generalized
    Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels, 2018,
    https://arxiv.org/abs/1805.07836, equation 6, here of the corrected prediction.
  """
  validate.in_range("exponent", exponent, 0, 1)
  validate.in_range("smoothing", smoothing, 0, 1)
  logits, confusion = jnp.asarray(logits), jnp.asarray(confusion)
  if logits.ndim < 2 or not logits.shape[-1]:
    raise ValueError(
      "logits must have shape [n, C], or [n, ..., C] for tokens and pixels, C at least"
      f" 1, got {list(logits.shape)}."
    )
  classes = logits.shape[-1]
  validate.shape("confusion", confusion, (classes, classes))
  logits = logits.astype(numerics.wide(logits.dtype))
  label, dtype = _rows.label_rows(labels, logits), logits.dtype
  confusion = _stochastic(jax.lax.stop_gradient(confusion.astype(dtype)))
  there = _rows.read_mask(mask, label.any(axis=-1))
  # Selected before the logarithms too: a gradient of zero times infinity is NaN.
  logits = jnp.where(per_row(there, logits), logits, jnp.zeros_like(logits))
  said, power = jax.nn.log_softmax(logits), numerics.scalar(exponent, dtype)
  if _rows.is_soft(labels, logits.ndim - 1):
    loss = _expected_loss(said, label, confusion, power)
  else:
    loss = _label_loss(said, _rows.chances(label, confusion), power)
  said = jnp.where(jnp.isneginf(said), jnp.zeros_like(said), said)
  pull = -(said / classes).sum(axis=-1)  # A sum of the whole could overflow.
  loss = loss + numerics.scalar(smoothing, dtype) * pull
  return _rows.mean_over_places(loss, there)


def _label_loss(said: Array, chances: Array, exponent: Array) -> Array:
  """The loss of labels [...] that have these chances, given each class [..., C]."""
  nowhere = jnp.asarray(-jnp.inf, said.dtype)
  known = jnp.log(jnp.where(chances > 0, chances, jnp.ones_like(chances)))
  scores = jnp.where(chances > 0, said + known, nowhere)
  impossible = (scores == nowhere).all(axis=-1)
  scores = jnp.where(impossible[..., None], jnp.zeros_like(scores), scores)
  floor = jnp.log(jnp.asarray(jnp.finfo(said.dtype).tiny, said.dtype))
  log_chance = jnp.where(impossible, floor, jax.nn.logsumexp(scores, axis=-1))
  return _generalized(log_chance, exponent)


def _expected_loss(
  said: Array, label: Array, confusion: Array, exponent: Array
) -> Array:
  """The mean of the losses of all labels, weighed by the shares of a soft one.

  One label at a time, computed again for the gradient: all would be [n, C, C].
  """

  @jax.checkpoint
  def one_label(column):
    share, chances = column
    chances = jnp.expand_dims(chances, tuple(range(said.ndim - 1)))
    loss = _label_loss(said, chances, exponent)
    return jnp.where(share > 0, share * loss, jnp.zeros_like(loss))

  columns = jnp.moveaxis(label, -1, 0), confusion.T
  return jax.lax.map(one_label, columns).sum(axis=0)


def _generalized(log_chance: Array, exponent: Array) -> Array:
  """(1 - u^q) / q of log u, without cancellation; -log u for q of zero."""
  # Below, q log u would be flushed to zero, and the loss with it.
  positive = exponent > jnp.sqrt(jnp.finfo(exponent.dtype).tiny).astype(exponent.dtype)
  power = jnp.where(positive, exponent, jnp.ones_like(exponent))
  return jnp.where(positive, -jnp.expm1(power * log_chance) / power, -log_chance)


def _stochastic(matrix: Array) -> Array:
  """Rows that sum to one: those of the identity where there is nothing to scale."""
  rows = _rows.normalized(matrix)
  known = rows.any(axis=1, keepdims=True)
  return jnp.where(known, rows, jnp.eye(rows.shape[0], dtype=rows.dtype))
