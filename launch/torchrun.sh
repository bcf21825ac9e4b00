#!/usr/bin/env bash
# torchrun instead of the deepspeed launcher, from the repository's folder.
#   launch/torchrun.sh +exp=129f latents=DIR run_dir=RUN
# Several machines: the same line on each, with NNODES, MASTER_ADDR (the first machine) and NODE_RANK set.
#   NNODES=2 MASTER_ADDR=node-0 NODE_RANK=0 launch/torchrun.sh +exp=129f latents=DIR run_dir=RUN
# NPROC ranks a machine; unset takes one a GPU.
set -euo pipefail

torchrun=${TORCHRUN:-.venv/bin/torchrun}
nnodes=${NNODES:-1}
where=(--standalone)
if ((nnodes > 1)); then
    where=(--nnodes "$nnodes" --node_rank "${NODE_RANK:?set NODE_RANK, 0 on MASTER_ADDR}"
        --master_addr "${MASTER_ADDR:?set MASTER_ADDR to the first machine}" --master_port "${MASTER_PORT:-29500}")
fi
exec "$torchrun" "${where[@]}" --nproc_per_node "${NPROC:-gpu}" launch/train.py "$@"
