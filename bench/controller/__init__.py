"""`prelay bench controller`: roles that follow what comes, against those that an oracle would give.

phases.py       what comes: one workload after the other
contenders.py   who decides on roles: the controller, or nobody
measure.py      the experiment, in virtual time
plot.py         its picture
"""
