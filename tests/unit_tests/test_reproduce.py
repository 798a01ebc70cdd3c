"""examples/reproduce: the commands of each profile, and what is made of their results."""

import json
import math
import random
import re
import shlex
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from pose_megatron.config import arguments
from pose_megatron.config.model import resolve_scaling
from pose_megatron.errors import ConfigError

FIRST_LOSS = 2.0
REACH = {"as it was": 64, "PoSE, no interpolation": 256, "PoSE, 3 chunks, no interpolation": 448}
COSTS = ("Seconds of a step", "Peak memory of a step, MiB")


@pytest.fixture
def modules(root, monkeypatch):
    """Its files, which import each other by name."""
    monkeypatch.syspath_prepend(str(root / "examples/reproduce"))
    import claims
    import experiments
    import profiles
    import recall
    import summary

    return claims, experiments, profiles, summary, recall


def dry_run(root, *flags):
    command = [sys.executable, root / "examples/reproduce/run.py", "--dry-run", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


@pytest.mark.parametrize(
    "profile, own, trainings",
    [
        ("cpu", [], 3 + 3 * 38),
        ("gpu", [], 3 + 3 * 38),
        ("paper", ["--model", "llama", "--train", "a", "--test", "b"], 29),
    ],
)
def test_every_command_is_one_that_the_tools_take(root, profile, own, trainings):
    done = dry_run(root, "--profile", profile, *own)
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    trained = [
        line[line.index("pretrain_pose.py") + 1 :] for line in lines if "pretrain_pose.py" in line
    ]
    assert len(trained) == trainings
    for words in trained:
        flags = arguments.parse(words)
        target = flags.model.max_position_embeddings or 64
        resolve_scaling(flags.model, target, 64, loaded=None)
    saved = [words[words.index("--save") + 1] for words in trained]
    assert len(set(saved)) == len(saved)
    loaded = [line[line.index("--load") + 1] for line in lines if "--context-lengths" in line]
    # what is measured was made before
    made = {*saved, *(line[line.index("--save-dir") + 1] for line in lines if "--save-dir" in line)}
    assert set(loaded) <= made
    programs = ["tools/evaluate_perplexity.py", "tools/checkpoint/convert.py"]
    if not own:
        programs.append("examples/reproduce/evaluate_recall.py")
    programs.append("benchmarks/full_length.py")
    for program in programs:
        known = subprocess.run(
            [sys.executable, program, "--help"], capture_output=True, text=True, cwd=root
        ).stdout
        flags = (w for line in lines if program in line for w in line if w[:2] == "--")
        used = {w.partition("=")[0] for w in flags}
        assert used and used <= set(re.findall(r"--[\w-]+", known))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--profile", "paper"], "--profile paper needs --model, --train and --test"),
        (["--model", "llama"], "--model, --train and --test belong together"),
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
    ],
)
def test_wrong_flags_are_named(root, flags, message):
    done = dry_run(root, *flags)
    assert done.returncode == 2 and message in done.stderr


def test_full_length_trains_on_as_many_tokens(root, modules):
    done = dry_run(root, "--profile", "cpu", "--tables", "table-1")
    tokens = set()
    for line in map(shlex.split, done.stdout.splitlines()):
        if "--pretrained-checkpoint" in line:
            sizes = ("--seq-length", "--global-batch-size", "--train-iters")
            tokens.add(math.prod(int(line[line.index(name) + 1]) for name in sizes))
    assert tokens == {64 * 64 * 150}


