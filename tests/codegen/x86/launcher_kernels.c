/* Kernels as the compiler would make them, for the tests of the launcher. */
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct runtime {
    void *arena;
    void (*fail)(struct runtime *, const char *message);
    void (*print)(struct runtime *, const char *prefix, const void *data, int64_t count, int32_t kind, int32_t hex);
};

#define KERNEL(name)                                                                                                   \
    void name(const uint64_t *args, int64_t first, int64_t last, int32_t g0, int32_t g1, int32_t g2, struct runtime *rt)

/* out, then n further slots */
KERNEL(copy_slots)
{
    uint64_t *out = (uint64_t *)args[0];
    for (uint64_t i = 0; i < out[0]; i++)
        out[1 + i] = args[1 + i];
}

/* count[p] += 1; thread[p]; when[p] from a counter; grid */
KERNEL(visit)
{
    int32_t *count = (int32_t *)args[0];
    int64_t *thread = (int64_t *)args[1], *when = (int64_t *)args[2];
    _Atomic int64_t *clock = (_Atomic int64_t *)args[3];
    for (int64_t p = first; p < last; p++) {
        count[p]++;
        thread[p] = syscall(SYS_gettid);
        when[p] = atomic_fetch_add(clock, 1);
        for (volatile int i = 0; i < 2000; i++)
            ;
    }
    (void)g0, (void)g1, (void)g2, (void)rt;
}

/* done[p] = 1, but program args[1] fails */
KERNEL(refuse)
{
    int8_t *done = (int8_t *)args[0];
    for (int64_t p = first; p < last; p++) {
        if (p == (int64_t)args[1])
            rt->fail(rt, "kernel.py:7:4: too far");
        done[p] = 1;
    }
}

/* arena[p] = its address, after all of args[1] bytes have been written */
KERNEL(use_arena)
{
    uint64_t *arena = (uint64_t *)args[0];
    for (int64_t p = first; p < last; p++) {
        memset(rt->arena, (int)p, args[1]);
        arena[p] = (uint64_t)rt->arena;
    }
}

/* prints args[1] elements of kind args[2] at args[0] */
KERNEL(show)
{
    for (int64_t p = first; p < last; p++)
        rt->print(rt, "2x3| x: ", (void *)args[0], args[1], args[2], args[3]);
}

KERNEL(show_scalar)
{
    int32_t value = -7;
    for (int64_t p = first; p < last; p++)
        rt->print(rt, "| n: ", &value, 1, 5, 0);
}

KERNEL(show_nothing)
{
    for (int64_t p = first; p < last; p++)
        rt->print(rt, "| here", NULL, 0, 5, 0);
}

/* every program waits until all have come */
KERNEL(meet)
{
    _Atomic int32_t *come = (_Atomic int32_t *)args[0];
    int32_t all = g0 * g1 * g2;
    for (int64_t p = first; p < last; p++) {
        atomic_fetch_add(come, 1);
        while (atomic_load(come) < all)
            ;
    }
}

/* program p waits until done[p] is set, then sets done[p + 1] */
KERNEL(follow)
{
    _Atomic int32_t *done = (_Atomic int32_t *)args[0];
    for (int64_t p = first; p < last; p++) {
        while (!atomic_load(&done[p]))
            ;
        atomic_store(&done[p + 1], 1);
    }
}

/* sets args[0][0], waits until args[0][1] is set, at most ten seconds */
KERNEL(wait_for_host)
{
    _Atomic int32_t *flags = (_Atomic int32_t *)args[0];
    time_t start = time(NULL);
    atomic_store(&flags[0], 1);
    while (!atomic_load(&flags[1]) && time(NULL) - start < 10)
        ;
    atomic_store(&flags[2], atomic_load(&flags[1]));
}

/* out[p] = x * y in single precision */
KERNEL(multiply)
{
    float *out = (float *)args[0];
    volatile float x, y;
    memcpy((void *)&x, &args[1], 4);
    memcpy((void *)&y, &args[2], 4);
    for (int64_t p = first; p < last; p++)
        out[p] = x * y;
}
