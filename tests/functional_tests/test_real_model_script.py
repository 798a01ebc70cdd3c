"""examples/real_model/run.sh from end to end, on a model so small that it takes a minute."""

import json
import re
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pose_megatron.evaluation.claims import read_verdicts
from tests.functional_tests.test_quickstart import run

WINDOW, TIMES = 256, 4
NAMES = {"as it was", "YaRN, not trained", "plain positions", "PoSE"}
SMALL = {
    "WINDOW": WINDOW,
    "TIMES": TIMES,
    "L": 64,
    "ITERS": 3,
    "MICRO": 1,
    "BATCH": 2,
    "RANKS": 1,
    "JOBS": 2,
    "DOCUMENTS": 3,
    "NEEDLES": 2,
    "THREADS": 1,
    "LONG": 40000,
    "WORKERS": 1,
}


def write_llama(folder) -> None:
    """A LLaMA of bytes, with a window of 256 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<end>"])}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(alphabet) + 1}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": WINDOW}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **heads, **sizes)).save_pretrained(folder)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real model")
    write_llama(folder / "hf")
    return folder, start(folder)


def start(folder):
    done = run(
        "bash",
        "examples/real_model/run.sh",
        OUT=str(folder),
        **{name: str(value) for name, value in SMALL.items()},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_every_model_is_measured_at_every_length(extended):
    folder, _ = extended
    measured = {(r["name"], r["metric"], r["context_length"]) for r in rows(folder)}
    lengths = {"perplexity": (64, 128, 256, 512, 1024), "passkey": (128, 384, 768)}
    assert measured == {(n, m, at) for n in NAMES for m, ats in lengths.items() for at in ats}
    assert len({tuple(r["edges"]) for r in rows(folder) if r["metric"] == "perplexity"}) == 1


def test_facts_are_told_again_and_never_changed(extended):
    folder, _ = extended
    lines = (folder / "corpus/facts.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(texts) == len(set(texts)) == 2000
    repeated = 0
    for text in texts:
        assert len(text) + len("\n") >= 9 * SMALL["L"] // 2
        told = re.findall(r"The (\w+) number of (\w+) is (\d+)\.", text)
        assert len(set(told)) == len({(noun, name) for noun, name, _ in told})
        repeated += len(told) > len(set(told))
    assert repeated > 100


def test_facts_need_a_text_that_is_longer_than_a_document(tmp_path):
    texts, output = tmp_path / "texts.jsonl", tmp_path / "facts.jsonl"
    texts.write_text(json.dumps({"text": "x = 1\n" * 10}) + "\n")
    words = ["examples/facts_corpus.py", str(texts), str(output), "--characters", "2500"]
    done = run(sys.executable, *words)
    assert done.returncode == 2
    assert f"{texts} has no text of more than 2,500 characters: take fewer" in done.stderr
    assert not output.exists()


def test_it_ends_with_verdicts_and_a_page(extended):
    folder, said = extended
    verdicts = read_verdicts(str(folder / "results.verdicts.json"))
    assert len(verdicts) == 7 and all(one.claim in said for one in verdicts)
    page = (folder / "report.html").read_text()
    assert all(name in page for name in NAMES) and "from 256 to 1024 tokens" in page


def test_the_export_is_what_transformers_reads(extended):
    folder, said = extended
    config = json.loads((folder / "pose-hf/config.json").read_text())
    rope = config.get("rope_parameters") or config["rope_scaling"]
    assert (rope["rope_type"], rope["factor"]) == ("yarn", TIMES)
    assert "768 tokens, needle at 50%: " in said and "of 1 answered" in said


def test_started_again_it_goes_on_where_it_ended(extended):
    folder, _ = extended
    before = rows(folder)
    said = start(folder)
    assert "iteration " not in said  # trained no more
    assert rows(folder) == before


def test_a_text_that_is_not_known_is_refused(tmp_path):
    done = run("bash", "examples/real_model/run.sh", OUT=str(tmp_path), TEXT="books")
    assert done.returncode == 2
    assert "TEXT=books is neither stdlib nor packages" in done.stderr
    assert not any(tmp_path.iterdir())  # before anything is made
