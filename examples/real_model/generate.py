"""Whether an exported model answers passkeys, by transformers' own generate.

python examples/real_model/generate.py FOLDER --length 12288
"""

import argparse
import sys

from pose_megatron.runtime.startup import prepare_megatron

prepare_megatron()  # mutes what it would say

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pose_megatron.evaluation.haystack import filler
from pose_megatron.evaluation.passkey import haystacks

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder")
parser.add_argument("--length", type=int, required=True, help="tokens of each prompt")
parser.add_argument("--prompts", type=int, default=3)
parser.add_argument("--seed", type=int, default=99, help="another than the evaluation's")
flags = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(
    flags.folder, local_files_only=True, trust_remote_code=False
)
# In float32, attention of grouped queries on a GPU takes the memory of all pairs of tokens.
on_gpu = torch.cuda.is_available()
model = AutoModelForCausalLM.from_pretrained(
    flags.folder,
    dtype=torch.bfloat16 if on_gpu else torch.float32,
    local_files_only=True,
    trust_remote_code=False,
).to("cuda" if on_gpu else "cpu")


def encode(text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


right = 0
for text in haystacks(encode, filler(encode), flags.length, flags.prompts, seed=flags.seed):
    question = text.questions[0]
    asked = torch.cat([text.tokens, question.tokens])[None].to(model.device)
    out = model.generate(
        asked,
        attention_mask=torch.ones_like(asked),
        do_sample=False,
        max_new_tokens=len(question.answer),
        pad_token_id=0,
    )
    said = tokenizer.decode(out[0, asked.size(1) :])
    wanted = tokenizer.decode(question.answer)
    right += said == wanted
    print(
        f"{flags.length:,} tokens, needle at {question.depth:.0%}: "
        f"...{tokenizer.decode(asked[0, -12:])!r} -> {said!r}, wanted {wanted!r}"
    )
print(
    f"transformers {sys.modules['transformers'].__version__}: {right} of {flags.prompts} answered"
)
