/* The threads that run programs. Programs are taken in grid order; the thread that launches works too, and waits only
   for workers that have begun, so that a launch is not delayed by threads that are slow to wake. */

enum {
    MAX_WORKERS = 1023,
    CHUNKS_PER_THREAD = 4,      /* each takes a quarter of its share of what is left */
    WORKER_SPIN_NS = 1000000,   /* before a worker sleeps: launches of a layer lie up to 0.3 ms apart where its weights
                                   have driven Python out of the caches, and a core that halts is slow to return */
    CALLER_SPIN_NS = 20000,
    LAZY_NS = 8000,             /* a launch that took less last time is not worth a system call */
    MAX_SPINNING_PROGRAMS = 512,
    SPINNING_STACK = 1 << 20,
};

#define OPEN 0x80000000u
#define ACTIVE 0x7fffffffu

static struct {
    pthread_mutex_t busy;
    struct worker *workers[MAX_WORKERS];
    int count;
    uint32_t epoch;
    struct job *job;
    _Atomic uint64_t gate; /* epoch << 32 | OPEN while it can be joined | workers that have joined */
    _Atomic bool waiting;
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER};

static pthread_mutex_t spinning_busy = PTHREAD_MUTEX_INITIALIZER;
static pthread_key_t caller_key;

static void futex_wait(void *word, uint32_t expected)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, NULL, NULL, 0);
}

static void futex_wake(void *word, int count)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

static void fail(struct runtime *runtime, const char *message)
{
    struct worker *worker = (struct worker *)runtime;
    struct job *job = worker->job;
    const char *none = NULL;
    if (atomic_compare_exchange_strong(&job->failure, &none, message))
        job->failed_program = job->traced ? worker->program : -1;
    atomic_store(&job->next, job->total);
    _longjmp(worker->escape, 1);
}

static struct worker *new_worker(int index)
{
    struct worker *worker = aligned_alloc(_Alignof(struct worker), sizeof *worker);
    if (worker) {
        memset(worker, 0, sizeof *worker);
        worker->runtime = (struct runtime){.fail = fail, .print = print_values};
        worker->index = index;
    }
    return worker;
}

static void free_worker(void *pointer)
{
    struct worker *worker = pointer;
    if (worker->arena_bytes)
        munmap(worker->runtime.arena, worker->arena_bytes);
    free(worker->output.data);
    free(worker);
}

/* Pages come from the kernel untouched, so that they lie near the thread that uses them first. */
static bool grow_arena(struct worker *worker, size_t bytes)
{
    const size_t huge = 2 << 20;
    if (bytes <= worker->arena_bytes)
        return true;
    size_t unit = bytes >= huge ? huge : 4096, size = (bytes + unit - 1) / unit * unit;
    void *arena = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (arena == MAP_FAILED)
        return false;
    if (size >= huge)
        madvise(arena, size, MADV_HUGEPAGE);
    if (worker->arena_bytes)
        munmap(worker->runtime.arena, worker->arena_bytes);
    worker->runtime.arena = arena;
    worker->arena_bytes = size;
    return true;
}

static bool take(struct job *job, int64_t *first, int64_t *last)
{
    int64_t next = atomic_load_explicit(&job->next, memory_order_relaxed), size;
    do {
        int64_t left = job->total - next;
        if (left <= 0)
            return false;
        size = job->threads == 1 ? left : left / ((int64_t)CHUNKS_PER_THREAD * job->threads);
        size = job->traced || size < 1 ? 1 : size;
    } while (!atomic_compare_exchange_weak_explicit(&job->next, &next, next + size, memory_order_relaxed,
                                                    memory_order_relaxed));
    *first = next;
    *last = next + size;
    return true;
}

static void wake_children(struct worker *const *workers, int index, int wanted, uint32_t ticket, bool lazy);

static void run_chunks(struct worker *worker, struct job *job)
{
    int64_t first, last;
    if (_setjmp(worker->escape))
        return;
    while (take(job, &first, &last)) {
        worker->program = first;
        job->function(job->arguments, first, last, job->grid[0], job->grid[1], job->grid[2], &worker->runtime);
        if (worker->index < 0 && atomic_load_explicit(&job->lazy, memory_order_relaxed)
            && now_ns() - job->started_ns > LAZY_NS) {
            atomic_store(&job->lazy, false);
            wake_children(pool.workers, -1, job->threads - 1, pool.epoch, false);
        }
    }
}

