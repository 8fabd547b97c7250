"""What all tests share: the same examples in every run, however slow the machine is."""

from hypothesis import settings

settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")
