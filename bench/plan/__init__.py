"""`prelay plan`: from what people write to a question for `cluster.planner`, and from its answer to tables,
pictures and `plan.yaml`.

Start reading at `options.py`; `report.py` has what comes out.
"""
