"""Scheduler: hand-computed cases, without a model (see `scheduler_driver`).

Random walks are in `walk_test`.
"""

import dataclasses

import numpy as np
import pytest

from jpaged.config import EngineConfig
from jpaged.scheduler import EMPTY, FINISHED, RETAINED, RUNNING, WAITING
from tests.support.scheduler_driver import Driver, RequestSpec

CONFIG = EngineConfig(
    num_blocks=16,
    block_size=4,
    max_num_seqs=4,
    max_model_len=32,
    max_num_batched_tokens=10,
    max_num_requests=16,
    max_num_prefixes=2,
    watermark=0.0,
)


def one(prompt: int, output: int = 5, priority: int = 0) -> RequestSpec:
    return RequestSpec(prompt, (output,), priority)


def test_decodes_come_first_and_prompts_get_the_rest_by_arrival():
    driver = Driver(CONFIG)
    driver.submit(one(3), one(4))
    assert driver.go() == {0: 3, 1: 4}
    driver.submit(one(6), one(9))
    # 10 tokens: two decodes, the 6 of request 2, and 2 of the 9 of request 3.
    assert driver.go() == {0: 1, 1: 1, 2: 6, 3: 2}
    # Three decodes, and the last 7 of request 3, for which exactly 7 are left.
    assert driver.go() == {0: 1, 1: 1, 2: 1, 3: 7}
    assert driver.go() == {0: 1, 1: 1, 2: 1, 3: 1}


def test_a_long_prompt_is_computed_in_several_steps():
    driver = Driver(CONFIG)
    driver.submit(one(25, 2))
    assert [driver.go() for _ in range(4)] == [{0: 10}, {0: 10}, {0: 5}, {0: 1}]
    assert driver.running() == set()


def test_a_request_that_does_not_fit_delays_all_later_requests():
    driver = Driver(CONFIG)
    # 16 blocks: request 0 uses 6, request 1 needs 7 and fits, request 2 needs 5 and
    # does not fit. Request 3 would fit.
    driver.submit(one(24), one(28), one(20), one(1))
    driver.go()
    assert driver.running() == {0}  # request 0 used up the budget
    for _ in range(3):
        driver.go()
    assert driver.running() == {0, 1}
    assert driver.queue["status"].tolist()[:4] == [RUNNING, RUNNING, WAITING, WAITING]


def test_at_most_max_num_seqs_rows_are_used():
    driver = Driver(CONFIG)
    driver.submit(*[one(1, 2)] * 6)
    assert driver.go() == dict.fromkeys(range(4), 1)
    assert driver.go() == dict.fromkeys(range(4), 1)
    assert driver.go() == {4: 1, 5: 1}


def test_the_watermark_stays_free_while_others_run():
    config = dataclasses.replace(CONFIG, watermark=0.5)  # 8 of 16 blocks
    for prompt, is_admitted in ((24, True), (25, False)):
        driver = Driver(config)
        driver.submit(one(4, 9))
        driver.go()
        # 1 block is used and 1 more will be needed. Of the other 14, 8 stay free.
        driver.submit(one(prompt))
        driver.go()
        assert driver.running() == ({0, 1} if is_admitted else {0})
    while 0 in driver.running():
        driver.go()
    driver.go()
    assert driver.running() == {1}  # alone it can use all blocks


def test_the_fewest_latest_rows_are_preempted():
    # 6 blocks of 4: three prompts of 8 fill the pool, and each needs a third block.
    config = dataclasses.replace(CONFIG, num_blocks=6, max_num_batched_tokens=24)
    driver = Driver(config)
    driver.submit(one(8), one(8), one(8))
    assert driver.go() == {0: 8, 1: 8, 2: 8}
    # Request 2 releases 2 blocks, which requests 0 and 1 need.
    assert driver.go() == {0: 1, 1: 1}
    assert driver.queue["status"].tolist()[:3] == [RUNNING, RUNNING, WAITING]
    assert driver.queue["num_preemptions"].tolist()[:3] == [0, 0, 1]
    # It has 9 known tokens, needs 3 blocks, and waits until the others have ended.
    for _ in range(3):
        assert driver.go() == {0: 1, 1: 1}
    assert driver.go() == {2: 9}
    assert driver.num_preempted == 1


