"""examples/lm_eval.sh on a task of our own, whose figures follow from transformers' logits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.byte_level import train

pytest.importorskip("lm_eval", reason="pip install -e '.[eval]' -c constraints.txt")
ROOT = Path(__file__).resolve().parents[2]
WORDS = "river mill grain road town cart rain morning evening flour stream miller".split()
QUESTIONS = [
    {
        "question": f"The {word} lies by the",
        "choices": [
            f"{WORDS[i - 1]} {WORDS[i - 5]}",
            WORDS[i - 2],
            f"old {WORDS[i - 3]} and grain",
        ],
        "answer": i % 3,
    }
    for i, word in enumerate(WORDS)
]
TASK = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Two exports, of which one brings code along, and a task."""
    folder = tmp_path_factory.mktemp("a house, with 'a' garden")
    tokenizer = train([json.dumps(QUESTIONS)], 320)
    for seed, name in [(0, "base"), (2, "extended")]:
        torch.manual_seed(seed)
        shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 128}
        config = LlamaConfig(
            hidden_size=32, intermediate_size=32, vocab_size=320, initializer_range=0.5, **shape
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save(str(folder / name / "tokenizer.json"))
        (folder / name / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}'
        )
    config = json.loads((folder / "extended/config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (folder / "extended/config.json").write_text(json.dumps(config))
    (folder / "extended/evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    (folder / "tasks").mkdir()
    questions = folder / "tasks/words.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    task = TASK.replace("FILE", json.dumps(str(questions)))
    (folder / "tasks/words.yaml").write_text(task)
    return folder


def run(house, tasks="words:0"):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OUT": str(house / "extended" / "out"),  # which is not of the model
        "TASKS": tasks,
        "INCLUDE": str(house / "tasks"),
        "DEVICE": "cpu",
        "BATCH": "4",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(house / "cache"),
    }
    return subprocess.run(
        ["bash", ROOT / "examples/lm_eval.sh", house / "base", house / "extended"],
        env=environment,
        text=True,
        capture_output=True,
    )


def right(folder):
    """For each question whether the right choice is the likeliest, by sum and by character."""
    from tokenizers import Tokenizer

    model = LlamaForCausalLM.from_pretrained(folder).eval()
    encode = Tokenizer.from_file(str(folder / "tokenizer.json")).encode
    found = []
    for q in QUESTIONS:
        start, sums = encode(q["question"]).ids, []
        for choice in q["choices"]:
            ids = encode(f"{q['question']} {choice}").ids
            assert ids[: len(start)] == start
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(logs[i - 1, ids[i]].item() for i in range(len(start), len(ids))))
        mean = [total / len(choice) for total, choice in zip(sums, q["choices"], strict=True)]
        found.append([some.index(max(some)) == q["answer"] for some in (sums, mean)])
    return torch.tensor(found, dtype=torch.float64)


def test_the_table_says_what_transformers_logits_say(house):
    done = run(house)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (house / "ran").exists()
    base, extended = right(house / "base"), right(house / "extended")
    assert len({*base.mean(0).tolist(), *extended.mean(0).tolist()}) > 2  # all could be told apart
    for k, metric in enumerate(["acc", "acc_norm"]):
        values = (base[:, k], extended[:, k], extended[:, k] - base[:, k])
        cells = " | ".join(
            f"{100 * v.mean():{sign}.2f} ± {100 * v.std() / len(v) ** 0.5:.2f}"
            for v, sign in zip(values, ["", "", "+"], strict=True)
        )
        assert f"| words | 0 | {metric} | {len(QUESTIONS)} | {cells} |" in done.stdout.splitlines()

    again = run(house)
    assert again.stdout.count(" is done: ") == 2 and "lm_eval" not in again.stderr
    assert again.stdout.splitlines()[-4:] == done.stdout.splitlines()[-4:]


def test_an_unknown_task_is_named_by_lm_eval_before_anything_is_measured(house):
    done = run(house, "words:1 wordz")
    assert done.returncode != 0 and "wordz" in done.stderr
    assert not [*house.rglob("words-1-shot")]
