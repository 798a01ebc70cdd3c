"""The command lines that read what is damaged or hostile.

{in} is a copy of the folder of material.make(), {clean} that folder itself, {out} a place for
results.
"""

from material import SHAPE, TRAINING

_PRETRAIN = f"pretrain {SHAPE} {TRAINING} --save {{out}}"
RESUME = f"{_PRETRAIN} --train-iters 3 --load {{in}}/run"
TRAIN = f"{_PRETRAIN} --train-iters 2".replace("{clean}/corpus", "{in}/corpus")
SAMPLES = f"{_PRETRAIN} --train-iters 2 --materialized {{in}}/samples"
TOKENIZE = (
    "preprocess --input {clean}/corpus.jsonl --output-prefix {out}/again --append-eod "
    "--tokenizer-type HuggingFaceTokenizer --tokenizer-model {in}/tokenizer"
)
INSPECT_TOKENS = "inspect {in}/corpus_text_document"
MERGE = "merge --input {in}/corpus_text_document --output-prefix {out}/merged"


def convert(folder: str, loader: str) -> str:
    saver = "megatron" if loader == "hf" else "hf"
    return (
        f"convert --loader {loader} --saver {saver} --load-dir {{in}}/{folder} --save-dir {{out}}"
    )


def readers(folder: str, loader: str) -> tuple[str, ...]:
    """All that read a folder of weights, but for the trainer."""
    line = convert(folder, loader)
    return (line, f"{line} --no-verify", f"inspect {{in}}/{folder}")


_EVALUATE = "--load {in}/run --context-lengths 32 --data-path {clean}/corpus_text_document"
RUN_READERS = (
    *readers("run", "megatron"),
    "inspect --verify {in}/run",
    "inspect --diff --values {in}/run {clean}/run",
    RESUME,
    f"{RESUME} --load-fallback",
    f"{RESUME} --finetune",
    RESUME.replace("--load {in}", "--pretrained-checkpoint {in}"),
    f"evaluate-perplexity {_EVALUATE} --max-documents 2",
    f"evaluate-passkey {_EVALUATE} --trials 1",
    "verify --megatron {in}/run --hf {clean}/hf",
)
