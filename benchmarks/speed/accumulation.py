"""Step 2 against its rivals: `python -m benchmarks.speed.accumulation`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from optax.experimental import aggregating

from benchmarks.speed import _measure
import optax_ranger as ranger

EVERY = 8


def micro_step_rows(
  rounds: int = 8, width: int = 2048, names: Sequence[str] | None = None
) -> list[_measure.Row]:
  """A micro-step of 32 M parameters: the mean over whole windows."""
  params, gradients = _measure.normal(0, width=width), _measure.normal(1, width=width)
  inner = optax.adamw(1e-3)
  weight = jnp.asarray(3.0)
  rivals = {
    "optax.MultiSteps": optax.MultiSteps(inner, EVERY),
    "aggregating.process": aggregating.process(
      optax.identity(), aggregating.accumulate_avg_updates(EVERY), inner
    ),
    "bare adamw, every call": inner,
  }
  rivals = {name: rivals[name] for name in names or rivals}
  ours = _measure.training(
    ranger.accumulate(inner, EVERY), params, gradients, weight=weight
  )
  others = [_measure.training(tx, params, gradients) for tx in rivals.values()]
  size = sum(leaf.size for leaf in params)
  seconds, *rival_seconds, copy = _measure.measure(
    "accumulate(adamw)",
    [ours, *others, _measure.copying(size)],
    rounds,
    calls=EVERY,
  )
  what = f"accumulate(adamw), {_measure.millions(params)}, every {EVERY}"
  rows = [
    _measure.Row(
      what,
      name,
      seconds,
      theirs,
      temporaries=ours.temporaries,
      rival_temporaries=other.temporaries,
    )
    for name, other, theirs in zip(rivals, others, rival_seconds, strict=True)
  ]
  room = 0.01 * sum(leaf.nbytes for leaf in params)
  rows[0] = rows[0]._replace(reach=f"1/6 = 0.167, under {room / 1e6:.3g} MB")
  floor = _measure.Row(what, "bandwidth floor", seconds, copy * floor_passes() / 2)
  return [*rows, floor]


def one_step_rows(rounds: int = 12, width: int = 2048) -> list[_measure.Row]:
  """A scan over eight gradients in one compiled step, and one step of adamw.

  The optimizer's part only: gradients are multiples of arrays at hand, and the
  time of a scan that only writes them is taken off in each round.
  """
  params, gradients = _measure.normal(0, width=width), _measure.normal(1, width=width)
  factors = jnp.linspace(0.5, 1.5, EVERY)
  inner = optax.adamw(1e-3)
  scaled = lambda factor: [factor * leaf for leaf in gradients]

  def ours(params, state):
    given = lambda params, batch: (0.0, scaled(batch[0]))
    _, gradient, _ = ranger.micro_batched(given, EVERY)(params, factors)
    updates, state = inner.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  def write_only(params, corner):
    # Into temporaries, as a model's backward pass does: fresh memory costs time.
    write = lambda kept, factor: (scaled(factor), kept[0][0, 0])
    last, corners = jax.lax.scan(write, [0 * leaf for leaf in gradients], factors)
    return params, corner + corners.sum() + sum(leaf[0, 0] for leaf in last)

  contender = _measure.looping(ours, params, inner.init(params))
  writing = _measure.looping(write_only, params, jnp.zeros([]))
  rival = _measure.training(optax.MultiSteps(inner, EVERY), params, gradients)
  whole, writes, calls = _measure.measure(
    "micro_batched(adamw)", [contender, writing, _eight_calls(rival)], rounds
  )
  many = _measure.millions(params)
  what = f"micro_batched, then adamw, {many}, {EVERY} gradients in one step"
  return [
    _measure.Row(
      what + form,
      "optax.MultiSteps, 8 calls",
      seconds,
      calls,
      reach,
      contender.temporaries,
      rival.temporaries,
    )
    for form, seconds, reach in (
      (", without writing the gradients", whole - writes, "1/8 = 0.125"),
      (", with it", whole, "-"),
    )
  ]


def way_rows(rounds: int = 8, width: int = 2048, leaves: int = 8) -> list[_measure.Row]:
  """What the noise scale and bfloat16 cost, against `accumulate` without."""
  params = _measure.normal(0, leaves, width)
  gradients = _measure.normal(1, leaves, width)
  inner, weight = optax.adamw(1e-3), jnp.asarray(3.0)
  rule = ranger.by_noise_scale(EVERY, min_every=EVERY)
  steps = {
    "plain": ranger.accumulate(inner, EVERY),
    "with the noise scale": ranger.accumulate(inner, rule),
    "in bfloat16": ranger.accumulate(inner, EVERY, accumulator_dtype="bfloat16"),
  }
  contenders = [
    _measure.training(step, params, gradients, weight=weight) for step in steps.values()
  ]
  seconds = _measure.measure("ways", contenders, rounds, calls=EVERY)
  what = f"accumulate(adamw), {_measure.millions(params)}, every {EVERY}"
  return [
    _measure.Row(
      f"{what}, {name}",
      "without",
      own,
      seconds[0],
      reach,
      contender.temporaries,
      contenders[0].temporaries,
    )
    for name, own, contender, reach in zip(
      list(steps)[1:], seconds[1:], contenders[1:], ("1.1", "-"), strict=True
    )
  ]


def _eight_calls(contender: _measure.Contender) -> _measure.Contender:
  return contender._replace(turn=lambda: [contender.turn() for _ in range(EVERY)][-1])


def floor_passes() -> float:
  """Reads and writes of parameter size that a micro-step can't do without.

  The guard and the sum read the gradient, and the sum is read and written; once
  a window, parameters and Adam's two moments are as well.
  """
  return 4 + 6 / EVERY


def quiet_rows(rounds: int = 10, width: int = 1024) -> list[_measure.Row]:
  """A call that emits nothing must cost next to nothing: muon is expensive."""
  params, gradients = _measure.normal(0, 1, width), _measure.normal(1, 1, width)
  tx = ranger.accumulate(optax.contrib.muon(1e-3), EVERY)
  ours = _measure.training(tx, params, gradients)
  (samples,) = _measure.measure(
    "accumulate(muon)", [ours], rounds, calls=EVERY, apart=True
  )
  return [
    _measure.Row(
      f"accumulate(muon), {width} x {width}, a call that emits nothing",
      "one that emits",
      samples[:, :-1].mean(axis=1),
      samples[:, -1],
      "0.1",
      ours.temporaries,
      ours.temporaries,
    )
  ]


def main() -> None:
  rows = [*micro_step_rows(), *way_rows(), *one_step_rows(), *quiet_rows()]
  print(_measure.machine())
  print(f"Copy rate: {_measure.copy_rate() / 1e9:.3g} GB/s\n")
  print(_measure.table(rows))


if __name__ == "__main__":
  main()
