"""Machines of a model's whole turn: an optional thought, and then an answer or calls of tools.

Gemma 4 writes ``<|channel>thought\\n...<channel|>``, then its answer, or calls such as
``<|tool_call>call:add{a:1,b:2}<tool_call|>``. The markup is control tokens, which are symbols of their own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from dgemma_mlx.constrain.characters import ALL
from dgemma_mlx.constrain.languages import of_schema
from dgemma_mlx.constrain.leaf import utf8
from dgemma_mlx.constrain.limits import compiling
from dgemma_mlx.constrain.machine import BYTES, Machine
from dgemma_mlx.constrain.terms import UNBOUNDED, Term, Terms
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.text.tools import CLOSE_CALL, OPEN_CALL, Tool, signatures

THOUGHT = ("<|channel>", "<channel|>")
CALL = (OPEN_CALL, CLOSE_CALL)
_HINT = 'Change its parameters, or give the tool "strict": false to leave its arguments free.'


@dataclass(frozen=True)
class Turn:
    """What a turn may consist of.

    Attributes:
        answer: The machine that the answer must match; None leaves it free.
        calls: The tools that may be called, each as its name and the JSON text of the schema of its arguments.
        thinks: Whether a thought may stand before the answer or the calls. In a free answer they may stand anywhere.
        must_call: Whether the turn must call a tool instead of answering.
    """

    answer: Machine | None = None
    calls: tuple[tuple[str, str], ...] = ()
    thinks: bool = False
    must_call: bool = False

    @property
    def is_free(self) -> bool:
        """Whether the answer is free, so that only its calls must match."""
        return self.answer is None and not self.must_call


def calls_of(tools: Sequence[Tool] | None, names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return the ``Turn.calls`` of the tools with these names, which ``declarations`` has accepted."""
    return tuple((each.name, json.dumps(each.schema)) for each in signatures(tools) if each.name in names)


@lru_cache(maxsize=16)
def of_turn(turn: Turn) -> Machine:
    """Return the machine of a turn that is not free throughout: it has an answer to match, or calls.

    A free answer is any text with thoughts in it, and calls may follow it. An answer that must match, or calls that
    must be made, may follow one thought, whatever is thought there. Equal turns have one machine.

    Raises ``DgemmaError`` (exit code 2), which names the tool, when the schema of a tool's arguments is not supported.
    """
    arguments = [(name, _arguments(name, schema)) for name, schema in turn.calls]
    own = [*(THOUGHT if turn.thinks else ()), *(CALL if arguments else ())]
    controls = tuple(dict.fromkeys([*own, *(control for _, machine in arguments for control in machine.controls)]))
    terms = Terms(BYTES + len(controls))
    mark = {control: terms.symbols(1 << BYTES + number) for number, control in enumerate(controls)}

    def between(marks: tuple[str, str], inside: Term) -> Term:
        return terms.sequence(mark[marks[0]], inside, mark[marks[1]])

    def call(name: str, machine: Machine) -> Term:
        head = terms.word(f"call:{name}".encode())
        return terms.sequence(head, lifted(terms, controls, machine))

    character = utf8(terms)(ALL)
    thought = between(THOUGHT, terms.repeat(character, 0)) if turn.thinks else terms.none
    calls = between(CALL, terms.either(call(*each) for each in arguments)) if arguments else terms.none
    if turn.is_free:
        free = terms.repeat(terms.either([character, thought]), 0)
        return Machine(terms, terms.sequence(free, terms.repeat(calls, 0)), controls)
    answer = terms.none if turn.answer is None or turn.must_call else lifted(terms, controls, turn.answer)
    held = terms.either([answer, terms.repeat(calls, 1)])
    return Machine(terms, terms.sequence(terms.repeat(thought, 0, 1), held), controls)


def lifted(terms: Terms, controls: Sequence[str], machine: Machine) -> Term:
    """Return the texts of a machine as a term over a larger alphabet: ``terms`` over bytes and ``controls``."""
    inner = machine.terms
    terms.within.add(inner)
    numbers = [controls.index(name) for name in machine.controls]
    moved = [(1 << BYTES + n, terms.symbols(1 << BYTES + number)) for n, number in enumerate(numbers)]

    def step(mask: int, after: Term) -> Term:
        marks = [symbol for bit, symbol in moved if mask & bit]
        return terms.sequence(terms.either([terms.symbols(mask & (1 << BYTES) - 1), *marks]), lift(after))

    def body(state: Term) -> Term:
        with machine.lock:
            steps = [step(mask, after) for mask, after in inner.row(state) if inner.least(after) < UNBOUNDED]
        return terms.either([*steps, *([terms.empty] if state.nullable else [])])

    def lift(state: Term) -> Term:
        if state is inner.empty:
            return terms.empty
        rule = terms.rule(lambda: body(state), ("lifted", state), state.nullable)
        rule.least = rule.hope = inner.least(state)
        return rule

    with machine.lock:
        return lift(machine.start)


@lru_cache(maxsize=256)
def _arguments(name: str, schema: str) -> Machine:
    """Return the machine of a tool's arguments, spelled as in a call."""
    from dgemma_mlx.constrain.call_spelling import CallSpelling

    try:
        with compiling("the schema of its arguments"):
            machine = of_schema(schema, CallSpelling)
    except DgemmaError as error:
        raise DgemmaError(f"tool {name}: {error.message}", _HINT, exit_code=2) from None
    if not machine.is_alive(machine.start):
        raise DgemmaError(f"tool {name}: no arguments satisfy its parameters", _HINT, exit_code=2)
    return machine
