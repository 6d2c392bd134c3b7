"""Slots of cache memory: who has which, growth, giving memory back."""

import numpy as np
import pytest

from config.errors import RequestError
from dmoe.kv import CachePart, KvPool

PARTS = (CachePart("k", 2, 64), CachePart("v", 2, 64))


def pool_of(layers=2, context=4096):
    return KvPool([PARTS] * layers, context)


def fill(pool, cache, length, value):
    pool.reserve(length)
    for layer in range(2):
        for array in pool.view(layer, cache.slot, cache.slot):
            array[0, :, :length] = value
    cache.length = length


def held(pool, cache):
    return [array[0, :, : cache.length].copy() for array in pool.view(1, cache.slot, cache.slot)]


def test_caches_survive_growth_in_both_directions():
    pool = pool_of()
    one = pool.open(4000)
    fill(pool, one, 100, 1.0)
    generation = pool.generation
    two = pool.open(4000)
    fill(pool, two, 3000, 2.0)
    assert pool.generation > generation
    assert pool.positions >= 3000
    for cache, value, length in ((one, 1.0, 100), (two, 2.0, 3000)):
        for array in held(pool, cache):
            assert array.shape[1] == length
            assert (array == value).all()


def test_a_prefix_is_copied_and_then_its_own():
    pool = pool_of()
    one = pool.open(50)
    fill(pool, one, 40, 3.0)
    two = pool.open(50, one, 30)
    assert two.length == 30
    pool.view(1, one.slot, one.slot)[0][:] = 9.0
    assert all((array == 3.0).all() for array in held(pool, two))


def test_the_lowest_free_slot_is_taken_and_its_pages_were_given_back():
    pool = pool_of()
    caches = [pool.open(4096) for _ in range(4)]
    for cache in caches:
        fill(pool, cache, 4096, 1.0)
    caches[1].close()
    caches[1].close()
    again = pool.open(10)
    assert again.slot == 1
    array = pool.view(0, 1, 1)[0]
    assert np.count_nonzero(array) < array.size / 100  # but for the pages it shares with its neighbours
    assert (pool.view(0, 0, 0)[0][0, :, :4096] == 1).all()
    assert (pool.view(0, 2, 2)[0][0, :, :4096] == 1).all()


def test_a_cache_closed_during_a_pass_is_freed_behind_it():
    pool = pool_of()
    cache = pool.open(10)
    pool.busy = True
    cache.close()
    assert cache.is_open
    pool.end_pass()
    assert not cache.is_open
    assert pool.open(10).slot == 0


def test_caches_of_a_pass_become_neighbours_and_nobody_loses_anything():
    pool = pool_of()
    caches = [pool.open(100) for _ in range(16)]
    for number, cache in enumerate(caches):
        fill(pool, cache, 20 + number, float(number))
    caches[5].close()
    active = [caches[4], caches[15], caches[12]]
    pool.bring_together(active)
    assert sorted(cache.slot for cache in active) == [4, 5, 6]
    assert len({cache.slot for cache in caches if cache.is_open}) == 15
    for number, cache in enumerate(caches):
        if cache.is_open:
            assert cache.length == 20 + number
            assert all((array == number).all() for array in held(pool, cache))
    before = [cache.slot for cache in caches]
    pool.bring_together([caches[0], caches[2]])  # near enough
    assert [cache.slot for cache in caches] == before


def test_more_than_the_context_is_refused():
    with pytest.raises(RequestError, match="5000 tokens do not fit the model's context of 4096"):
        pool_of().open(5000)
