"""plan(validate=True) on CPU tensors: which values are refused, with which words, and when."""

import pytest
import torch
from fake_kernel import META, install, plan_arguments, run_inputs

from etap_flashinfer import BatchMLAPagedAttentionWrapper, index_values

CPU = torch.device("cpu")


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def index(**changes: torch.Tensor) -> list[torch.Tensor]:
    """Three requests of 1, 0 and 2 queries on 2, 0 and 3 pages of 4 tokens; right if unchanged."""
    tensors = {
        "qo_indptr": int32(0, 1, 1, 3),
        "kv_indptr": int32(0, 2, 2, 5),
        "kv_indices": int32(7, 3, 0, 9, 2),
        "kv_len_arr": int32(8, 0, 9),
    }
    return list((tensors | changes).values())


def check(page_size: int = 4, **changes: torch.Tensor) -> index_values.CheckedIndex:
    return index_values.check(*index(**changes), page_size, CPU)


def test_right_values_and_what_run_needs_of_them() -> None:
    assert check() == index_values.CheckedIndex(3, 9, 2)
    assert check(kv_len_arr=int32(8, 0, 4)) == index_values.CheckedIndex(3, 7, 0)
    assert check(kv_len_arr=int32(0, 0, 0)).highest_page == -1


@pytest.mark.parametrize(
    "changes",
    [
        {"qo_indptr": int32(0, 1, 1, 3, -7, 2**31 - 1), "kv_indptr": int32(0, 2, 2, 5, -1)},
        {"kv_indices": int32(7, 3, 0, 9, 2, -1, 2**31 - 1)},  # behind the last request
        {"kv_indices": int32(7, 3, 0, 9, -5), "kv_len_arr": int32(8, 0, 8)},  # not reached
        {"kv_indptr": int32(1, 2, 2, 5), "kv_len_arr": int32(4, 0, 9)},
        {"qo_indptr": int32(0, 0, 0, 0)},
    ],
)
def test_what_no_request_reaches_may_be_anything(changes: dict[str, torch.Tensor]) -> None:
    assert check(**changes).highest_page == 9 or "kv_indices" in changes


