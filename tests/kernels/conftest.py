"""How tests reach a kernel: on the GPU where there is one, in the simulator where there is none.

A test of a kernel is written once and takes the fixture ``metal``:

    module = import_module("dgemma_mlx.kernels.foo")  # plain `import` finds the operation of that name

    def test_foo(metal: UseMetal) -> None:
        metal(module)
        found = foo_kernel(x)
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Protocol

import mlx.core as mx
import pytest

from tests.metalsim.simulate import simulated
from tests.metalsim.toolchain import available


class UseMetal(Protocol):
    def __call__(self, module: ModuleType, **options: Any) -> None: ...


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> UseMetal:
    """``metal(module, **options)`` lets the kernels of a module run for the rest of the test.

    Those are what ``mx.fast.metal_kernel`` made: the module's private names that end in ``_kernel``. The options are
    those of ``simulated`` (``check=False`` for real sizes); a GPU has no use for them.
    """

    def use(module: ModuleType, **options: Any) -> None:
        kernels = {name: k for name, k in vars(module).items() if name.startswith("_") and name.endswith("_kernel")}
        assert kernels, f"{module.__name__} has no kernel"
        if mx.metal.is_available():
            return
        if not available():
            pytest.skip("needs Metal, or x86-64 Linux and Clang for the simulator: pip install ziglang")
        for name, kernel in kernels.items():
            monkeypatch.setattr(module, name, simulated(kernel, **options))

    return use
