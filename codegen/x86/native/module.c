/* The Python side: Launcher(name, plan, arena_bytes, spins, traced), called as Triton calls what runs a kernel. */

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *name;
    struct parameter *parameters;
    Py_ssize_t count, slots, arena_bytes;
    int spins, traced;
    int64_t work_ns; /* of the last launch, of all threads together */
} Launcher;

enum { GRID = 0, FUNCTION = 4, LAUNCH_METADATA = 6, ENTER_HOOK = 7, EXIT_HOOK = 8, FIRST_ARGUMENT = 9, FEW_SLOTS = 64 };

static PyObject *s_calls, *s_torch, *s_get_num_threads, *s_write;
static PyObject *get_num_threads; /* torch's, once it is loaded */

/* As many as torch uses, or as many as this process may run on. -1 with an exception set. */
static int thread_count(void)
{
    if (!get_num_threads) {
        PyObject *torch = PyImport_GetModule(s_torch);
        get_num_threads = torch ? PyObject_GetAttr(torch, s_get_num_threads) : NULL;
        Py_XDECREF(torch);
        PyErr_Clear();
    }
    if (!get_num_threads) {
        cpu_set_t cpus;
        return sched_getaffinity(0, sizeof cpus, &cpus) ? 1 : CPU_COUNT(&cpus);
    }
    PyObject *count = PyObject_CallNoArgs(get_num_threads);
    long number = count ? PyLong_AsLong(count) : -1;
    Py_XDECREF(count);
    return PyErr_Occurred() ? -1 : number < 1 ? 1 : number > MAX_WORKERS ? MAX_WORKERS : (int)number;
}

/* Triton's hooks are lists that are mostly empty. */
static bool call_hook(PyObject *hook, PyObject *metadata)
{
    if (hook == Py_None)
        return true;
    PyObject *calls = PyObject_GetAttr(hook, s_calls);
    bool empty = calls && PyList_Check(calls) && PyList_GET_SIZE(calls) == 0;
    Py_XDECREF(calls);
    PyErr_Clear();
    if (empty)
        return true;
    PyObject *result = PyObject_CallOneArg(hook, metadata);
    Py_XDECREF(result);
    return result != NULL;
}

static bool read_grid(Launcher *self, PyObject *const *sizes, struct job *job)
{
    job->total = 1;
    for (int axis = 0; axis < 3; axis++) {
        long long size = PyLong_Check(sizes[axis]) ? PyLong_AsLongLong(sizes[axis])
                                                   : PyNumber_AsSsize_t(sizes[axis], PyExc_OverflowError);
        if (size == -1 && PyErr_Occurred())
            return false;
        if (size < 0 || size > INT32_MAX || __builtin_mul_overflow(job->total, size, &job->total)) {
            PyErr_Format(PyExc_ValueError, "%U: the grid's axis %d has %lld programs", self->name, axis, size);
            return false;
        }
        job->grid[axis] = (int32_t)size;
    }
    return true;
}

static bool write_output(struct text *text)
{
    PyObject *out = PySys_GetObject("stdout"), *line, *done = NULL;
    if (text->size && out && out != Py_None) {
        line = PyUnicode_DecodeUTF8(text->data, text->size, "replace");
        done = line ? PyObject_CallMethodOneArg(out, s_write, line) : NULL;
        Py_XDECREF(line);
        Py_XDECREF(done);
        if (!done)
            return false;
    }
    if (text->lost)
        PyErr_SetString(PyExc_MemoryError, "no memory for all that the kernel printed");
    return !text->lost;
}

static bool raise_failure(Launcher *self, struct job *job)
{
    const char *failure = atomic_load(&job->failure);
    int64_t at = job->failed_program, g0 = job->grid[0], g1 = job->grid[1];
    if (!failure)
        return true;
    if (failure == out_of_memory)
        PyErr_Format(PyExc_MemoryError, "%U: %s, %zd bytes", self->name, failure, self->arena_bytes);
    else if (at < 0)
        PyErr_Format(PyExc_RuntimeError, "%U: %s", self->name, failure);
    else
        PyErr_Format(PyExc_RuntimeError, "%U: %s, in program (%lld, %lld, %lld)", self->name, failure,
                     (long long)(at % g0), (long long)(at / g0 % g1), (long long)(at / g0 / g1));
    return false;
}

