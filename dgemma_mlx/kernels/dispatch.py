"""The choice between the Metal kernel and the reference of an operation.

The mode decides. It is set by the environment variable ``DGEMMA_KERNELS`` or by ``set_mode``:

* ``auto`` (the default): run the kernel if the machine has Metal and the self-check found the kernel to be correct and
  faster than the reference on this machine.
* ``off``: run the references. No kernel is compiled.
* ``reference``: run the references, but let ``dgemma-mlx doctor`` check and time the kernels.
* ``force``: run the kernels without a self-check. Without Metal this is an error.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property, partial
from typing import Any, Literal, get_args

import mlx.core as mx

from dgemma_mlx.checks import shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.kernels.operation import Operation, P, R
from dgemma_mlx.kernels.selfcheck import Store, Verdict, examine

Mode = Literal["auto", "off", "reference", "force"]
MODES: tuple[Mode, ...] = get_args(Mode)
VARIABLE = "DGEMMA_KERNELS"


class DispatchedOperation(Operation[P, R]):
    """An operation that can be called. A call runs the kernel or the reference, depending on the mode."""

    @cached_property
    def _verdicts(self) -> dict[mx.Dtype, Verdict]:
        """The verdicts that this process has looked up, by dtype."""
        return {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the kernel or the reference with these arguments and return its result.

        Raises ``DgemmaError`` (exit code 2) in mode ``force`` without Metal.
        """
        run = self.kernel if self._use_kernel(args) else self.reference
        return run(*args, **kwargs)

    def verdict(self, dtype: mx.Dtype) -> Verdict:
        """Return the verdict on the kernel for a dtype on this machine.

        The kernel is checked if no verdict is stored. Warns with ``RuntimeWarning`` if it is found to be broken then.
        While another thread or process runs a check, the status is "checking"; a later call looks again.
        """
        if verdict := self._verdicts.get(dtype):
            return verdict
        verdict = self._look_up(dtype)
        if verdict.status != "checking":
            self._verdicts[dtype] = verdict
        return verdict

    def _use_kernel(self, args: tuple[Any, ...]) -> bool:
        """Return whether a call with these arguments runs the kernel."""
        if _State.mode in ("off", "reference") or _State.references:
            return False
        if _State.mode == "force":
            return _must_have_metal()
        return has_metal() and self.verdict(_dtype(args)).status == "faster"

    def _look_up(self, dtype: mx.Dtype) -> Verdict:
        """Return the stored verdict for a dtype, or check the kernel and store the verdict."""
        store = _store()
        key = store.key(self, dtype)
        if (known := store.get(key)) and known.status != "checking":
            return known
        verdict = store.settle(key, partial(examine, self, dtype))
        if verdict.broken:
            warnings.warn(
                f"the kernel {self.name} does not work here; plain operations replace it ({dtype}: {verdict.detail})",
                RuntimeWarning, stacklevel=2,
            )
        return verdict


class _State:
    """The settings of this process.

    Attributes:
        mode: The mode in force.
        references: Number of active ``references`` contexts, in which no kernel runs.
    """

    mode: Mode = "auto"
    references = 0


def mode() -> Mode:
    """Return the mode in force."""
    return _State.mode


def set_mode(mode: str) -> None:
    """Set the mode, which overrides ``DGEMMA_KERNELS``. Raises ``DgemmaError`` (exit code 2) for an unknown mode."""
    if mode not in MODES:
        message = f"{VARIABLE} must be one of {', '.join(MODES)}, not {shown(mode)}"
        raise DgemmaError(message, "The default is auto.", exit_code=2)
    _State.mode = mode


@contextmanager
def references(only: bool = True) -> Iterator[None]:
    """Run only references within the context, unless ``only`` is False.

    Training needs this, because the kernels have no gradients.
    """
    _State.references += only
    try:
        yield
    finally:
        _State.references -= only


def has_metal() -> bool:
    """Return whether kernels can run: the machine has Metal, and the GPU is MLX's default device."""
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


def forget_verdicts() -> None:
    """Remove the stored verdicts, so that every kernel is checked again when a process first uses it.

    Raises ``DgemmaError`` if the kernels cannot be checked here (exit code 2), or if the file cannot be removed.
    """
    if _State.mode == "off":
        raise DgemmaError("the Metal kernels are switched off and cannot be checked", f"Set {VARIABLE}=auto.", 2)
    if not has_metal():
        raise DgemmaError("without Metal, the kernels cannot be checked", "The references run here.", 2)
    try:
        _store().clear()
    except OSError as error:
        raise DgemmaError(f"cannot remove {error.filename}: {error.strerror}", "Check its permissions.") from None


def _must_have_metal() -> bool:
    """Return True with Metal. Raises ``DgemmaError`` (exit code 2) without."""
    if not has_metal():
        raise DgemmaError(f"{VARIABLE}=force, but Metal is not available", "Use auto or off.", exit_code=2)
    return True


def _dtype(args: tuple[Any, ...]) -> mx.Dtype:
    """Return the dtype of the first floating-point array among the arguments."""
    return next(a.dtype for a in args if isinstance(a, mx.array) and mx.issubdtype(a.dtype, mx.floating))


@cache
def _store() -> Store:
    """Return the store of verdicts in the user's cache folder."""
    from platformdirs import user_cache_path

    return Store(user_cache_path("dgemma-mlx") / "kernels.json")


set_mode(os.environ.get(VARIABLE) or "auto")
