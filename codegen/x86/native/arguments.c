/* Python objects -> the 8-byte slots that a kernel reads. */

enum kind { K_SKIP, K_TUPLE, K_POINTER, K_BOOL, K_SIGNED, K_UNSIGNED, K_F16, K_BF16, K_F32, K_F64 };

/* One parameter; `children` of a tuple, in order. `bits` is the width of an integer. */
struct parameter {
    int kind, bits;
    Py_ssize_t count;
    struct parameter *children;
    PyObject *name;
};

static PyObject *s_data_ptr, *s_is_cpu, *s_device;

static void free_parameters(struct parameter *parameters, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; parameters && i < count; i++) {
        free_parameters(parameters[i].children, parameters[i].count);
        Py_XDECREF(parameters[i].name);
    }
    PyMem_Free(parameters);
}

/* From a tuple of (name, kind, bits, children or None); the slots that they fill are added to *slots. */
static struct parameter *parse_parameters(PyObject *plan, Py_ssize_t *slots)
{
    Py_ssize_t count = PyTuple_GET_SIZE(plan);
    struct parameter *parameters = PyMem_Calloc(count + 1, sizeof *parameters);
    if (!parameters)
        return (struct parameter *)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++) {
        struct parameter *here = &parameters[i];
        PyObject *name, *children;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(plan, i), "UiiO", &name, &here->kind, &here->bits, &children))
            goto failed;
        here->name = Py_NewRef(name);
        if (here->kind == K_TUPLE) {
            here->count = PyTuple_GET_SIZE(children);
            here->children = parse_parameters(children, slots);
            if (!here->children)
                goto failed;
        } else if (here->kind != K_SKIP) {
            ++*slots;
        }
    }
    return parameters;
failed:
    free_parameters(parameters, count);
    return NULL;
}

/* To nearest even; `mantissa` bits are stored, `least` is the exponent of the smallest normal number. */
static uint64_t encode_float(double value, int mantissa, int least)
{
    uint64_t sign = signbit(value) ? 0x8000 : 0, infinity = (uint64_t)((1 - least) * 2 + 1) << mantissa;
    double magnitude = fabs(value);
    if (isnan(value))
        return sign | infinity | 1ull << (mantissa - 1);
    if (isinf(value) || magnitude == 0)
        return sign | (magnitude == 0 ? 0 : infinity);
    int exponent = ilogb(magnitude);
    if (exponent < least)
        exponent = least;
    if (exponent > 1 - least)
        return sign | infinity;
    uint64_t steps = (uint64_t)nearbyint(ldexp(magnitude, mantissa - exponent));
    uint64_t bits = ((uint64_t)(exponent - least) << mantissa) + steps;
    return sign | (bits > infinity ? infinity : bits);
}

static bool pack_float(PyObject *value, const struct parameter *parameter, uint64_t *slot)
{
    double number = PyFloat_AsDouble(value);
    if (number == -1 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_TypeError))
            PyErr_Format(PyExc_TypeError, "argument '%U' must be a float, not %.100s", parameter->name,
                         Py_TYPE(value)->tp_name);
        return false;
    }
    float single = (float)number;
    *slot = 0;
    if (parameter->kind == K_F64)
        memcpy(slot, &number, 8);
    else if (parameter->kind == K_F32)
        memcpy(slot, &single, 4);
    else
        *slot = parameter->kind == K_F16 ? encode_float(number, 10, -14) : encode_float(number, 7, -126);
    return true;
}

static bool integer_fits(uint64_t number, bool negative, const struct parameter *parameter)
{
    int bits = parameter->bits;
    if (parameter->kind == K_UNSIGNED)
        return !negative && (bits == 64 || number >> bits == 0);
    int64_t value = (int64_t)number, most = (int64_t)(UINT64_MAX >> (65 - bits));
    return (value < 0) == negative && value <= most && value >= -most - 1;
}