static bool run(Launcher *self, struct job *job)
{
    struct text output = {0};
    if (!job->total)
        return true;
    if (self->spins && job->total > MAX_SPINNING_PROGRAMS) {
        PyErr_Format(PyExc_RuntimeError,
                     "%U: its programs wait for each other, and %lld need a thread each; hint: at most %d can have one",
                     self->name, (long long)job->total, MAX_SPINNING_PROGRAMS);
        return false;
    }
    job->threads = thread_count();
    if (job->threads < 0)
        return false;
    atomic_store(&job->lazy, self->work_ns < LAZY_NS);
    Py_BEGIN_ALLOW_THREADS
    job->started_ns = now_ns();
    if (self->spins)
        run_spinning(job, &output);
    else
        run_job(job, &output);
    Py_END_ALLOW_THREADS
    self->work_ns = atomic_load(&job->work_ns);
    bool written = write_output(&output);
    free(output.data);
    return written && raise_failure(self, job);
}

static bool launch(Launcher *self, PyObject *const *args, uint64_t *slots)
{
    uint64_t *next = slots;
    struct job job = {.arguments = slots, .arena_bytes = self->arena_bytes, .traced = self->traced,
                      .failed_program = -1};
    if (!read_grid(self, args + GRID, &job))
        return false;
    job.function = (kernel_function)PyLong_AsVoidPtr(args[FUNCTION]);
    if (!job.function && PyErr_Occurred())
        return false;
    for (Py_ssize_t i = 0; i < self->count; i++)
        if (!pack(args[FIRST_ARGUMENT + i], &self->parameters[i], &next))
            return false;
    return call_hook(args[ENTER_HOOK], args[LAUNCH_METADATA]) && run(self, &job)
           && call_hook(args[EXIT_HOOK], args[LAUNCH_METADATA]);
}

static PyObject *launcher_call(PyObject *object, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Launcher *self = (Launcher *)object;
    uint64_t few[FEW_SLOTS], *slots = few;
    Py_ssize_t given = PyVectorcall_NARGS(flags);
    if ((keywords && PyTuple_GET_SIZE(keywords)) || given != FIRST_ARGUMENT + self->count)
        return PyErr_Format(PyExc_TypeError, "%U: %zd arguments for a kernel of %zd", self->name,
                            given - FIRST_ARGUMENT, self->count);
    if (self->slots > FEW_SLOTS && !(slots = PyMem_Malloc(self->slots * sizeof *slots)))
        return PyErr_NoMemory();
    bool done = launch(self, args, slots);
    if (slots != few)
        PyMem_Free(slots);
    return done ? Py_NewRef(Py_None) : NULL;
}

static PyObject *launcher_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(keywords))
{
    PyObject *name, *plan;
    Py_ssize_t arena_bytes;
    int spins, traced;
    if (!PyArg_ParseTuple(args, "UO!npp", &name, &PyTuple_Type, &plan, &arena_bytes, &spins, &traced))
        return NULL;
    Launcher *self = (Launcher *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->vectorcall = launcher_call;
    self->name = Py_NewRef(name);
    self->arena_bytes = arena_bytes;
    self->spins = spins;
    self->traced = traced;
    self->work_ns = LAZY_NS;
    self->count = PyTuple_GET_SIZE(plan);
    self->parameters = parse_parameters(plan, &self->slots);
    if (!self->parameters) {
        self->count = 0;
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void launcher_free(PyObject *object)
{
    Launcher *self = (Launcher *)object;
    free_parameters(self->parameters, self->count);
    Py_XDECREF(self->name);
    Py_TYPE(object)->tp_free(object);
}

static PyTypeObject LauncherType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "moecc.codegen.x86.Launcher",
    .tp_doc = "Runs a kernel: (g0, g1, g2, stream, function, packed, metadata, enter, exit, *arguments).",
    .tp_basicsize = sizeof(Launcher),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(Launcher, vectorcall),
    .tp_call = PyVectorcall_Call,
    .tp_new = launcher_new,
    .tp_dealloc = launcher_free,
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "moecc_x86_launcher", .m_size = -1};

static bool intern_names(void)
{
    struct { PyObject **place; const char *name; } names[] = {
        {&s_data_ptr, "data_ptr"}, {&s_is_cpu, "is_cpu"}, {&s_device, "device"}, {&s_calls, "calls"},
        {&s_torch, "torch"}, {&s_get_num_threads, "get_num_threads"}, {&s_write, "write"},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!(*names[i].place = PyUnicode_InternFromString(names[i].name)))
            return false;
    return true;
}

PyMODINIT_FUNC PyInit_moecc_x86_launcher(void)
{
    if (!intern_names() || PyType_Ready(&LauncherType) < 0)
        return NULL;
    if (start_pool())
        return PyErr_Format(PyExc_OSError, "no thread-specific storage for the launcher");
    PyObject *module = PyModule_Create(&definition);
    if (module && PyModule_AddObjectRef(module, "Launcher", (PyObject *)&LauncherType) < 0)
        Py_CLEAR(module);
    return module;
}
