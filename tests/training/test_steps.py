"""When a run saves, previews and ends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.training.steps import Clock, PreviewPlan, SavePlan, epochs_between_saves, make_clock


@given(batches=st.integers(1, 40), accumulation=st.integers(1, 9), total=st.integers(1, 100))
def test_updates_partition_the_micro_batches_of_every_epoch(batches: int, accumulation: int, total: int) -> None:
    clock = Clock(batches, accumulation, total)
    sizes, group = [], 0
    for index in range(batches):
        group += 1
        if clock.ends_update(index):
            assert group == clock.group_size(index) <= accumulation
            sizes.append(group)
            group = 0
    assert group == 0 and len(sizes) == clock.updates_per_epoch
    for done in range(total):
        epoch, index = clock.position(done)
        assert (epoch - 1) * clock.updates_per_epoch + sum(1 for i in range(index) if clock.ends_update(i)) == done


def test_epochs_override_steps() -> None:
    assert make_clock(7, 2, 1600, None).total_updates == 1600
    assert make_clock(7, 2, 1600, 3).total_updates == 12


def stems(plan: SavePlan, clock: Clock) -> list[tuple[int, str, str]]:
    return [
        (done, save.kind, save.stem) for done in range(1, clock.total_updates + 1) for save in plan.due(done, clock)
    ]


def test_names_and_moments_are_those_of_sd_scripts() -> None:
    plan = SavePlan("cat", every_n_epochs=1, every_n_steps=4)
    assert stems(plan, Clock(3, 1, 8)) == [
        (3, "epoch", "cat-000001"),
        (4, "step", "cat-step00000004"),
        (6, "epoch", "cat-000002"),
        (8, "step", "cat-step00000008"),
        (8, "end", "cat"),
    ]
    assert stems(SavePlan(None, every_n_epochs=2, every_n_steps=3), Clock(2, 1, 5)) == [
        (3, "step", "at-step00000003"),
        (4, "epoch", "epoch-000002"),
        (5, "end", "last"),
    ]


def test_old_files_expire_as_in_sd_scripts() -> None:
    plan = SavePlan("x", every_n_steps=10, last_n_steps=30, every_n_epochs=2, last_n_epochs=2, last_n_epochs_state=1)
    clock = Clock(100, 1, 1000)
    assert plan.due(50, clock)[0].expired_weights == ("x-step00000010",)
    assert plan.due(40, clock)[0].expired_weights == ()
    epoch = plan.due(600, clock)[1]
    assert (epoch.expired_weights, epoch.expired_states) == (("x-000002",), ("x-000004",))


def test_states_are_saved_when_asked_and_always_on_a_stop() -> None:
    clock = Clock(2, 1, 4)
    assert [save.state for save in SavePlan("x", save_state_on_train_end=True, every_n_steps=2).due(4, clock)] == [
        False,
        True,
    ]
    assert SavePlan("x").on_stop(3).state


@pytest.mark.parametrize(("every", "ratio", "expected"), [(3, None, 3), (3, 4, 2), (None, 100, 1), (None, None, None)])
def test_epoch_ratio(every: int | None, ratio: int | None, expected: int | None) -> None:
    assert epochs_between_saves(every, ratio, 10) == expected


def test_previews_by_epoch_win_over_steps() -> None:
    clock = Clock(3, 1, 9)
    due = [done for done in range(10) if PreviewPlan(every_n_steps=2, every_n_epochs=2, at_first=True).due(done, clock)]
    assert due == [0, 6]
    assert [done for done in range(10) if PreviewPlan(every_n_steps=4).due(done, clock)] == [4, 8]
