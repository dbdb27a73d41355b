# mypy: ignore-errors
"""What `triton.language.extra.libdevice` is on x86: functions by CUDA's names, of fp64, fp32, fp16 and bf16.

extern.py gives the symbols their code. As CUDA's do, a predicate has truth values, and the fast ones take fp32 alone.
A function that is missing here is missing for a reason: it rounds in a direction, or libm has none of its kind.
"""

from __future__ import annotations

from triton.language import core

from moecc.codegen.x86.extern import PREFIX

_INTEGERS = ("int32", "int64")
_FLOATS = ("fp32", "fp64", "fp16", "bf16")


def _declare(
    name: str, signatures: dict[tuple[str, ...], str | tuple[str, str]], *, is_predicate: bool = False
):
    """A function; for every list of arguments' types the type of its result, or its symbol and that."""
    table = {}
    for arguments, signature in signatures.items():
        symbol, result = (name, signature) if isinstance(signature, str) else signature
        table[tuple(map(core.dtype, arguments))] = (PREFIX + symbol, core.dtype(result))

    def call(arguments, semantic):
        value = core.extern_elementwise("", "", arguments, table, is_pure=True, _semantic=semantic)
        return value.to(core.int1, _semantic=semantic) if is_predicate else value

    def of_one(arg0, _semantic=None):
        return call([arg0], _semantic)

    def of_two(arg0, arg1, _semantic=None):
        return call([arg0, arg1], _semantic)

    def of_three(arg0, arg1, arg2, _semantic=None):
        return call([arg0, arg1, arg2], _semantic)

    (count,) = {len(arguments) for arguments in signatures}
    function = (of_one, of_two, of_three)[count - 1]
    function.__name__ = function.__qualname__ = name
    return core.extern(function)


def _float(name: str, count: int = 1):
    return _declare(name, {(element,) * count: element for element in _FLOATS})


def _fast(name: str, count: int = 1):
    return _declare(name, {("fp32",) * count: "fp32"})


def _test(name: str):
    return _declare(name, {(element,): "int32" for element in _FLOATS}, is_predicate=True)


def _count(name: str):
    return _declare(name, {(element,): "int32" for element in _INTEGERS})


acos = _float("acos")
acosh = _float("acosh")
asin = _float("asin")
asinh = _float("asinh")
atan = _float("atan")
atan2 = _float("atan2", 2)
atanh = _float("atanh")
cbrt = _float("cbrt")
ceil = _float("ceil")
copysign = _float("copysign", 2)
cos = _float("cos")
cosh = _float("cosh")
div_rn = _float("div_rn", 2)
erf = _float("erf")
erfc = _float("erfc")
exp = _float("exp")
exp10 = _float("exp10")
exp2 = _float("exp2")
expm1 = _float("expm1")
fdim = _float("fdim", 2)
floor = _float("floor")
fma = _float("fma", 3)
fma_rn = _float("fma", 3)
fmod = _float("fmod", 2)
hypot = _float("hypot", 2)
j0 = _float("j0")
j1 = _float("j1")
lgamma = _float("lgamma")
log = _float("log")
log10 = _float("log10")
log1p = _float("log1p")
log2 = _float("log2")
nearbyint = _float("nearbyint")
nextafter = _declare("nextafter", {("fp32",) * 2: "fp32", ("fp64",) * 2: "fp64"})
normcdf = _float("normcdf")
rcbrt = _float("rcbrt")
rcp_rn = _float("rcp_rn")
remainder = _float("remainder", 2)
rint = _float("rint")
round = _float("round")
rsqrt = _float("rsqrt")
rsqrt_rn = _float("rsqrt")
saturatef = _fast("saturatef")
sin = _float("sin")
sinh = _float("sinh")
sqrt = _float("sqrt")
sqrt_rn = _float("sqrt_rn")
tan = _float("tan")
tanh = _float("tanh")
tgamma = _float("tgamma")
trunc = _float("trunc")
y0 = _float("y0")
y1 = _float("y1")
add_rn = _float("add_rn", 2)
sub_rn = _float("sub_rn", 2)
mul_rn = _float("mul_rn", 2)

fast_cosf = _fast("fast_cosf")
fast_dividef = _fast("fast_dividef", 2)
fast_exp10f = _fast("fast_exp10f")
fast_expf = _fast("fast_expf")
fast_log10f = _fast("fast_log10f")
fast_log2f = _fast("fast_log2f")
fast_logf = _fast("fast_logf")
fast_powf = _fast("fast_powf", 2)
fast_sinf = _fast("fast_sinf")
fast_tanf = _fast("fast_tanf")
fast_tanhf = _fast("fast_tanhf")

finitef = _test("isfinite")
isfinited = _test("isfinite")
isinf = _test("isinf")
isnan = _test("isnan")
signbit = _declare("signbit", {(element,): "int32" for element in ("fp32", "fp64")})

brev = _declare("brev", {(element,): element for element in _INTEGERS})
clz = _count("clz")
ffs = _count("ffs")
popc = _count("popc")

float_as_int = _declare("float_as_int", {("fp32",): "int32"})
int_as_float = _declare("int_as_float", {("int32",): "fp32"})
double_as_longlong = _declare("double_as_longlong", {("fp64",): "int64"})
longlong_as_double = _declare("longlong_as_double", {("int64",): "fp64"})

ldexp = _declare("ldexp", {(element, "int32"): element for element in ("fp32", "fp64")})
pow = _declare(
    "pow",
    {(element,) * 2: element for element in _FLOATS}
    | {(element, "int32"): ("pow_integer", element) for element in ("fp32", "fp64")},
)
abs = _declare(
    "abs",
    {(element,): element for element in _FLOATS} | {(element,): ("iabs", element) for element in _INTEGERS},
)
mulhi = _declare(
    "mulhi",
    {(element,) * 2: element for element in _INTEGERS}
    | {(f"u{element}",) * 2: ("umulhi", f"u{element}") for element in _INTEGERS},
)
