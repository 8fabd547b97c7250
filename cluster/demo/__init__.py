"""`prelay demo`: the main job on real input, shown and checked.

Start reading at `run.py`; `prompts.py` is what is asked, `clients.py` asks it through both front ends,
`report.py` prints how it was served, and `reference.py` computes the same answers in one process.
"""
