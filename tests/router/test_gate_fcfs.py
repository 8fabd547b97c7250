"""First come, first served."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.gate.fcfs import FcfsGateQueue


@given(
    operations=st.lists(
        st.tuples(st.booleans(), st.integers(0, 30), st.integers(0, 5)),
        max_size=120,
    )
)
def test_the_gate_is_a_queue_by_arrival(operations, make_request):
    gate, waiting = FcfsGateQueue(), {}
    for add, number, arrived_at in operations:
        request_id = f"r{number:02d}"
        if add and request_id not in waiting:
            waiting[request_id] = make_request(request_id, arrived_at=float(arrived_at))
            gate.add(waiting[request_id])
        elif not add:
            waiting.pop(request_id, None)
            gate.remove(request_id)
        first = min(waiting.values(), key=lambda one: (one.arrived_at, one.request_id), default=None)
        assert tuple(gate.next(0.0)) == (() if first is None else (first,))
        assert len(gate) == len(waiting)
