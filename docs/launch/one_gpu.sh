#!/usr/bin/env bash
# One GPU, or all GPUs of one machine: one process drives them all, nothing else is needed.
# 8 GPUs: add --config.train.fsdp=8 where one card cannot hold the model; the batch must divide by the number of cards.
set -euo pipefail
python -m unimat_jax.main --config="${CONFIG:-unimat:small}" --workdir="${WORKDIR:-runs/unimat}" "$@"
