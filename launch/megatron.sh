#!/bin/bash
# Train with Megatron-LM and MuSe: launch/megatron.sh LAUNCHER... -- CHECKOUT [OPTION]...
#
# LAUNCHER starts the processes, CHECKOUT is a folder with Megatron-LM as it is, OPTION one of Megatron-LM's or MuSe's
# that is added to those below or, if it is among them, replaces it. At least the data must be said; to try without:
#   data="--mock-data --tokenizer-type NullTokenizer --vocab-size 50257"
#
#   One node:     launch/megatron.sh launch/torchrun.sh 1 8 localhost -- ../Megatron-LM $data
#   Two nodes:    launch/megatron.sh launch/torchrun.sh 2 8 node1 -- ../Megatron-LM $data      (on each of them)
#   Slurm:        launch/megatron.sh sbatch --nodes=2 launch/slurm.sh -- ../Megatron-LM $data
#
# To go on after a stop, give every start the same folder, which all nodes see, and an interval in steps:
#   --save runs/a --load runs/a --save-interval 500
# SIGTERM (Slurm's before preemption and the end of the time) then saves, too.
#
# All options of MuSe: python -m muse_dist.megatron_patch --help
set -eu
launcher=()
while [ "$#" -gt 0 ] && [ "$1" != -- ]; do
    launcher+=("$1")
    shift
done
if [ "${#launcher[@]}" -eq 0 ] || [ "$#" -lt 2 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '$d' >&2
    exit 2
fi
checkout=$2
shift 2

attention=(
    --attention muse
    --muse-preset fast                      # or accurate, which reads more
    --muse-exchange moments                 # what ranks send each other: summaries of keys; kv: the keys themselves
    --attention-dropout 0                   # MuSe has none; Megatron's default is 0.1
    --no-create-attention-mask-in-dataloader  # a mask of N x N bytes that MuSe does not read
)
parallel=(
    --context-parallel-size 8               # ranks that share a sequence; tokens / 2 / ranks must be whole blocks
    --tensor-model-parallel-size 1          # ranks that share every layer's heads
    --pipeline-model-parallel-size 1        # ranks that have a part of the layers each
    --calculate-per-token-loss              # ranks with unequal numbers of tokens that count are weighed right
)
model=(                                     # about 350 million parameters
    --num-layers 24 --hidden-size 1024 --num-attention-heads 16  # heads of 64
    --seq-length 65536 --max-position-embeddings 65536  # tokens of a sequence, on all ranks together; not less
    --position-embedding-type rope --rotary-base 500000  # a slow rotation, for tokens that are far apart
    --normalization RMSNorm --disable-bias-linear --hidden-dropout 0  # as Llama has it
    --swiglu --ffn-hidden-size 2816         # the MLP, as Llama's
)
training=(
    --bf16                                  # weights and activations; the optimizer keeps fp32
    --micro-batch-size 1                    # sequences that ranks which share them read at once
    --global-batch-size 8 --train-iters 1000  # sequences a step, and steps
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-fraction 0.05  # the rate, its end and its course
    --weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95  # the optimizer's usual settings
    --eval-iters 1 --log-interval 1         # batches an evaluation reads; steps between lines of the log
    --exit-signal-handler                   # SIGTERM ends the run after the step, and saves with --save
)
plain=(                                     # what needs neither Transformer Engine nor apex; with them, replace the
    --transformer-impl local                # first by --transformer-impl transformer_engine
    # kernels of apex's and Transformer Engine's; leave these out where they are installed
    --no-persist-layer-norm --no-gradient-accumulation-fusion --no-rope-fusion --no-masked-softmax-fusion
)

# Megatron-LM insists on it before Blackwell: kernels then start in the order in which they were given.
export CUDA_DEVICE_MAX_CONNECTIONS=1
exec "${launcher[@]}" -m muse_dist.megatron_patch "$checkout/pretrain_gpt.py" \
    "${attention[@]}" "${parallel[@]}" "${model[@]}" "${training[@]}" "${plain[@]}" "$@"