def test_empty_tensors() -> None:
    empty = int32()
    assert check(**dict.fromkeys(("kv_indices", "kv_len_arr"), empty)).num_queries == 0
    zeros = {"kv_indptr": int32(0, 0, 0, 0), "kv_len_arr": int32(0, 0, 0), "kv_indices": empty}
    assert check(**zeros) == index_values.CheckedIndex(3, -1, 2)
    with pytest.raises(ValueError, match=r"kv_indptr is 2 behind request 0; .* only 0 elements"):
        check(kv_indices=empty)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qo_indptr": int32(1, 1, 1, 3)}, "qo_indptr starts at 1; it must start at 0"),
        ({"qo_indptr": int32(0, 5, 1, 3)}, "qo_indptr falls from 5 to 1 at request 1"),
        ({"qo_indptr": int32(0, 2**31 - 1, -(2**31), 3)}, "falls from 2147483647 to -2147483648"),
        ({"kv_indptr": int32(-1, 2, 2, 5)}, "kv_indptr starts at -1"),
        ({"kv_indptr": int32(0, 4, 2, 5)}, "kv_indptr falls from 4 to 2 at request 1"),
        ({"kv_indptr": int32(0, 2, 2, 6)}, "kv_indptr is 6 behind request 2; .* only 5 elements"),
        ({"kv_indptr": int32(0, 9, 9, 9)}, "kv_indptr is 9 behind request 0"),
        ({"kv_len_arr": int32(8, -3, 9)}, "kv_len_arr is -3 for request 1"),
        ({"kv_len_arr": int32(8, 1, 9)}, "is 1 for request 1, whose 0 pages of 4 tokens hold 0"),
        ({"kv_len_arr": int32(8, 0, 2**31 - 1)}, "2147483647 for request 2, whose 3 pages .* 12"),
        ({"kv_indices": int32(7, -4, -1, 9, 2)}, "gives request 0 page -4; pages count from 0"),
        ({"kv_indices": int32(7, 3, 0, -(2**31), -1)}, "request 2 page -2147483648"),
    ],
)
def test_the_first_offender_is_named(changes: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(**changes)


def test_the_first_of_several_requests_and_then_of_several_faults() -> None:
    with pytest.raises(ValueError, match="for request 1, whose"):
        check(kv_len_arr=int32(8, 1, -1), kv_indices=int32(7, 3, -1, 9, 2))
    with pytest.raises(ValueError, match=r"qo_indptr falls .* at request 2"):
        check(qo_indptr=int32(0, 1, 1, 0), kv_len_arr=int32(8, 0, 99))


def is_wrong(
    qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, kv_indices: torch.Tensor, lengths: list[int]
) -> bool:
    """Whether any of the requests, on pages of 2 tokens, must be refused; one by one."""
    for request, length in enumerate(lengths):
        begin, end = kv_indptr[request : request + 2].tolist()
        if qo_indptr[request] > qo_indptr[request + 1] or not 0 <= begin <= end <= len(kv_indices):
            return True
        if not 0 <= length <= 2 * (end - begin):
            return True
        if (kv_indices[begin : begin + -(-length // 2)] < 0).any():
            return True
    return False


def test_agrees_with_a_loop() -> None:
    random = torch.Generator().manual_seed(1)

    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=random).tolist()

    refused = 0
    for number in range(2000):
        lowest = -1 if number % 4 == 0 else 0
        qo_indptr, kv_indptr = (int32(0, *draw(lowest, 4, 3)).cumsum(0).int() for _ in range(2))
        kv_indices, lengths = int32(*draw(-1, 20, 8)), draw(lowest, 4, 3)
        expected = is_wrong(qo_indptr, kv_indptr, kv_indices, lengths)
        try:
            index_values.check(qo_indptr, kv_indptr, kv_indices, int32(*lengths), 2, CPU)
            found = False
        except ValueError:
            found = True
        assert found == expected, (qo_indptr, kv_indptr, kv_indices, lengths)
        refused += found
    assert 400 < refused < 1600


# In the wrapper


def make_wrapper(**arguments) -> BatchMLAPagedAttentionWrapper:
    return BatchMLAPagedAttentionWrapper(
        torch.empty(4096, dtype=torch.uint8), backend="reference", **arguments
    )


def test_run_compares_with_its_tensors() -> None:
    wrapper = make_wrapper()
    arguments = plan_arguments(kv_indices=int32(0, 1, 2, 8))
    wrapper.plan(**arguments, validate=True)
    inputs = run_inputs(device="cpu")
    with pytest.raises(ValueError, match="gives request 1 page 8; the cache has pages 0 to 7"):
        wrapper.run(**inputs)
    packed = {"query": torch.zeros(2, 16, 576).bfloat16(), "kv_cache": tuple(inputs.values())[2:]}
    with pytest.raises(ValueError, match="the cache has pages 0 to 7"):
        wrapper.run(**packed)
    with pytest.raises(ValueError, match="qo_indptr ends at 2; q_nope holds only 1 queries"):
        wrapper.run(**run_inputs(1, device="cpu"))
    wrapper.plan(**plan_arguments(), validate=True)
    assert wrapper.run(**inputs).shape == (2, 16, 512)


def test_the_kernel_is_not_launched_beyond_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = install(monkeypatch)
    wrapper = BatchMLAPagedAttentionWrapper(
        torch.empty(4096, dtype=torch.uint8, device=META), backend="etap"
    )
    wrapper.plan(**plan_arguments())
    wrapper._checked_index = index_values.CheckedIndex(2, 8, 1)
    with pytest.raises(ValueError, match="page 8; the cache has pages 0 to 7"):
        wrapper.run(**run_inputs())
    assert not kernel.calls


def test_a_refused_plan_leaves_none_behind_and_graph_buffers_alone() -> None:
    buffers = {
        "qo_indptr": torch.full((3,), -5, dtype=torch.int32),
        "kv_indptr": torch.full((3,), -5, dtype=torch.int32),
        "kv_indices": torch.full((9,), -5, dtype=torch.int32),
        "kv_len_arr": torch.full((2,), -5, dtype=torch.int32),
    }
    wrapper = make_wrapper(use_cuda_graph=True, **buffers)
    with pytest.raises(ValueError, match="request 1 page -1"):
        wrapper.plan(**plan_arguments(kv_indices=int32(0, 1, 2, -1)), validate=True)
    assert all((buffer == -5).all() for buffer in buffers.values())
    with pytest.raises(RuntimeError, match="after a plan"):
        wrapper.run(**run_inputs(device="cpu"))


@pytest.mark.parametrize(
    ("variable", "argument", "is_refused"),
    [
        (None, None, False),
        ("0", None, False),
        ("", None, False),
        ("1", None, True),
        ("1", False, False),
        ("0", True, True),
    ],
)
def test_argument_and_environment(monkeypatch, variable, argument, is_refused) -> None:
    """A negative page within a request's length is seen by plan only with validate."""
    monkeypatch.delenv(index_values.VALIDATE_ENV, raising=False)
    if variable is not None:
        monkeypatch.setenv(index_values.VALIDATE_ENV, variable)
    arguments = plan_arguments(kv_indices=int32(0, 1, 2, -1))
    if is_refused:
        with pytest.raises(ValueError, match="page -1"):
            make_wrapper().plan(**arguments, validate=argument)
    else:
        make_wrapper().plan(**arguments, validate=argument)


def test_bad_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(index_values.VALIDATE_ENV, "yes")
    with pytest.raises(ValueError, match="ETAP_FLASHINFER_VALIDATE is 'yes'; allowed: 0, 1"):
        make_wrapper().plan(**plan_arguments())
