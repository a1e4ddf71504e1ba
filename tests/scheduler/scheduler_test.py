"""The scheduler: cases worked by hand.

No model runs here; see `scheduler_driver`. Random walks are in `scheduler_walk_test`.
"""

import dataclasses

import numpy as np
import pytest

from jpaged.config import EngineConfig
from jpaged.scheduler import EMPTY, FINISHED, RETAINED, RUNNING, WAITING
from tests.support.scheduler_driver import Driver, SequenceParams

CONFIG = EngineConfig(
    num_blocks=16,
    block_size=4,
    max_num_seqs=4,
    max_model_len=32,
    max_num_batched_tokens=10,
    max_num_requests=12,
    watermark=0.0,
)


def one(prompt: int, output: int = 5, priority: int = 0) -> SequenceParams:
    return SequenceParams(prompt, (output,), priority)


def test_decodes_come_first_and_prompts_share_the_rest_in_order_of_arrival():
    driver = Driver(CONFIG)
    driver.submit(one(3), one(4))
    assert driver.go() == {0: 3, 1: 4}
    driver.submit(one(6), one(9))
    # 10 tokens: two decodes, the 6 of request 2, and 2 of the 9 of request 3.
    assert driver.go() == {0: 1, 1: 1, 2: 6, 3: 2}
    # Three decodes, and the last 7 of request 3, for which exactly 7 are left.
    assert driver.go() == {0: 1, 1: 1, 2: 1, 3: 7}
    assert driver.go() == {0: 1, 1: 1, 2: 1, 3: 1}


def test_a_long_prompt_takes_several_steps():
    driver = Driver(CONFIG)
    driver.submit(one(25, 2))
    assert [driver.go() for _ in range(4)] == [{0: 10}, {0: 10}, {0: 5}, {0: 1}]
    assert driver.running() == set()


def test_who_does_not_fit_holds_up_all_behind_it():
    driver = Driver(CONFIG)
    # 16 blocks: request 0 takes 6, 1 wants 7 and fits, 2 wants 5 and does not; 3 would.
    driver.submit(one(24), one(28), one(20), one(1))
    driver.go()
    assert driver.running() == {0}  # request 0 used up the budget
    for _ in range(3):
        driver.go()
    assert driver.running() == {0, 1}
    assert driver.queue["status"].tolist()[:4] == [RUNNING, RUNNING, WAITING, WAITING]


def test_no_more_rows_are_given_than_there_are():
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
        # 1 block is used and 1 more as good as taken: 14 of 16, of which 8 stay.
        driver.submit(one(prompt))
        driver.go()
        assert driver.running() == ({0, 1} if is_admitted else {0})
    while 0 in driver.running():
        driver.go()
    driver.go()
    assert driver.running() == {1}  # alone it may take all


def test_the_fewest_latest_rows_are_preempted():
    # 6 blocks of 4: three prompts of 8 fill the pool, and each wants a third block.
    config = dataclasses.replace(CONFIG, num_blocks=6, max_num_batched_tokens=24)
    driver = Driver(config)
    driver.submit(one(8), one(8), one(8))
    assert driver.go() == {0: 8, 1: 8, 2: 8}
    # Request 2 gives back 2 blocks, which is what 0 and 1 want.
    assert driver.go() == {0: 1, 1: 1}
    assert driver.queue["status"].tolist()[:3] == [RUNNING, RUNNING, WAITING]
    assert driver.queue["num_preemptions"].tolist()[:3] == [0, 0, 1]
    # It knows 9 tokens, needs 3 blocks, and waits for them: 5 output tokens.
    for _ in range(3):
        assert driver.go() == {0: 1, 1: 1}
    assert driver.go() == {2: 9}
    assert driver.num_preempted == 1


def test_the_first_row_goes_on_when_all_others_must_give_way():
    config = dataclasses.replace(CONFIG, num_blocks=8, max_num_batched_tokens=32)
    driver = Driver(config)
    driver.submit(one(16, 16), one(15, 16))
    driver.go()
    while driver.running() != {0}:
        assert driver.go()[0] == 1
    assert driver.queue["num_preemptions"].tolist()[:2] == [0, 1]
    assert driver.queue["status"][1] == WAITING


def test_priority_admits_the_smaller_first_and_preempts_the_larger():
    config = dataclasses.replace(
        CONFIG, num_blocks=6, max_num_batched_tokens=24, policy="priority"
    )
    driver = Driver(config)
    driver.submit(one(8, priority=2), one(8, priority=0), one(8, priority=1))
    driver.submit(one(4, priority=0))
    assert driver.step() == {1: 8, 3: 4, 2: 8}
    driver.commit()
    # One block is left: 1 and 3 grow, so 2, the last of them, gives way.
    driver.go()
    assert driver.running() == {1, 3}
    assert driver.queue["num_preemptions"].tolist()[:4] == [0, 0, 1, 0]


