"""Control tokens in texts against the tokenizers' own libraries; the token that ends a document."""

import dataclasses
import json
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import AddedToken, Tokenizer, models

from pose_megatron.preprocessing import readers
from pose_megatron.preprocessing.control_tokens import ControlTokens
from pose_megatron.preprocessing.preprocess import PreprocessingJob, preprocess
from tests import byte_level

STDLIB = Path(sysconfig.get_path("stdlib"))
CODE = [(STDLIB / f"{name}.py").read_text("utf-8")[:9000] for name in ("argparse", "heapq", "ast")]
CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    CODE[0],
    "Turns end with <|im_end|> and documents with <|endoftext|><|im_end|>.",
    "no <|im_end or <|im_end |>",
    "sentencepiece's own: </s> <s> <unk> 日",
    CODE[1] + "<|im_start|>x",
    "",
]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A folder as of a chat model: eos ends turns."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = byte_level.train(CODE, 500, special=[])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CHAT])
    tokenizer.add_tokens(["<think>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": "{{ '<|im_start|>' + message + '<|im_end|>' }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def train_pieces(folder, **symbols):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        max_sentence_length=1 << 20,
        minloglevel=2,
        **symbols,
    )
    model = str(folder / "tokenizer.model")
    return folder, sentencepiece.SentencePieceProcessor(model_file=model)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """sentencepiece takes the symbols whole from texts."""
    return train_pieces(tmp_path_factory.mktemp("whole"), user_defined_symbols=[*CHAT, "\n", "  "])


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """The same model, but sentencepiece does not look for the symbols in texts."""
    return train_pieces(
        tmp_path_factory.mktemp("apart"),
        control_symbols=CHAT,
        user_defined_symbols=["\n", "  "],
    )


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PART_BYTES", 6000)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "c.jsonl").write_text("\n" + rows * 2)  # the first line is blank
    return PreprocessingJob([str(tmp_path / "c.jsonl")], str(tmp_path / "out" / "c"), "", "")


def run(job, **changes):
    """(token ids, summary)"""
    job = dataclasses.replace(job, overwrite=True, **changes)
    summary = preprocess(job)
    ids = np.fromfile(f"{job.output_prefix}_text_document.bin", np.uint16)
    return ids.tolist(), summary


def flat(documents, eod):
    return [i for ids in [*documents, *documents] if ids for i in [*ids, eod]]


@pytest.mark.parametrize("library", ["auto", "own"])
@pytest.mark.parametrize("workers", [1, 2])
def test_hugging_face_tokens_are_transformers_kept_or_split(job, chat, library, workers, capsys):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(chat)
    changes = {
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(chat),
        "append_eod": True,
        "tokenizer_library": library,
        "workers": workers,
    }
    counts = {"<|im_end|>": 4, "<|endoftext|>": 2, "<|im_start|>": 2}
    for handling, split in (("keep", False), ("split", True)):
        ids, summary = run(job, control_tokens_in_text=handling, **changes)
        expected = [
            theirs.encode(text, add_special_tokens=False, split_special_tokens=split)
            for text in TEXTS
        ]
        assert ids == flat(expected, theirs.eos_token_id)
        assert summary["control_tokens_in_text"] == {
            "handling": handling,
            "kept": {} if split else counts,
            "split": counts if split else {},
        }
        assert ("with gigatoken" in capsys.readouterr().err) == (library == "auto")
    plain, _ = run(job, **changes)
    assert plain == run(job, control_tokens_in_text="keep", **changes)[0]  # the default


def test_sentencepiece_tokens_are_its_own_kept_or_split(job, pieces, apart):
    whole, apart = pieces, apart[1]
    assert [whole[1].id_to_piece(i) for i in range(400)] == [
        apart.id_to_piece(i) for i in range(400)
    ]
    counts = {"<|im_end|>": 4, "<|endoftext|>": 2, "<|im_start|>": 2}
    never = {"</s>": 2, "<s>": 2, "<unk>": 2}  # sentencepiece takes them for ordinary text
    changes = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(whole[0])}
    for library in ("auto", "own"):
        for handling, own, kept, split in (
            ("keep", whole[1], counts, never),
            ("split", apart, {}, counts | never),
        ):
            ids, summary = run(
                job,
                control_tokens_in_text=handling,
                append_eod=True,
                tokenizer_library=library,
                **changes,
            )
            assert ids == flat(own.encode(TEXTS), own.eos_id())
            found = summary["control_tokens_in_text"]
            assert (found["kept"], found["split"]) == (kept, split)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_fail_names_file_line_and_token_and_leaves_nothing(
    job, chat, pieces, tmp_path, workers, on_error
):
    changes = {
        "control_tokens_in_text": "fail",
        "workers": workers,
        "on_error": on_error,
        "append_eod": True,
    }
    way_out = "take it out, or choose --control-tokens-in-text keep or split"
    path = tmp_path / "c.parquet"
    parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=2)
    for kind, model in (
        ("HuggingFaceTokenizer", chat),
        ("SentencePieceTokenizer", pieces[0]),
    ):
        changes |= {"tokenizer_type": kind, "tokenizer_model": str(model)}
        job = dataclasses.replace(job, output_prefix=str(tmp_path / kind / "c"))
        message = rf"c\.jsonl:3: control token <\|im_end\|> in the text of 'text'; {way_out}"
        with pytest.raises(ValueError, match=message):
            run(job, **changes)
        with pytest.raises(ValueError, match=r"c\.parquet:2: control token <\|im_end\|> in the"):
            run(job, input=[str(path)], **changes)
        left = Path(job.output_prefix).parent.iterdir()
        assert {path.name for path in left} <= {"c.partial"}
        ordinary = tmp_path / "ordinary.jsonl"
        ordinary.write_text("".join(json.dumps({"text": text}) + "\n" for text in CODE))
        ids, summary = run(job, input=[str(ordinary)], **changes)
        assert summary["control_tokens_in_text"] == {"handling": "fail", "kept": {}, "split": {}}
        assert (
            ids
            == run(job, input=[str(ordinary)], **changes | {"control_tokens_in_text": "keep"})[0]
        )
    ordinary.write_text(json.dumps({"text": "a </s>"}))
    with pytest.raises(ValueError, match=r"ordinary\.jsonl:1: control token </s> in the text"):
        run(job, input=[str(ordinary)], **changes)


