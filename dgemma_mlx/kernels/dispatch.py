"""Which of the two runs, the Metal kernel or the reference in plain ops.

A kernel runs where there is Metal, it has passed the self-check on this machine and was the faster one there.
``DGEMMA_KERNELS``, or ``set_mode``, says otherwise:

* ``auto``: that, the default
* ``off``: references; no kernel is even compiled
* ``reference``: references, but ``dgemma-mlx doctor`` still checks and times the kernels
* ``force``: kernels, checked or not; without Metal an error
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any, Literal, get_args

import mlx.core as mx

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.kernels.operation import Operation, P, R
from dgemma_mlx.kernels.selfcheck import Store, Verdict, examine

Mode = Literal["auto", "off", "reference", "force"]
MODES: tuple[Mode, ...] = get_args(Mode)
VARIABLE = "DGEMMA_KERNELS"


class DispatchedOperation(Operation[P, R]):
    """An operation that can be called: a call runs the kernel or the reference."""

    @cached_property
    def _verdicts(self) -> dict[mx.Dtype, Verdict]:
        """The verdicts known to this process."""
        return {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Kernel or reference; ``DgemmaError`` where the kernel is forced and there is no Metal."""
        run = self.kernel if self._use_kernel(args) else self.reference
        return run(*args, **kwargs)

    def verdict(self, dtype: mx.Dtype) -> Verdict:
        """That of the self-check on this machine; checks where nobody has."""
        if dtype not in self._verdicts:
            self._verdicts[dtype] = self._look_up(dtype)
        return self._verdicts[dtype]

    def _use_kernel(self, args: tuple[Any, ...]) -> bool:
        if _State.mode in ("off", "reference") or _State.references:
            return False
        if _State.mode == "force":
            return _must_have_metal()
        return has_metal() and self.verdict(_dtype(args)).status == "faster"

    def _look_up(self, dtype: mx.Dtype) -> Verdict:
        store = _store()
        key = store.key(self, dtype)
        if known := store.get(key):
            return known
        store.put(key, Verdict("checking", pid=os.getpid()))
        verdict = examine(self, dtype)
        store.put(key, verdict)
        if verdict.broken:
            warnings.warn(
                f"the kernel {self.name} does not work here, plain operations replace it ({dtype}: {verdict.detail})",
                RuntimeWarning, stacklevel=2,
            )
        return verdict


class _State:
    """Of this process."""

    mode: Mode = "auto"
    references = 0  # how many ``references()`` are open


def mode() -> Mode:
    """The one in force."""
    return _State.mode


def set_mode(mode: str) -> None:
    """Replaces what ``DGEMMA_KERNELS`` said; ``DgemmaError`` (exit code 2) for an unknown mode."""
    if mode not in MODES:
        raise DgemmaError(f"{VARIABLE} must be one of {', '.join(MODES)}, not {mode!r}", exit_code=2)
    _State.mode = mode


@contextmanager
def references(only: bool = True) -> Iterator[None]:
    """Within it no kernel runs, if ``only``: kernels have no gradient, so training goes by the references."""
    _State.references += only
    try:
        yield
    finally:
        _State.references -= only


def has_metal() -> bool:
    """Whether kernels can run: there is a GPU, and it is the default device."""
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


def _must_have_metal() -> bool:
    if not has_metal():
        raise DgemmaError(f"{VARIABLE}=force, but there is no Metal here", "Use auto or off.", exit_code=2)
    return True


def _dtype(args: tuple[Any, ...]) -> mx.Dtype:
    """That of the first floating array."""
    return next(a.dtype for a in args if isinstance(a, mx.array) and mx.issubdtype(a.dtype, mx.floating))


@cache
def _store() -> Store:
    from platformdirs import user_cache_path

    return Store(user_cache_path("dgemma-mlx") / "kernels.json")


set_mode(os.environ.get(VARIABLE) or "auto")
