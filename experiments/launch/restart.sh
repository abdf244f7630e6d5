#!/usr/bin/env bash
# Runs a command again until it succeeds: for machines that the platform may take away.
#
#     experiments/launch/restart.sh python experiments/train.py --config=... --workdir=/mnt/...
#
# A run resumes from its newest checkpoint, so the command is the same each time. LIMIT failures
# (default 5) within QUICK seconds (default 120) of their start, one after the other, are an error
# of the command rather than of the machine, and end the loop. PAUSE seconds (10) lie between.
# SIGTERM and SIGINT are passed on as SIGTERM, at which a run saves; nothing is restarted then.
set -euo pipefail

if [ $# -eq 0 ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

child=
signals=0
stop() {
  signals=$((signals + 1))
  if [ -n "$child" ]; then
    kill -TERM "$child" 2>/dev/null || true
  fi
}
trap stop TERM INT

quick_failures=0
while true; do
  started=$SECONDS
  # In the background: bash runs a trap only once a foreground command has ended.
  "$@" &
  child=$!
  # A signal ends `wait` with a status of its own, whether the command has ended by then or not: bash
  # keeps the command's status, so wait for it again.
  while true; do
    before=$signals
    status=0
    wait "$child" || status=$?
    if [ "$signals" -eq "$before" ]; then
      break
    fi
  done
  child=
  if [ "$status" -eq 0 ] || [ "$signals" -gt 0 ]; then
    exit "$status"
  fi
  if [ $((SECONDS - started)) -lt "${QUICK:-120}" ]; then
    quick_failures=$((quick_failures + 1))
  else
    quick_failures=0
  fi
  if [ "$quick_failures" -ge "${LIMIT:-5}" ]; then
    echo "restart.sh: gave up: $quick_failures quick failures in a row, the last with $status" >&2
    exit "$status"
  fi
  echo "restart.sh: ended with $status; again in ${PAUSE:-10} s" >&2
  sleep "${PAUSE:-10}" &
  wait "$!" || true  # so that a signal need not wait for the pause
  if [ "$signals" -gt 0 ]; then
    exit "$status"
  fi
done
