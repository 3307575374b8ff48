"""Windows: which keys around a query it attends."""

import dataclasses
from typing import Any

from ring_swa_jax import _checks

WindowSize = int | tuple[int | None, int | None] | None
"""W for the W keys before a query and itself; a pair (L, R) for L before and R after; None: all."""

_NO_BOUND = "; for no bound, which FlashAttention writes as -1, write None"


@dataclasses.dataclass(frozen=True)
class Window:
    """Keys from ``left`` tokens before a query to ``right`` after it; None: all on that side."""

    left: int | None
    right: int | None

    @classmethod
    def of(cls, window_size: Any) -> "Window":
        """What a user's ``window_size`` means: W is (W, 0), None is (None, 0).

        Raises:
            TypeError: not a static integer, nor a pair of them.
            ValueError: negative, or not two numbers.
        """
        if not isinstance(window_size, (tuple, list)):
            return cls(_bound(window_size, _NO_BOUND), 0)
        if len(window_size) != 2:
            raise ValueError(
                "window_size must be W, for the W keys before a query and itself, or a pair "
                f"(L, R), for L keys before and R after it; got {window_size!r}"
            )
        mend = f" in {window_size!r}{_NO_BOUND}; (None, None) is attention that is not causal"
        return cls(*(_bound(bound, mend) for bound in window_size))

    @property
    def setting(self) -> WindowSize:
        """The shortest ``window_size`` that means this."""
        return self.left if self.right == 0 else (self.left, self.right)

    def reaches_all(self, length: int) -> bool:
        """Whether one side has no bound that matters in a sequence of this length."""
        return any(bound is None or bound >= length - 1 for bound in (self.left, self.right))

    def reach(self, length: int) -> tuple[int | None, int]:
        """(keys before, keys after) a query in a sequence of this length.

        The first is None for all keys. The second is always a number: ``length`` for all keys.
        """
        before = None if self.left is None or self.left >= length - 1 else self.left
        after = length if self.right is None or self.right >= length - 1 else self.right
        return before, after if length > 1 else 0


def static_window(window_size: Any) -> WindowSize:
    """A user's ``window_size``, checked, in its shortest form: (W, 0) is W.

    Raises:
        TypeError: as `Window.of`.
        ValueError: as `Window.of`.
    """
    return Window.of(window_size).setting


def static_causal_window(window_size: Any, what: str) -> int | None:
    """As `static_window`, for ``what``, which cannot see keys after a query.

    Raises:
        TypeError: as `Window.of`.
        ValueError: as `Window.of`, and a window that reaches past the query.
    """
    window = Window.of(window_size)
    if window.right != 0:
        raise ValueError(
            f"window_size of {what} must not reach past the query, as later tokens do not exist "
            f"yet: write {window.left!r} or ({window.left!r}, 0), got {window_size!r}"
        )
    return window.left


def _bound(bound: Any, mend_of_negative: str) -> int | None:
    return None if bound is None else _checks.static_count("window_size", bound, mend_of_negative)