def test_samples_wait_for_their_leader_and_then_map_its_blocks():
    driver = Driver(CONFIG)
    driver.submit(SequenceParams(14, (5, 5, 5)))
    # 14 tokens in two steps; the samples get rows at once, and compute nothing.
    assert driver.go() == {0: 10}
    assert driver.running() == {0, 1, 2}
    assert driver.go() == {0: 4}
    # They take 13 tokens from the leader and compute the 14th: two copies of the last
    # block, and of three owners the last writes in place.
    assert driver.go() == {0: 1, 1: 1, 2: 1}
    assert driver.num_copies == 2
    tables = np.asarray(driver.blocks.block_tables)[:3]
    assert (tables[:, :3] == tables[0, :3]).all()
    assert len(set(tables[:, 3].tolist())) == 3
    assert np.asarray(driver.blocks.context_lens).tolist() == [15, 14, 14, 0]


def test_a_sample_whose_leader_has_ended_computes_the_prompt_itself():
    driver = Driver(dataclasses.replace(CONFIG, max_num_seqs=1))
    driver.submit(SequenceParams(6, (1, 2)))
    assert driver.go() == {0: 6}
    assert driver.go() == {1: 6}
    assert driver.go() == {1: 1}


def test_a_prompt_of_one_token_has_nothing_to_share():
    driver = Driver(CONFIG)
    driver.submit(SequenceParams(1, (3, 3)))
    assert driver.go() == {0: 1, 1: 1}
    assert driver.num_copies == 0


def test_admission_leaves_room_for_copies_of_shared_blocks():
    config = dataclasses.replace(
        CONFIG, num_blocks=3, block_size=16, max_num_batched_tokens=64
    )
    driver = Driver(config)
    driver.submit(SequenceParams(11, (5, 5)))
    driver.go()
    driver.submit(one(8), one(8))
    # Both samples hold one block, and their next tokens make two of it. So of the two
    # free blocks one is left, for the first of the two requests.
    assert driver.go() == {0: 1, 1: 1, 2: 8}
    assert driver.num_copies == 1


# ---- requests of several sequences


def group(
    prompt: int, *outputs: int, is_lockstep: bool = True, **options
) -> SequenceParams:
    return SequenceParams(prompt, outputs, is_lockstep=is_lockstep, **options)


def test_lockstep_rows_compute_the_last_prompt_token_in_the_same_step():
    driver = Driver(CONFIG)
    driver.submit(group(9, 3, 3, 3))
    assert driver.go() == {0: 8}
    assert driver.go() == {0: 1, 1: 1, 2: 1}
    assert driver.go() == {0: 1, 1: 1, 2: 1}


def test_lockstep_rows_wait_through_all_chunks_of_a_long_prompt():
    driver = Driver(CONFIG)
    driver.submit(group(25, 2, 2))
    assert [driver.go() for _ in range(3)] == [{0: 10}, {0: 10}, {0: 4}]
    assert driver.go() == {0: 1, 1: 1}


def test_a_lockstep_prompt_of_one_token_is_computed_by_each_row():
    driver = Driver(CONFIG)
    driver.submit(group(1, 2, 2))
    assert driver.go() == {}  # rows are given, and their last tokens withheld
    assert driver.running() == {0, 1}
    assert driver.go() == {0: 1, 1: 1}
    assert driver.num_copies == 0


def test_lockstep_rows_come_back_together_after_a_preemption():
    config = dataclasses.replace(CONFIG, num_blocks=8, max_num_batched_tokens=24)
    driver = Driver(config)
    driver.submit(one(8, 9), group(7, 9, 9))
    assert driver.go() == {0: 8, 1: 6}
    for _ in range(4):
        assert driver.go() == {0: 1, 1: 1, 2: 1}
    # Request 0 wants a fourth block. The others know 11 tokens, and have used up the
    # pool with one block in common and two each of their own.
    assert driver.go() == {0: 1}
    assert driver.num_free() == 4
    assert [driver.go() for _ in range(3)] == [{0: 1}] * 3
    # The first computes 10; then the second maps the prompt of it, 7, and computes 3.
    assert driver.go() == {1: 10}
    assert driver.go() == {2: 3}
    assert driver.go() == {1: 1, 2: 1}


@pytest.mark.parametrize("is_lockstep", [False, True])
@pytest.mark.parametrize(("prompt", "is_admitted"), [(28, True), (29, False)])
def test_a_request_gets_rows_for_all_its_sequences_or_for_none(
    prompt, is_admitted, is_lockstep
):
    driver = Driver(dataclasses.replace(CONFIG, num_blocks=15))
    # 15 blocks, 6 of them for request 0. The three want 7 + 1 + 1 with 28 tokens, of
    # which 27 fill 6 shared blocks, and with 29 tokens 8 + 1 + 1.
    driver.submit(one(24), group(prompt, 2, 2, 2, is_lockstep=is_lockstep), one(1))
    for _ in range(3):
        driver.go()
    assert driver.running() == ({0, 1, 2, 3} if is_admitted else {0})


