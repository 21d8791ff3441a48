"""Devices that lie: simulated in one process, and in two real ones."""

import pytest

from tests.helpers import run_processes
from tests.processes import liars

pytestmark = pytest.mark.slow
ROBUST = sorted(set(liars.AGGREGATORS) - {"mean"})


@pytest.fixture(scope="module")
def honest():
  accuracy = liars.accuracy("mean", 0)
  assert accuracy > 0.95
  return accuracy


@pytest.mark.parametrize("name", ROBUST)
def test_two_liars_of_eight_devices_do_no_harm(name, honest):
  accuracy = liars.accuracy(name, liars.NUM_LIARS)
  print(f"{name}: {accuracy:.3f}, honest: {honest:.3f}")
  assert accuracy >= honest - 0.01


def test_two_liars_of_eight_devices_ruin_the_mean(honest):
  accuracy = liars.accuracy("mean", liars.NUM_LIARS)
  print(f"mean: {accuracy:.3f}, honest: {honest:.3f}")
  assert accuracy < honest - 0.5


def test_a_process_that_lies():
  """Two processes over gloo, of six devices and of two; all of the second lie."""
  devices = [liars.NUM_DEVICES - liars.NUM_LIARS, liars.NUM_LIARS]
  first, second = run_processes("tests.processes.liars", devices, timeout=500)
  print("two processes:", first)
  assert first == second  # the same parameters on both
  assert first["honest"] > 0.95
  assert first["mean"] < first["honest"] - 0.5
  for name in ROBUST:
    assert first[name] >= first["honest"] - 0.01, (name, first)
