#!/bin/sh
# Train with DeepSpeed's launcher: launch/deepspeed.sh FOLDER [OPTION OF deepspeed]... PROGRAM [ARGUMENT]...
#
# One node, 8 GPUs:        launch/deepspeed.sh runs/a --num_gpus 8 train.py --out runs/a
#                          launch/deepspeed.sh runs/1b --num_gpus 8 --module launch.train --config configs/1b.toml \
#                              --engine deepspeed --set train.shard=false deepspeed.stage=3
# Two nodes, over ssh:     launch/deepspeed.sh runs/a --hostfile hosts train.py --out runs/a
#                          (a line a node in the file hosts: "node1 slots=8"; it calls pdsh, or with --launcher openmpi
#                          mpirun)
# Two nodes, without ssh:  on each, with its own RANK and the first one's ADDRESS:
#   launch/deepspeed.sh runs/a --hostfile hosts --no_ssh --node_rank RANK --master_addr ADDRESS --master_port 29500 ...
#
# FOLDER is the run's; the program leaves a file `finished` there when all its steps are done, as launch.train and
# launch/deepspeed_example.py do. deepspeed itself exits with 0 even where its ranks were lost with a node. Programs
# find their GPU in LOCAL_RANK; there is no argument --local_rank.
set -u
if [ "$#" -lt 2 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
folder=$1
shift
rm -f "$folder/finished"
# In a process group of its own, because deepspeed leaves its ranks behind when it is stopped.
setsid deepspeed --no_local_rank "$@" &
launcher=$!
trap 'kill -TERM -"$launcher" 2>/dev/null; wait "$launcher"; exit 143' TERM INT
wait "$launcher"
status=$?
kill -TERM -"$launcher" 2>/dev/null  # ranks that outlived it
if [ "$status" -eq 0 ] && [ ! -e "$folder/finished" ]; then
    echo "launch/deepspeed.sh: deepspeed ended, but $folder/finished is missing: ranks were lost. Start it again to" \
        "resume from the last checkpoint in $folder." >&2
    exit 1
fi
exit "$status"
