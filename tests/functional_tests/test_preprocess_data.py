"""The corpus tools as a user starts them: files against stock megatron-core, and every error."""

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import sysconfig
import time
import warnings
from collections import Counter
from itertools import chain
from pathlib import Path

import pyarrow
import pytest
import sentencepiece
import zstandard
from pyarrow import parquet
from tokenizers import Tokenizer

warnings.simplefilter("ignore")
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from tests.byte_level import train
from tests.processes import PATIENCE

ROOT = Path(__file__).parents[2]
STDLIB = Path(sysconfig.get_path("stdlib"))
NAMES = ("argparse", "ast", "heapq", "inspect", "textwrap", "tarfile", "typing", "zipfile")
# Python 3.12 made a package of zipfile.
FILES = [(STDLIB / f"{name}.py", STDLIB / name / "__init__.py") for name in NAMES]
PATHS = [next(path for path in paths if path.is_file()) for paths in FILES]
TEXTS = [path.read_text("utf-8") for path in PATHS] * 2
VOCAB_SIZE = 800
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(tool, *arguments):
    return [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]


def call(tool, *arguments):
    return subprocess.run(
        command(tool, *arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE
    )


def jsonl(rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The folder that train_tokenizer.py writes."""
    folder = tmp_path_factory.mktemp("corpus")
    corpus = folder / "corpus.jsonl"
    corpus.write_bytes(jsonl({"text": text} for text in TEXTS))
    result = call(
        "train_tokenizer.py",
        "--input",
        corpus,
        "--output-dir",
        folder / "tokenizer",
        "--vocab-size",
        VOCAB_SIZE,
    )
    assert result.returncode == 0, result.stderr
    assert f"{VOCAB_SIZE} tokens" in result.stdout and "bytes/token" in result.stdout
    return folder / "tokenizer"


@pytest.fixture(scope="module")
def pieces(tokenizer):
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))


def build(prefix, documents):
    """Files that stock megatron-core writes for documents of token ids, as Megatron-LM calls it."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(VOCAB_SIZE))
    for ids in documents:
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def files(prefix):
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def test_trained_folder_loads_in_transformers_with_the_same_ids(tokenizer, pieces):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer)
    unseen = (STDLIB / "difflib.py").read_text("utf-8")
    assert theirs.encode(unseen) == pieces.encode(unseen)
    assert theirs.decode(theirs.encode(unseen)) == unseen
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (1, 2, VOCAB_SIZE)
    assert sorted(path.name for path in tokenizer.iterdir()) == [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A Hugging Face byte-level BPE as transformers loads it."""
    folder = tmp_path_factory.mktemp("byte_level")
    model = train(TEXTS, VOCAB_SIZE)
    model.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_two_workers_write_megatrons_files_from_any_kind_of_file(tmp_path, tokenizer, pieces):
    # more than one part per file, so that two workers could disorder them
    texts = TEXTS * 2
    for i, path in enumerate(("a.jsonl", "b.jsonl.gz", "c.jsonl.zst")):
        content = jsonl({"text": text} for text in texts[i * 8 : i * 8 + 8])
        if path.endswith("gz"):
            content = gzip.compress(content)
        if path.endswith("zst"):
            content = zstandard.ZstdCompressor().compress(content)
        (tmp_path / path).write_bytes(content)
    parquet.write_table(
        pyarrow.table({"text": texts[24:]}), tmp_path / "d.parquet", row_group_size=3
    )
    prefix = tmp_path / "new" / "folder" / "corpus"
    result = call(
        "preprocess_data.py",
        "--input",
        tmp_path / "[a-d].*",
        "--output-prefix",
        prefix,
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--tokenizer-model",
        tokenizer,
        "--append-eod",
        "--workers",
        2,
        "--log-interval",
        2,
    )
    assert result.returncode == 0, result.stderr
    expected = build(tmp_path / "stock", [[*pieces.encode(text), 2] for text in texts])
    assert files(f"{prefix}_text_document") == expected
    assert "tokenizing with gigatoken: its ids are those of the tokenizer's own" in result.stderr
    assert "MB/s" in result.stderr and "tokens/s" in result.stderr and "left" in result.stderr
    assert f"{len(texts)} documents" in result.stdout
    dataset = IndexedDataset(f"{prefix}_text_document")
    assert [pieces.decode(dataset[i].tolist()) for i in range(len(dataset))] == texts
    assert sorted(path.name for path in prefix.parent.iterdir()) == [
        "corpus_summary.json",
        "corpus_text_document.bin",
        "corpus_text_document.idx",
    ]


def inspect_token_files(joined, preprocessed):
    """Their counts, and whether a bit has changed since they were written."""
    inspect = "checkpoint/checkpoint_inspector.py"
    result = call(inspect, joined, preprocessed)  # the latter is --output-prefix, without the key
    assert result.stdout.count("; as written\n") == 2, result.stderr
    assert f"{joined}.bin/.idx: 16 documents, " in result.stdout
    assert f"{preprocessed}_text_document.bin/.idx: " in result.stdout
    file = Path(f"{joined}.bin")
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    result = call(inspect, joined)
    assert result.returncode == 1 and f"{file} is damaged: its CRC-32 is" in result.stderr
    Path(f"{joined}_summary.json").unlink()
    result = call(inspect, "--json", f"{joined}.idx")
    assert json.loads(result.stdout)["as_written"] is None
    result = call(inspect, "--diff", joined, preprocessed)
    assert result.returncode == 1 and "token files are not compared" in result.stderr
    file.write_bytes(content)


def test_shards_joined_are_the_corpus_preprocessed_at_once(tmp_path, byte_level):
    """With a Hugging Face tokenizer; either library, and transformers', give the same bytes."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(byte_level)
    expected = build(
        tmp_path / "stock",
        [[*theirs.encode(text, add_special_tokens=False), theirs.eos_token_id] for text in TEXTS],
    )
    for name, texts in (("all", TEXTS), ("a", TEXTS[:5]), ("b", TEXTS[5:])):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl({"text": text} for text in texts))
        library = "own" if name == "a" else "auto"
        result = call(
            "preprocess_data.py",
            "--input",
            tmp_path / f"{name}.jsonl",
            "--output-prefix",
            tmp_path / "shards" / name,
            "--append-eod",
            "--tokenizer-type",
            "HuggingFaceTokenizer",
            "--tokenizer-model",
            byte_level,
            "--tokenizer-library",
            library,
        )
        assert result.returncode == 0, result.stderr
        assert ("with gigatoken" in result.stderr) == (library == "auto")
    assert files(tmp_path / "shards" / "all_text_document") == expected
    shards = [tmp_path / "shards" / f"{name}_text_document" for name in "ab"]
    flags = ("--output-prefix", tmp_path / "new" / "joined")
    result = call("merge_datasets.py", "--input", shards[0], f"{shards[1]}.idx", *flags)
    assert result.returncode == 0 and "16 documents" in result.stdout, result.stderr
    assert files(tmp_path / "new" / "joined") == expected
    names = {f"joined{end}" for end in (".bin", ".idx", "_summary.json")}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names
    inspect_token_files(tmp_path / "new" / "joined", tmp_path / "shards" / "a")
    (tmp_path / "none").mkdir()
    for inputs, prefix, message in (
        (shards, flags[1], "joined.bin exists; choose another, or replace it with --over"),
        ([tmp_path / "none"], tmp_path / "x", "none: the folder has no .idx file"),
        (shards, shards[0], "is one of the shards"),
        ([tmp_path / "nowhere"], tmp_path / "x", "nowhere.bin: no such file"),
    ):
        result = call("merge_datasets.py", "--input", *inputs, "--output-prefix", prefix)
        assert result.returncode == 1 and message in result.stderr.splitlines()[-1], result.stderr
    assert files(tmp_path / "new" / "joined") == expected
    (tmp_path / "shards" / "all_text_document.idx").unlink()
    result = call("merge_datasets.py", "--input", tmp_path / "shards", *flags, "--overwrite")
    assert result.returncode == 0 and files(tmp_path / "new" / "joined") == expected


def test_one_worker_overwrites_skips_lines_and_counts(tmp_path, tokenizer, pieces):
    rows = [
        {"text": TEXTS[0], "title": "one"},
        {"text": "", "title": "two"},
        {"text": "nul \0 and \ud800 </s>", "title": "three"},
    ]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(
        jsonl(rows[:1]) + b"\nno json\n" + jsonl(rows[1:]) + jsonl([{"text": "x"}, {"text": "y"}])
    )
    prefix = tmp_path / "corpus"
    flags = (
        "--input",
        corpus,
        "--output-prefix",
        prefix,
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        tokenizer,
        "--json-keys",
        "text",
        "title",
        "--on-error",
        "skip",
    )
    earlier = Path(f"{prefix}_title_document.idx")
    earlier.write_text("an earlier run's")
    refused = call("preprocess_data.py", *flags)
    assert refused.returncode == 1 and f"{earlier} exists" in refused.stderr
    assert "--overwrite" in refused.stderr and "Traceback" not in refused.stderr
    assert earlier.read_text() == "an earlier run's"
    result = call("preprocess_data.py", *flags, "--overwrite")
    assert result.returncode == 0, result.stderr
    texts = [TEXTS[0], "", "nul \0 and \ufffd </s>"]
    # a text without tokens is no sequence, yet counts in Megatron's list of documents
    ids = {
        "text": [pieces.encode(text) for text in texts],
        "title": [pieces.encode(row["title"]) for row in rows],
    }
    for key, documents in ids.items():
        assert files(f"{prefix}_{key}_document") == build(tmp_path / "stock", documents)
    summary = json.loads(Path(f"{prefix}_summary.json").read_text())
    assert summary["documents"] == 5 and summary["empty_documents"] == 1
    assert summary["tokens"] == sum(map(len, chain(*ids.values())))
    assert summary["bytes"] == corpus.stat().st_size and summary["lines"] == 6
    assert summary["texts_with_replaced_surrogates"] == 1 and summary["seconds"] > 0
    assert summary["skipped"] == {"not JSON": 1, "lacks key 'title'": 2}
    assert [line.split(": ")[0] for line in summary["first_skipped"]] == [
        f"{corpus}:{n}" for n in (3, 6, 7)
    ]
    assert summary["outputs"]["title"]["documents"] == 3
    lengths = Counter(len(d).bit_length() - 1 for d in ids["text"] if d)
    assert summary["outputs"]["text"]["lengths"] == {
        f"{1 << i}-{(2 << i) - 1}": n for i, n in sorted(lengths.items())
    }
    for note in (
        "1 lines skipped (not JSON)",
        "1 empty documents",
        "1 texts had lone surrogates",
        "1 control tokens written in texts, split as ordinary text (</s> 1)",
    ):
        assert note in result.stdout


def test_lines_of_ten_megabytes(tmp_path, byte_level):
    """Far longer than what a worker reads at a time; the last has no newline."""
    # no piece crosses from ";" to a letter: the ids of the whole are those of its units
    unit, sizes = "x" + "\0".join(TEXTS)[:500_000] + ";", (1, 20, 1, 4)
    rows = ({"text": f"{i};" + unit * n} for i, n in enumerate(sizes))
    (tmp_path / "c.jsonl").write_bytes(jsonl(rows).rstrip())
    result = call(
        "preprocess_data.py",
        "--input",
        tmp_path / "c.jsonl",
        "--output-prefix",
        tmp_path / "c",
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        byte_level,
        "--workers",
        2,
    )
    assert result.returncode == 0, result.stderr
    own = Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    dataset, ids = IndexedDataset(str(tmp_path / "c_text_document")), own.encode(unit).ids
    assert [dataset[i].tolist() for i in range(len(dataset))] == [
        own.encode(f"{i};").ids + ids * n for i, n in enumerate(sizes)
    ]


GOOD = b'{"text": "a b c"}\n'
BAD_INPUT = [
    ("c.jsonl", GOOD * 3 + b"{oops\n", (), "c.jsonl:4: not JSON"),
    ("c.jsonl", GOOD + b'{"body": "a"}\n', (), "c.jsonl:2: lacks key 'text' (it has body)"),
    ("c.jsonl", GOOD + b'\n{"text": 3}\n', (), "c.jsonl:3: value of 'text' is not a string"),
    ("c.jsonl", GOOD * 5000 + b"{oops\n", ("--workers", "2"), "c.jsonl:5001: not JSON"),
    ("c.jsonl", b"", (), "no document with tokens under key 'text' (0 lines"),
    ("c.jsonl", b'{"text": ""}\n', (), "(1 lines, 1 of them empty texts, 0 skipped)"),
    ("c.txt", GOOD, (), "c.txt: unknown extension, use one of .jsonl"),
    ("c.jsonl.gz", GOOD, (), "c.jsonl.gz: broken gzip file"),
    ("c.jsonl", None, (), "c.jsonl: no such file"),
    ("c.jsonl", GOOD, ("--tokenizer-model", "nowhere"), "--tokenizer-model nowhere: no such file"),
    ("c.jsonl", GOOD, ("--workers", "0"), "--workers: must be at least 1, not 0"),
    ("c.jsonl", GOOD, ("--tokenizer-type", "Mine"), "--tokenizer-type: invalid choice: 'Mine'"),
    ("c.jsonl", GOOD, ("--output-prefix", "/dev/null/x"), "/dev/null"),
    ("c.json", b"[" + GOOD + b"]", ("--on-error", "skip"), "c.json: is one JSON array, where JSON"),
    ("c.jsonl", GOOD, ("--append-eod", "--eod-token", "<e>"), "--eod-token <e>: not a token of"),
    ("c.jsonl", GOOD, ("--eod-token", "</s>"), "--eod-token </s> has no meaning without --append"),
    (
        "c.jsonl",
        GOOD + b'{"text": "a</s>"}\n',
        ("--control-tokens-in-text", "fail"),
        "c.jsonl:2: control token </s> in the text of 'text'; take it out, or choose",
    ),
]


@pytest.mark.parametrize("name, content, flags, message", BAD_INPUT)
def test_bad_input_ends_in_one_sentence(tmp_path, tokenizer, name, content, flags, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = call(
        "preprocess_data.py",
        "--input",
        tmp_path / name,
        "--output-prefix",
        tmp_path / "out" / "corpus",
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--tokenizer-model",
        tokenizer,
        *flags,
    )
    assert result.returncode in (1, 2)
    assert message in result.stderr.splitlines()[-1], result.stderr
    assert "Traceback" not in result.stderr and not result.stdout
    assert not list(tmp_path.glob("out/*"))


def test_no_end_of_sequence_token(tmp_path, tokenizer):
    (tmp_path / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    (tmp_path / "c.jsonl").write_bytes(GOOD)
    result = call(
        "preprocess_data.py",
        "--input",
        tmp_path / "c.jsonl",
        "--output-prefix",
        tmp_path / "out",
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        tmp_path,
        "--append-eod",
    )
    assert result.returncode == 1 and "no end-of-sequence token" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "tokenizer.json"]


def test_stopped_runs_go_on_to_the_same_bytes(tmp_path, tokenizer):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(jsonl({"text": text} for text in TEXTS) * 10)
    runs = {}
    for stop, workers in ((signal.SIGINT, 2), (signal.SIGTERM, 1), (signal.SIGKILL, 2)):
        folder = tmp_path / stop.name
        flags = (
            "--input",
            corpus,
            "--output-prefix",
            folder / "c",
            "--workers",
            workers,
            "--tokenizer-type",
            "SentencePieceTokenizer",
            "--tokenizer-model",
            tokenizer,
            "--log-interval",
            10**9,
            "--tokenizer-library",
            "own",
        )
        runs[stop] = (
            folder,
            flags,
            subprocess.Popen(
                command("preprocess_data.py", *flags),
                env=ENVIRONMENT,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            ),
        )
    for stop, (folder, _, process) in runs.items():
        deadline = time.monotonic() + PATIENCE
        while not any(p.stat().st_size > 1_000_000 for p in folder.glob("c.partial/0.bin")):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.02)
        if stop == signal.SIGINT:
            os.killpg(process.pid, stop)  # Ctrl-C reaches every process of the run
        else:
            process.send_signal(stop)
    for stop, (folder, _, process) in runs.items():
        _, error = process.communicate(timeout=PATIENCE)  # its workers, too, hold stderr
        left = {path.name for path in folder.iterdir()}
        assert left == {"c.partial"} | ({".c.owner"} if stop == signal.SIGKILL else set())
        if stop == signal.SIGKILL:
            assert process.returncode == -stop
        else:
            assert process.returncode == 130 and error.count("\n") == 1, error
            assert "interrupted, run it again to go on after" in error
    outcomes = set()
    for stop, (folder, flags, _) in runs.items():
        result = call("preprocess_data.py", *flags)
        assert result.returncode == 0, result.stderr
        assert "going on after" in result.stderr or stop == signal.SIGKILL
        assert len(list(folder.iterdir())) == 3
        summary = json.loads((folder / "c_summary.json").read_text())
        assert summary["documents"] == summary["lines"] == 160
        assert summary["bytes"] == corpus.stat().st_size
        outcomes.add(files(folder / "c_text_document"))
    assert len(outcomes) == 1


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(tmp_path, tokenizer, pieces):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(jsonl({"text": text} for text in TEXTS) * 4)
    flags = (
        "--input",
        corpus,
        "--output-prefix",
        tmp_path / "out" / "c",
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--tokenizer-model",
        tokenizer,
    )
    limit = 1_000_000  # bytes of one file: the second part does not fit
    result = subprocess.run(
        command("preprocess_data.py", *flags),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 1, result.stderr
    assert "c: File too large; make room and run it again to go on" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["c.partial"]
    result = call("preprocess_data.py", *flags)
    assert result.returncode == 0 and "going on after" in result.stderr, result.stderr
    expected = build(tmp_path / "stock", [pieces.encode(text) for text in TEXTS * 4])
    assert files(tmp_path / "out" / "c_text_document") == expected


@pytest.mark.parametrize(
    "name, content, flags, message",
    [
        ("c.jsonl", GOOD + b"{oops\n", (), "c.jsonl:2: not JSON"),
        ("c.jsonl", b'{"text": ""}\n', (), "no text to train on"),
        ("c.jsonl", GOOD, (), "--vocab-size 800: sentencepiece cannot train it"),
        ("c.jsonl", None, (), "c.jsonl: no such file"),
        ("c.jsonl", GOOD, ("--output-dir", "TRAINED"), "tokenizer_config.json exists"),
    ],
)
def test_bad_training_ends_in_one_sentence(tmp_path, tokenizer, name, content, flags, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    flags = [tokenizer if flag == "TRAINED" else flag for flag in flags]
    result = call(
        "train_tokenizer.py",
        "--input",
        tmp_path / name,
        "--output-dir",
        tmp_path / "out",
        "--vocab-size",
        VOCAB_SIZE,
        *flags,
    )
    assert result.returncode == 1 and message in result.stderr.splitlines()[-1], result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    "flag, value, range_of_it",
    [("--character-coverage", "99.95", "[0.98, 1]"), ("--threads", "5000", "[1, 1024]")],
)
def test_a_value_that_sentencepiece_would_refuse_is_named(tmp_path, flag, value, range_of_it):
    (tmp_path / "c.jsonl").write_bytes(GOOD)
    words = ["--input", tmp_path / "c.jsonl", "--output-dir", tmp_path / "out"]
    result = call("train_tokenizer.py", *words, "--vocab-size", VOCAB_SIZE, flag, value)
    assert result.returncode == 2
    assert f"argument {flag}: must be in {range_of_it}, not {value}" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tool", ["preprocess_data.py", "train_tokenizer.py", "merge_datasets.py"])
def test_help_ends_with_an_example(tool):
    result = call(tool, "--help")
    assert result.returncode == 0
    assert f"python tools/{tool} --input" in result.stdout.rpartition("example:")[2]
