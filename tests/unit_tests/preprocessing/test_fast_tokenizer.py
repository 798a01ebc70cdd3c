"""gigatoken beside the tokenizers' own libraries: used where it agrees, found out where not."""

import json
import os
import sysconfig
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from gigatoken import gigatoken_rs
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from pose_megatron.preprocessing import fast_tokenizer
from pose_megatron.preprocessing.fast_tokenizer import FastTokenizer, difference, prove
from pose_megatron.preprocessing.tokenizer import build_tokenizer
from tests.byte_level import train

TEXTS = [
    (Path(sysconfig.get_path("stdlib")) / name).read_text("utf-8")
    for name in ("argparse.py", "heapq.py", "textwrap.py")
]


def byte_level(folder, **config):
    tokenizer = train(TEXTS, 600)
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

    usual = st.text(st.sampled_from("ab<eos>/ \n\t_-=1▁"), max_size=60)
    holds_on(st.text(max_size=40) | usual, tokenizer, fast, 200)


def test_letters_newer_than_a_librarys_unicode_keep_their_ids(tmp_path):
    """U+16EBB became a letter in Unicode 17; it split words in one library and not in the other."""
    text = 'None,\n    "\U00016ebb",\n    "\U00016ebc",\n    " \U00016ebb"'
    own = train([text] * 4, 400)
    own.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    fast = FastTokenizer(build_tokenizer("HuggingFaceTokenizer", tmp_path))
    assert fast.tokenize_batch([text])[0].tolist() == own.encode(text).ids


def holds_on(strategy, tokenizer, fast, examples=100):
    """The tokenizer's own ids on any such string; how many strings gigatoken was not given."""

    @settings(max_examples=examples, deadline=None)
    @given(strategy)
    def holds(text):
        [ids] = fast.tokenize_batch([text])
        assert ids.tolist() == tokenizer.tokenize(text)

    before = fast.own_texts
    holds()
    return fast.own_texts - before


def alone(tokenizer):
    """gigatoken on the tokenizer as it is, without our doubts."""
    return gigatoken_rs.load_hf_json(json.dumps(tokenizer.as_json()))


def changed(folder, change):
    """The byte-level tokenizer with a change to its tokenizer.json."""
    byte_level(folder)
    path = folder / "tokenizer.json"
    form = json.loads(path.read_text())
    change(form)
    path.write_text(json.dumps(form))
    return build_tokenizer("HuggingFaceTokenizer", folder)


LETTERS = st.text(st.sampled_from("aerst ▁\n()=_"), max_size=60)


@pytest.mark.parametrize("share", [0.5, 1])
def test_equal_scores_send_a_text_to_its_library(tmp_path, share):
    """As in a vocabulary that was extended: all that was added has one score."""
    how = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    piece_model(tmp_path / "spm", model_type="bpe", byte_fallback=True, **how)
    path = tmp_path / "spm" / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    pieces = [piece for piece in model.pieces if piece.type == 1 and len(piece.piece) > 1]
    for piece in pieces[int(len(pieces) * (1 - share)) :]:
        piece.score = -1e6
    path.write_bytes(model.SerializeToString())
    tokenizer = build_tokenizer("SentencePieceTokenizer", path.parent)
    words = [word for text in TEXTS for word in text.split()]
    bare = alone(tokenizer)
    assert any(bare.encode(word).tolist() != tokenizer.tokenize(word) for word in words)
    fast, why = prove(tokenizer, words)
    assert fast, why
    assert 0 < fast.own_texts
    holds_on(LETTERS | st.lists(st.sampled_from(words)).map(" ".join), tokenizer, fast)
    assert fast.tokenize_batch(["("])[0].tolist() == tokenizer.tokenize("(")


def test_pieces_made_in_two_ways_send_a_text_to_its_library(tokenizers):
    """erere: "er" + "ere" or "ere" + "re", where both may be made at once."""
    tokenizer = tokenizers["LLaMA's sentencepiece"]
    fast, _ = prove(tokenizer, [])
    twice = [t["content"] for t in fast.definition.form["added_tokens"]]
    assert twice
    texts = [f"x{string}y" for string in twice]
    before = fast.own_texts
    fast.tokenize_batch(texts)
    assert fast.own_texts == before + len(texts)
    holds_on(st.lists(st.sampled_from([*twice, "re", "er", "e"])).map("".join), tokenizer, fast)


@pytest.mark.parametrize("form", ["NFC", "NFKC", "NFD", "Lowercase"])
def test_the_librarys_own_normalizer_normalizes(tmp_path, form):
    """gigatoken composes with another version of Unicode: of marks it knows more."""
    tokenizer = changed(tmp_path / "hf", lambda f: f.update(normalizer={"type": form}))
    fast, why = prove(tokenizer, TEXTS)
    assert fast, why
    marks = [chr(c) for c in range(0x20000) if unicodedata.combining(chr(c))]
    composed = [chr(c) for c in range(0x20000) if unicodedata.decomposition(chr(c))]
    alphabet = st.sampled_from([*marks, *composed, *"aeo<>\u1100\u1161"])
    holds_on(st.text(alphabet, max_size=8), tokenizer, fast, 150)
    assert not holds_on(st.text(st.sampled_from("aé日\n")), tokenizer, fast, 20)


