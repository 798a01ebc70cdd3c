#!/usr/bin/env bash
# Short-context tasks before and after extension, with EleutherAI's lm-evaluation-harness:
#
#   bash examples/lm_eval.sh BASE EXTENDED
#
# Both are Hugging Face folders. The table comes last; what lm_eval finds lands in $OUT, and a task
# that is done there for the same files is not done again. No code of a folder runs: lm_eval's
# --trust_remote_code stays off.
set -euo pipefail

OUT=${OUT:-runs/lm_eval}
# Those of the PoSE paper's Table 3, as name:shots; without :shots, as many as lm_eval says.
TASKS=${TASKS:-boolq:0 piqa:0 winogrande:0 truthfulqa_mc2:0 arc_challenge:25 hellaswag:10}
BATCH=${BATCH:-8}
DEVICE=${DEVICE:-}              # default: a GPU where there is one
INCLUDE=${INCLUDE:-}            # a folder with tasks of your own, as lm_eval's YAML

fail() { echo "$*" >&2; exit 1; }

[ $# = 2 ] || fail "usage: bash examples/lm_eval.sh BASE EXTENDED (two Hugging Face folders)"
for folder in "$@" ${INCLUDE:+"$INCLUDE"}; do
    [ -d "$folder" ] || fail "$folder: no such folder"
done
for folder in "$@"; do
    [ ! -f "$folder/config.json" ] || continue
    [ -z "$(find -L "$folder" -maxdepth 1 \( -name 'latest_*.txt' -o -name 'iter_*' -o -name .metadata \))" ] ||
        fail "$folder is a Megatron checkpoint; export it with: python tools/checkpoint/convert.py" \
            "--loader megatron --saver hf$(printf ' --load-dir %q --save-dir %q' "$folder" "${folder%/}-hf")"
    fail "$folder has no config.json, so it is not a Hugging Face folder"
done
version=$(python -c 'from importlib.metadata import version; print(version("lm_eval"))' 2> /dev/null) ||
    fail "lm_eval is not installed; install it with: pip install -e '.[eval]' -c constraints.txt"

set -f  # a task's name may be a pattern
more=(${DEVICE:+--device "$DEVICE"} --batch_size "$BATCH" ${INCLUDE:+--include_path "$INCLUDE"})
names=$(printf '%s\n' $TASKS | cut -d: -f1 | paste -sd,)
mkdir -p "$OUT"
known='' results=()
for folder in "$@"; do
    folder=$(realpath "$folder")
    model=$(python -c 'import json, sys; print(json.dumps({"pretrained": sys.argv[1]}))' "$folder")
    files=$(echo "lm_eval $version"
        find -L "$folder" ${INCLUDE:+"$INCLUDE"} -samefile "$OUT" -prune -o \
            -type f ! -name '*.pyc' -printf '%p %s %T@\n' | sort)
    for task in $TASKS; do
        name=${task%%:*} shots=${task#"${task%%:*}"}
        shots=${shots#:}
        result=$OUT$folder/$name${shots:+-$shots-shot}
        results+=("$result")
        if [ "$(cat "$result/files.txt" 2> /dev/null)" = "$files" ]; then
            echo "$name of $folder is done: $result"
            continue
        fi
        if [ -z "$known" ]; then
            python -m lm_eval validate --tasks "$names" ${INCLUDE:+--include_path "$INCLUDE"} >&2
            known=yes
        fi
        rm -rf "$result" "$result.part"
        mkdir -p "$result.part"
        echo "$files" > "$result.part/files.txt"
        python -m lm_eval run --model hf --model_args "$model" "${more[@]}" --tasks "$name" \
            ${shots:+--num_fewshot "$shots"} --output_path "$result.part/out.json" --log_samples
        [ -n "$(find "$result.part" -name 'out_*.json')" ] ||
            fail "lm_eval has written nothing for $name of $folder; its messages above say why"
        mv "$result.part" "$result"
    done
done
echo
python "$(dirname "$0")/lm_eval_table.py" "${results[@]}"
