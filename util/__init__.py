"""Tools that every room uses.

Importing this package limits how long GNU OpenMP's waiting threads spin, unless the user chose:
with torch's default, a training step beside other work takes several times as long, as waiting
threads keep the cores that the working ones need. `docs/performance.md` has the figures of
`python -m tests.benchmarks.spinning`, under "Waiting threads". OpenMP reads the count when torch
loads it, and child processes inherit it; so every room that imports torch imports this package
first.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
