#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU (several TPU VMs) with one command, from your own machine.
#
#     NAME=my-pod ZONE=us-central1-a experiments/launch/tpu_pod.sh \
#         --config=configs/imagenet256/var.py:d16 --workdir=gs://my-bucket/var_d16 ...
#
# NAME and ZONE are those of the TPU. Every host gets the repository at REPOSITORY (default this
# one's origin), installs it with its TPU extra and runs experiments/train.py with the arguments.
# Where the platform or another host's death ends it, restart.sh runs it again on every host: they
# wait for one another and go on from the newest checkpoint. workdir and data must be the same
# place for all hosts: a bucket or a shared disk.
set -euo pipefail

if [ $# -eq 0 ] || [ -z "${NAME:-}" ] || [ -z "${ZONE:-}" ]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

# Quoted once more for the shell on the hosts.
arguments=$(printf '%q ' "$@")
repository=$(printf '%q' "${REPOSITORY:-$(git -C "$(dirname "$0")" remote get-url origin)}")
# --distributed without addresses: on TPUs jax asks the platform who the others are.
gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="
  set -e
  [ -d ar_jax ] || git clone $repository ar_jax
  cd ar_jax
  make install EXTRAS=tpu
  experiments/launch/restart.sh .venv/bin/python experiments/train.py --distributed $arguments"
