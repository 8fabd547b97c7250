#!/usr/bin/env bash
# Starts Ray on this host: its head, or a node that takes prelay's workers of one role, or a router (router.actors).
#
#   launch.sh head [-- OPTION...]
#   launch.sh prefill|decode|mixed|router HEAD:PORT [-- OPTION...]
#
# Each OPTION goes to `ray start`. All hosts need the same Python and prelay, the checkpoint at the same path, and the same
# token: the first start of the head makes one, which `ray get-auth-token` prints there; write it to ~/.ray/auth_token on the
# others. (RAY_AUTH_MODE=disabled does without. Whoever reaches Ray's ports then runs programs on all hosts.)
set -euo pipefail

usage() {
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

role=${1:-}
case $role in
head) shift ;;
prefill | decode | mixed | router)
    head=${2:-}
    if [[ ! $head =~ ^[^[:space:]]+:[0-9]+$ ]]; then
        echo "launch.sh: $role: give the head as HOST:PORT, as in launch.sh $role 10.0.0.1:6379" >&2
        usage
    fi
    shift 2
    ;;
*) usage ;;
esac
if [[ $# -gt 0 ]]; then
    [[ $1 == -- ]] || usage
    shift
fi

export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
if [[ $RAY_AUTH_MODE == token && -z ${RAY_AUTH_TOKEN:-} ]]; then
    token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
    if [[ $role == head ]]; then
        ray get-auth-token --generate >/dev/null
    elif [[ ! -s $token ]]; then
        echo "launch.sh: there is no token in $token: write there what \`ray get-auth-token\` prints on the head" >&2
        exit 1
    fi
fi

# Without its head a node serves on for a week, until it is back, instead of a minute.
export RAY_gcs_rpc_server_reconnect_timeout_s=${RAY_gcs_rpc_server_reconnect_timeout_s:-604800}

if [[ $role == head ]]; then
    # No work is placed on it: it has the router, which wants its cores for itself.
    exec ray start --head --port=6379 --num-cpus=0 --resources='{"router": 1}' --include-dashboard=false \
        --disable-usage-stats "$@"
fi
if [[ $role == router ]]; then
    # One for each host, as they listen at the same ports.
    exec ray start --address="$head" --num-cpus=0 --resources='{"router": 1}' --disable-usage-stats "$@"
fi
# As many workers as its CPUs or GPUs allow: the resource only says whose turn this host is.
exec ray start --address="$head" --resources="{\"$role\": 1000}" --disable-usage-stats "$@"
