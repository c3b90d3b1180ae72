"""The fixture ``metal``, which runs kernels on the GPU if there is one and in the simulator otherwise.

A test of a kernel uses it like this:

    module = import_module("dgemma_mlx.kernels.foo")  # `from dgemma_mlx.kernels import foo` imports the operation foo

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
    """Return a function ``metal(module, **options)`` that makes a module's kernels run until the end of the test.

    The kernels are the objects from ``mx.fast.metal_kernel``, whose private names end in ``_kernel``. The options are
    those of ``simulated``, for example ``check=False`` for real sizes. On a GPU they are ignored.
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
