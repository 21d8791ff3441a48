"""Policy gradients on CartPole with wrong units and a learning rate that is a guess.

An actor-critic network balances a pole for up to 200 steps, 16 episodes per update.
In the second case, 20% of them are recorded in centimeters and degrees.

*Krum* averages the 11 episodes with the closest gradients, *checked* drops episodes
outside of limits, *NGS* is `ranger.accelerate` around Adam. Krum and this fault were
chosen, from nine aggregators and seven faults, on other seeds. Ten seeds: NGS with
the checked mean reaches 199 steps from all three rates, as Adam does only from 0.01.
With wrong units, Krum lifts Adam from 145 to 194; the check is better if you know the
limits (199). In meters, Krum gains nothing; with NGS, it is worse (148 at 0.001).
`python examples/cartpole.py` takes about 2 minutes and needs `pip install gymnasium`.
"""

import argparse
import functools
import json
import pathlib

from flax import nnx
from gymnasium.envs.phys2d import cartpole
import jax
import jax.numpy as jnp
from matplotlib import figure
import numpy as np
import optax
import tqdm

import optax_ranger as ranger

ENVIRONMENT = cartpole.CartPoleFunctional()
# The default adds mass and length of the pole; CartPole-v1 multiplies them.
POLE = cartpole.CartPoleParams(polemass_length=0.05)
LENGTH, EPISODES, DISCOUNT, RATES = 200, 16, 0.99, (0.001, 0.01, 0.1)
UNITS, LIMITS = np.array([100, 100, 57.3, 57.3]), np.array([2.4, 4, 0.21, 4])
CASES = {"meters and radians": 0.0, "20% centimeters and degrees": 0.2}
MEAN, KRUM = ranger.aggregate_by_mean(), ranger.aggregate_by_krum(5, 11)
METHODS = {  # aggregator, whether states are checked, whether the rate is learned
  "Adam, mean": (MEAN, False, False),
  "Adam, checked mean": (MEAN, True, False),
  "Adam, Krum": (KRUM, False, False),
  "NGS, checked mean": (MEAN, True, True),
  "NGS, Krum": (KRUM, False, True),
}


def network(key: jax.Array) -> nnx.Sequential:
  """The logits of two actions, and the value of the state."""
  rngs = nnx.Rngs(key)
  hidden, output = nnx.Linear(4, 32, rngs=rngs), nnx.Linear(32, 3, rngs=rngs)
  return nnx.Sequential(hidden, nnx.tanh, output)


GRAPH = nnx.graphdef(network(jax.random.key(0)))


def play(params, key):
  """One episode: states, actions and whether the pole stood, for each time step."""
  model = nnx.merge(GRAPH, params)
  start_key, key = jax.random.split(key)

  def step(carry, key):
    state, standing = carry
    action = jax.random.categorical(key, model(state)[:2])
    after = ENVIRONMENT.transition(state, action, None, POLE)
    fallen = ENVIRONMENT.terminal(after, None, POLE)
    return (after, standing & ~fallen), (state, action, standing.astype(jnp.float32))

  start = ENVIRONMENT.initial(start_key, POLE), jnp.array(True)
  return jax.lax.scan(step, start, jax.random.split(key, LENGTH))[1]


def episode_losses(params, batch):
  """One loss per episode: the aggregators combine their gradients."""
  states, actions, standing, returns = batch
  output = nnx.merge(GRAPH, params)(states)
  errors = returns - output[..., 2]
  surprise = optax.softmax_cross_entropy_with_integer_labels(output[..., :2], actions)
  losses = surprise * jax.lax.stop_gradient(errors) + 0.5 * errors**2
  return (losses * standing).sum(axis=1) / LENGTH


def train(step, checked, learned, num_updates, key, rate, wrong_share):
  """Returns the mean number of steps that the pole stood, for each update."""
  grad_fn = ranger.value_and_grad(episode_losses, step)
  decay = optax.linear_schedule(1.0, 0.0, num_updates // 2, num_updates // 2)
  tx = optax.chain(optax.adam(rate, b2=0.99), optax.scale_by_schedule(decay))
  if learned:
    tx = ranger.accelerate(optax.adam(rate, b2=0.99), schedule=decay)
  times = np.arange(LENGTH)
  discounts = (1 - DISCOUNT) * np.tril(DISCOUNT ** (times[:, None] - times))

  def update(carry, key):
    params, state = carry
    play_key, units_key = jax.random.split(key)
    keys = jax.random.split(play_key, EPISODES)
    states, actions, standing = jax.vmap(play, in_axes=(None, 0))(params, keys)
    wrong = jax.random.bernoulli(units_key, wrong_share, [EPISODES, 1, 1])
    states, used = jnp.where(wrong, UNITS * states, states), standing
    if checked:
      outside = (abs(states) > LIMITS).any(axis=2) & (standing > 0)
      used = standing * ~outside.any(axis=1, keepdims=True)
    _, grads = grad_fn(params, (states, actions, used, standing @ discounts))
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), standing.sum(axis=1).mean()

  start_key, key = jax.random.split(key)
  params = nnx.state(network(start_key))
  start = params, tx.init(params)
  return jax.lax.scan(update, start, jax.random.split(key, num_updates))[1]


def main() -> None:
  """Trains all methods, rates and seeds, prints the results and draws them."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--quick", action="store_true", help="two methods, ten updates")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  seeds, num_updates = (1, 10) if args.quick else (10, 150)
  names = ("Adam, checked mean", "NGS, Krum") if args.quick else METHODS
  keys, shares = jax.vmap(jax.random.key)(np.arange(seeds)), np.array([*CASES.values()])
  picture = figure.Figure(figsize=(8, 4), layout="constrained")
  axes, found = picture.subplots(1, 2, sharey=True), {case: {} for case in CASES}
  for name in tqdm.tqdm(names):
    run = functools.partial(train, *METHODS[name], num_updates)
    for mapped in ((0, None, None), (None, 0, None), (None, None, 0)):
      run = jax.vmap(run, mapped)
    curves = np.asarray(jax.jit(run)(keys, np.array(RATES), shares))
    last = curves[..., -num_updates // 10 :].mean(axis=-1)
    for case, axis, returns in zip(CASES, axes, last, strict=True):
      means, deviations = returns.mean(axis=1), returns.std(axis=1)
      errors = deviations / max(1, seeds - 1) ** 0.5
      axis.errorbar(RATES, means, errors, marker="o", capsize=3, label=name)
      axis.set(xscale="log", xlabel="learning rate", title=case)
      for rate, mean, error, values in zip(RATES, means, errors, returns, strict=True):
        tqdm.tqdm.write(f"{case:30}{name:20}{rate:<8}{mean:6.1f} ± {error:.1f}")
        found[case][f"{name}, rate {rate}"] = values.tolist()
  axes[0].set_ylabel("steps that the pole stands, last 10% of training")
  axes[0].legend(loc="lower center")
  picture.savefig(args.out / "cartpole.png", dpi=100)
  clean, results = found.values()
  record = {"problem": "CartPole, 20% of episodes in wrong units", "better": "higher"}
  roles = {"baseline": "Adam, checked mean, rate 0.01", "ours": "NGS, Krum, rate 0.001"}
  tables = {"measure": "steps, end of training", "results": results, "clean": clean}
  (args.out / "cartpole.json").write_text(json.dumps(record | roles | tables, indent=2))


if __name__ == "__main__":
  main()