def test_the_first_request_continues_when_all_others_are_preempted():
    config = dataclasses.replace(CONFIG, num_blocks=8, max_num_batched_tokens=32)
    driver = Driver(config)
    driver.submit(one(16, 16), one(15, 16))
    driver.go()
    while driver.running() != {0}:
        assert driver.go()[0] == 1
    assert driver.queue["num_preemptions"].tolist()[:2] == [0, 1]
    assert driver.queue["status"][1] == WAITING


def test_smaller_priorities_are_admitted_first_and_larger_ones_preempted_first():
    config = dataclasses.replace(
        CONFIG, num_blocks=6, max_num_batched_tokens=24, policy="priority"
    )
    driver = Driver(config)
    driver.submit(one(8, priority=2), one(8, priority=0), one(8, priority=1))
    driver.submit(one(4, priority=0))
    assert driver.step() == {1: 8, 3: 4, 2: 8}
    driver.commit()
    # One block is left, and requests 1 and 3 grow: the last one, 2, is preempted.
    driver.go()
    assert driver.running() == {1, 3}
    assert driver.queue["num_preemptions"].tolist()[:4] == [0, 0, 1, 0]


def test_samples_wait_for_the_first_sample_and_then_map_its_blocks():
    driver = Driver(CONFIG)
    driver.submit(RequestSpec(14, (5, 5, 5)))
    # 14 tokens in two steps. The other samples get rows at once, and compute nothing.
    assert driver.go() == {0: 10}
    assert driver.running() == {0, 1, 2}
    assert driver.go() == {0: 4}
    # They map 13 tokens of the leader and compute the 14th. There are two copies of the
    # last block; the last of its three owners writes in place.
    assert driver.go() == {0: 1, 1: 1, 2: 1}
    assert driver.num_copies == 2
    tables = np.asarray(driver.blocks.block_tables)[:3]
    assert (tables[:, :3] == tables[0, :3]).all()
    assert len(set(tables[:, 3].tolist())) == 3
    assert np.asarray(driver.blocks.context_lens)[:4].tolist() == [15, 14, 14, 0]


def test_a_sample_computes_the_prompt_itself_if_the_first_sample_has_ended():
    driver = Driver(dataclasses.replace(CONFIG, max_num_seqs=1))
    driver.submit(RequestSpec(6, (1, 2)))
    assert driver.go() == {0: 6}
    assert driver.go() == {1: 6}
    assert driver.go() == {1: 1}


def test_samples_of_a_prompt_with_one_token_share_nothing():
    driver = Driver(CONFIG)
    driver.submit(RequestSpec(1, (3, 3)))
    assert driver.go() == {0: 1, 1: 1}
    assert driver.num_copies == 0


def test_admission_reserves_blocks_for_copies_of_shared_blocks():
    config = dataclasses.replace(
        CONFIG, num_blocks=3, block_size=16, max_num_batched_tokens=64
    )
    driver = Driver(config)
    driver.submit(RequestSpec(11, (5, 5)))
    driver.go()
    driver.submit(one(8), one(8))
    # Both samples share one block, and their next tokens need a copy of it. So one of
    # the two free blocks is left, for the first of the two requests.
    assert driver.go() == {0: 1, 1: 1, 2: 8}
    assert driver.num_copies == 1


# ---- requests with several sequences


def group(
    prompt: int, *outputs: int, is_lockstep: bool = True, **options
) -> RequestSpec:
    return RequestSpec(prompt, outputs, is_lockstep=is_lockstep, **options)


def test_lockstep_rows_compute_the_last_prompt_token_in_the_same_step():
    driver = Driver(CONFIG)
    driver.submit(group(9, 3, 3, 3))
    assert driver.go() == {0: 8}
    assert driver.go() == {0: 1, 1: 1, 2: 1}
    assert driver.go() == {0: 1, 1: 1, 2: 1}


def test_lockstep_rows_wait_during_all_chunks_of_a_long_prompt():
    driver = Driver(CONFIG)
    driver.submit(group(25, 2, 2))
    assert [driver.go() for _ in range(3)] == [{0: 10}, {0: 10}, {0: 4}]
    assert driver.go() == {0: 1, 1: 1}


def test_a_lockstep_prompt_of_one_token_is_computed_by_each_row():
    driver = Driver(CONFIG)
    driver.submit(group(1, 2, 2))
    assert driver.go() == {}  # both get rows, and wait with their last token
    assert driver.running() == {0, 1}
    assert driver.go() == {0: 1, 1: 1}
    assert driver.num_copies == 0


