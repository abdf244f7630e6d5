#!/usr/bin/env bash
# Runs a command again until it succeeds: for machines that the platform may take away.
#
#     experiments/launch/restart.sh python experiments/train.py --config=... --workdir=gs://...
#
# A run resumes from its newest checkpoint, so the command is the same each time. LIMIT failures
# (default 5) within QUICK seconds (default 120) of their start, one after the other, are an error of
# the command rather than of the machine, and end the loop. PAUSE seconds (default 10) lie between.
set -euo pipefail

if [ $# -eq 0 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

quick_failures=0
while true; do
  started=$SECONDS
  status=0
  "$@" || status=$?
  if [ "$status" -eq 0 ]; then
    exit 0
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
  sleep "${PAUSE:-10}"
done
