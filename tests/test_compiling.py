"""How early kernels start that Inductor makes."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.utils import IndentedBuffer

from transformers_async_cb import compiling


WAIT, LAUNCH = "tl.extra.cuda.gdc_wait()", "tl.extra.cuda.gdc_launch_dependents()"


@pytest.fixture(autouse=True)
def undone():
    theirs = TritonKernel._filter_pdl
    yield
    TritonKernel._filter_pdl = theirs


def ordered(early: bool = True) -> list[str]:
    """The lines of a kernel, once Inductor has put these calls in order."""
    kernel, code = (
        SimpleNamespace(_enable_pdl_codegen=lambda: early, GDC_WAIT=WAIT, GDC_LAUNCH=LAUNCH),
        IndentedBuffer(),
    )
    lines = ["x = load()", WAIT, "y = load()", WAIT, LAUNCH, "store()"] if early else ["x = load()", "store()"]
    for line in lines:
        code.writeline(line)
    TritonKernel._filter_pdl(kernel, code)
    return [line.strip() for line in code._lines]


def test_kernels_made_for_us_let_the_next_one_start_and_then_wait_before_they_read_anything():
    assert compiling._lets_the_next_start()
    with compiling._first_of_all():
        assert ordered() == [LAUNCH, WAIT, "x = load()", "y = load()", "store()"]
        assert ordered(early=False) == ["x = load()", "store()"]


def test_kernels_made_for_others_are_as_inductor_makes_them():
    theirs = ordered()
    assert compiling._lets_the_next_start()
    assert compiling._lets_the_next_start(), "twice is harmless"
    assert ordered() == theirs != [LAUNCH, WAIT, "x = load()", "y = load()", "store()"]


def test_what_is_compiled_for_us_is_kept_apart_from_what_is_compiled_for_others():
    before = torch._inductor.config.post_grad_custom_post_pass
    with compiling._first_of_all():
        assert torch._inductor.config.post_grad_custom_post_pass.uuid() is not None
    assert torch._inductor.config.post_grad_custom_post_pass is before is None


def test_a_pass_of_the_users_is_left_alone_which_is_said_once(log):
    logging.Logger.info_once.cache_clear()
    log.set_level("INFO", compiling.logger.name)
    with torch._inductor.config.patch(post_grad_custom_post_pass=compiling._Mark()):
        for _ in range(3):
            assert not compiling._lets_the_next_start()
    assert [message for message in log.messages if "start a little later" in message] == log.messages[:1]