def test_lockstep_rows_are_admitted_together_after_a_preemption():
    config = dataclasses.replace(CONFIG, num_blocks=8, max_num_batched_tokens=24)
    driver = Driver(config)
    driver.submit(one(8, 9), group(7, 9, 9))
    assert driver.go() == {0: 8, 1: 6}
    for _ in range(4):
        assert driver.go() == {0: 1, 1: 1, 2: 1}
    # Request 0 needs a fourth block. The other rows have 11 known tokens and use the
    # rest of the pool: one shared block, and two own blocks each.
    assert driver.go() == {0: 1}
    assert driver.num_free() == 4
    assert [driver.go() for _ in range(3)] == [{0: 1}] * 3
    # The first computes 10 tokens. Then the second maps 7 of them, the prompt, and
    # computes 3.
    assert driver.go() == {1: 10}
    assert driver.go() == {2: 3}
    assert driver.go() == {1: 1, 2: 1}


@pytest.mark.parametrize("is_lockstep", [False, True])
@pytest.mark.parametrize(("prompt", "is_admitted"), [(28, True), (29, False)])
def test_all_sequences_of_a_request_get_rows_or_none_does(
    prompt, is_admitted, is_lockstep
):
    driver = Driver(CONFIG)
    # 16 blocks, 7 of them for request 0. With 28 tokens, 27 of them in 6 shared blocks,
    # the three sequences need 7 + 1 + 1 blocks; with 29 tokens, 8 + 1 + 1.
    driver.submit(one(28, 2), group(prompt, 2, 2, 2, is_lockstep=is_lockstep), one(1))
    for _ in range(3):
        driver.go()
    assert driver.running() == ({0, 1, 2, 3} if is_admitted else {0})


def test_a_request_waits_until_there_are_rows_for_all_its_sequences():
    driver = Driver(CONFIG)
    driver.submit(one(1, 4), one(1, 2), one(1, 9), group(1, 2, 2), one(1))
    assert driver.go() == {0: 1, 1: 1, 2: 1}  # one row stays empty
    assert driver.go() == {0: 1, 1: 1, 2: 1}
    assert driver.go() == {0: 1, 2: 1}
    assert driver.running() == {0, 2, 3, 4}
    assert driver.go() == {0: 1, 2: 1, 3: 1, 4: 1}


@pytest.mark.parametrize("is_lockstep", [False, True])
def test_all_sequences_of_a_request_are_preempted_together(is_lockstep):
    config = dataclasses.replace(CONFIG, num_blocks=6, max_num_batched_tokens=24)
    driver = Driver(config)
    # Request 0 fills 2 blocks and needs a third, and so do the two later rows: samples
    # when 2 of 6 blocks are free, lockstep rows when none is. Preempting one of them
    # would be enough.
    driver.submit(one(8), group(8, 5, 5, is_lockstep=is_lockstep))
    assert driver.go() == {0: 8, 1: 7 if is_lockstep else 8}
    if is_lockstep:
        # The last prompt token is written to a block and its copy; both are then full.
        assert driver.go() == {0: 1, 1: 1, 2: 1}
    assert driver.go() == {0: 1}
    assert driver.status(3) == [RUNNING, WAITING, WAITING]
    assert driver.queue["num_preemptions"][:3].tolist() == [0, 1, 1]
    driver.finish()


def test_the_first_request_continues_with_all_its_lockstep_rows():
    # Its rows share 1 block, and finally have 2 own blocks each: 7 in total.
    config = dataclasses.replace(CONFIG, num_blocks=7, max_num_batched_tokens=24)
    driver = Driver(config)
    driver.submit(group(5, 7, 7, 7), one(8, 9))
    assert driver.go() == {0: 4, 3: 8}
    for _ in range(4):
        assert driver.go() == dict.fromkeys(range(4), 1)
    assert driver.num_free() == 0
    for _ in range(3):
        assert driver.go() == {0: 1, 1: 1, 2: 1}
    assert driver.queue["num_preemptions"][:4].tolist() == [0, 0, 0, 1]
    assert driver.go() == {3: 13}  # the prompt and 5 generated tokens


