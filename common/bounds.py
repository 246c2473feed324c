"""What stands beside an argument: the range of a number, or of several, and what it changes nothing without.

gamma: Annotated[float, between(0, 1)] = 0.99
part_episodes: Annotated[int, at_least(1), only_with(buffer="part")] = 50
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_type_hints

import tyro

from common.errors import UserError
from common.usage import flag, flag_of


@dataclass(frozen=True)
class Bound:
    """`holds(value)` says whether a value is inside; `words` what to say of one that is not: it "has to …"."""

    words: str
    holds: Callable[[float], bool]

    def __call__(self, default: str) -> str:
        """What --help says behind the argument's own words."""
        return f"(default: {default}; {self.words.partition(' ')[2]})"


def bound(words: str, holds: Callable[[float], bool]):
    return tyro.conf.arg(help_behavior_hint=Bound(words, holds))


# NaN and infinity are outside of every one of them


def at_least(low: float):
    return bound(f"be at least {low}", lambda value: low <= value < math.inf)


def above(low: float):
    return bound(f"be above {low}", lambda value: low < value < math.inf)


def between(low: float, high: float):
    return bound(f"lie between {low} and {high}", lambda value: low <= value <= high)


def even():
    return bound("be an even number above 0", lambda value: value > 0 and value % 2 == 0)


def finite():
    return bound("be a finite number", lambda value: -math.inf < value < math.inf)


@dataclass(frozen=True)
class OnlyWith:
    """Values of other arguments; where none of these holds, the one so marked changes nothing."""

    values: tuple[tuple[str, object], ...]

    def met(self, args) -> list[str]:
        """The arguments that have the value which is asked of them."""
        return [name for name, value in self.values if getattr(args, name) == value]

    def __str__(self) -> str:
        """As they are typed."""
        return " or ".join(" ".join(flag(name, value)) for name, value in self.values)


def only_with(**values) -> OnlyWith:
    return OnlyWith(tuple(values.items()))


def marks_of(args_class: type) -> Iterator[tuple[str, object]]:
    """Whatever is said of a script's arguments, by their names."""
    for name, hint in get_type_hints(args_class, include_extras=True).items():
        for mark in getattr(hint, "__metadata__", ()):
            yield name, mark


def bounds_of(args_class: type) -> dict[str, Bound]:
    """The bounds of a script's arguments, by their names."""
    found = ((name, getattr(mark, "help_behavior_hint", None)) for name, mark in marks_of(args_class))
    return {name: inside for name, inside in found if isinstance(inside, Bound)}


def check(args) -> None:
    """Refuse a number outside of its bound; None and words are inside of each. Raises UserError."""
    for name, inside in bounds_of(type(args)).items():
        value = getattr(args, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, str | None) and not inside.holds(number):
                words = "be finite and " * math.isinf(number) + inside.words
                raise UserError(f"{flag_of(name)} is {number}, but has to {words}")
