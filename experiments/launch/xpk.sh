#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster through XPK (pip install xpk), from your own machine.
#
#     CLUSTER=my-cluster ZONE=us-central1-a PROJECT=my-project WORKLOAD=var-d16 \
#     TPU_TYPE=v5litepod-256 \
#         experiments/launch/xpk.sh --config=configs/imagenet256/var.py:d16 \
#         --workdir=/mnt/shared/var_d16 ...
#
# XPK puts this repository on top of IMAGE (default python:3.12), and starts it on every host of the
# slice as WORKLOAD, a name that the cluster does not have yet. Each installs itself with its TPU
# extra. A job that loses a host is started anew on all hosts, up to RESTARTS times (default 100),
# and goes on from the newest checkpoint, on a disk that the cluster mounts in every container.
set -euo pipefail

if [ $# -eq 0 ] || [ -z "${CLUSTER:-}" ] || [ -z "${ZONE:-}" ] || [ -z "${PROJECT:-}" ] ||
  [ -z "${WORKLOAD:-}" ] || [ -z "${TPU_TYPE:-}" ]; then
  sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

# Quoted once more for the shell in the container.
arguments=$(printf '%q ' "$@")
# No restart.sh: a process alone cannot rejoin a job that the cluster starts anew as a whole.
xpk workload create \
  --cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT" \
  --workload="$WORKLOAD" --tpu-type="$TPU_TYPE" --num-slices=1 \
  --max-restarts="${RESTARTS:-100}" \
  --base-docker-image="${IMAGE:-python:3.12}" --script-dir="$(dirname "$0")/../.." \
  --command="pip install '.[tpu]' && python experiments/train.py --distributed $arguments"