def made_up(folder, experiment, seed, lengths, loss, answered):
    """A run's results with losses of two documents around the given one; shares are known to
    `answered` either way. In each of 96 texts pairs that stand up to REACH back are recalled."""
    file = folder / f"{experiment.key}-{seed}.jsonl"
    recalled = [
        {
            "name": experiment.name,
            "metric": "passkey",
            "needle": "a pair",
            "needles": 8,
            "trials": 96,
            "context_length": n,
            "passkey": loss - FIRST_LOSS + 0.5,  # a share
            "low": loss - FIRST_LOSS + 0.5 - answered,
            "high": loss - FIRST_LOSS + 0.5 + answered,
            "answers": [
                [i / 8, (1 - i / 8) * n <= REACH.get(experiment.name, n), 0.1] for i in range(8)
            ]
            * 96,
        }
        for n in lengths
    ]
    lost = [
        {
            "name": experiment.name,
            "metric": "perplexity",
            "context_length": n,
            "loss": loss,
            "perplexity": math.exp(loss),
            "standard_error": 0.5,
            "documents": 2,
            "by_document": [loss - 0.001, loss + 0.001],
        }
        for n in lengths
    ]
    rows = recalled if experiment.recalls else lost
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def results(folder, modules, losses, answered=0.0001):
    """{file: experiment} of all of them; a name's loss where it is given."""
    _, experiments, profiles, *_ = modules
    profile = profiles.PROFILES["cpu"]
    found = {}
    for experiment in experiments.experiments(profile):
        for seed in profile.seeds if experiment.trained else (0,):
            loss = losses.get((experiment.table, experiment.name), FIRST_LOSS) + seed / 1000
            lengths = experiments.lengths(experiment.table, profile)
            found[made_up(folder, experiment, seed, lengths, loss, answered)] = experiment
    return profile, found


def test_every_claim_has_its_models_and_verdicts_follow_the_losses(tmp_path, modules):
    claims, _, _, summary, _ = modules
    named = {
        ("table-5", "3 chunks"): FIRST_LOSS - 0.1,
        ("table-5", "every token its own (random positions)"): FIRST_LOSS + 0.6,
        ("recipes", "CREAM"): FIRST_LOSS - 0.1,
        ("recipes", "LongRecipe"): FIRST_LOSS + 0.1,
        ("table-1", "random positions to 8 L"): FIRST_LOSS + 0.1,
        ("figure-2b", "PoSE, no interpolation"): FIRST_LOSS + 0.45,  # 95 % recalled
        ("figure-2b", "as it was"): FIRST_LOSS + 0.5,
    }
    profile, runs = results(tmp_path, modules, named)
    tables = summary.Tables(profile, runs)
    all_claims = list(claims.claims(profile))
    assert all(tables.decides(claim) for claim in all_claims)
    found = {claim.text: tables.verdict(claim).verdict for claim in all_claims}
    assert found["at 8 L three chunks are within 0.05 nats of two"] == "does not hold"
    random = "at 8 L random positions lose at least 0.5 nats more than two chunks"
    assert found[random] == "holds"
    assert found["beyond the paper: at 8 L, CREAM loses less than two chunks"] == "holds"
    assert (
        found["beyond the paper: at 8 L, LongRecipe loses less than two chunks"] == "does not hold"
    )
    assert found["PoSE to 8 L loses there less than random positions"] == "holds"
    assert found["PoSE to 16 L loses there at most 0.05 nats more than at L"] == "holds"
    assert found["the base model loses at least 0.5 nats more at 8 L than at L"] == "does not hold"
    pose = "PoSE, no interpolation: it misses"
    assert found[f"{pose} at most 10% of pairs at 8 L"] == "holds"
    assert found[f"beyond the paper: {pose} fewer of them than plain windows"] == "holds"
    assert found["PoSE, linear: it misses at most 10% of pairs at 8 L"] == "does not hold"
    text = "the base model misses at least 50% more of the pairs at 8 L than at L"
    assert found[text] == "does not hold"
    # by what they answer, of far pairs alone
    far = "the base model misses at least 80% more of the pairs over 2 L back than at L"
    assert found[far] == "holds"
    far = "no interpolation: it misses at most 10% of pairs over 7 L back"
    assert found[f"beyond the paper: PoSE, {far}"] == "does not hold"
    assert found[f"beyond the paper: PoSE to 10 L, {far}"] == "holds"
    assert len(found) == len(all_claims)