/* With rounding to nearest and subnormal numbers, whatever the thread had set. */
static void run_share(struct worker *worker, struct job *job)
{
    unsigned control = _mm_getcsr();
    worker->job = job;
    if (!grow_arena(worker, job->arena_bytes)) {
        const char *none = NULL;
        atomic_compare_exchange_strong(&job->failure, &none, out_of_memory);
        atomic_store(&job->next, job->total);
        return;
    }
    int64_t begun = now_ns();
    _mm_setcsr(0x1f80);
    run_chunks(worker, job);
    _mm_setcsr(control);
    atomic_fetch_add(&job->work_ns, now_ns() - begun);
}

/* Hands the ticket on: the threads form a tree whose root is the caller, index -1. */
static void wake_children(struct worker *const *workers, int index, int wanted, uint32_t ticket, bool lazy)
{
    for (int child = 2 * index + 2; child <= 2 * index + 3 && child < wanted; child++) {
        atomic_store(&workers[child]->ticket, ticket);
        if (!lazy && atomic_load(&workers[child]->sleeping))
            futex_wake(&workers[child]->ticket, 1);
    }
}

static bool join(uint32_t ticket)
{
    uint64_t gate = atomic_load(&pool.gate);
    do {
        if (gate >> 32 != ticket || !(gate & OPEN))
            return false;
    } while (!atomic_compare_exchange_weak(&pool.gate, &gate, gate + 1));
    return true;
}

static void leave(void)
{
    uint64_t gate = atomic_fetch_sub(&pool.gate, 1) - 1;
    if (!(gate & (OPEN | ACTIVE)) && atomic_load(&pool.waiting))
        futex_wake(&pool.gate, 1);
}

static uint32_t next_ticket(struct worker *worker, uint32_t seen)
{
    for (int64_t until = now_ns() + WORKER_SPIN_NS; now_ns() < until;) {
        uint32_t ticket = atomic_load_explicit(&worker->ticket, memory_order_acquire);
        if (ticket != seen)
            return ticket;
        _mm_pause();
    }
    atomic_store(&worker->sleeping, true);
    while (atomic_load(&worker->ticket) == seen)
        futex_wait(&worker->ticket, seen);
    atomic_store(&worker->sleeping, false);
    return atomic_load(&worker->ticket);
}

/* Linux likes to wake a thread on its waker's core and may leave both there for many milliseconds. A mask without that
   core moves the thread at once; it keeps the place when it gets its own mask back. */
static void leave_core(int core, int threads)
{
    cpu_set_t allowed, others;
    if (sched_getcpu() != core || sched_getaffinity(0, sizeof allowed, &allowed) || CPU_COUNT(&allowed) < threads)
        return;
    others = allowed;
    CPU_CLR(core, &others);
    if (CPU_COUNT(&others) && !sched_setaffinity(0, sizeof others, &others))
        sched_setaffinity(0, sizeof allowed, &allowed);
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    for (uint32_t ticket = 0;;) {
        ticket = next_ticket(worker, ticket);
        if (!join(ticket))
            continue;
        struct job *job = pool.job;
        wake_children(pool.workers, worker->index, job->threads - 1, ticket, atomic_load(&job->lazy));
        leave_core(job->core, job->threads);
        run_share(worker, job);
        leave();
    }
    return NULL;
}

