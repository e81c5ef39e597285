"""scripts/flashinfer_suite.py over a stand-in for FlashInfer's checkout; real processes, no GPU."""

from __future__ import annotations

import flashinfer_suite
import pytest

pytest.importorskip("flashinfer.mla")

SUITE = """
import flashinfer
import pytest

from tests.test_helpers.test_helpers import clear_cuda_cache


@pytest.fixture(autouse=not flashinfer.utils.has_flashinfer_jit_cache(), scope="module")
def warmup_jit():
    raise AssertionError("would compile stock kernels")


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
@pytest.mark.parametrize("heads", [16, 64, 128])
def test_batch_mla_page_attention(heads, backend):
    assert backend == "fa3"
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper
    assert wrapper.__mro__[1].__module__ == "etap_flashinfer.mla"
    assert heads != WRONG_HEADS


def test_batch_prefill_with_ragged_kv_cache():
    raise AssertionError("not of the MLA wrapper")


def test_fp8_kv_requires_scales():
    with pytest.raises(ValueError):
        RAISES


def test_batch_mla_without_kpe():
    raise ValueError(WITHOUT_KPE)
"""


def run(
    tmp_path, workers=1, wrong_heads=0, raises="pass", without_kpe="got head_dim_kpe 0; allowed: 64"
):
    helpers = tmp_path / "tests" / "test_helpers"
    helpers.mkdir(parents=True)
    for directory in (tmp_path / "tests", helpers):
        (directory / "__init__.py").touch()
    (helpers / "test_helpers.py").write_text("def clear_cuda_cache(device): ...\n")
    test_file, other = (tmp_path / name for name in flashinfer_suite.TEST_FILES)
    test_file.parent.mkdir()
    other.write_text("def test_mla_page_index_uint32_overflow_regression(): ...\n")
    text = SUITE.replace("WRONG_HEADS", str(wrong_heads)).replace("RAISES", raises)
    test_file.write_text(text.replace("WITHOUT_KPE", repr(without_kpe)))
    return flashinfer_suite.run_all(tmp_path, workers, [])


def test_our_wrapper_is_the_one_that_is_tested(tmp_path):
    assert run(tmp_path, workers=2) == {
        "tests": {
            "test_batch_mla_page_attention": {"passed": 3},
            "test_batch_mla_without_kpe": {"differs": 1},
            "test_fp8_kv_requires_scales": {"differs": 1},
            "test_mla_page_index_uint32_overflow_regression": {"passed": 1},
        },
        "failed": [],
    }


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"wrong_heads": 64}, "test_batch_mla_page_attention[64-fa3]"),
        ({"raises": "raise ValueError"}, "test_fp8_kv_requires_scales"),  # does not differ any more
        ({"without_kpe": "out of memory"}, "test_batch_mla_without_kpe"),  # differs in another way
    ],
)
def test_a_failure_is_named(tmp_path, changes, failed):
    assert run(tmp_path, **changes)["failed"] == [failed]


def test_a_process_that_dies_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="1 of 2 processes left no result"):
        run(tmp_path, workers=2, raises="import os; os._exit(3)")


def test_what_is_not_a_checkout_is_refused(tmp_path, capsys):
    assert flashinfer_suite.main(["--checkout", str(tmp_path)]) == 2
    assert "not FlashInfer's sources" in capsys.readouterr().err


def test_suite_version(tmp_path):
    (tmp_path / flashinfer_suite.TESTS).mkdir(parents=True)
    for name in flashinfer_suite.TEST_FILES:
        (tmp_path / name).write_text(name.name)
    (tmp_path / "version.txt").write_text("0.6.14\n")
    found = flashinfer_suite.suite_version(tmp_path)
    assert found.pop("version") == "0.6.14"
    assert len(set(found.values())) == 2
