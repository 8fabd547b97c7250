"""What all tests share: the same examples in every run, however slow the machine is; and cores that run from
their sources, for which doubles can stand in. Processes that tests start run compiled cores, as users do."""

from hypothesis import settings

from engine import cores

cores.use_sources()

settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")
