"""Two-operand arithmetic: the smallest task on which learning can be seen, with one dial for its difficulty."""

from __future__ import annotations

from protocol.errors import ConfigError
from protocol.keyed import MAX_SEED, KeyedPermutation, split_key
from tasks.base import Problem, check_index
from tasks.options import check_whole_number

_OPERATIONS = "+-*"
_MAX_DIGITS = 9


class Arithmetic:
    """Prompts such as "37+58=" with the answer "95", over operands 0..10**digits-1.

    Invariant: a problem is its triple (a, operation, b). All triples are numbered and put in an order that `seed`
    decides; the first `heldout` of them are held out and all others are training problems, so no triple occurs twice.
    """

    def __init__(self, digits: int = 2, operations: str = "+", heldout: int = 400, seed: int = 0) -> None:
        """ConfigError if an option is wrong, or if holding out `heldout` problems leaves none to train on."""
        check_whole_number("task.digits", digits, 1, _MAX_DIGITS)
        check_whole_number("task.seed", seed, 0, MAX_SEED)
        self._operations = _checked_operations(operations)
        self._num_operands = 10**digits
        num_problems = len(self._operations) * self._num_operands**2
        check_whole_number("task.heldout", heldout, 1, num_problems - 1)
        self._num_heldout = heldout
        self._order = KeyedPermutation(num_problems, split_key(seed, "arithmetic order"))

    @property
    def num_train(self) -> int:
        """All triples that are not held out."""
        return self._order.size - self._num_heldout

    @property
    def num_heldout(self) -> int:
        """The triples that are held out."""
        return self._num_heldout

    def train(self, index: int) -> Problem:
        """Training problem `index`; IndexError unless 0 <= index < num_train."""
        check_index(index, self.num_train, "train")
        return self._problem(index, self._order(self._num_heldout + index))

    def heldout(self, index: int) -> Problem:
        """Held-out problem `index`; IndexError unless 0 <= index < num_heldout."""
        check_index(index, self.num_heldout, "heldout")
        return self._problem(index, self._order(index))

    def solution(self, problem: Problem) -> str:
        """The result in decimal."""
        return problem.answer

    def reward(self, problem: Problem, completion: str) -> float:
        """1.0 if `completion`, without surrounding white space, is the result in decimal; otherwise 0.0."""
        return 1.0 if completion.strip() == problem.answer else 0.0

    def _problem(self, index: int, number: int) -> Problem:
        rest, b = divmod(number, self._num_operands)
        operation_number, a = divmod(rest, self._num_operands)
        operation = self._operations[operation_number]
        return Problem(index=index, prompt=f"{a}{operation}{b}=", answer=str(_result(a, operation, b)))


def _checked_operations(operations: object) -> str:
    """`operations` in a fixed order, so that "+-" and "-+" are the same task."""
    accepted = isinstance(operations, str) and bool(operations) and set(operations) <= set(_OPERATIONS)
    if not accepted or len(set(str(operations))) < len(str(operations)):
        fix = f"use one or more different characters out of {_OPERATIONS!r}"
        raise ConfigError("task.operations", operations, "not a set of operations", fix)
    return "".join(operation for operation in _OPERATIONS if operation in str(operations))


def _result(a: int, operation: str, b: int) -> int:
    if operation == "+":
        return a + b
    return a - b if operation == "-" else a * b
