"""Where a decoder keeps the keys and values of what it has read, while rows come and go.

B rows of a batch, S new positions, T cached positions, L layers, K kv heads on this rank, E head dim
P positions of a prefix that all rows begin with

A cache is handed to Decoder.forward(), whose layers call write() with the keys and values of the new positions and
attend to the groups of rows it returns. A cache may have a prefix: each row then begins with it, its keys and values
lie there once, and what is said of a row's positions counts from the prefix's end.
"""

import os.path
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from src import parallel

SMALLEST = 64  # positions of a bucket; below it moving rows costs more than it saves
# Of one forward over prompts, padding and a shared prefix included: enough to use a processor, few to hold
PREFILL_TOKENS = 2048
LEAST_SHARED = 64  # tokens; a shorter prefix saves little, and what rows round to would depend on the other prompts
Layers = Sequence[tuple[Tensor, Tensor]]  # keys and values of one sequence, [K, T, E] a layer


class Group(NamedTuple):
    """Consecutive rows of a batch whose keys and values lie in one tensor, and what they may attend to."""

    rows: slice
    keys: Tensor  # [b, K, T, E]
    values: Tensor
    mask: Tensor | None  # [b, 1, S, T] bool, True = may attend; None = causal over the new positions alone
    prefix: tuple[Tensor, Tensor] | None  # keys and values [K, P, E] of what all rows attend to besides


def up_to(positions: Tensor, length: int) -> Tensor:
    """Which of `length` cached positions each query may attend to: those up to its own.

    positions [b, S] int64 -> [b, 1, S, length] bool.
    """
    return torch.arange(length, device=positions.device) <= positions[:, None, :, None]


def shared_prefix(prompts: Sequence[list[int]]) -> int:
    """How many tokens that all prompts begin with are kept once, 0 for few; each prompt has at least one more."""
    n = min(len(os.path.commonprefix(prompts)), min(map(len, prompts), default=0) - 1)
    return n if n >= LEAST_SHARED and min(prompts) != max(prompts) else 0


def n_positions(layers: Layers) -> int:
    """How long the sequence is that these keys and values are of."""
    return layers[0][0].shape[1] if layers else 0


class PromptCache:
    """Keys and values of freshly read prompts, right-padded rows of one batch: what prefill writes."""

    def __init__(self, prefix: Layers = ()) -> None:
        self.prefix = prefix
        self.layers: list[tuple[Tensor, Tensor]] = []

    def write(self, layer: int, keys: Tensor, values: Tensor) -> list[Group]:
        """Keep keys and values [B, K, S, E] of a layer, called once for each in order; attention stays in the batch."""
        assert layer == len(self.layers), "a PromptCache reads one batch, once"
        self.layers.append((keys, values))
        return [Group(slice(None), keys, values, None, self.prefix[layer] if self.prefix else None)]

    def row(self, index: int, length: int) -> Layers:
        """The keys and values of one prompt of this length; views."""
        return [(keys[index, :, :length], values[index, :, :length]) for keys, values in self.layers]


def bucket_capacity(length: int) -> int:
    """How many positions a row of so many has room for on a CPU: 64, 96, 128, 192, 256, ..."""
    power = max(SMALLEST, 1 << (length - 1).bit_length())
    return power * 3 // 4 if SMALLEST < length <= power * 3 // 4 else power


