"""Property tests measure no time: the machine may be busy."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile("llmcad", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("llmcad")

# Before torch is loaded, here and in what the tests start: several test processes share the cores, and OpenMP's
# threads would spin on them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
