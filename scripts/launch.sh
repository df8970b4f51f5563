#!/usr/bin/env bash
# Start a recipe on one node of a cluster, with the same command for every scheduler (see docs/cluster.md):
#
#   NODES=2 NODE_RANK=0 FIRST_NODE=node-0 scripts/launch.sh configs/verifiable.toml [options of `run`]
#
# NODES       number of nodes (1)
# NODE_RANK   index of this node, from 0 (0)
# FIRST_NODE  host name of node 0 (this node)
# PORT        a free port on node 0 (29500)
# PROCESSES   processes on this node: a number, or auto for one per GPU, without GPUs one per CPU (auto)
#
# run.resume=auto: a node that was lost and restarts resumes the run.
set -euo pipefail

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" \
    --master-addr "${FIRST_NODE:-127.0.0.1}" --master-port "${PORT:-29500}" \
    --nproc-per-node "${PROCESSES:-auto}" \
    -m weighted_mtp_core run "$@" --set run.resume=auto
