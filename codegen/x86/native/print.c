/* tl.device_print: lines are gathered by each thread and written to sys.stdout after the launch. */

/* What the elements of a printed tile are; abi.py has the same order. */
enum print_kind { P_U1, P_I8, P_U8, P_I16, P_U16, P_I32, P_U32, P_I64, P_U64, P_F16, P_BF16, P_F32, P_F64, P_E4M3,
                  P_E5M2, P_POINTER };

static const int print_bytes[] = {1, 1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8, 1, 1, 8};

static void text_add(struct text *text, const char *data, size_t size)
{
    if (text->size + size > text->room) {
        size_t room = (text->size + size) * 2 + 4096;
        char *grown = realloc(text->data, room);
        if (!grown) {
            text->lost = true;
            return;
        }
        text->data = grown;
        text->room = room;
    }
    memcpy(text->data + text->size, data, size);
    text->size += size;
}

/* The value of a float of `mantissa` bits below `width` bits in all; exponents are biased as IEEE 754 has them.
   With `finite`, as in e4m3fn, all ones alone is NaN and there is no infinity. */
static double decode_float(uint32_t bits, int width, int mantissa, bool finite)
{
    int exponent_bits = width - 1 - mantissa, bias = (1 << (exponent_bits - 1)) - 1;
    int exponent = bits >> mantissa & ((1 << exponent_bits) - 1), fraction = bits & ((1 << mantissa) - 1);
    double sign = bits >> (width - 1) & 1 ? -1.0 : 1.0;
    bool top = exponent == (1 << exponent_bits) - 1;
    if (finite ? top && fraction == (1 << mantissa) - 1 : top && fraction)
        return NAN;
    if (top && !finite)
        return sign * INFINITY;
    if (!exponent)
        return sign * ldexp(fraction, 1 - bias - mantissa);
    return sign * ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
}

static double float_value(uint64_t bits, int kind)
{
    float single;
    double value;
    switch (kind) {
    case P_F16: return decode_float(bits, 16, 10, false);
    case P_BF16: return decode_float(bits, 16, 7, false);
    case P_E4M3: return decode_float(bits, 8, 3, true);
    case P_E5M2: return decode_float(bits, 8, 2, false);
    case P_F32: memcpy(&single, &bits, 4); return single;
    default: memcpy(&value, &bits, 8); return value;
    }
}

static int format_value(char *line, size_t room, uint64_t bits, int kind, bool hex)
{
    int bytes = print_bytes[kind], unused = 64 - 8 * bytes;
    if (hex || kind == P_POINTER)
        return snprintf(line, room, "0x%0*llx", 2 * bytes, (unsigned long long)bits);
    switch (kind) {
    case P_I8: case P_I16: case P_I32: case P_I64:
        return snprintf(line, room, "%lld", (long long)(int64_t)(bits << unused) >> unused);
    case P_U1: case P_U8: case P_U16: case P_U32: case P_U64:
        return snprintf(line, room, "%llu", (unsigned long long)bits);
    default:
        return snprintf(line, room, "%f", float_value(bits, kind));
    }
}

/* The sizes that lead a prefix, `16x32|`; the rest of the prefix is left in *prefix. -1 where it has none. */
static int leading_shape(const char **prefix, int64_t *shape, int most)
{
    const char *at = *prefix + strspn(*prefix, "0123456789x");
    if (*at != '|')
        return -1;
    int rank = 0;
    for (const char *digits = *prefix; digits < at && rank < most; rank++) {
        char *end;
        shape[rank] = strtoll(digits, &end, 10);
        digits = end + 1;
    }
    *prefix = at + 1;
    return rank;
}

/* One line for each element, as the GPU backends write it: `pid (0, 0, 0) idx (3) prefix: value`. */
static void print_values(struct runtime *runtime, const char *prefix, const void *data, int64_t count, int32_t kind,
                         int32_t hex)
{
    struct worker *worker = (struct worker *)runtime;
    const int32_t *grid = worker->job->grid;
    int64_t program = worker->program, shape[8] = {count};
    int rank = leading_shape(&prefix, shape, 8);
    if (rank < 0)
        rank = 1;
    for (int64_t element = 0; element < count; element++) {
        char line[256];
        uint64_t bits = 0;
        memcpy(&bits, (const char *)data + element * print_bytes[kind], print_bytes[kind]);
        int size = snprintf(line, sizeof line, "pid (%lld, %lld, %lld) idx (", (long long)(program % grid[0]),
                            (long long)(program / grid[0] % grid[1]), (long long)(program / grid[0] / grid[1]));
        int64_t rows = count;
        for (int axis = 0; axis < rank; axis++) {
            rows /= shape[axis];
            size += snprintf(line + size, sizeof line - size, axis ? ", %lld" : "%lld",
                             (long long)(element / rows % shape[axis]));
        }
        text_add(&worker->output, line, size);
        text_add(&worker->output, ")", 1);
        text_add(&worker->output, prefix, strlen(prefix));
        size = format_value(line, sizeof line - 1, bits, kind, hex);
        line[size++] = '\n';
        text_add(&worker->output, line, size);
    }
}
