"""Ranks that were started again agree with each other, whatever dead ones left in the store."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from sparsemae.training.meeting import meet


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))


def met(store, ranks, delays=None):
    """The names that ranks come to, each in a thread with a connection of its own."""
    names = {}

    def run(rank):
        time.sleep((delays or {}).get(rank, 0))
        own = dist.TCPStore("127.0.0.1", store.port, timeout=timedelta(seconds=10))
        names[rank] = meet(own, rank, ranks, timeout=10)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert set(names) == set(range(ranks))
    assert len(set(names.values())) == 1
    return names[0]


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_all_come_to_one_name(store, ranks):
    assert met(store, ranks)


def test_every_attempt_has_a_name_of_its_own(store):
    assert len({met(store, 3) for _ in range(4)}) == 4


@pytest.mark.parametrize("late", [0, 1, 2])
def test_words_of_the_dead_mislead_nobody_who_comes_first(store, late):
    """A successor that comes late finds that its predecessor's word was taken for its own."""
    before = met(store, 3)
    assert met(store, 3, {late: 0.5}) != before


def test_who_waits_in_vain_is_told(store):
    for rank in (0, 1):
        with pytest.raises(TimeoutError, match="has not come to meet the others"):
            meet(store, rank, 2, timeout=0.2)
