"""Masked steps by fused kernels: in Triton's interpreter, in a process of its own, and as the compiler makes them."""

import json
import random
from pathlib import Path

import pytest
import torch

from lightning_topkast.ops.fused import step
from tests.test_block_ops import needs_triton, run_python

FOLDER = Path(__file__).parent
# fused_steps.py imports Triton's kernels, which may not be there
CHECKS = (
    "bits_of_single_passes",
    "tensors_of_several_types_at_once",
    "autograd_notices_what_was_written",
    "training_has_the_same_bits",
    "kernels_are_few",
    "tables_are_written_once_if_nothing_moves",
    "gradient_of_two_weights_is_masked_by_both",
    "interrupted_step_loses_no_value",
    "captured_steps_train_the_same",
)


@pytest.fixture(scope="module")
def failures():
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    return json.loads(run_python(FOLDER / "fused_steps.py", seed, TRITON_INTERPRET="1"))


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("check", CHECKS)
def test_with_interpreted_triton(check, failures):
    assert set(failures) == set(CHECKS)
    assert not failures[check], failures[check]


@pytest.mark.slow
@needs_triton
def test_kernels_compile_to_wide_copies(tmp_path):
    made = json.loads(run_python(FOLDER / "fused_assembly.py", TRITON_CACHE_DIR=str(tmp_path)))
    assert {name.split()[0] for name in made} == {"open_kernel", "take_kernel", "mask_kernel"}
    for name, counts in made.items():
        assert counts["atomics"] == 0
        if "take" not in name:  # which follows the exploring entries
            assert (counts["wide loads"] > 0) == (counts["wide stores"] > 0) == ("aligned" in name), f"{name}: {counts}"


def test_cpu_uses_its_own_passes(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not step.works.__wrapped__(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("obstacle", ["no compiler", "other bits"])
def test_kernels_that_do_not_work_are_not_used(obstacle, monkeypatch, caplog):
    class Launch:
        TYPES = (torch.float32,)

        @staticmethod
        def open_(*tensors):
            if obstacle == "no compiler":
                raise RuntimeError("Failed to find C compiler")

        @staticmethod
        def close_(*weights):
            pass

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(step, "triton_version", lambda: "3.7.1")
    monkeypatch.setattr(step, "_launch", Launch)
    assert not step.works.__wrapped__(torch.device("cpu"), torch.float32)
    (record,) = caplog.records
    said = "RuntimeError: Failed to find C compiler" if obstacle == "no compiler" else "they give other results"
    assert said in record.getMessage()
