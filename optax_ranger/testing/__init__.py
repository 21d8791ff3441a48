"""Laws that every Optax transformation should satisfy, for steps of your own.

`check` runs them all, and reports what each law found. `parametrize_with_laws` makes a
test of each under pytest.
"""

from optax_ranger.testing._check import Report as Report
from optax_ranger.testing._check import Result as Result
from optax_ranger.testing._check import check as check
from optax_ranger.testing._check import parametrize_with_laws as parametrize_with_laws
from optax_ranger.testing._laws import LAWS as LAWS
from optax_ranger.testing._subject import SkippedError as SkippedError
from optax_ranger.testing._subject import Subject as Subject
from optax_ranger.testing._subject import random_like as random_like