def test_rows_are_means_over_seeds_with_their_standard_errors(tmp_path, modules):
    profile, runs = results(tmp_path, modules, {})
    rows = list(modules[3].Tables(profile, runs).rows("table-4"))
    row = next(r for r in rows if (r["name"], r["context_length"]) == ("text uniform", 64))
    # of 2.001, 2.002 and 2.003
    assert row["loss"] == pytest.approx(2.002)
    assert row["standard_error"] == pytest.approx(0.001 / math.sqrt(3))
    assert row["perplexity"] == pytest.approx(math.exp(2.002))
    assert row["by_seed"] == pytest.approx([2.001, 2.002, 2.003])
    base = next(modules[3].Tables(profile, runs).rows("table-1"))
    assert (base["seeds"], base["standard_error"]) == (1, 0.5)  # over its documents


def test_what_is_recalled_is_a_mean_over_seeds(tmp_path, modules):
    named = {("figure-2b", "PoSE, linear"): FIRST_LOSS + 0.3}
    profile, runs = results(tmp_path, modules, named)
    rows = {row["name"]: row for row in modules[3].Tables(profile, runs).rows("figure-2b")}
    row = rows["PoSE, linear"]
    # of 0.801, 0.802 and 0.803; 4.303 is Student's quantile for two degrees of freedom
    assert row["passkey"] == pytest.approx(0.802)
    assert row["high"] - row["passkey"] == pytest.approx(4.3027 * 0.001 / math.sqrt(3), rel=1e-4)
    assert (row["seeds"], len(row["answers"])) == (3, 3 * 96 * 8)
    base = rows["as it was"]  # one model: by its answers
    assert [base[key] for key in ("passkey", "low", "high")] == pytest.approx([0.5, 0.4999, 0.5001])

    # seeds that agree do not make few answers many
    _, runs = results(tmp_path, modules, named, answered=0.1)
    rows = {row["name"]: row for row in modules[3].Tables(profile, runs).rows("figure-2b")}
    row = rows["PoSE, linear"]
    assert [row[key] for key in ("low", "high")] == pytest.approx([0.702, 0.902])


def test_a_document_repeats_its_pairs_between_the_text(modules):
    recall = modules[4]
    text = "".join(chr(ord("a") + i % 26) for i in range(800))
    whole = 0
    for seed in range(40):
        made = recall.document(random.Random(seed), text)
        symbols = "".join(c for c in made if c in recall.SYMBOLS)
        pairs = Counter(symbols[i : i + 2] for i in range(0, len(symbols), 2))
        assert 2 <= len(pairs) == len({pair[0] for pair in pairs}) <= 8  # one value a key
        for key, value in pairs:
            assert value in recall.VALUES[recall.KEYS.index(key)]
        assert pairs.total() > len(pairs)
        rest = "".join(c for c in made if c not in recall.SYMBOLS)
        assert rest in ("", text)
        whole += rest == text
    assert 10 < whole < 40


@pytest.mark.parametrize("length", [64, 301])
def test_a_haystack_has_each_pair_once_and_asks_for_all(modules, length):
    recall = modules[4]

    def hay(draw, count):
        return np.arange(count) % 100

    made = recall.haystacks(lambda text: [ord(text)], hay, length, 5, 4, seed=3)
    depths = []
    for haystack in made:
        tokens = haystack.tokens.tolist()
        assert len(haystack.questions) == 4
        for question in haystack.questions:
            (key,), (value,) = question.tokens.tolist(), question.answer.tolist()
            assert len(tokens) + 2 == length
            assert tokens.count(key) == 1 and tokens[tokens.index(key) + 1] == value
            place = tokens.index(key) / (length - 10)
            assert question.depth == pytest.approx(place, abs=10 / length)
            assert question.wanted == (chr(value),)
            depths.append(question.depth)
    assert sorted(depths) == pytest.approx([i / 19 for i in range(20)])
    assert len({tuple(h.tokens.tolist()) for h in made}) == 5


