"""What smoothed predictions are used for: a regularizer, and soft targets."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.sharding import per_row
from optax_ranger._core.types import Array
from optax_ranger.labels import _rows

# The least 1 - agreement, so that its logarithm and slope stay bounded.
_LEAST = 1e-4


def early_learning_regularizer(logits: Any, smoothed: Any) -> Array:
  r"""Returns the ELR term of each example, to be added to its loss.

  It falls as the prediction agrees with its own past, and its gradient keeps an
  example whose early predictions contradict its label from being memorized.
  It helps under wrong labels; under look-alike classes that are confused
  systematically, less.

  .. math:: r_i = \log(1 - \langle p_i, \tilde p_i \rangle)

  Its factor :math:`\lambda` in the loss is left to the caller, 3 being usual.

  Args:
    logits: ``float [n, C]``.
    smoothed: ``float [n, C]``, the rows of ``smoothed_predictions``; no gradient
      flows into it. A row of zeros, an example never visited, gives zero.

  Returns:
    ``float32 [n]`` (float64 for such logits), from :math:`\log 10^{-4}` to 0:
    the agreement is cut off there, where its gradient would explode.

  Raises:
    ValueError: for shapes that do not fit.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> logits, smoothed = jnp.zeros([2, 2]), jnp.array([[1.0, 0.0], [0.0, 0.0]])
    >>> print(ranger.labels.early_learning_regularizer(logits, smoothed).round(4))
    [-0.6931  0.    ]

  References:
    Liu et al., Early-Learning Regularization Prevents Memorization of Noisy
    Labels, 2020, https://arxiv.org/abs/2007.00151, equation 6.
  """
  logits, smoothed = jnp.asarray(logits), jnp.asarray(smoothed)
  if logits.ndim != 2:
    raise ValueError(f"logits must have shape [n, C], got {list(logits.shape)}.")
  validate.shape("smoothed", smoothed, logits.shape)
  probabilities = jax.nn.softmax(logits.astype(numerics.wide(logits.dtype)))
  past = jax.lax.stop_gradient(smoothed.astype(probabilities.dtype))
  agreement = (probabilities * past).sum(axis=1)
  return jnp.log(jnp.maximum(1 - agreement, jnp.asarray(_LEAST, agreement.dtype)))


def refine_targets(
  labels: Any, beliefs: Any, *, confusion: Any = None, support: Any = None
) -> Array:
  r"""Returns soft targets: what the labels become in the light of the beliefs.

  With a confusion matrix, the posterior of the true class given belief and
  label. Without, a mixture of label and belief, in which the label keeps as
  much as its support.

  .. math::
    q_i(c) &\propto b_i(c) \, T[c, y_i] \\
    t_i &= s_i \, e_{y_i} + (1 - s_i) \, q_i

  Args:
    labels: ``[n]``, integers in [0, C) or names, which count in sorted order. An
      example with -1, a missing value or a class beyond C has no label, and its
      belief is its target. Or soft labels, ``float [n, C]``, as in
      ``forward_corrected_loss``: the target is the mean of the targets of the
      labels, weighed by their shares.
    beliefs: ``float [n, C]``, not negative, such as the rows of
      ``smoothed_predictions`` or of ``neighbor_beliefs``, or a mixture of both;
      of any scale. A row of zeros, or one that is not finite, is no belief: the
      label stays.
    confusion: ``float [C, C]``, T[c, y], the chance that an example of class c
      bears the label y, such as ``label_confusion(labels, beliefs)``; its rows
      need not be normalized. None for q = b.
    support: ``float [n]``, s in [0, 1], how far the label is to be kept, such as
      ``label_support(neighbors, labels)``. When missing: zero with a confusion
      matrix, which has weighed the label already; without, the belief in it,
      :math:`b_i(y_i)`.

  Returns:
    ``float32 [n, C]`` (float64 for such beliefs). No gradient flows through it.

  Guarantees:
    * Rows are non-negative and sum to one, for any input.
    * ``support=1`` is the label.
    * With the true confusion and belief it is Bayes' posterior.

  Raises:
    ValueError: for shapes that do not fit, and labels below -1 or beyond int32
      where they are known.
    TypeError: for labels that are neither integers nor names.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> refine = jax.jit(ranger.labels.refine_targets)
    >>> labels, beliefs = jnp.array([0]), jnp.array([[0.25, 0.75]])
    >>> print(refine(labels, beliefs))  # 1/4 label, 3/4 belief
    [[0.4375 0.5625]]
    >>> confusion = jnp.array([[0.75, 0.25], [0.25, 0.75]])  # a quarter is wrong
    >>> print(refine(labels, beliefs, confusion=confusion))
    [[0.5 0.5]]

  References:
    Reed et al., Training Deep Neural Networks on Noisy Labels with
    Bootstrapping, 2015, https://arxiv.org/abs/1412.6596, equation 6; Patrini et
    al., Making Deep Neural Networks Robust to Label Noise, 2017,
    https://arxiv.org/abs/1609.03683.
  """
  belief = _rows.distributions("beliefs", beliefs)
  (n, classes), dtype = belief.shape, belief.dtype
  label = _rows.label_rows(labels, belief)
  if confusion is None:
    posterior, kept = belief, label * belief
  else:
    confusion = jnp.asarray(confusion)
    validate.shape("confusion", confusion, (classes, classes))
    posterior = _posterior(label, belief, confusion.astype(dtype))
    kept = jnp.zeros_like(label)
  if support is not None:
    support = jnp.asarray(support)
    validate.shape("support", support, (n,))
    trust = jnp.clip(per_row(support.astype(dtype), belief), 0, 1)
    kept = jnp.where(jnp.isnan(trust), jnp.zeros_like(label), trust * label)
  # A posterior of zeros: the label contradicts the belief, which is left then.
  usable = posterior.any(axis=1, keepdims=True)
  posterior = jnp.where(usable, posterior, belief)
  kept = jnp.where(belief.any(axis=1, keepdims=True), kept, label)
  target = kept + (1 - kept.sum(axis=1, keepdims=True)) * posterior
  blank = jnp.logical_not(target.any(axis=1, keepdims=True))
  target = jnp.where(blank, jnp.full_like(target, 1 / classes), target)
  return jax.lax.stop_gradient(target)


def _posterior(label: Array, belief: Array, confusion: Array) -> Array:
  """The class given belief and label, the mean over what a soft label may be.

  Zeros without a label, and where it contradicts the belief.
  """
  usable = jnp.logical_and(jnp.isfinite(confusion), confusion >= 0)
  confusion = jnp.where(usable, confusion, jnp.zeros_like(confusion))
  confusion = numerics.to_peak(confusion, axis=0)  # Chances stay in range then.
  chance = jnp.matmul(belief, confusion, precision="highest")
  least = jnp.asarray(jnp.finfo(chance.dtype).tiny, chance.dtype)
  chance = jnp.where(chance < least, jnp.zeros_like(chance), chance)
  shares = _rows.chances(numerics.divide(label, chance), confusion)
  return _rows.normalized(belief * shares)