class _Bucket:
    """Rows of at most `capacity` positions: row i's position t lies at stores[layer][:, i, :, t].

    The rows in use come first. What lies after a row's end is zero, never another row's: it is masked, and a masked
    NaN would still spoil a sum. Each layer has a tensor of its own: while rows move, one is there twice.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.slots: list[int] = []
        self.stores: list[Tensor] = []  # of each layer [2, n, K, capacity, E]; keys, then values
        self.most = 0  # rows that the stores have held

    def add(self, slots: Sequence[int], layers: Iterable[Sequence[Tensor]]) -> None:
        """Give slots the next rows. layers: in each what every row begins with, [2, K, T, E]."""
        start, end = len(self.slots), len(self.slots) + len(slots)
        for layer, rows in enumerate(layers):
            _, kv_heads, length, head_dim = rows[0].shape
            if not start:
                self.stores.append(rows[0].new_empty(2, end, kv_heads, self.capacity, head_dim))
            elif end > (had := self.stores[layer].shape[1]):  # doubled, rows are copied seldom
                room = max(end, had * 2 if rows[0].is_cpu else had * 5 // 4)
                self.stores[layer] = self._resized(self.stores[layer], room, start)
            store = self.stores[layer]
            for place in range(start, end):  # no name is left to one of the rows: it would keep them all
                store[:, place, :, :length] = rows[place - start]
            store[:, start:end, :, length:] = 0
        self.slots += slots
        self.most = max(self.most, end)

    def remove(self, slot: int) -> None:
        """Drop a row; the last one takes its place. A bucket that is half empty gives its memory back."""
        index, last = self.slots.index(slot), len(self.slots) - 1
        for store in self.stores if index != last else ():
            store[:, index] = store[:, last]
        self.slots[index] = self.slots[last]
        self.slots.pop()
        if not self.slots:
            self.stores = []
        elif 2 * last <= self.most:
            for layer, store in enumerate(self.stores):
                self.stores[layer] = self._resized(store, last, last)
            self.most = last

    @staticmethod
    def _resized(rows: Tensor, n: int, kept: int) -> Tensor:
        """A layer's store for n rows, of which the first few are kept. [2, m, K, capacity, E] -> [2, n, ...]."""
        store = rows.new_empty(2, n, *rows.shape[2:])
        store[:, :kept] = rows[:, :kept]
        return store


class KVCache:
    """The cache of continuous batching: a fixed number of slots, each empty or holding one sequence.

    Rows live in buckets of like length - up to 64 positions, 96, 128, 192, 256, ... - and move to the next when
    they outgrow theirs, so memory and reading follow what is used. slots() tells the order of the rows in the batch.
    """

    def __init__(self, n_slots: int) -> None:
        self.lengths = np.zeros(n_slots, dtype=np.int64)  # positions in use, by slot; 0 = empty
        self.prefix: Layers = ()
        self.positions = torch.zeros(0, 1, dtype=torch.int64)  # [B, 1], what advance() made room for
        self._buckets: list[_Bucket] = []  # by capacity
        self._targets: list[tuple[_Bucket, slice, Tensor, Tensor, Tensor]] = []

    def slots(self) -> list[int]:
        """The slots in use, in the order that the batch has them."""
        return [slot for bucket in self._buckets for slot in bucket.slots]

    def admit(self, slots: Sequence[int], prompt: Layers) -> None:
        """Put one prompt's keys and values into each of these empty slots."""
        length = n_positions(prompt)
        self._bucket_of(length + 1).add(slots, ([torch.stack(both)] * len(slots) for both in prompt))
        self.lengths[slots] = length

    def release(self, slot: int) -> None:
        """Empty a slot."""
        next(bucket for bucket in self._buckets if slot in bucket.slots).remove(slot)
        self._buckets = [bucket for bucket in self._buckets if bucket.slots]
        self.lengths[slot] = 0

    def advance(self) -> Tensor:
        """Make room for one more position in every row. -> its position in each, [B, 1] int64, in slots() order."""
        for bucket in list(self._buckets):
            full = [slot for slot in bucket.slots if self.lengths[slot] == bucket.capacity]
            if full:
                self._move_up(full, bucket)
        self._buckets = [bucket for bucket in self._buckets if bucket.slots]
        slots = self.slots()
        positions = parallel.to_device(torch.from_numpy(self.lengths[slots]))  # [B]
        self.lengths[slots] += 1
        self._targets, start = [], 0
        for bucket in self._buckets:
            rows = slice(start, start + len(bucket.slots))
            start = rows.stop
            here = positions[rows]
            # read only as far as the bucket's longest row has come
            seen = up_to(here[:, None], int(self.lengths[bucket.slots].max()))
            self._targets.append((bucket, rows, torch.arange(len(here), device=here.device), here, seen))
        self.positions = positions[:, None] + n_positions(self.prefix)
        return self.positions

    def write(self, layer: int, keys: Tensor, values: Tensor) -> list[Group]:
        """Store keys and values [B, K, 1, E] of a layer at the positions that advance() gave; what to attend to."""
        groups, prefix = [], self.prefix[layer] if self.prefix else None
        for bucket, rows, index, positions, seen in self._targets:
            stored_keys, stored_values = bucket.stores[layer]
            stored_keys[index, :, positions] = keys[rows, :, 0]
            stored_values[index, :, positions] = values[rows, :, 0]
            n, length = len(index), seen.shape[-1]
            groups.append(Group(rows, stored_keys[:n, :, :length], stored_values[:n, :, :length], seen, prefix))
        return groups

    def _bucket_of(self, length: int) -> _Bucket:
        """The bucket for rows of this many positions, made if there is none."""
        capacity = bucket_capacity(length)
        for bucket in self._buckets:
            if bucket.capacity == capacity:
                return bucket
        self._buckets = sorted([*self._buckets, _Bucket(capacity)], key=lambda bucket: bucket.capacity)
        return self._bucket_of(length)

    def _move_up(self, slots: Sequence[int], bucket: _Bucket) -> None:
        """Copy rows that fill their bucket into the next one; prompts of equal length do so together."""
        index, everyone = [bucket.slots.index(slot) for slot in slots], len(slots) == len(bucket.slots)
        # where all rows leave, a layer at a time is given back
        stores = (bucket.stores.pop(0) if everyone else bucket.stores[layer] for layer in range(len(bucket.stores)))
        self._bucket_of(bucket.capacity + 1).add(slots, ([store[:, i] for i in index] for store in stores))
        for slot in slots:
            bucket.remove(slot)


