#!/usr/bin/env bash
# Extends LLaMA-2-7B from 4k to 128k tokens in Megatron's own pretrain(), on 8 nodes of 8 GPUs under
# Slurm. Submit it from the repository:
#
#   sbatch examples/megatron/llama_pose_slurm.sh
#
# The job may be requeued and submitted again as it is: it goes on from its last checkpoint.
#SBATCH --job-name=megatron-pose-128k
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1        # one torchrun a node, which starts a rank for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --requeue                  # after a node failure Slurm starts the job again
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"

# All of these on storage that every node sees.
MODEL=${MODEL:-models/llama-2-7b}                     # tokenizer of Hugging Face
START=${START:-checkpoints/llama-2-7b}                # what pose-megatron convert wrote
RUN=${RUN:-checkpoints/llama-2-7b-128k}
DATA=${DATA:-data/books_text_document}
ITERATIONS=1000
MINUTES=$((12 * 60 - 20))                             # of --time, less one save and the start

# shellcheck source=/dev/null
source .venv/bin/activate
export OMP_NUM_THREADS=8
export CUDA_DEVICE_MAX_CONNECTIONS=1                  # orders tensor-parallel overlap before Blackwell
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True # less memory lost between tensors
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1              # a lost rank ends the others, not a hang
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1           # or a replaced node waits for an address in vain
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600             # seconds after SIGTERM for a step and a save
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
LAUNCH=(torchrun
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 --max-restarts 3
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "${hosts[0]}:29400")
CHECKPOINT_ARGS=(
    --use-checkpoint-args --pretrained-checkpoint "$START" --load "$RUN" --save "$RUN"
    --save-interval 100 --dist-ckpt-optim-fully-reshardable --exit-duration-in-mins "$MINUTES")
# --use-checkpoint-args does not take the epsilon of the norms.
MODEL_ARGS=(
    --norm-epsilon 1e-5)
POSE_ARGS=(
    --seq-length 4096 --max-position-embeddings 131072 --rope-scaling yarn)
TRAINING_ARGS=(
    --train-iters "$ITERATIONS" --global-batch-size 64 --micro-batch-size 2 --bf16
    --calculate-per-token-loss --lr 2e-5 --lr-decay-style constant --lr-warmup-iters 10
    --weight-decay 0 --adam-beta2 0.95 --clip-grad 1.0)
PARALLEL_ARGS=(
    --tensor-model-parallel-size 2 --sequence-parallel
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)
DATA_ARGS=(
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$MODEL"
    --data-path "$DATA" --split 990,10,0)
LOG_ARGS=(
    --log-interval 10 --eval-interval 100 --eval-iters 10 --tensorboard-dir "$RUN-tensorboard")

# --kill-on-bad-exit: one node's failure beyond its restarts ends the job, and --requeue starts it.
srun --kill-on-bad-exit=1 "${LAUNCH[@]}" examples/megatron/pretrain_gpt_pose.py \
    "${CHECKPOINT_ARGS[@]}" "${MODEL_ARGS[@]}" "${POSE_ARGS[@]}" "${TRAINING_ARGS[@]}" \
    "${PARALLEL_ARGS[@]}" "${DATA_ARGS[@]}" "${LOG_ARGS[@]}"

# Stopped by the clock and not at the end: in line again.
if [ "$(cat "$RUN/latest_checkpointed_iteration.txt")" -lt "$ITERATIONS" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
