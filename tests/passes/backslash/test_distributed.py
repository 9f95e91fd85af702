"""The same training on two ranks as in one process: DDP and FSDP2 over gloo on the CPU."""

import pytest
import torch
from support import distributed_worker as worker
from support.closeness import assert_rejects_corruption, assert_within
from support.ranks import DISTRIBUTED, Runs, run_ranks
from torch import Tensor

#: The ranks' gradients are sums of the same terms in another order. In float64 (u = 1.1e-16) with below 1000 terms of
#: size 10 and less, they differ by 1e-12 at most. AdamW's step is Lipschitz in the gradient with lr/ε = 20, shrinking
#: does not widen a difference for ν = 1 and hardly below it: 20·1e-12 a step, 2.4e-10 in 12 steps. Four times that is
#: left for what the differences themselves do to later gradients.
TOLERANCE = 1e-9

pytestmark = pytest.mark.skipif(not DISTRIBUTED, reason="this torch has no gloo")


@pytest.fixture(scope="module")
def one() -> Runs:
    return worker.run_cases("one")


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Runs]:
    runs = run_ranks(request.param, tmp_path_factory.mktemp(request.param), worker.__file__)
    runs[0]["way"] = request.param
    return runs


def flat(run: Runs) -> Tensor:
    return torch.cat([weight.flatten() for weight in run["weights"].values()])


@pytest.mark.parametrize("case", worker.CASES)
def test_two_ranks_train_what_one_process_trains(case: str, ranks: list[Runs], one: Runs) -> None:
    expected = flat(one[case])
    for run in ranks:
        assert_rejects_corruption(flat(run[case]), expected, TOLERANCE)
    got = flat(ranks[0][case])
    different = (got == 0) != (expected == 0)
    # A weight may be an exact zero in one alone only where it is a rounding away from it in the other.
    assert_within(got[different], expected[different], TOLERANCE)
    assert different.sum() <= 1


@pytest.mark.parametrize("case", worker.CASES)
def test_ranks_agree_to_the_last_bit(case: str, ranks: list[Runs]) -> None:
    first, second = (run[case] for run in ranks)
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    assert torch.equal(first["state"]["fits"], second["state"]["fits"])
    assert {**first["state"], "fits": None} == {**second["state"], "fits": None}
    assert first["bits"] == second["bits"]


@pytest.mark.parametrize("case", worker.CASES)
def test_statistics_are_those_of_whole_tensors(case: str, ranks: list[Runs], one: Runs) -> None:
    state, expected = ranks[1][case]["state"], one[case]["state"]
    # Counts of symbols are the same to the last one, and so are the bits.
    assert ranks[1][case]["bits"] == pytest.approx(one[case]["bits"], rel=1e-14)
    assert state["measured_bits"] == pytest.approx(expected["measured_bits"], rel=1e-14)
    assert state["steps"] == expected["steps"] == worker.STEPS
    assert state["strength"] == pytest.approx(expected["strength"], rel=1e-6)
    assert state["strength"] > 0 or case == "free"


def test_the_training_under_test_does_something(one: Runs) -> None:
    free = flat(one["free"])
    for case in ("strength", "target", "coupled", "accumulated"):
        assert (flat(one[case]) - free).abs().max() > 1e-3, case
    for case in ("strength", "target", "accumulated"):
        assert int((flat(one[case]) == 0).sum()) >= 5, case
        assert one[case]["bits"] < one["free"]["bits"]


def test_exact_weights_beside_the_grid_are_those_of_one_process(ranks: list[Runs], one: Runs) -> None:
    step = worker.SETTINGS.step
    for run in (*ranks, {"on grid": one["on grid"]}):
        found = run["on grid"]
        assert set(found["exact"]) == {"embedding.weight", "hidden.weight", "head.weight"}
        for name, exact in found["exact"].items():
            assert_within(exact, one["on grid"]["exact"][name], TOLERANCE)
            on_grid = found["weights"][name]
            assert torch.equal(on_grid, (exact / step).round() * step)
            assert not torch.equal(on_grid, exact)


def test_frozen_weights_stay(ranks: list[Runs]) -> None:
    expected = worker.Net().frozen.weight
    for run in ranks:
        assert torch.equal(run["target"]["weights"]["frozen.weight"], expected)


def test_each_rank_of_fsdp_steps_its_shard_even_an_empty_one(ranks: list[Runs]) -> None:
    rows = [
        [run["target"]["rows"][name] for name in ("embedding.weight", "hidden.weight", "head.weight")] for run in ranks
    ]
    assert rows == ([[7, 4, 1], [6, 3, 0]] if ranks[0]["way"] == "fsdp" else [[13, 7, 1], [13, 7, 1]])


def test_fsdp_resumes_bit_for_bit(ranks: list[Runs]) -> None:
    if ranks[0]["way"] != "fsdp":
        pytest.skip("the files of DDP are those of one process")
    for run in ranks:
        for case, resumed in run["resumed"].items():
            for name, weight in run[case]["weights"].items():
                assert torch.equal(resumed["weights"][name], weight), name
            for name, exact in run[case]["exact"].items():
                assert torch.equal(resumed["exact"][name], exact), name
            assert resumed["state"]["steps"] == worker.STEPS
            assert resumed["state"]["strength"] == run[case]["state"]["strength"]
        assert set(run["resumed"]) == set(worker.RESUMED)


def test_a_regularizer_of_parameters_that_sharding_replaced_is_refused(ranks: list[Runs]) -> None:
    if ranks[0]["way"] != "fsdp":
        pytest.skip("DDP keeps the Parameters")
    for run in ranks:
        for message in run["too early"].values():
            assert "after" in message
            assert "fully_shard" in message