class FixedCache:
    """The slots of a KVCache in one tensor that is read whole, empty slots too: what a CUDA graph needs. Addresses and
    shapes change only when a row outgrows the capacity, which then doubles; `generation` counts that."""

    SMALLEST = 256  # positions; below it a graph would be captured too often

    def __init__(self, n_slots: int) -> None:
        self.lengths = np.zeros(n_slots, dtype=np.int64)  # positions in use, by slot; 0 = empty
        self.generation = 0
        self.prefix: Layers = ()
        self.positions = torch.zeros(n_slots, 1, dtype=torch.int64, device=parallel.device())
        self.index = torch.arange(n_slots, device=parallel.device())
        self.seen: Tensor | None = None  # [n, 1, 1, capacity] bool
        self.store: Tensor | None = None  # [2, L, n, K, capacity, E]; keys, then values

    def slots(self) -> list[int]:
        """The slots in use."""
        return np.flatnonzero(self.lengths).tolist()

    def admit(self, slots: Sequence[int], prompt: Layers) -> None:
        """Put one prompt's keys and values into each of these empty slots."""
        length = n_positions(prompt)
        self._reserve(length + 1, len(prompt), prompt[0][0])
        index = parallel.to_device(torch.tensor(slots))
        self.store[:, :, index, :, length:] = 0  # masked or not, a NaN of an earlier row would spoil sums
        for layer, (keys, values) in enumerate(prompt):
            self.store[0, layer, index, :, :length] = keys
            self.store[1, layer, index, :, :length] = values
        self.lengths[slots] = length

    def release(self, slot: int) -> None:
        """Empty a slot."""
        self.lengths[slot] = 0

    def advance(self) -> Tensor:
        """Make room for one more position in every slot. -> its position in each, [n, 1] int64, always one tensor."""
        self._reserve(int(self.lengths.max()) + 1, self.store.shape[1], self.store[0, 0, 0])
        self.positions.copy_(parallel.to_device(torch.from_numpy(self.lengths))[:, None] + n_positions(self.prefix))
        self.seen.copy_(up_to(self.positions - n_positions(self.prefix), self.seen.shape[-1]))
        self.lengths[self.slots()] += 1
        return self.positions

    def write(self, layer: int, keys: Tensor, values: Tensor) -> list[Group]:
        """Store keys and values [n, K, 1, E] of a layer at the positions that advance() gave; what to attend to."""
        stored_keys, stored_values = self.store[0, layer], self.store[1, layer]
        positions = self.positions[:, 0] - n_positions(self.prefix)
        stored_keys[self.index, :, positions] = keys[:, :, 0]
        stored_values[self.index, :, positions] = values[:, :, 0]
        prefix = self.prefix[layer] if self.prefix else None
        return [Group(slice(None), stored_keys, stored_values, self.seen, prefix)]

    def _reserve(self, length: int, n_layers: int, like: Tensor) -> None:
        """Make room for rows of this many positions of keys shaped like [K, T, E]."""
        had = 0 if self.store is None else self.store.shape[4]
        if length <= had:
            return
        capacity = max(self.SMALLEST, 1 << (length - 1).bit_length())
        kv_heads, _, head_dim = like.shape
        store = like.new_zeros(2, n_layers, len(self.lengths), kv_heads, capacity, head_dim)
        if self.store is not None:
            store[:, :, :, :, :had] = self.store
        self.store = store
        self.seen = torch.zeros(len(self.lengths), 1, 1, capacity, dtype=torch.bool, device=like.device)
        self.generation += 1


Cache = PromptCache | KVCache | FixedCache
