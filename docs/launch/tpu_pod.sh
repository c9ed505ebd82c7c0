#!/usr/bin/env bash
# A TPU pod slice: the same command on all its hosts, which find each other. TPU, ZONE and a gs:// bucket or a shared disk
# for WORKDIR come from you; `unimat_jax.main --mode=compile --topology=v4:4x4x2` tells before whether the model fits.
set -euo pipefail
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
  cd unimat-jax && pip install -q -e '.[tpu]' &&
  python -m unimat_jax.main --config=${CONFIG:-unimat} --workdir=${WORKDIR:?} --config.model.dtype=bfloat16 $*"
