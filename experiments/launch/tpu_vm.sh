#!/usr/bin/env bash
# Trains on a Cloud TPU of one host (one TPU VM, up to 8 chips), from your own machine.
#
#     NAME=my-tpu ZONE=us-central1-a experiments/launch/tpu_vm.sh \
#         --config=configs/imagenet256/var.py:d16 --workdir=/mnt/shared/var_d16 ...
#
# NAME and ZONE are those of the TPU. It gets the repository at REPOSITORY (default this one's
# origin), installs it with its TPU extra and runs experiments/train.py with the arguments,
# restarted where the platform ends it. A TPU of several hosts needs tpu_pod.sh.
set -euo pipefail

if [ $# -eq 0 ] || [ -z "${NAME:-}" ] || [ -z "${ZONE:-}" ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

# Quoted once more for the shell on the host.
arguments=$(printf '%q ' "$@")
repository=$(printf '%q' "${REPOSITORY:-$(git -C "$(dirname "$0")" remote get-url origin)}")
gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="${WORKER:-0}" --command="
  set -e
  [ -d ar_jax ] || git clone $repository ar_jax
  cd ar_jax
  make install EXTRAS=tpu
  experiments/launch/restart.sh .venv/bin/python experiments/train.py $arguments"