def test_more_samples_than_rows_run_one_after_another():
    driver = Driver(CONFIG)
    driver.submit(RequestSpec(3, (2, 2, 3, 3, 2, 2)), one(1, 2))
    assert driver.go() == {0: 3}
    assert driver.running() == {0, 1, 2, 3}
    assert driver.go() == {0: 1, 1: 1, 2: 1, 3: 1}
    # Sample 0 has ended, so sample 4 cannot map its blocks and computes the prompt.
    assert driver.go() == {1: 1, 2: 1, 3: 1, 4: 3}
    assert driver.running() == {2, 3, 4}
    # Sample 5 gets a row first, and only then the later request.
    assert driver.go() == {2: 1, 3: 1, 4: 1, 5: 3}
    assert driver.go() == {5: 1, 6: 1}


def test_samples_that_do_not_fit_together_run_a_few_at_a_time():
    driver = Driver(dataclasses.replace(CONFIG, num_blocks=8))
    # Each sample has 30 tokens in 8 blocks, of which 7 can be shared, so one sample
    # runs at a time.
    driver.submit(RequestSpec(30, (2, 2, 2)), one(1))
    for sample in range(3):
        for tokens in (10, 10, 10, 1):
            assert driver.go() == {sample: tokens}
    assert driver.go() == {3: 1}


def test_samples_of_the_first_request_are_preempted_before_its_first_sample():
    config = dataclasses.replace(CONFIG, num_blocks=8, max_num_batched_tokens=24)
    driver = Driver(config)
    # 24 tokens each, of which 7 are shared: 6 blocks, and 5 more for each other sample.
    driver.submit(RequestSpec(8, (16, 16, 16)))
    steps = driver.finish()
    assert driver.queue["num_preemptions"][:3].tolist()[0] == 0
    assert driver.num_preempted > 0
    assert steps < 60


def test_samples_run_one_after_another_only_if_no_other_request_runs():
    config = dataclasses.replace(CONFIG, num_blocks=8)
    driver = Driver(config)
    driver.submit(one(1, 2), RequestSpec(30, (1, 1)))
    assert driver.go() == {0: 1}
    assert driver.go() == {0: 1}
    assert driver.go() == {1: 10}  # only now, because nothing else runs


def test_an_ended_row_of_a_lockstep_request_uses_no_tokens_or_blocks():
    driver = Driver(CONFIG)
    driver.submit(group(4, 1, 6))
    driver.go()
    assert driver.go() == {0: 1, 1: 1}
    assert driver.running() == {0, 1}
    assert driver.length(0) == 0
    assert driver.num_free() == 15
    for _ in range(4):
        assert driver.go() == {1: 1}
    assert driver.num_free() == 14
    assert driver.finish() == 1
    assert driver.status(2) == [FINISHED, FINISHED]


def test_an_ended_row_is_admitted_again_without_tokens_or_blocks():
    config = dataclasses.replace(CONFIG, num_blocks=8, max_num_batched_tokens=24)
    driver = Driver(config)
    driver.submit(one(7, 12), group(11, 1, 9))
    assert driver.go() == {0: 7, 1: 10}
    assert driver.go() == {0: 1, 1: 1, 2: 1}
    for _ in range(5):
        assert driver.go() == {0: 1, 2: 1}
    assert driver.go() == {0: 1}
    assert driver.status(3) == [RUNNING, WAITING, WAITING]
    driver.end([0])
    # 16 of 17 known tokens now, and the last one in the next step: no row is behind.
    assert driver.go() == {2: 16}
    assert driver.running() == {1, 2}
    assert driver.num_free() == 4
    assert driver.go() == {2: 1}


def test_retained_sequences_use_no_rows():
    driver = Driver(CONFIG)
    driver.submit(group(4, 2, 2, num_retained=2), one(1), one(1))
    driver.go()
    assert driver.status(6) == [RUNNING, RUNNING, RETAINED, RETAINED, RUNNING, RUNNING]
    driver.finish()
    assert driver.status(6) == [FINISHED] * 6


# ---- pinned prefixes

PINS = dataclasses.replace(CONFIG, max_num_batched_tokens=24)