def test_pairs_that_do_not_fit_are_counted(modules):
    *_, recall = modules
    # 8 pairs of 2 tokens, a key and its value
    with pytest.raises(ConfigError, match="--context-lengths 17: 8 pairs .* take 18 tokens"):
        recall.haystacks(lambda text: [ord(text)], None, 17, 1, 8, seed=0)


def test_a_symbol_of_several_tokens_is_named(modules):
    recall = modules[4]
    with pytest.raises(ConfigError, match=f"^{recall.KEYS[0]} is 3 tokens of this tokenizer"):
        recall.haystacks(lambda text: list(text.encode()), None, 64, 1, 1, seed=0)


def measured_cost(**steps):
    """As benchmarks/full_length.py writes it."""
    rows = [
        {"kind": name[:4], "target": int(name[5:]), "steps": seconds, "bytes": 3 * 2**20}
        for name, seconds in steps.items()
    ]
    rows = [row | {"seconds": sorted(row["steps"])[1]} for row in rows]
    return {
        "date": "2026-11-29",
        "device": "a CPU",
        "threads": 1,
        "torch": "2.13.0",
        "megatron-core": "0.16.1",
        "settings": {"seq_length": 8, "factors": [2, 16], "hidden_size": 64},
        "results": rows,
    }


def test_costs_are_compared_step_by_step(modules):
    import cost

    fast, slow = [1.0, 1.01, 0.99], [20.0, 20.5, 19.5]
    found = measured_cost(pose_16=fast, pose_128=fast, full_16=[2.0, 2.0, 2.0], full_128=slow)
    rows = [
        (r["name"], r["metric"], r["context_length"], r[r["metric"]]) for r in cost.cost_rows(found)
    ]
    assert ("PoSE", "seconds", 128, 1.0) in rows and ("full length", "seconds", 128, 20.0) in rows
    assert ("PoSE", "memory", 16, 3.0) in rows and len(rows) == 8
    same, more = cost.cost_verdicts(found)
    assert (same.verdict, more.verdict) == ("holds", "holds")
    # by hand: mean 20, standard deviation 0.5, 4.303 * 0.5 / sqrt(3) = 1.24
    assert more.numbers == "20.00 times (18.76 to 21.24, 3 steps)"
    grown = measured_cost(pose_16=fast, pose_128=[1.6, 1.61, 1.59], full_16=fast, full_128=slow)
    assert [v.verdict for v in cost.cost_verdicts(grown)] == ["does not hold", "does not hold"]


def test_the_report_has_a_chapter_for_each_table(tmp_path, modules, capsys):
    profile, runs = results(tmp_path, modules, {})
    steps = [1.0, 1.1, 0.9]
    cost = tmp_path / "cost.json"
    found = measured_cost(pose_16=steps, pose_128=steps, full_16=steps, full_128=steps)
    cost.write_text(json.dumps(found))
    modules[3].write(tmp_path, profile, runs, cost)
    page = (tmp_path / "report.html").read_text()
    assert '<th scope="row">PoSE to 8 L</th>' in page  # the label is the name alone
    titles = re.findall(r"<h2>(.*)</h2>", page)
    chapters = list(modules[1].TITLES.values())
    at = chapters.index(modules[1].TITLES["figure-3"])
    chapters[at : at + 1] = [f"{chapters[at]}: {what}" for what in COSTS]
    assert titles == ["Verdicts", *chapters, "How they were made"]
    assert len(json.loads((tmp_path / "verdicts.json").read_text())) == page.count(
        '<td class="verdict'
    )
    assert (tmp_path / "report.md").read_text() in capsys.readouterr().out
