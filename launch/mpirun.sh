#!/bin/sh
# Train with Open MPI: launch/mpirun.sh -np RANKS [OPTION OF mpirun]... python PROGRAM [ARGUMENT]...
#
# One node, 8 GPUs:   launch/mpirun.sh -np 8 python train.py
# Two nodes:          launch/mpirun.sh -np 16 --host node1:8,node2:8 -x MASTER_ADDR -x MASTER_PORT python train.py
#
# mpi4py tells every process its rank. The first rank's host name and port 29500 are where the ranks meet; on hosts with
# several networks set MASTER_ADDR (and MASTER_PORT for several runs on one host) and pass them on with -x.
# mpirun ends all ranks when one fails, and exits with its status. MPI's end waits for all ranks: where a program catches
# the error of a rank and ends it with sys.exit, one that is stuck would be waited for; python -m mpi4py PROGRAM ends both.
set -eu
: "${OMP_NUM_THREADS:=1}"  # ranks share the node's cores
export OMP_NUM_THREADS
# --bind-to none: bound to one core each, ranks of PyTorch would run all their threads on it.
exec mpirun --bind-to none -x PATH -x OMP_NUM_THREADS "$@"
