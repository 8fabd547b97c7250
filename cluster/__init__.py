"""The whole deployment: its configuration, the command line, and the processes behind `prelay serve`.

Knows: Ray (placement, start, restart), processes, signals, cores, the terminal.
Does not know: how a request is served; requests never pass through this package.
Start reading at `cli.py` (what a user can ask for). What a user starts is a guard (`guard.py`) that runs the
deployment in a child process (`child.py`); `launch.py` is that deployment: what it starts, watches and ends.
`status.py` and `top.py` look at a running one from outside.
"""
