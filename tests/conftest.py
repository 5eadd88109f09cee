"""Property tests measure no time: the machine may be busy."""

from hypothesis import HealthCheck, settings

settings.register_profile("llmcad", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("llmcad")
