"""Every layout of ranks trains the model that one rank trains: losses and gradient norms of four
steps, from the same checkpoint and on the same batches, whatever divides the work."""

from itertools import combinations

import pytest

from tests.functional_tests.layouts import (
    BROKEN,
    FROM_HYBRID,
    HAS_HYBRID,
    HYBRID,
    LAYOUTS,
    MODELS,
    RESUMED,
    STEPS,
    deviation,
    measure,
    table,
)

TOLERANCE = 1e-5  # relative, in float32


@pytest.fixture(scope="module")
def rows(tmp_path_factory, stdlib_corpus):
    rows = measure(tmp_path_factory.mktemp("matrix"), stdlib_corpus)
    print(table(rows))  # with any test that fails, and with --capture=no
    return rows


@pytest.mark.parametrize("name", [n for n, x in LAYOUTS.items() if n != x.reference])
def test_a_layout_trains_the_model_of_one_rank(rows, name):
    assert max(deviation(rows, name)) < TOLERANCE


@pytest.mark.parametrize("name", RESUMED)
def test_training_goes_on_in_another_layout(rows, name):
    assert len(rows[name]["losses"]) == 2
    assert max(deviation(rows, name)) < TOLERANCE


@pytest.mark.skipif(not HAS_HYBRID, reason="--model-class hybrid needs megatron-core 0.19")
@pytest.mark.parametrize("name", [*HYBRID, *FROM_HYBRID])
def test_a_hybrid_model_trains_like_a_gpt_model(rows, name):
    twin = name.removesuffix(", hybrid").removesuffix(", from hybrid")
    assert rows[name] == rows[twin]


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_positions_on_a_single_rank_are_seen(rows, name):
    assert min(deviation(rows, name)) > 10 * TOLERANCE


@pytest.mark.parametrize("model", MODELS)
def test_every_step_of_the_reference_counts(rows, model):
    row = rows[f"1 rank, {model}"]
    assert len(row["losses"]) == len(row["grad_norms"]) == STEPS
    # Other batches and other weights each time: of the eight samples of two steps, one at least
    # would tell them apart. Single numbers of two steps may come close by chance.
    batches = [row["sample_losses"][i : i + 8] for i in range(0, 8 * STEPS, 8)]
    assert [len(batch) for batch in batches] == [8] * STEPS
    for one, other in combinations(map(sorted, batches), 2):
        assert max(abs(a / b - 1) for a, b in zip(one, other, strict=True)) > 1000 * TOLERANCE
    assert len(set(row["losses"])) == len(set(row["grad_norms"])) == STEPS
    # Above --clip-grad: the norm is part of every update.
    assert min(row["grad_norms"]) > 0.5
