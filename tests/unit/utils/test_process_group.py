"""Processes of a run: which form a group, and how they find each other in a store."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from lowlat.utils.errors import UserError
from lowlat.utils.process_group import _common_prefix, is_follower, join_group


def test_restarted_processes_share_a_new_prefix() -> None:
    """Regression: the keys of processes that had ended were taken for those of the new ones."""
    store, found = HashStore(), []
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            # process 0 comes last: the others meet the prefix of the one before
            joined = [pool.submit(_common_prefix, store, rank, 3) for rank in (2, 1, 0)]
            prefixes = {one.result(60) for one in joined}
        assert len(prefixes) == 1
        found += prefixes
    assert len(set(found)) == 3


def test_a_rank_without_a_run_is_no_follower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not is_follower()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert is_follower()


def test_a_layout_of_one_process_is_refused() -> None:
    with pytest.raises(UserError, match="pipeline=1 is a layout of one process; leave --parallel"):
        join_group(1, "--parallel pipeline=1")
