#!/usr/bin/env bash
# Stops Ray on this host, and with it all workers that run here. `prelay serve` is stopped by Ctrl-C or SIGTERM where it runs.
set -euo pipefail
exec ray stop "$@"
