"""What a simulation refuses.

SimulationError         what was asked for cannot be simulated
└── ProfileMissError    the profile knows nothing of this model, or of it split like this
"""

from __future__ import annotations


class SimulationError(ValueError):
    """Names the value, and what would work."""


class ProfileMissError(SimulationError):
    """A profile of other models, or of other ways to split this one."""
