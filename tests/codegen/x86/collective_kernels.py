# mypy: ignore-errors
"""Kernels in which elements of a tile meet."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def offsets(S: tl.constexpr):
    """Of every element of a row-major tile."""
    at = tl.arange(0, S[0])
    for dim in tl.static_range(1, len(S)):
        at = tl.expand_dims(at, dim) * S[dim] + tl.arange(0, S[dim])
    return at


@triton.jit
def affine(a, b, c, d):
    """x -> c (a x + b) + d: associative, and the order matters."""
    return a * c, b * c + d


@triton.jit
def welford(mean, m2, n, mean_, m2_, n_):
    delta = mean_ - mean
    total = n + n_
    return mean + delta * n_ / total, m2 + m2_ + delta * delta * n * n_ / total, total


@triton.jit
def left(a, b):
    return a


@triton.jit
def store_all(pointer, tile):
    """Of a tile of any shape, or a scalar."""
    if tile.type.is_block():
        flat = tl.reshape(tile, [tile.numel])
        tl.store(pointer + tl.arange(0, flat.shape[0]), flat)
    else:
        tl.store(pointer, tile)


@triton.jit
def reduce(x, y, z, S: tl.constexpr, AXIS: tl.constexpr, WHAT: tl.constexpr):
    tile = tl.load(x + offsets(S))
    if WHAT == "sum":
        store_all(y, tl.sum(tile, AXIS))
    elif WHAT == "max":
        store_all(y, tl.max(tile, AXIS))
    elif WHAT == "xor":
        store_all(y, tl.xor_sum(tile, AXIS))
    elif WHAT == "left":
        store_all(y, tl.reduce(tile, AXIS, left))
    elif WHAT == "affine":
        a, b = tl.reduce((tile, tile + 1), AXIS, affine)
        store_all(y, a)
        store_all(z, b)
    elif WHAT == "argmax":
        value, index = tl.max(tile, AXIS, return_indices=True)
        store_all(y, value)
        store_all(z, index)
    else:
        mean, m2, n = tl.reduce((tile, tl.zeros_like(tile), tl.full(S, 1.0, tl.float32)), AXIS, welford)
        store_all(y, mean)
        store_all(z, m2 / n)


@triton.jit
def scan(x, y, z, S: tl.constexpr, AXIS: tl.constexpr, WHAT: tl.constexpr, REVERSE: tl.constexpr):
    tile = tl.load(x + offsets(S))
    if WHAT == "sum":
        tl.store(y + offsets(S), tl.cumsum(tile, AXIS, reverse=REVERSE))
    elif WHAT == "left":
        tl.store(y + offsets(S), tl.associative_scan(tile, AXIS, left, reverse=REVERSE))
    else:
        a, b = tl.associative_scan((tile, tile + 1), AXIS, affine, reverse=REVERSE)
        tl.store(y + offsets(S), a)
        tl.store(z + offsets(S), b)


@triton.jit
def gather(x, index, y, S: tl.constexpr, TO: tl.constexpr, AXIS: tl.constexpr):
    tl.store(y + offsets(TO), tl.gather(tl.load(x + offsets(S)), tl.load(index + offsets(TO)), AXIS))


@triton.jit
def concatenate(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + tl.arange(0, 2 * N), tl.cat(tl.load(x + at) + 1, tl.load(y + at), can_reorder=True))


@triton.jit
def histogram(x, y, n, N: tl.constexpr, BINS: tl.constexpr, MASKED: tl.constexpr):
    at = tl.arange(0, N)
    values = tl.load(x + at)
    counts = tl.histogram(values, BINS, mask=at < n) if MASKED else tl.histogram(values, BINS)
    tl.store(y + tl.arange(0, BINS), counts)


@triton.jit
def collatz(a, b):
    if a <= 0:
        return b, -1
    steps = 0
    while a > 1:
        a = a // 2 if a % 2 == 0 else 3 * a + 1
        steps += 1
    return a + b, steps


@triton.jit
def order_two(a, b):
    if a > b:
        return b, a
    return a, b


@triton.jit
def map_elements(x, y, z, S: tl.constexpr):
    first, steps = tl.map_elementwise(collatz, tl.load(x + offsets(S)), tl.load(y + offsets(S)))
    tl.store(y + offsets(S), first)
    tl.store(z + offsets(S), steps)


@triton.jit
def map_pairs(x, y, S: tl.constexpr):
    pairs = tl.map_elementwise(order_two, tl.load(x + offsets(S)), pack=2)
    tl.store(y + offsets(S), pairs[0])


@triton.jit
def sort(x, y, S: tl.constexpr, DESCENDING: tl.constexpr):
    tl.store(y + offsets(S), tl.sort(tl.load(x + offsets(S)), descending=DESCENDING))


@triton.jit
def topk(x, y, S: tl.constexpr, K: tl.constexpr):
    store_all(y, tl.topk(tl.load(x + offsets(S)), K))


@triton.jit
def flip(x, y, S: tl.constexpr, AXIS: tl.constexpr):
    tl.store(y + offsets(S), tl.flip(tl.load(x + offsets(S)), AXIS))


@triton.jit
def sort_rows_in_loop(x, y, rows, N: tl.constexpr):
    """The sorted rows added up, through columns: what is sorted is seen through windows of another form."""
    total = tl.zeros([N], x.dtype.element_ty)
    at = tl.arange(0, N)
    for row in range(rows):
        pair = tl.sort(tl.join(tl.load(x + row * N + at), tl.load(x + row * N + at) + 1).trans(1, 0))
        total += tl.sum(pair * (tl.arange(0, 2) + 1)[:, None], 0)
    tl.store(y + at, total)


@triton.jit
def modify(
    x, item, old, target, mask, S: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr, SEM: tl.constexpr
):
    """Every element of item changes the element of x that target names."""
    at = tl.program_id(0) * 0 + offsets(S)
    pointers = x + tl.load(target + at)
    value = tl.load(item + at)
    wanted = tl.load(mask + at) != 0 if MASKED else None
    if KIND == "add":
        before = tl.atomic_add(pointers, value, wanted, sem=SEM)
    elif KIND == "and":
        before = tl.atomic_and(pointers, value, wanted, sem=SEM)
    elif KIND == "or":
        before = tl.atomic_or(pointers, value, wanted, sem=SEM)
    elif KIND == "xor":
        before = tl.atomic_xor(pointers, value, wanted, sem=SEM)
    elif KIND == "max":
        before = tl.atomic_max(pointers, value, wanted, sem=SEM)
    elif KIND == "min":
        before = tl.atomic_min(pointers, value, wanted, sem=SEM)
    else:
        before = tl.atomic_xchg(pointers, value, wanted, sem=SEM)
    if old is not None:
        tl.store(old + at, before)


@triton.jit
def modify_one(x, item, old, KIND: tl.constexpr):
    value = tl.load(item)
    if KIND == "add":
        before = tl.atomic_add(x, value, mask=value != 0)
    elif KIND == "max":
        before = tl.atomic_max(x, value)
    else:
        before = tl.atomic_xchg(x, value)
    tl.store(old, before)


@triton.jit
def add_by_all(x, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.atomic_add(x + at % 4, (at + 1).to(x.dtype.element_ty))


@triton.jit
def compare_and_swap(x, expected, item, old, S: tl.constexpr):
    at = offsets(S)
    before = tl.atomic_cas(x + at, tl.load(expected + at), tl.load(item + at))
    tl.store(old + at, before)


@triton.jit
def locked_sum(lock, total, N: tl.constexpr):
    """Programs that wait for each other add to what a lock guards."""
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    seen = tl.load(total + tl.arange(0, N))
    tl.store(total + tl.arange(0, N), seen + tl.program_id(0))
    tl.atomic_xchg(lock, 0)


@triton.jit
def check(x, n, S: tl.constexpr):
    tl.device_assert(tl.load(x + offsets(S)) >= n, 'x "must"\nnot be small: 100% \\ é')


@triton.jit
def check_one(n):
    tl.device_assert(n > 3, "n is small")


@triton.jit
def show(x, n, S: tl.constexpr, HEX: tl.constexpr):
    tile = tl.load(x + offsets(S))
    tl.device_print("tile", tile, n, hex=HEX)
    tl.device_print("done")
