#!/usr/bin/env bash
# Trains on one or on all hosts of a Cloud TPU with one command, from your own machine.
#
#     NAME=my-tpu ZONE=us-central1-a experiments/launch/tpu_vm.sh \
#         --config=configs/imagenet256/var.py:d16 --workdir=gs://my-bucket/var_d16 ...
#
# NAME and ZONE are those of the TPU. Every host gets the repository at REPOSITORY (default this
# one's origin), installs it with its TPU extra and runs experiments/train.py with the arguments,
# restarted where the platform ends it.
set -euo pipefail

if [ $# -eq 0 ] || [ -z "${NAME:-}" ] || [ -z "${ZONE:-}" ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

repository=${REPOSITORY:-$(git -C "$(dirname "$0")" remote get-url origin)}
arguments=$(printf '%q ' "$@")
gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="
  set -e
  [ -d ar_jax ] || git clone $(printf '%q' "$repository") ar_jax
  cd ar_jax
  make install EXTRAS=tpu
  experiments/launch/restart.sh .venv/bin/python experiments/train.py --distributed $arguments"
