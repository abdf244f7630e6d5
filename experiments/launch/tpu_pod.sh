#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU (several TPU VMs) with one command, from your own machine.
#
#     NAME=my-pod ZONE=us-central1-a experiments/launch/tpu_pod.sh \
#         --config=configs/imagenet256/var.py:d16 --workdir=/mnt/shared/var_d16 ...
#
# As tpu_vm.sh, on every host. Where the platform or another host's death ends it, restart.sh runs
# it again on every host: they wait for one another and go on from the newest checkpoint. workdir and
# data must be on a disk that all hosts have mounted at one place: gs:// is not read. See README.md.
set -euo pipefail

if [ $# -eq 0 ] || [ -z "${NAME:-}" ] || [ -z "${ZONE:-}" ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

# --distributed without addresses: on TPUs jax asks the platform who the others are.
WORKER=all exec "$(dirname "$0")/tpu_vm.sh" --distributed "$@"
