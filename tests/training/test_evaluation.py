"""`eval_params`: the smoothed parameters of any state, or a sentence."""

import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

import optax_ranger as ranger


def test_a_checkpoint_without_a_template_is_refused(tmp_path):
  tx = optax.chain(optax.sgd(1.0), ranger.smooth_by_ema(0.5))
  params = {"w": jnp.zeros(2)}
  state = tx.init(params)
  for _ in range(3):
    updates, state = tx.update({"w": -jnp.ones(2)}, state, params)
    params = optax.apply_updates(params, updates)
  with ocp.StandardCheckpointer() as saver:
    saver.save(tmp_path / "checkpoint", {"params": params, "state": state})
    saver.wait_until_finished()
    found = saver.restore(tmp_path / "checkpoint")
  with pytest.raises(ValueError, match="template"):
    ranger.eval_params(found["state"], found["params"])
