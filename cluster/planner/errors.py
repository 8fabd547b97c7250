"""What the planner refuses, with the nearest thing that would work.

PlanError               no plan can be made of what was given
├── HardwareError       a device, a count or a link that cannot be
└── NoPlanError         the model fits nowhere, or the limits cannot be kept by an empty machine
"""

from __future__ import annotations


class PlanError(ValueError):
    """Names the value, and what would work."""


class HardwareError(PlanError):
    """The hardware is not described as it has to be."""


class NoPlanError(PlanError):
    """There is nothing to choose from."""