def test_a_vocabulary_without_some_bytes_is_used_where_they_do_not_occur(tmp_path):
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<eos>"], show_progress=False)
    own.train_from_iterator(TEXTS, trainer)
    own.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tmp_path)
    with pytest.raises(RuntimeError, match="no single-byte vocab entry"):
        alone(tokenizer)
    fast, why = prove(tokenizer, TEXTS)
    assert fast, why
    before = fast.own_texts
    assert [list(ids) for ids in fast.tokenize_batch(TEXTS)] == tokenizer.tokenize_batch(TEXTS)
    assert fast.own_texts == before
    assert holds_on(st.text(max_size=20), tokenizer, fast)


@pytest.mark.parametrize("how", ["single_word", "lstrip", "rstrip", "normalized"])
def test_added_tokens_that_take_more_than_their_text_are_left_to_the_library(tmp_path, how):
    def add(form):
        form["added_tokens"][-1][how] = True
        form["normalizer"] = {"type": "NFC"}

    tokenizer = changed(tmp_path / "hf", add)
    fast, why = prove(tokenizer, TEXTS)
    assert fast, why
    pieces = st.sampled_from(["ArgumentParser", "a", " ", "\n", "\u0338", "<eos>", "é", "\u212b"])
    assert holds_on(st.lists(pieces).map("".join), tokenizer, fast)


def test_pieces_of_the_users_are_left_to_sentencepiece(tmp_path):
    how = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    users = ["<sym>", "def main", "\t", "e\u0301"]
    tokenizer = piece_model(
        tmp_path / "spm", model_type="bpe", byte_fallback=True, user_defined_symbols=users, **how
    )
    fast, why = prove(tokenizer, TEXTS)
    assert fast, why
    pieces = st.sampled_from([*users, "a", " ", "def", " main", "e", "<s>", "▁"])
    assert holds_on(st.lists(pieces).map("".join), tokenizer, fast)


@pytest.mark.parametrize("how", [{}, {"byte_fallback": True}])
@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc_cf", "identity"])
def test_sentencepiece_models_of_every_normalization(tmp_path, how, rule):
    tokenizer = piece_model(tmp_path / "spm", model_type="bpe", normalization_rule_name=rule, **how)
    fast, why = prove(tokenizer, TEXTS)
    assert fast, why
    odd = st.text(st.sampled_from("ab  \t\n\x85\u2028\u3000ﬁ½e\u0301ÅÅ▁日"), max_size=20)
    holds_on(odd | st.text(max_size=20), tokenizer, fast)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: f["model"].update(dropout=0.1), "knows no dropout"),
        (lambda f: f["model"].update(end_of_word_suffix="</w>"), "knows no end_of_word_suffix"),
        (
            lambda f: f.update(
                pre_tokenizer={
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Digits", "individual_digits": True},
                        f["pre_tokenizer"],
                    ],
                }
            ),
            r"may split words otherwise (pre-tokenizers: Digits and ByteLevel)",
        ),
    ],
)
def test_what_gigatoken_would_pass_over_keeps_the_own_library(tmp_path, change, message):
    fast, why = prove(changed(tmp_path / "hf", change), TEXTS)
    assert fast is None and message in why


def test_models_that_gigatoken_cannot_express_keep_their_library(tmp_path):
    fast, why = prove(piece_model(tmp_path / "spm", model_type="unigram"), TEXTS)
    assert fast is None
    assert "own library: only BPE sentencepiece models are supported" in why and "\n" not in why


def real_tokenizers():
    folder = os.environ.get("POSE_TOKENIZERS")
    return sorted(path for path in Path(folder).iterdir() if path.is_dir()) if folder else []


@pytest.mark.skipif(not real_tokenizers(), reason="POSE_TOKENIZERS names no folder of tokenizers")
@pytest.mark.parametrize("folder", real_tokenizers(), ids=lambda path: path.name)
def test_real_tokenizers_keep_their_ids(folder):
    kind = "HuggingFace" if (folder / "tokenizer.json").exists() else "SentencePiece"
    tokenizer = build_tokenizer(f"{kind}Tokenizer", folder)
    fast, why = prove(tokenizer, TEXTS)
    assert fast, why
    characters = [chr(c) for c in range(0x80, 0x20000) if unicodedata.category(chr(c)) != "Cs"]
    texts = [f"ab{c} c{c}{c}d 1{c}\n{c}" for c in characters[::37]]
    for text, ids, own in zip(
        texts, fast.tokenize_batch(texts), tokenizer.tokenize_batch(texts), strict=True
    ):
        assert np.array_equal(ids, own), text
    holds_on(st.text(max_size=40), tokenizer, fast, 100)


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
