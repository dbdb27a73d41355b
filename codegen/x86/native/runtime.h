/* What the parts of the launcher share. They are compiled as one file, in the order that glue.py names. */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <immintrin.h>
#include <linux/futex.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* What a kernel is handed, one for each thread. `fail` does not return. */
struct runtime {
    void *arena;
    void (*fail)(struct runtime *, const char *message);
    void (*print)(struct runtime *, const char *prefix, const void *data, int64_t count, int32_t kind, int32_t hex);
};

/* Runs programs first..last-1, axis 0 fastest; arguments are slots of 8 bytes. */
typedef void (*kernel_function)(const uint64_t *arguments, int64_t first, int64_t last, int32_t g0, int32_t g1,
                                int32_t g2, struct runtime *);

/* Text that grows; `lost` where there was no memory for more. */
struct text {
    char *data;
    size_t size, room;
    bool lost;
};

/* One launch. */
struct job {
    kernel_function function;
    const uint64_t *arguments;
    int32_t grid[3];
    int64_t total;
    int threads, core;  /* the core is the caller's */
    size_t arena_bytes;
    bool traced;        /* one program a call, so that messages can tell which */
    _Atomic bool lazy;  /* workers that sleep are left asleep */
    int64_t started_ns;
    _Atomic int64_t work_ns; /* of all threads together */
    _Atomic int64_t next;
    _Atomic(const char *) failure;
    int64_t failed_program; /* -1 where a chunk of several ran */
};

/* A thread that runs programs: one of the pool, or a caller's. */
struct worker {
    struct runtime runtime; /* first: the kernel's pointer is cast back */
    size_t arena_bytes;
    struct job *job;
    int64_t program;
    struct text output;
    jmp_buf escape;
    int index;
    _Atomic uint32_t ticket;
    _Atomic bool sleeping;
} __attribute__((aligned(128)));

static const char out_of_memory[] = "no memory for the tiles of a program";

static void text_add(struct text *, const char *data, size_t size);
static void print_values(struct runtime *, const char *prefix, const void *data, int64_t count, int32_t kind,
                         int32_t hex);

static int64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}