def test_what_failed_goes_on_as_another_handling(job, chat, capsys):
    job = dataclasses.replace(
        job, tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(chat), append_eod=True
    )
    with open(job.input[0], "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in [*CODE, *TEXTS])
    for handling, how in (("keep", "kept"), ("split", "split")):
        with pytest.raises(ValueError, match=r"c\.jsonl:5: control token"):
            preprocess(dataclasses.replace(job, control_tokens_in_text="fail"))
        capsys.readouterr()
        went_on = dataclasses.replace(job, control_tokens_in_text=handling)
        summary = preprocess(went_on)
        assert "going on after" in capsys.readouterr().err
        assert sum(summary["control_tokens_in_text"][how].values()) == 4
        written = Path(f"{job.output_prefix}_text_document.bin").read_bytes()
        ids, _ = run(went_on)
        assert np.frombuffer(written, np.uint16).tolist() == ids
        for path in Path(job.output_prefix).parent.iterdir():
            path.unlink()


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "SentencePieceTokenizer"])
def test_the_token_that_ends_a_document_is_said_and_chosen(job, chat, pieces, kind, capsys):
    if kind == "HuggingFaceTokenizer":
        folder, own = chat, Tokenizer.from_file(str(chat / "tokenizer.json"))
        of, ids = own.token_to_id, [own.encode(text).ids for text in TEXTS]
        eos, hint = "<|im_end|>", "in its chat template it ends turns, and --eod-token chooses"
    else:
        folder, own = pieces
        of, ids, eos, hint = own.piece_to_id, own.encode(TEXTS), "</s>", "end-of-sequence token\n"
    changes = {"tokenizer_type": kind, "tokenizer_model": str(folder), "append_eod": True}
    for token, eod in ((None, eos), ("<|endoftext|>",) * 2, (str(of("<|im_start|>")), CHAT[1])):
        found, summary = run(job, eod_token=token, **changes)
        assert found == flat(ids, of(eod))
        assert (summary["eod_token"], summary["eod_id"]) == (eod, of(eod))
        said = capsys.readouterr().err
        assert f"each document ends with {eod} (id {of(eod)}), " in said
        assert (hint in said) == (token is None)
    for wrong in ("<|none|>", "100000", "-1", "", "²²²"):
        with pytest.raises(ValueError, match="^--eod-token .*: not a token of .*<.im_start.>"):
            run(job, eod_token=wrong, **changes)
    with pytest.raises(ValueError, match="--eod-token <s> has no meaning without --append-eod"):
        run(job, eod_token="<s>", **changes | {"append_eod": False})
    found, summary = run(job, **changes | {"append_eod": False})
    assert found == [i for text in ids * 2 for i in text] and summary["eod_token"] is None


def test_a_template_beside_the_tokenizer_tells_that_eos_ends_turns(job, chat, tmp_path, capsys):
    changes = {"tokenizer_type": "HuggingFaceTokenizer", "append_eod": True}
    (tmp_path / "tokenizer.json").write_bytes((chat / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    for template, told in (("", False), ("{{ m }}<|im_end|>", True), ("{{ eos_token }}", False)):
        (tmp_path / "chat_template.jinja").write_text(template)
        run(job, tokenizer_model=str(tmp_path), **changes)
        assert ("it ends turns" in capsys.readouterr().err) == told


WORDS = st.text("<|>ab.[\\", min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(st.sets(WORDS, max_size=8), st.lists(WORDS | st.sampled_from("x ")).map("".join))
def test_what_is_found_is_what_tokenizers_finds(tokens, text):
    ours = ControlTokens(dict.fromkeys(tokens, 0))
    theirs = Tokenizer(models.WordLevel({"": 0}, unk_token=""))
    theirs.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
    assert ours.written(text) == [token for token in theirs.encode(text).tokens if token]