/* Signals are the business of the threads that Python knows. */
static int start_thread(pthread_t *thread, const pthread_attr_t *attributes, void *(*body)(void *), void *argument)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(thread, attributes, body, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

/* The workers that there are, `wanted` if that many can be had. */
static int grow_pool(int wanted)
{
    while (pool.count < wanted && pool.count < MAX_WORKERS) {
        pthread_t thread;
        struct worker *worker = new_worker(pool.count);
        if (!worker || start_thread(&thread, NULL, work, worker)) {
            free(worker);
            break;
        }
        pthread_detach(thread);
        pool.workers[pool.count++] = worker;
    }
    return pool.count < wanted ? pool.count : wanted;
}

static void wait_for_workers(void)
{
    uint64_t gate = atomic_fetch_and(&pool.gate, ~(uint64_t)OPEN) & ~(uint64_t)OPEN;
    for (int64_t until = now_ns() + CALLER_SPIN_NS; gate & ACTIVE; gate = atomic_load(&pool.gate)) {
        if (now_ns() < until) {
            _mm_pause();
            continue;
        }
        atomic_store(&pool.waiting, true);
        gate = atomic_load(&pool.gate);
        if (gate & ACTIVE)
            futex_wait(&pool.gate, (uint32_t)gate);
        atomic_store(&pool.waiting, false);
    }
}

/* What a child process inherits of the pool is memory without threads. */
static void after_fork(void)
{
    pthread_mutex_init(&pool.busy, NULL);
    pthread_mutex_init(&spinning_busy, NULL);
    atomic_store(&pool.waiting, false);
    pool.count = 0;
    atomic_store(&pool.gate, 0);
}

static struct worker *caller(void)
{
    struct worker *worker = pthread_getspecific(caller_key);
    if (!worker && (worker = new_worker(-1)))
        pthread_setspecific(caller_key, worker);
    return worker;
}

static void collect(struct text *output, struct worker *worker)
{
    if (worker->output.size)
        text_add(output, worker->output.data, worker->output.size);
    output->lost |= worker->output.lost;
    worker->output.size = 0;
    worker->output.lost = false;
}

/* Runs the job; what it printed is added to output. A pool that another thread uses is not waited for. */
static void run_job(struct job *job, struct text *output)
{
    struct worker *self = caller();
    if (!self) {
        atomic_store(&job->failure, out_of_memory);
        return;
    }
    bool alone = job->threads == 1 || job->total == 1 || pthread_mutex_trylock(&pool.busy);
    if (alone) {
        job->threads = 1;
        atomic_store(&job->lazy, false);
        run_share(self, job);
        collect(output, self);
        return;
    }
    int wanted = grow_pool((int)(job->total < job->threads ? job->total : job->threads) - 1);
    job->threads = wanted + 1;
    job->core = sched_getcpu();
    pool.job = job;
    pool.epoch += pool.epoch == UINT32_MAX ? 2 : 1;
    atomic_store(&pool.gate, (uint64_t)pool.epoch << 32 | OPEN);
    wake_children(pool.workers, -1, wanted, pool.epoch, atomic_load(&job->lazy));
    run_share(self, job);
    wait_for_workers();
    collect(output, self);
    for (int i = 0; job->traced && i < wanted; i++)
        collect(output, pool.workers[i]);
    pthread_mutex_unlock(&pool.busy);
}

/* Programs that wait for each other: each has a thread of its own, and all begin when all are there. */
struct spinning {
    struct worker *worker;
    struct job *job;
    pthread_t thread;
    _Atomic uint32_t *start; /* 0 wait, 1 run, 2 go home */
};

static void *spin(void *argument)
{
    struct spinning *self = argument;
    while (!atomic_load(self->start))
        futex_wait(self->start, 0);
    if (atomic_load(self->start) == 1)
        run_share(self->worker, self->job);
    return NULL;
}

static void run_spinning(struct job *job, struct text *output)
{
    static struct spinning threads[MAX_SPINNING_PROGRAMS];
    _Atomic uint32_t start = 0;
    pthread_attr_t attributes;
    int count = 0;
    pthread_mutex_lock(&spinning_busy);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, SPINNING_STACK);
    job->traced = true;
    for (; count < job->total; count++) {
        struct spinning *here = &threads[count];
        *here = (struct spinning){.worker = new_worker(count), .job = job, .start = &start};
        if (!here->worker || start_thread(&here->thread, &attributes, spin, here)) {
            free(here->worker);
            break;
        }
    }
    if (count < job->total)
        atomic_store(&job->failure, "no thread for every program, though they wait for each other");
    atomic_store(&start, count < job->total ? 2 : 1);
    futex_wake(&start, INT_MAX);
    for (int i = 0; i < count; i++) {
        pthread_join(threads[i].thread, NULL);
        collect(output, threads[i].worker);
        free_worker(threads[i].worker);
    }
    pthread_attr_destroy(&attributes);
    pthread_mutex_unlock(&spinning_busy);
}

static int start_pool(void)
{
    return pthread_key_create(&caller_key, free_worker) || pthread_atfork(NULL, NULL, after_fork);
}
