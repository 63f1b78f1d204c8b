#!/bin/sh
# Train with torchrun: launch/torchrun.sh NODES GPUS FIRST [OPTION OF torchrun]... -m MODULE [ARGUMENT]...
#
# The same command on every node; FIRST is the first one's address, with ":PORT" for another than 29500. Two runs whose
# nodes meet at the same port would take each other for nodes of one run; of one node alone any free port is taken.
#
#   One node:                launch/torchrun.sh 1 8 localhost -m launch.train --config configs/1b.toml
#   Two nodes, static:       launch/torchrun.sh 2 8 node1 --node-rank 0 -m launch.train --config configs/1b.toml
#                            (on the other --node-rank 1; the order of ranks is that of the numbers)
#   Elastic, 2 to 4 nodes:   launch/torchrun.sh 2:4 8 node1 --max-restarts 100 -m launch.train --config configs/8b.toml
#                            (nodes may come and go: all ranks start again from the last checkpoint)
#
# Hosts with several networks: add --local-addr with the address by which the others reach this one, and set
# GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to its interface. Try the allocation first: -m launch.doctor.
set -eu
if [ "$#" -lt 4 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
nodes=$1 gpus=$2 first=$3
shift 3

# One thread a process unless the caller wants more: ranks share the node's cores. After SIGTERM torchrun kills ranks
# that are still saving when so many seconds are over, of itself 30; versions that do not know the variable always do.
: "${OMP_NUM_THREADS:=1}" "${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:=240}"
export OMP_NUM_THREADS TORCH_ELASTIC_SHUTDOWN_TIMEOUT

case " $* " in
*" --node-rank "*|*" --node-rank="*|*" --node_rank "*|*" --node_rank="*)  # static: who is who is given
    case $first in *:*) ;; *) first=$first:29500 ;; esac
    exec torchrun --nnodes "$nodes" --nproc-per-node "$gpus" --master-addr "${first%:*}" --master-port "${first##*:}" \
        "$@" ;;
*)  # the nodes find each other at FIRST; --rdzv-id may come with the other options
    case $first in *:*) ;; *) if [ "$nodes" = 1 ]; then first=$first:0; else first=$first:29500; fi ;; esac
    # A store of its own for every start: in the nodes' common one, ranks find addresses of ranks that are dead.
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE
    exec torchrun --nnodes "$nodes" --nproc-per-node "$gpus" --rdzv-backend c10d --rdzv-endpoint "$first" "$@" ;;
esac
