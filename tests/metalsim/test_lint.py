"""Tests that source which Metal refuses is reported, and that MLX's own headers are not."""

from __future__ import annotations

from pathlib import Path

import mlx
import pytest

from tests.metalsim import toolchain, transform
from tests.metalsim.lint import lint_text, lint_tree

HEADERS = Path(mlx.__path__[0]) / "include" / "mlx" / "backend" / "metal" / "kernels"

REFUSED = {
    "a pointer": "void f(const float* p) {}",
    "a reference": "void f(int n, float& r) {}",
    "a constant reference": "template <typename T> T f(const T& r) { return r; }",
    "a local one": "void f() { const auto& r = g(); }",
    "one in a loop": "void f() { for (const vec<T, 2>& r : a) {} }",
    "behind a default": "void f(device int* a = (device int*)0, vec<float, 2>* b = {}) {}",
    "of a method": "namespace n { struct S { void operator()(S& other) thread {} }; }",
    "of a constructor": "struct S { float v; S(const S& other) thread : v(other.v) {} };",
    "goto": "void f() { again: goto again; }",
    "threadgroup memory": "void f() { if (true) { threadgroup float x[4]; } }",
    "constant threadgroup memory": "void f(int n) { const threadgroup uint x = 4; }",
}
TAKEN = {
    "spaces": "void f(const device float* p, thread const float& r, constant int& n, threadgroup T* t) {}",
    "values": "template <typename T, typename = enable_if_t<(2 > 1)>> T f(T x, float a[4]) { return x & 2; }",
    "products": "struct S { float v; S(float a, float b) : v(a * b) {} float f() { return v * v; } };",
    "comments": '// goto\n/* void f(float* p) {} */ constant char x[] = "goto";\n#define F(x) x&\n',
    "in a kernel": "[[kernel]] void k() { if (true) { threadgroup float x[4]; x[0] = 1; } }",
    "attributes": "[[kernel, max_total_threads_per_threadgroup(64)]] void k() { threadgroup float x; }",
    "pointers to it": "void f(threadgroup float* x) { threadgroup float* y = x; threadgroup auto& z = *x; }",
    "constants": "void f(threadgroup float* x) { const thread auto& y = *x; const int n = 3 & 1, m = (n & 2); }",
    "initializers": "constant float a[2] = {1, 2}; enum E { x = 1 & 3 }; void f() { g({2 * x, 3}); }",
}


@pytest.mark.parametrize("name", REFUSED)
def test_metal_refuses(name: str) -> None:
    (finding,) = lint_text(f"\n// a comment\n{REFUSED[name]}\n")
    assert finding.line == 3


@pytest.mark.parametrize("name", TAKEN)
def test_metal_accepts(name: str) -> None:
    assert lint_text(TAKEN[name]) == []


def test_the_headers_of_mlx_are_not_reported() -> None:
    headers = sorted(HEADERS.rglob("*.h"))
    assert len(headers) > 50
    assert {path.name: found for path in headers if (found := lint_text(path.read_text()))} == {}


TREES = [
    # pointers and references
    ("void f() { float a[2];\nfloat* p = a; }", [(2, "pointer without an address space")]),
    ("void f() { float a[2];\nfloat& p = a[0]; thread auto& q = a[1]; }", [(2, "reference without an address space")]),
    ("struct S {\nfloat* p; };", [(2, "pointer without an address space")]),
    ("using P = float*;", [(1, "pointer without an address space")]),
    ("void f(thread float* p) {\nauto q = (float*)p; }", [(2, "pointer without an address space")] * 2),
    ("thread float* f(float a[2]) { auto q = a; auto* r = a; return r; }", []),
    # globals and statics
    ("float counter;", [(1, "counter is global or static")]),
    ("namespace n {\nconstexpr int N = 4; }", [(2, "N is global or static")]),
    ("void f() {\nstatic const int n = 4; }", [(2, "n is global or static")]),
    ("constant int n = 3; struct S { static constant constexpr int m = 4; }; void f() { constexpr int k = 2; }", []),
    # recursion
    ("int f(int n) { return n ? f(n - 1) : 0; }", [(1, "recursion")]),
    (
        "int g(int);\nint f(int n) { return g(n); }\nint g(int n) { return n ? f(n - 1) : 0; }",
        [(1, "recursion"), (2, "recursion")],
    ),
    ("template <int N> int f() { if constexpr (N) return f<N - 1>(); return 0; } int g() { return f<3>(); }", []),
    # bfloat
    ("void f(device bfloat* p, float x) {\np[0] = x; }", [(2, "float becomes bfloat without a cast")]),
    ("void f(device bfloat* p, float x) {\np[0] += x; }", [(2, "float becomes bfloat without a cast")]),
    (
        "template <class T> T g(float x) {\nreturn x; }\nvoid f() { g<bfloat>(1); g<half>(1); }",
        [(2, "float becomes bfloat without a cast")],
    ),
    ("void f(device bfloat* p, float x) { p[0] = bfloat(x); p[1] = p[0] * p[0]; x = p[1]; p[2] = 1; }", []),
    # other faults
    (
        "template <class T> void f(device T* p) {\np[0] *= 0.5; }\nvoid g(device float* p) { f(p); }",
        [(2, "double")],
    ),
    ("void f() {\nauto g = [](int n) { return n; }; g(2); }", [(2, "a lambda")]),
    (
        "struct S { float v; float get() const { return v; } };\nfloat f(device S* s, S t) { return t.v + s->get(); }",
        [(2, "a method without an address space, called on an object in device memory")],
    ),
    ("struct S { float v; float get() const device { return v; } }; float f(device S* s) { return s->get(); }", []),
    ("struct S { float v; }; void f(device S* s) { S t = s[0]; t.v = 2; s[1] = t; }", []),
    ("void f(float4 a, float4 b) {\nint4 c = a < b; }", [(2, "comparing vectors gives boolN in Metal, intN here")]),
    ("float4 f(float4 a, float4 b) { return any(!(a < b) || a == b) ? a : metal::select(a, b, a > b); }", []),
]


@pytest.mark.kernels
@pytest.mark.skipif(not toolchain.available(), reason="needs Clang: pip install ziglang")
@pytest.mark.parametrize(("source", "expected"), TREES)
def test_faults_that_depend_on_types(source: str, expected: list[tuple[int, str]]) -> None:
    tree = toolchain.syntax_tree(f'#line 1 "{toolchain.KERNEL_FILE}"\n{source}', transform.preamble())
    assert [(line, message.split(":")[0]) for line, message in lint_tree(tree)] == expected