static bool pack_integer(PyObject *value, const struct parameter *parameter, uint64_t *slot)
{
    PyObject *index = PyNumber_Index(value);
    if (!index) {
        if (PyErr_ExceptionMatches(PyExc_TypeError))
            PyErr_Format(PyExc_TypeError, "argument '%U' must be an integer, not %.100s", parameter->name,
                         Py_TYPE(value)->tp_name);
        return false;
    }
    int overflow;
    int64_t number = PyLong_AsLongLongAndOverflow(index, &overflow);
    bool negative = overflow ? overflow < 0 : number < 0;
    if (overflow > 0) {
        number = (int64_t)PyLong_AsUnsignedLongLong(index);
        overflow = PyErr_Occurred() != NULL;
        PyErr_Clear();
    }
    bool fits = !overflow && integer_fits((uint64_t)number, negative, parameter);
    if (!fits)
        PyErr_Format(PyExc_OverflowError, "argument '%U' is %S, which does not fit %s%d", parameter->name, index,
                     parameter->kind == K_UNSIGNED ? "u" : "i", parameter->bits);
    Py_DECREF(index);
    *slot = (uint64_t)number;
    return fits;
}

/* Null for None, an address as an integer, or what has data_ptr() and does not say that it lives elsewhere. */
static bool pack_pointer(PyObject *value, const struct parameter *parameter, uint64_t *slot)
{
    *slot = 0;
    if (value == Py_None)
        return true;
    PyObject *address;
    if (PyLong_Check(value)) {
        address = Py_NewRef(value);
    } else {
        PyObject *is_cpu = PyObject_GetAttr(value, s_is_cpu);
        if (!is_cpu && !PyErr_ExceptionMatches(PyExc_AttributeError))
            return false;
        PyErr_Clear();
        bool elsewhere = is_cpu == Py_False;
        Py_XDECREF(is_cpu);
        if (elsewhere) {
            PyObject *device = PyObject_GetAttr(value, s_device);
            if (device)
                PyErr_Format(PyExc_TypeError, "argument '%U' is a tensor on %S; this backend runs on the CPU's",
                             parameter->name, device);
            Py_XDECREF(device);
            return false;
        }
        address = PyObject_CallMethodNoArgs(value, s_data_ptr);
        if (!address) {
            if (PyErr_ExceptionMatches(PyExc_AttributeError))
                PyErr_Format(PyExc_TypeError, "argument '%U' must be a tensor (it has no data_ptr), not %.100s",
                             parameter->name, Py_TYPE(value)->tp_name);
            return false;
        }
    }
    *slot = PyLong_AsUnsignedLongLong(address);
    Py_DECREF(address);
    return !PyErr_Occurred();
}

static bool pack_tuple(PyObject *, const struct parameter *, uint64_t **slots);

static bool pack(PyObject *value, const struct parameter *parameter, uint64_t **slots)
{
    int truth;
    switch (parameter->kind) {
    case K_SKIP: return true;
    case K_TUPLE: return pack_tuple(value, parameter, slots);
    case K_POINTER: return pack_pointer(value, parameter, (*slots)++);
    case K_SIGNED: case K_UNSIGNED: return pack_integer(value, parameter, (*slots)++);
    case K_BOOL:
        truth = PyObject_IsTrue(value);
        *(*slots)++ = truth > 0;
        return truth >= 0;
    default: return pack_float(value, parameter, (*slots)++);
    }
}

static bool pack_tuple(PyObject *value, const struct parameter *parameter, uint64_t **slots)
{
    PyObject *items = PySequence_Fast(value, "");
    if (!items || PySequence_Fast_GET_SIZE(items) != parameter->count) {
        PyErr_Format(PyExc_TypeError, "argument '%U' must be a tuple of %zd items", parameter->name,
                     parameter->count);
        Py_XDECREF(items);
        return false;
    }
    bool done = true;
    for (Py_ssize_t i = 0; done && i < parameter->count; i++)
        done = pack(PySequence_Fast_GET_ITEM(items, i), &parameter->children[i], slots);
    Py_DECREF(items);
    return done;
}
