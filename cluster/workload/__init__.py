"""What is asked of a server, when, and whether the answers were good: traces, arrivals, lengths, limits.

Knows neither servers nor simulators: `prelay bench serve` sends these jobs over the network, the simulator
takes their arrivals and lengths, and both are judged by the same rule.

Start reading at `drawing.py` (a function of a specification, a seed and a rate); `judge.py` is the rule.
"""
