"""What the load generator gives up on. What it refuses of its input: cluster/workload/errors.py.

MeasurementError (bench/errors.py)
└── NotAServerError     nothing at the URL answers as it should
"""

from __future__ import annotations

from bench.errors import MeasurementError


class NotAServerError(MeasurementError):
    """What listens at the URL, if anything does, is not a server that can be measured."""
