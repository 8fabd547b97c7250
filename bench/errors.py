"""What a measurement refuses or fails of."""

from __future__ import annotations


class MeasurementError(Exception):
    """A process or a request that something was to be measured of did not do what it should."""
