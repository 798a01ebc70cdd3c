"""gigatoken beside the tokenizers' own libraries: used where it agrees, found out where not."""

import json
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from pose_megatron.preprocessing import fast_tokenizer
from pose_megatron.preprocessing.fast_tokenizer import FastTokenizer, difference, prove
from pose_megatron.preprocessing.tokenizer import build_tokenizer

TEXTS = [
    (Path(sysconfig.get_path("stdlib")) / name).read_text("utf-8")
    for name in ("argparse.py", "heapq.py", "textwrap.py")
]


def byte_level(folder, **config):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<eos>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.add_tokens([AddedToken("ArgumentParser", normalized=False)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"} | config))
    return build_tokenizer("HuggingFaceTokenizer", folder)


def piece_model(folder, **how):
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXTS for line in text.splitlines()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=600,
        minloglevel=2,
        hard_vocab_limit=False,
        **how,
    )
    return build_tokenizer("SentencePieceTokenizer", folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "Hugging Face": byte_level(folder / "hf"),
        "special tokens are text": byte_level(folder / "split", split_special_tokens=True),
        "LLaMA's sentencepiece": piece_model(
            folder / "spm",
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
        ),
    }


@pytest.mark.parametrize(
    "name", ["Hugging Face", "special tokens are text", "LLaMA's sentencepiece"]
)
def test_proven_ids_are_the_librarys_on_any_string(tokenizers, name):
    tokenizer = tokenizers[name]
    fast, why = prove(tokenizer, TEXTS)
    assert fast and "with gigatoken" in why and "3 texts" in why

    @settings(max_examples=300, deadline=None)
    @given(st.text(max_size=40) | st.text(st.sampled_from("ab<eos>/ \n\t_-=1▁"), max_size=60))
    def holds(text):
        [ids] = fast.tokenize_batch([text])
        assert ids.tolist() == tokenizer.tokenize(text)

    holds()


def test_letters_newer_than_a_librarys_unicode_keep_their_ids(tmp_path):
    """U+16EBB became a letter in Unicode 17; it split words in one library and not in the other."""
    text = 'None,\n    "\U00016ebb",\n    "\U00016ebc",\n    " \U00016ebb"'
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.train_from_iterator(
        [text] * 4,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<eos>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    own.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    fast = FastTokenizer(build_tokenizer("HuggingFaceTokenizer", tmp_path))
    assert fast.tokenize_batch([text])[0].tolist() == own.encode(text).ids


@pytest.mark.parametrize(
    "how, message",
    [
        ({"model_type": "unigram"}, "own library: only BPE sentencepiece models are supported"),
        ({"model_type": "bpe"}, "own library: only byte_fallback"),
        # sentencepiece's default normalization: gigatoken 0.10 keeps some of Unicode's spaces
        (
            {"model_type": "bpe", "byte_fallback": True},
            r"own library: gigatoken's ids differ on '\x85",
        ),
    ],
)
def test_models_that_gigatoken_cannot_express_keep_their_library(tmp_path, how, message):
    fast, why = prove(piece_model(tmp_path / "spm", **how), TEXTS)
    assert fast is None and message in why


def test_a_hugging_face_tokenizer_that_it_cannot_express_keeps_its_library(tmp_path):
    byte_level(tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()])
    tokenizer.save(str(path))
    fast, why = prove(build_tokenizer("HuggingFaceTokenizer", path.parent), TEXTS)
    assert fast is None and "own library: gigatoken" in why and "\n" not in why


def test_other_ids_are_found(tokenizers):
    """Another tokenizer's gigatoken stands for one that is wrong."""
    wrong, right = FastTokenizer(tokenizers["Hugging Face"]), tokenizers["LLaMA's sentencepiece"]
    assert difference(wrong, right, ["", TEXTS[0]]) == (
        f"gigatoken's ids differ on {TEXTS[0][:40]!r}"
    )
    assert difference(wrong, tokenizers["Hugging Face"], ["", *TEXTS]) is None
    assert difference(wrong, tokenizers["special tokens are text"], ["a <eos> b"]) == (
        "gigatoken's ids differ on 'a <eos> b'"
    )


def test_memory_is_bounded_by_loading_again(tokenizers, monkeypatch):
    tokenizer = tokenizers["LLaMA's sentencepiece"]
    fast = FastTokenizer(tokenizer)
    loads = []
    monkeypatch.setattr(fast, "_load", lambda form, load=fast._load: loads.append(1) or load(form))
    resident = iter([10, 11, fast_tokenizer.CACHE_BYTES + 50, 20, 30])
    fast._limit = 40
    monkeypatch.setattr(fast_tokenizer, "_resident", lambda: next(resident))
    for _ in range(4):
        assert [list(ids) for ids in fast.tokenize_batch(TEXTS)] == tokenizer.tokenize_batch(TEXTS)
    assert len(loads) == 1
