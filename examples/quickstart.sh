#!/usr/bin/env bash
# The whole job on two CPU cores, in about nine minutes: a small LLaMA is trained on windows of
# L = 64 tokens, leaves to Hugging Face's format and comes back, is extended to T = 8 L by PoSE
# (still 64 tokens at a time), and is measured at L, 2L, 4L and 8L, beside a control that is trained
# in the same way at plain positions. `make quickstart` runs it.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-quickstart}          # everything lands here
L=64
T=$((8 * L))
BASE_ITERS=${BASE_ITERS:-1200}
POSE_ITERS=${POSE_ITERS:-300}
DOCUMENTS=${DOCUMENTS:-24}      # held-out ones that are measured
started=$SECONDS

step() { printf '\n\033[1m[%d:%02d] %s\033[0m\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$*"; }

rm -rf "$OUT"
mkdir -p "$OUT"

TRAIN=(torchrun --standalone --nproc-per-node 2 pretrain_pose.py
    --data-path "$OUT/train_text_document" --split 100,0,0
    --tokenizer-model "$OUT/tokenizer" --seq-length $L
    --micro-batch-size 32 --global-batch-size 64 --num-workers 0 --log-interval 100)
MODEL_ARGS=(--num-layers 3 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 384
    --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 64)

step "corpus: the Python standard library's source"
python examples/stdlib_corpus.py "$OUT/corpus"

step "tokenizer: SentencePiece BPE, 512 tokens"
python tools/train_tokenizer.py --input "$OUT/corpus/train.jsonl" --vocab-size 512 \
    --output-dir "$OUT/tokenizer"

step "preprocessing into Megatron's indexed format"
for part in train test; do
    python tools/preprocess_data.py --input "$OUT/corpus/$part.jsonl" --workers 2 --append-eod \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$OUT/tokenizer" \
        --output-prefix "$OUT/$part"
done

step "base model: $BASE_ITERS steps at plain positions 0 to $((L - 1))"
"${TRAIN[@]}" "${MODEL_ARGS[@]}" --train-iters "$BASE_ITERS" --lr 3e-3 --lr-warmup-iters 50 \
    --save "$OUT/base-trained"

step "out to Hugging Face and in again: the way a LLaMA from outside comes in"
python tools/checkpoint/convert.py --loader megatron --saver hf \
    --load-dir "$OUT/base-trained" --save-dir "$OUT/base-hf"
python tools/checkpoint/convert.py --loader hf --saver megatron --make-vocab-size-divisible-by 64 \
    --load-dir "$OUT/base-hf" --save-dir "$OUT/base"

EXTEND=("${TRAIN[@]}" --load "$OUT/base" --finetune --max-position-embeddings $T
    --train-iters "$POSE_ITERS" --lr 1e-3 --lr-warmup-iters 10)
for scaling in yarn linear; do
    step "PoSE with $scaling: $POSE_ITERS steps of $L tokens, positions up to $T"
    "${EXTEND[@]}" --rope-scaling $scaling --save "$OUT/pose-$scaling"
done
step "the control: as many steps with linear, positions 0 to $((L - 1))"
"${EXTEND[@]}" --rope-scaling linear --position-sampler full --save "$OUT/plain-linear"

step "perplexity of held-out files at L to 8L"
EVALUATE=(env OMP_NUM_THREADS=2 python tools/evaluate_perplexity.py
    --data-path "$OUT/test_text_document" --max-documents "$DOCUMENTS" --stride $L
    --context-lengths $L $((2 * L)) $((4 * L)) $T --output "$OUT/results.jsonl")
"${EVALUATE[@]}" --load "$OUT/base" --name "base"
"${EVALUATE[@]}" --load "$OUT/plain-linear" --name "plain positions, linear"
for scaling in linear yarn; do
    "${EVALUATE[@]}" --load "$OUT/base" --rope-scaling $scaling --name "interpolation only, $scaling"
    "${EVALUATE[@]}" --load "$OUT/pose-$scaling" --name "PoSE, $scaling"
done

step "out to Hugging Face, and transformers' logits beside ours"
for scaling in yarn linear; do
    python tools/checkpoint/convert.py --loader megatron --saver hf \
        --load-dir "$OUT/pose-$scaling" --save-dir "$OUT/pose-$scaling-hf"
    python tools/checkpoint/verify.py --megatron "$OUT/pose-$scaling" --hf "$OUT/pose-$scaling-hf"
done

step "table and plot"
python tools/plot_results.py "$OUT/results.jsonl" --output "$OUT/perplexity.png" --window $L \
    --title "Trained on $L tokens at a time (Python standard library)"
python tools/report.py "$OUT/results.jsonl" --output "$OUT/report.html" --window $L \
    --title "Trained on $L tokens at a time"
cat <<END

Everything is in $OUT/
  pose-yarn-hf/     the extended model, for transformers and vLLM
  pose-yarn/        its Megatron checkpoint, for more training under any layout
  results.jsonl     the figures;  perplexity.png, perplexity.md  the plot and the table above
  report.html       both with their errors, settings, commands and versions, for a browser
END
step "done"
