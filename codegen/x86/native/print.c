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

static int format_program(char *line, size_t room, const struct worker *worker)
{
    const int32_t *grid = worker->job->grid;
    int64_t program = worker->program;
    return snprintf(line, room, "pid (%lld, %lld, %lld)", (long long)(program % grid[0]),
                    (long long)(program / grid[0] % grid[1]), (long long)(program / grid[0] / grid[1]));
}

static int format_index(char *line, size_t room, int64_t element, int64_t count, const int64_t *shape, int rank)
{
    int size = snprintf(line, room, " idx (");
    for (int axis = 0; axis < rank; axis++) {
        count /= shape[axis];
        size += snprintf(line + size, room - size, axis ? ", %lld" : "%lld",
                         (long long)(element / count % shape[axis]));
    }
    return size + snprintf(line + size, room - size, ")");
}

/* One line for each element, as the GPU backends write it, `pid (0, 0, 0) idx (3) prefix: value`; without a value one
   line for the program. */
static void print_values(struct runtime *runtime, const char *prefix, const void *data, int64_t count, int32_t kind,
                         int32_t hex)
{
    struct worker *worker = (struct worker *)runtime;
    int64_t shape[8] = {count};
    char program[80], line[360]; /* the value of a double takes 317 */
    int program_size = format_program(program, sizeof program, worker), rank = leading_shape(&prefix, shape, 8);
    for (int64_t element = 0; element < (count ? count : 1); element++) {
        uint64_t bits = 0;
        text_add(&worker->output, program, program_size);
        if (count)
            text_add(&worker->output, line,
                     format_index(line, sizeof line, element, count, shape, rank < 0 ? 1 : rank));
        text_add(&worker->output, prefix, strlen(prefix));
        if (count) {
            memcpy(&bits, (const char *)data + element * print_bytes[kind], print_bytes[kind]);
            text_add(&worker->output, line, format_value(line, sizeof line, bits, kind, hex));
        }
        text_add(&worker->output, "\n", 1);
    }
}
