#!/bin/sh
# Clients of other makes, each in an environment of its own below .bench: LiteLLM (which bench_gateway.py needs too) and
# lm-eval. They are large and want other versions of what RiOS uses, so no test installs them; tests that need them skip
# where they are not. Without names, all of them: clients.sh [litellm] [lm_eval]
set -eu

cd "$(dirname "$0")/../.."
python="${PYTHON:-.venv/bin/python}"
make_env() {
    name="$1"
    shift
    # the packages it was made of: other ones make it anew
    [ "$(cat ".bench/$name/made" 2>/dev/null)" = "$*" ] && return 0
    echo "clients: making .bench/$name" >&2
    "$python" -m venv --clear ".bench/$name"
    ".bench/$name/bin/python" -m pip install -q "$@"
    echo "$*" >".bench/$name/made"
}
mkdir -p .bench
for name in "${@:-litellm lm_eval}"; do
    for each in $name; do
        case "$each" in
        litellm) make_env litellm "litellm[proxy]==1.108.7" uvicorn uvloop httptools ;;
        lm_eval) make_env lm_eval "lm_eval[api]==0.4.13" "transformers==5.24.0" ;;
        *) echo "clients.sh: $each is none of litellm, lm_eval" >&2 && exit 2 ;;
        esac
    done
done
