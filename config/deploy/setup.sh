#!/bin/sh
# Sets up everything RiOS needs in .venv: system packages (when root, else the command is printed), locked
# dependencies, the `rios` command. Quick when nothing changed. Arguments for pip may follow (e.g. an extra index).
set -eu
cd "$(dirname "$0")/../.."

say() { printf '%s\n' "$*" >&2; }
fail() { say "setup: $1"; say "  $2"; exit 1; }

PYTHON=${PYTHON:-python3}
VENV=.venv
STAMP=$VENV/.rios-setup

need=""
command -v "$PYTHON" >/dev/null 2>&1 || need="$need python3"
command -v cc >/dev/null 2>&1 || need="$need gcc libc6-dev"
if command -v cc >/dev/null 2>&1; then
    printf '#include <gmp.h>\nint main(void){return 0;}\n' | cc -x c -fsyntax-only - 2>/dev/null || need="$need libgmp-dev"
else
    need="$need libgmp-dev"
fi
if command -v "$PYTHON" >/dev/null 2>&1; then
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || need="$need python3-venv"
    header=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
    [ -f "$header/Python.h" ] || need="$need python3-dev"
else
    need="$need python3-venv python3-dev"
fi
if [ -n "$need" ]; then
    command="apt-get install -y --no-install-recommends$need"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "setup: installing system packages:$need"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive $command -qq >/dev/null ||
            fail "could not install$need" "run: apt-get update && $command"
    else
        fail "missing system packages:$need" "run: sudo apt-get update && sudo $command"
    fi
fi

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$PYTHON" --version) is too old" "RiOS needs Python 3.11 or newer; set PYTHON=python3.12 or the like"

want=$(cat requirements.lock pyproject.toml config/deploy/setup.sh | sha256sum; "$PYTHON" --version; pwd)
if [ -x $VENV/bin/rios ] && [ "$(cat $STAMP 2>/dev/null)" = "$want" ]; then
    exit 0
fi

say "setup: Python environment in $VENV (a few minutes the first time: one dependency builds from source)"
[ -x $VENV/bin/python ] || "$PYTHON" -m venv $VENV || fail "cannot create $VENV" "is the disk full?"
pip() { $VENV/bin/python -m pip --disable-pip-version-check "$@"; }
log=$VENV/setup.log
if ! { pip install -q --require-hashes -r requirements.lock "$@" &&
    pip install -q --no-deps --config-settings editable_mode=compat -e .; } >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    fail "installing the dependencies failed (log: $log)" "check the network and the disk, then run make setup again"
fi
# libp2p brings trio-typing, whose outdated stubs hide trio's own type hints from mypy
rm -rf $VENV/lib/python*/site-packages/trio-stubs
printf '%s' "$want" >$STAMP
say "setup: done"
