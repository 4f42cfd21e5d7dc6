"""src/models/cache.py: where rows lie, what they may see, and how much memory they hold."""

import math
import random
import weakref

import pytest
import torch
from torch import Tensor

from src.models.cache import FixedCache, KVCache, PromptCache, shared_prefix, up_to

LAYERS, KV_HEADS, HEAD_DIM = 2, 3, 4
ROW_BYTES = 2 * LAYERS * KV_HEADS * HEAD_DIM * 4  # of one position, float32


def keys_of(sequence: int, positions: Tensor, layer: int) -> Tensor:
    """The keys [K, S, E] that a sequence has at some positions: every number tells where it belongs."""
    numbers = sequence * 1e4 + layer * 1e3 + positions.float()
    return numbers[None, :, None].expand(KV_HEADS, len(positions), HEAD_DIM)


def prompt(sequence: int, length: int) -> list[tuple[Tensor, Tensor]]:
    """A prompt's keys and values as PromptCache.row() gives them."""
    layers = [keys_of(sequence, torch.arange(length), layer) for layer in range(LAYERS)]
    return [(keys, -keys) for keys in layers]


def step(cache: KVCache, sequences: dict[int, int]) -> None:
    """Decode one position of every row; each layer must then see exactly its row's past and present."""
    before = cache.lengths.copy()
    positions = cache.advance()
    slots = cache.slots()
    assert positions[:, 0].tolist() == before[slots].tolist()
    for layer in range(LAYERS):
        new = torch.stack([keys_of(sequences[slot], positions[row], layer) for row, slot in enumerate(slots)])
        seen = 0
        for group in cache.write(layer, new, -new):
            for row, slot in enumerate(slots[group.rows]):
                mask = group.mask[row, 0, 0]
                assert mask.sum() == before[slot] + 1
                expected = keys_of(sequences[slot], torch.arange(int(before[slot]) + 1), layer)
                assert torch.equal(group.keys[row][:, mask], expected)
                assert torch.equal(group.values[row][:, mask], -expected)
                assert group.values[row].isfinite().all()
                seen += 1
        assert seen == len(slots)


def test_a_query_sees_its_own_position_and_those_before() -> None:
    assert up_to(torch.tensor([[0], [2]]), 3)[:, 0, 0].tolist() == [[True, False, False], [True] * 3]


def test_a_shared_prefix_leaves_each_prompt_a_token() -> None:
    common = list(range(80))
    assert shared_prefix([[*common, 1], [*common, 2, 3]]) == 80
    assert shared_prefix([common, [*common, 2], common]) == 79
    assert shared_prefix([common[:70], common]) == 69
    for too_little in ([], [common], [common, common], [common[:60], common], [common, common[1:]]):
        assert shared_prefix(too_little) == 0


def test_rows_keep_their_past_while_others_come_grow_and_go() -> None:
    draw = random.Random(0)
    cache, sequences = KVCache(6), {}
    for sequence in range(1, 40):
        if len(sequences) == 6 or sequences and draw.random() < 0.5:
            slot = draw.choice(sorted(sequences))
            cache.release(slot)
            del sequences[slot]
        free = sorted(set(range(6)) - sequences.keys())
        slots = free[: draw.randint(1, 2)]  # samples of one prompt share what was read
        cache.admit(slots, prompt(sequence, draw.choice([1, 5, 60, 63, 64, 100, 127, 200])))
        sequences |= dict.fromkeys(slots, sequence)
        assert sorted(cache.slots()) == sorted(sequences)
        for _ in range(draw.randint(0, 4)):
            step(cache, sequences)


def n_bytes(cache: KVCache) -> int:
    return sum(store.nbytes for bucket in cache._buckets for store in bucket.stores)


def test_memory_follows_what_is_used() -> None:
    cache = KVCache(100)
    assert n_bytes(cache) == 0
    cache.admit([3], prompt(1, 10))
    assert n_bytes(cache) == 64 * ROW_BYTES
    cache.admit([7], prompt(2, 200))
    assert n_bytes(cache) == (64 + 256) * ROW_BYTES
    cache.admit([8], prompt(3, 130))
    assert n_bytes(cache) == (64 + 192 + 256) * ROW_BYTES
    cache.release(3)
    cache.release(8)
    assert n_bytes(cache) == 256 * ROW_BYTES
    cache.release(7)
    assert n_bytes(cache) == 0


def test_rows_that_move_together_are_twice_in_memory_a_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most = [0], [0]

    def count(store: Tensor) -> Tensor:
        alive[0] += store.nbytes
        most[0] = max(most[0], alive[0])
        weakref.finalize(store, lambda n=store.nbytes: alive.append(alive.pop() - n))
        return store

    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *given: count(new_empty(*given)))
    cache = KVCache(20)
    cache.admit(range(20), prompt(1, 60))
    for _ in range(20):  # from 64 positions to 96
        step(cache, dict.fromkeys(range(20), 1))
    assert most[0] == 20 * (96 + 64 // LAYERS) * ROW_BYTES and alive[0] == n_bytes(cache) == 20 * 96 * ROW_BYTES


@pytest.mark.parametrize("kind", [KVCache, FixedCache])
def test_a_broken_row_spoils_none_that_takes_its_place(kind: type[KVCache] | type[FixedCache]) -> None:
    """One of whose numbers were NaN left them where the next row's positions will be, and those after it."""
    cache = kind(3)
    cache.admit([0, 2], prompt(1, 3))
    cache.admit([1], [(keys * math.nan, values) for keys, values in prompt(2, 40)])
    cache.release(1)
    cache.admit([1], prompt(3, 5))
    cache.advance()
    for layer in range(LAYERS):
        new = torch.zeros(3, KV_HEADS, 1, HEAD_DIM)
        for group in cache.write(layer, new, new):
            assert group.keys.isfinite().all() and group.values.isfinite().all()


def test_a_bucket_that_empties_gives_memory_back() -> None:
    cache = KVCache(32)
    cache.admit(range(32), prompt(1, 3))
    for slot in range(30):
        cache.release(slot)
    assert n_bytes(cache) <= 8 * 64 * ROW_BYTES
    step(cache, {30: 1, 31: 1})


def test_prompt_cache_keeps_rows_without_their_padding() -> None:
    cache = PromptCache()
    keys = torch.arange(2 * KV_HEADS * 5 * HEAD_DIM).view(2, KV_HEADS, 5, HEAD_DIM).float()
    for layer in range(LAYERS):
        (group,) = cache.write(layer, keys + layer, -keys)
        assert group.mask is None and torch.equal(group.keys, keys + layer)
    (first, second) = cache.row(1, 3)
    assert torch.equal(first[0], keys[1, :, :3]) and torch.equal(second[0], keys[1, :, :3] + 1)
    assert torch.equal(second[1], -keys[1, :, :3])


def test_a_bucket_shrinks_with_its_rows() -> None:
    cache = KVCache(20)
    for slot in range(20):
        cache.admit([slot], prompt(slot, 10))
    for slot in range(20):
        cache.release(slot)
        # by the first that goes its store has room for 32, of which no more than 20 were written
        assert n_bytes(cache) <= max(2 * (19 - slot), 32 if slot < 9 else 0) * 64 * ROW_BYTES
