"""Tasks over two processes."""

import numpy as np
import pytest

from tests.helpers import close
from tests.helpers import run_processes
from tests.processes import tasks


@pytest.mark.slow
def test_two_processes_equal_one():
  """Also with the optimizer's state in parts; each process gives its own rows."""
  first, second = run_processes("tests.processes.tasks", [2, 2], timeout=200)
  assert first == second
  expected = np.array(tasks.train(shard_state=False))
  for shard_state in ("False", "True"):
    close(np.array(first[shard_state]), expected, rtol=1e-4, atol=1e-5)
  assert "batch['border'] has 3 rows" in first["refused"]