def test_a_request_waits_until_there_are_rows_for_all_its_sequences():
    driver = Driver(CONFIG)
    driver.submit(one(1, 4), one(1, 2), one(1, 9), group(1, 2, 2), one(1))
    assert driver.go() == {0: 1, 1: 1, 2: 1}  # and one row stays empty
    assert driver.go() == {0: 1, 1: 1, 2: 1}
    assert driver.go() == {0: 1, 2: 1}
    assert driver.running() == {0, 2, 3, 4}
    assert driver.go() == {0: 1, 2: 1, 3: 1, 4: 1}


@pytest.mark.parametrize("is_lockstep", [False, True])
def test_a_request_is_preempted_whole(is_lockstep):
    config = dataclasses.replace(CONFIG, num_blocks=6, max_num_batched_tokens=24)
    driver = Driver(config)
    # Request 0 fills 2 blocks and wants a third, and so do the two behind it: samples
    # when 2 of 6 are free, and lockstep rows when none is. To send one away would do.
    driver.submit(one(8), group(8, 5, 5, is_lockstep=is_lockstep))
    assert driver.go() == {0: 8, 1: 7 if is_lockstep else 8}
    if is_lockstep:
        # The last prompt token goes into a block and its copy; then both are full.
        assert driver.go() == {0: 1, 1: 1, 2: 1}
    assert driver.go() == {0: 1}
    assert driver.status(3) == [RUNNING, WAITING, WAITING]
    assert driver.queue["num_preemptions"][:3].tolist() == [0, 1, 1]
    driver.finish()


def test_the_first_request_goes_on_with_all_its_lockstep_rows():
    # Its rows have 1 block in common and in the end 2 each of their own: all of 7.
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
    assert driver.go() == {3: 13}  # the prompt and 5 generated ones


def test_more_samples_than_rows_take_turns():
    driver = Driver(CONFIG)
    driver.submit(SequenceParams(3, (2, 2, 3, 3, 2, 2)), one(1, 2))
    assert driver.go() == {0: 3}
    assert driver.running() == {0, 1, 2, 3}
    assert driver.go() == {0: 1, 1: 1, 2: 1, 3: 1}
    # Sample 0 has gone, and what 4 would have mapped: it computes its prompt.
    assert driver.go() == {1: 1, 2: 1, 3: 1, 4: 3}
    assert driver.running() == {2, 3, 4}
    # There are rows for sample 5, and only then for the request behind.
    assert driver.go() == {2: 1, 3: 1, 4: 1, 5: 3}
    assert driver.go() == {5: 1, 6: 1}


def test_samples_that_do_not_fit_together_run_a_few_at_a_time():
    driver = Driver(dataclasses.replace(CONFIG, num_blocks=8))
    # Each sample has 30 tokens in 8 blocks, of which 7 can be shared: one at a time.
    driver.submit(SequenceParams(30, (2, 2, 2)), one(1))
    for sample in range(3):
        for tokens in (10, 10, 10, 1):
            assert driver.go() == {sample: tokens}
    assert driver.go() == {3: 1}


def test_samples_of_the_first_request_give_way_to_its_first():
    config = dataclasses.replace(CONFIG, num_blocks=8, max_num_batched_tokens=24)
    driver = Driver(config)
    # 24 tokens each, of which 7 are shared: 6 blocks, and 5 more for each other.
    driver.submit(SequenceParams(8, (16, 16, 16)))
    steps = driver.finish()
    assert driver.queue["num_preemptions"][:3].tolist()[0] == 0
    assert driver.num_preempted > 0
    assert steps < 60


def test_samples_take_no_turns_beside_another_request():
    config = dataclasses.replace(CONFIG, num_blocks=8)
    driver = Driver(config)
    driver.submit(one(1, 2), SequenceParams(30, (1, 1)))
    assert driver.go() == {0: 1}
    assert driver.go() == {0: 1}
    assert driver.go() == {1: 10}  # alone, and only now


def test_an_ended_row_of_a_lockstep_request_costs_nothing():
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


def test_an_ended_row_comes_back_without_tokens_or_blocks():
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
    # Of 17 known tokens 16 with the row, and the last: there is nobody to wait for.
    assert driver.go() == {2: 16}
    assert driver.running() == {1, 2}
    assert driver.num_free() == 4
    assert driver.go() == {2: 1}


def test_sequences_that_are_held_take_no_rows():
    driver = Driver(CONFIG)
    driver.submit(group(4, 2, 2, num_held=2), one(1), one(1))
    driver.go()
    assert driver.status(6) == [RUNNING, RUNNING, RETAINED, RETAINED, RUNNING, RUNNING]
    driver.finish()
    assert driver.status(6) == [FINISHED] * 6