def test_requests_map_a_pinned_prefix_whole_or_in_part_and_copy_its_last_block():
    driver = Driver(PINS)
    prefix = driver.pin(10)
    assert driver.go() == {prefix: 10}
    assert driver.status(1) == [RETAINED]
    table = driver.table(prefix)
    sharing = [(13, 10), (11, 10), (10, 10), (9, 6)]
    driver.submit(*(RequestSpec(n, (2,), prefix=prefix, shared=m) for n, m in sharing))
    assert driver.go() == {}
    # A request that maps its whole prompt computes the last token, for its logits.
    assert driver.go() == {1: 3, 2: 1, 3: 1, 4: 3}
    # Copies: three of the third block, one of the second. The prefix keeps its blocks.
    assert driver.num_copies == 4
    assert driver.table(prefix) == table
    for seq_index in (1, 2, 3):
        assert driver.table(seq_index)[:2] == table[:2]
        assert driver.table(seq_index)[2] != table[2]
    assert driver.table(4)[0] == table[0]
    assert driver.table(4)[1] != table[1]
    driver.finish()
    assert driver.num_free() == 13
    assert driver.table(prefix) == table


def test_lockstep_rows_that_map_all_but_one_token_need_no_extra_step():
    driver = Driver(PINS)
    prefix = driver.pin(8)
    driver.go()
    driver.submit(group(9, 2, 2, 2, prefix=prefix, shared=8))
    assert driver.go() == {}
    # The first row maps the prefix, the others map the first row, and all decode.
    assert driver.go() == {1: 1, 2: 1, 3: 1}


def test_a_prefix_is_admitted_first_and_uses_one_of_max_num_seqs_rows():
    driver = Driver(PINS)
    driver.submit(*[one(1, 3)] * 4, one(2))
    driver.go()
    prefix = driver.pin(5)
    assert driver.go() == dict.fromkeys(range(4), 1)
    assert driver.go() == dict.fromkeys(range(4), 1)
    assert driver.go() == {prefix: 5, 4: 2}
    driver.submit(*[one(1)] * 3)
    # Now it is RETAINED, and four other rows run.
    assert len(driver.go()) == 4


def test_a_retained_prefix_is_not_preempted_and_its_blocks_stay_used():
    driver = Driver(dataclasses.replace(PINS, num_blocks=7))
    prefix = driver.pin(8)
    driver.go()
    driver.submit(one(8), one(8), RequestSpec(9, (5,), prefix=prefix, shared=8))
    assert driver.go() == {1: 8, 2: 8}
    # Each of three rows needs a block, and 1 of 7 is free. The third row's mapped
    # blocks do not become free with it, so the second is preempted too.
    assert driver.go() == {1: 1}
    assert driver.status(4) == [RETAINED, RUNNING, WAITING, WAITING]
    driver.finish()
    assert driver.status(1) == [RETAINED]
    assert driver.num_free() == 5


def test_a_prefix_that_is_being_computed_is_not_preempted():
    config = dataclasses.replace(PINS, num_blocks=8, max_num_batched_tokens=6)
    driver = Driver(config)
    driver.submit(one(3, 9), one(3, 9))
    assert driver.go() == {0: 3, 1: 3}
    prefix = driver.pin(20)
    for _ in range(4):
        assert driver.go() == {0: 1, 1: 1, prefix: 4}
    # It needs a fifth block, and 4 + 2 + 2 are used. It arrived last, and comes first.
    assert driver.go() == {0: 1, prefix: 4}
    assert driver.status(3) == [RUNNING, WAITING, RETAINED]
    driver.finish()
    assert driver.num_free() == 3


@pytest.mark.parametrize("is_released", [False, True])
def test_a_request_whose_prefix_has_ended_computes_all_its_tokens(is_released):
    driver = Driver(PINS)
    prefix = driver.pin(10)
    driver.go()
    driver.submit(RequestSpec(13, (2, 2), prefix=prefix, shared=10))
    driver.end([prefix])
    if is_released:
        driver.release()
        assert driver.status(1) == [EMPTY]
        (new,) = driver.submit(one(11))
        assert new == [prefix]  # the same index, and no sequence maps it
    planned = driver.go()
    assert planned == {1: 13, 0: 11} if is_released else {1: 13}
    assert driver.go()[2] == 1  # the second sample maps 12 tokens of the first


def test_a_row_whose_prefix_ends_while_it_waits_computes_all_its_tokens():
    driver = Driver(dataclasses.replace(PINS, max_num_batched_tokens=6))
    prefix = driver.pin(10)
    driver.submit(RequestSpec(11, (2,), prefix=prefix, shared=10))
    assert driver.go() == {prefix: 6}
    assert driver.go() == {prefix: 4}
    assert driver.running() == {1}
    driver.end([prefix])
    assert driver.go() == {1: 6}
    assert driver.go() == {1: 5}
    driver.finish()
    assert driver.num_free() == 16
