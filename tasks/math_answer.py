"""Reading mathematical answers out of text and comparing them, by math-verify.

math-verify's own timeouts are signals, which only work in the main thread and cannot interrupt the big-integer
arithmetic that hangs most often. They are therefore off, so that a reward does not depend on the thread it is computed
in. The consequence: a comparison takes as long as it takes. What a policy can easily write to stop an actor (towers of
powers, huge factorials and exponents, sums, integrals) is compared as text instead of being computed. This is not a
complete guard: \\binom of two huge numbers, for one, is computed while it is being read.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from typing import Any

_COSTLY_KINDS = {"Sum", "Product", "Integral", "Limit"}
_GROWING_KINDS = {"Pow", "factorial", "factorial2", "subfactorial"}
_LARGEST_EXPONENT = 10_000
_LARGEST_EXPONENT_OF_COMPOUND = 20  # of a sum, which is expanded, or of a power, which multiplies exponents


def final_answer(text: str) -> str:
    """What follows the last "####" if there is one, as in GSM8K; otherwise all of `text`."""
    return text.rsplit("####", 1)[-1].strip()


def parse_reference(answer: str) -> list[Any]:
    """The expressions that a reference answer can be read as; empty if it cannot be read.

    An answer without \\boxed{} or dollar signs around it is taken as one LaTeX formula: math-verify would read the 3
    out of "3x+2".
    """
    marked = "\\boxed" in answer or answer.count("$") > 1
    return _parse(answer if marked else f"\\boxed{{{answer}}}")


def is_correct(reference: list[Any], completion: str) -> bool:
    """Whether the last answer in `completion` equals `reference`, as parsed by `parse_reference`."""
    found = _parse(completion)
    if any(_is_costly(expression) for expression in [*reference, *found]):
        return bool(_as_written(reference) & _as_written(found))
    verify = importlib.import_module("math_verify").verify
    return bool(verify(reference, found, timeout_seconds=None))


def _parse(text: str) -> list[Any]:
    # It warns once that timeouts are off, which is deliberate here.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    found: list[Any] = importlib.import_module("math_verify").parse(text, parsing_timeout=None)
    return found


def _as_written(expressions: list[Any]) -> set[str]:
    """math-verify lists what it parsed and also the text it parsed it from."""
    return {expression for expression in expressions if isinstance(expression, str)}


def _is_costly(expression: Any) -> bool:
    """Whether evaluating `expression` could take minutes or all memory."""
    return any(_is_costly_node(node) for node in _nodes(expression))


def _is_costly_node(node: Any) -> bool:
    kind = type(node).__name__
    if kind not in _GROWING_KINDS:
        return kind in _COSTLY_KINDS
    base, size = node.args[0], node.args[-1]
    if size.is_Number:
        return not _is_within(size, _LARGEST_EXPONENT if base.is_Atom else _LARGEST_EXPONENT_OF_COMPOUND)
    # Roots in an exponent are small, and unknowns are not computed; powers and factorials of numbers make a tower.
    towers = (inner for inner in _nodes(size) if type(inner).__name__ in _GROWING_KINDS and inner.is_number)
    return any(not (tower.args[-1].is_Number and _is_within(tower.args[-1], 1)) for tower in towers)


def _is_within(number: Any, bound: int) -> bool:
    # Asked first whether it is finite, because comparing "not a number" raises.
    return bool(number.is_finite) and bool(abs(number) <= bound)


def _nodes(expression: Any) -> Iterator[Any]:
    """`expression` and all its parts. The names of SymPy's classes are compared, so SymPy need not be imported."""
    pending = [expression]  # no recursion: a policy can write deeply nested expressions
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, str):
            pending.extend(node.args if hasattr(node, "args") else node)  # a mutable matrix has no args
