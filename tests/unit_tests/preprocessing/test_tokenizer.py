"""Ids against sentencepiece and transformers, texts back again, bad files."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, processors

from pose_megatron.preprocessing import tokenizer_training
from pose_megatron.preprocessing.tokenizer import build_tokenizer, replace_surrogates
from tests import byte_level

ROOT = Path(__file__).parents[3]
STDLIB = Path(sysconfig.get_path("stdlib"))
TEXTS = [(STDLIB / name).read_text("utf-8") for name in ("argparse.py", "heapq.py", "textwrap.py")]
HARD = ["", " ", "  a\n\n\tb  ", "naïve 日本 😀", "a\0b", "</s>x<s>", "\r\n"]


@pytest.fixture(scope="module")
def spm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spm")
    tokenizer_training.write_folder(tokenizer_training.train(TEXTS, 512, 1, 0.9995), folder)
    return folder


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """A byte-level BPE that adds <bos> and cuts at 5 tokens unless told otherwise."""
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = byte_level.train(TEXTS, 400, ["<bos>", "<eos>"])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["ArgumentParser"])
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 0)])
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": {"content": "<eos>", "__type": "AddedToken"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_sentencepiece_ids_are_sentencepieces(spm_folder):
    ours = build_tokenizer("SentencePieceTokenizer", spm_folder)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(spm_folder / "tokenizer.model"))
    texts = TEXTS + HARD
    assert ours.tokenize_batch(texts) == [theirs.encode_as_ids(text) for text in texts]
    assert ours.tokenize(TEXTS[0]) == theirs.encode_as_ids(TEXTS[0])
    assert [ours.detokenize(ours.tokenize(text)) for text in texts] == texts
    assert (ours.vocab_size, ours.bos, ours.eod, ours.pad) == (512, 1, 2, None)
    assert [f.name for f in ours.files] == [
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_hugging_face_ids_are_transformers_without_special_tokens(hf_folder):
    from transformers import AutoTokenizer

    ours = build_tokenizer("HuggingFaceTokenizer", hf_folder)
    theirs = AutoTokenizer.from_pretrained(hf_folder)
    texts = [*TEXTS, *HARD, "<eos> ArgumentParser"]
    assert ours.tokenize_batch(texts) == [
        theirs.encode(text, add_special_tokens=False, truncation=False) for text in texts
    ]
    assert ours.tokenize("<eos>") == [ours.eod] == [theirs.eos_token_id]
    assert [ours.detokenize(ours.tokenize(text)) for text in TEXTS + HARD] == TEXTS + HARD
    assert (ours.vocab_size, ours.bos, ours.pad) == (len(theirs), theirs.bos_token_id, None)
    from_file = build_tokenizer("HuggingFaceTokenizer", hf_folder / "tokenizer.json")
    assert from_file.unique_identifiers == ours.unique_identifiers
    assert ours.unique_identifiers["class"].endswith(".HuggingFaceTokenizer")
    assert ours.unique_identifiers["tokenizer_path"] == str(hf_folder / "tokenizer.json")


@pytest.mark.parametrize("name", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_both_forms_of_a_trained_tokenizer_agree_and_take_any_string(spm_folder, name):
    tokenizer = build_tokenizer(name, spm_folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(spm_folder / "tokenizer.model"))

    @settings(max_examples=200, deadline=None)
    @given(
        st.text(st.characters(exclude_categories=()), max_size=30)  # surrogates too
        | st.text(st.sampled_from("ab<s>/ \n\t_-=1"), max_size=60)
    )
    def holds(text):
        clean = replace_surrogates(text)
        assert tokenizer.tokenize(text) == model.encode_as_ids(clean)
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == clean.replace("▁", " ")

    holds()


def test_surrogates():
    assert replace_surrogates("a\ud800b\udfff") == "a\ufffdb\ufffd"
    assert replace_surrogates("\ud83d\ude00") == "😀"  # a pair is one character
    assert replace_surrogates("plain ✓") == "plain ✓"


def test_the_ids_that_end_a_sentence_come_from_the_tokenizer(spm_folder, hf_folder):
    from transformers import AutoTokenizer

    ours = build_tokenizer("SentencePieceTokenizer", spm_folder)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(spm_folder / "tokenizer.model"))
    pieces = [theirs.id_to_piece(i) for i in range(512)]
    for ending in (".", ":", ")"):
        assert ours.ids_ending(ending) == [
            i
            for i, piece in enumerate(pieces)
            if piece.endswith(ending) or piece == f"<0x{ord(ending):02X}>"
        ]
    assert all(theirs.decode([i]).endswith("\n") for i in ours.ids_ending("\n"))
    assert ours.ids_ending("\n") and ours.ids_ending("</s>") == [ours.eod]

    ours = build_tokenizer("HuggingFaceTokenizer", hf_folder)
    theirs = AutoTokenizer.from_pretrained(hf_folder)
    for ending in (".", "\n", "<eos>", "Parser"):
        assert (
            ours.ids_ending(ending)
            == [i for i in range(ours.vocab_size) if theirs.decode([i]).endswith(ending)]
            != []
        )
    assert ours.ids_ending("no such ending") == []


@pytest.mark.parametrize(
    "kind, model, message",
    [
        ("GPT2BPETokenizer", "hf", "GPT2BPETokenizer: unknown"),
        ("SentencePieceTokenizer", "nowhere", "nowhere: no such file"),
        ("SentencePieceTokenizer", "hf", "no tokenizer.model; use --tokenizer-type Hugging"),
        ("SentencePieceTokenizer", "hf/tokenizer.json", "not a sentencepiece model"),
        ("HuggingFaceTokenizer", "empty", "no tokenizer.json; make one"),
        ("HuggingFaceTokenizer", "hf/tokenizer_config.json", "not a Hugging Face tokenizer"),
    ],
)
def test_bad_tokenizers(tmp_path, hf_folder, kind, model, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hf").symlink_to(hf_folder)
    with pytest.raises(ValueError, match=message):
        build_tokenizer(kind, tmp_path / model)


def test_bad_tokenizer_config(tmp_path, hf_folder):
    (tmp_path / "tokenizer.json").write_bytes((hf_folder / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        _ = build_tokenizer("HuggingFaceTokenizer", tmp_path).eod
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"eos_token": "not in the vocabulary"}')
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        _ = build_tokenizer("HuggingFaceTokenizer", tmp_path).eod
    config.write_text('{"added_tokens_decoder": {"1234": {"content": "<new>"}}}')
    with pytest.raises(ValueError, match="lacks token '<new>' with id 1234"):
        build_tokenizer("HuggingFaceTokenizer", tmp_path)
    for wrong in ([], "words", {"x": "<new>"}, {"1": 2}, {"1": {"id": 1}}, [[1, 2, 3]]):
        config.write_text(json.dumps({"added_tokens_decoder": wrong, "eos_token": "<eos>"}))
        if wrong:
            with pytest.raises(ValueError, match=r"added_tokens_decoder in tokenizer_config\.json"):
                build_tokenizer("HuggingFaceTokenizer", tmp_path)
        else:
            build_tokenizer("HuggingFaceTokenizer", tmp_path)
    for wrong in (3, ["<eos>"], {"id": 1}, True):
        config.write_text(json.dumps({"eos_token": wrong}))
        with pytest.raises(ValueError, match=r"tokenizer_config\.json has .* for a token"):
            build_tokenizer("HuggingFaceTokenizer", tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        build_tokenizer("HuggingFaceTokenizer", tmp_path)


def test_import_loads_no_tokenizer_library():
    program = (
        "import sys, pose_megatron.preprocessing.tokenizer\n"
        "print(*{'sentencepiece', 'tokenizers', 'transformers', 'zstandard'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True)
    assert (result.returncode, result.stdout) == (0, b"\n"), result.stderr


def test_training_does_not_depend_on_threads_and_knows_code():
    pieces, others = (
        sentencepiece.SentencePieceProcessor(
            model_proto=tokenizer_training.train(TEXTS, 600, threads, 0.9995)
        )
        for threads in (1, 3)
    )
    assert all(pieces.id_to_piece(i) == others.id_to_piece(i) for i in range(600))
    assert len(pieces.encode(" " * 8)) == 1
    assert len(pieces.encode("):\n")) == 1
    assert [pieces.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]


@pytest.mark.parametrize("size, message", [(300, "smaller than required"), (10**6, "too high")])
def test_training_refuses_sizes_that_do_not_fit(size, message):
    with pytest.raises(ValueError, match=f"--vocab-size {size}: .*{message}"):
        tokenizer_training.train(TEXTS, size, 1, 0.9995)


@pytest.mark.parametrize(
    "flag, value, texts",
    [
        ("--character-coverage", 99.95, TEXTS),
        ("--character-coverage", 0.5, TEXTS),
        ("--character-coverage", float("nan"), TEXTS),
        ("--threads", 5000, TEXTS),
        ("--vocab-size", 3, TEXTS),
        ("--vocab-size", 1 << 31, TEXTS),
        ("--input", None, [""]),  # sentencepiece gives no reason
    ],
)
def test_training_blames_the_flag_that_is_wrong(flag, value, texts):
    given = {"--vocab-size": 400, "--threads": 1, "--character-coverage": 0.9995}
    if value is not None:
        given[flag] = value
    with pytest.raises(ValueError) as caught:
        tokenizer_training.train(texts, *given.values())
    message = str(caught.value)
    assert message.startswith(flag if value is None else f"{flag} {value} must be from ")
    assert " ()" not in message and not any(other in message for other in given.keys() - {flag})


def test_check_fails_loudly_when_the_forms_differ(tmp_path, spm_folder):
    for file in spm_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert tokenizer_training.check(tmp_path, TEXTS) > 0
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"].reverse()
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"tokenizer\.model and tokenizer\.json differ on"):
        tokenizer_training.check(tmp_path, TEXTS)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=20)), st.integers(1, 100))
def test_sample_keeps_order_and_size(texts, size):
    kept = tokenizer_training.sample(iter(texts), size)
    assert kept == tokenizer_training.sample(iter(texts), size)
    rest = iter(texts)
    assert all(text in rest for text in kept)  # a subsequence
    total = sum(len(text.encode()) for text in kept)
    assert total <= size or len(kept) == 1
    if sum(len(text.encode()) for text in texts) <= size:
        assert kept == texts
