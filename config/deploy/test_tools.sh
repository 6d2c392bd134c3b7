#!/bin/sh
# System tools for the tests in network namespaces (tests/netns), the fault suite and the gateway's. Installed where this is root and apt-get works; nothing
# fails where they cannot be had: those tests skip and say what is missing.
set -eu

need=""
command -v ip >/dev/null 2>&1 || need="$need iproute2"
command -v nft >/dev/null 2>&1 || need="$need nftables"
command -v miniupnpd >/dev/null 2>&1 || need="$need miniupnpd-nftables"
ls /usr/lib/*/faketime/libfaketimeMT.so.1 >/dev/null 2>&1 || need="$need faketime"
command -v redis-server >/dev/null 2>&1 || need="$need redis-server"
command -v nginx >/dev/null 2>&1 || need="$need nginx-light"
command -v chromium >/dev/null 2>&1 || need="$need chromium"
command -v wrk >/dev/null 2>&1 || need="$need wrk"
[ -n "$need" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    exit 0
fi
echo "test tools: installing$need" >&2
# RUNLEVEL=1: no service is started, the tests run their own
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends $need; } >/dev/null 2>&1 ||
    echo "test tools: could not install$need; tests that need them skip" >&2