# ---- pinned prefixes

PINS = dataclasses.replace(CONFIG, max_num_prefixes=2, max_num_batched_tokens=24)


def test_requests_map_a_pinned_prefix_whole_or_in_part_and_copy_its_last_block():
    driver = Driver(PINS)
    prefix = driver.pin(10)
    assert driver.go() == {prefix: 10}
    assert driver.status(1) == [RETAINED]
    table = driver.table(prefix)
    sharing = [(13, 10), (11, 10), (10, 10), (9, 6)]
    driver.submit(
        *(SequenceParams(n, (2,), prefix=prefix, shared=m) for n, m in sharing)
    )
    assert driver.go() == {}
    # Who has all 10 tokens computes the last again, for its logits.
    assert driver.go() == {1: 3, 2: 1, 3: 1, 4: 3}
    # Of the third block four copies, and of the second one: the prefix keeps its own.
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


def test_lockstep_rows_that_map_all_but_one_token_of_a_prefix_lose_no_step():
    driver = Driver(PINS)
    prefix = driver.pin(8)
    driver.go()
    driver.submit(group(9, 2, 2, 2, prefix=prefix, shared=8))
    assert driver.go() == {}
    # The first maps the prefix and the others map the first: then all decode.
    assert driver.go() == {1: 1, 2: 1, 3: 1}


def test_a_prefix_comes_before_all_that_wait_and_its_row_is_one_of_those_that_run():
    driver = Driver(PINS)
    driver.submit(*[one(1, 3)] * 4, one(2))
    driver.go()
    prefix = driver.pin(5)
    assert driver.go() == dict.fromkeys(range(4), 1)
    assert driver.go() == dict.fromkeys(range(4), 1)
    assert driver.go() == {prefix: 5, 4: 2}
    driver.submit(*[one(1)] * 3)
    # Now it is held, beside four that run.
    assert len(driver.go()) == 4


def test_a_held_prefix_is_not_preempted_and_its_blocks_never_come_back():
    driver = Driver(dataclasses.replace(PINS, num_blocks=7))
    prefix = driver.pin(8)
    driver.go()
    driver.submit(one(8), one(8), SequenceParams(9, (5,), prefix=prefix, shared=8))
    assert driver.go() == {1: 8, 2: 8}
    # Each of three wants a block, and 1 of 7 is free. What the third maps is not its
    # to give, so the second has to go as well.
    assert driver.go() == {1: 1}
    assert driver.status(4) == [RETAINED, RUNNING, WAITING, WAITING]
    driver.finish()
    assert driver.status(1) == [RETAINED]
    assert driver.num_free() == 5


def test_a_prefix_that_is_being_computed_is_not_the_one_to_give_way():
    config = dataclasses.replace(PINS, num_blocks=8, max_num_batched_tokens=6)
    driver = Driver(config)
    driver.submit(one(3, 9), one(3, 9))
    assert driver.go() == {0: 3, 1: 3}
    prefix = driver.pin(20)
    for _ in range(4):
        assert driver.go() == {0: 1, 1: 1, prefix: 4}
    # It wants a fifth block, and 4 + 2 + 2 are used. It came last, and is the first.
    assert driver.go() == {0: 1, prefix: 4}
    assert driver.status(3) == [RUNNING, WAITING, RETAINED]
    driver.finish()
    assert driver.num_free() == 3


@pytest.mark.parametrize("is_released", [False, True])
def test_a_request_whose_prefix_is_gone_computes_alone(is_released):
    driver = Driver(PINS)
    prefix = driver.pin(10)
    driver.go()
    driver.submit(SequenceParams(13, (2, 2), prefix=prefix, shared=10))
    driver.end([prefix])
    if is_released:
        driver.release()
        assert driver.status(1) == [EMPTY]
        (strangers,) = driver.submit(one(11))
        assert strangers == [prefix]  # at the place, and nobody maps it
    planned = driver.go()
    assert planned == {1: 13, 0: 11} if is_released else {1: 13}
    assert driver.go()[2] == 1  # its sample maps 12 of it


def test_a_row_whose_prefix_goes_while_it_waits_for_it_computes_alone():
    driver = Driver(dataclasses.replace(PINS, max_num_batched_tokens=6))
    prefix = driver.pin(10)
    driver.submit(SequenceParams(11, (2,), prefix=prefix, shared=10))
    assert driver.go() == {prefix: 6}
    assert driver.go() == {prefix: 4}
    assert driver.running() == {1}
    driver.end([prefix])
    assert driver.go() == {1: 6}
    assert driver.go() == {1: 5}
    driver.finish()
    assert driver.num_free() == 16
