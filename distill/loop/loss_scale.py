"""The factor on a loss that keeps gradients within the range of float16."""

from __future__ import annotations

from typing import Any


class LossScale:
    """Halved after gradients that are not finite, doubled after many steps in a row that are; 1 where not enabled.

    torch's GradScaler decides on each process by itself, which sharded gradients do not allow.
    """

    largest, growth_interval = 2.0**16, 1000

    def __init__(self, enabled: bool):
        self.enabled, self.value, self._finite_in_a_row = enabled, self.largest if enabled else 1.0, 0

    def update(self, finite: bool) -> bool:
        """Whether the scale was halved."""
        self._finite_in_a_row = self._finite_in_a_row + 1 if finite else 0
        before = self.value
        if self.enabled and not finite:
            self.value = max(1.0, self.value / 2)
        elif self.enabled and self._finite_in_a_row % self.growth_interval == 0:
            self.value = min(self.largest, self.value * 2)
        return self.value < before

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "finite_in_a_row": self._finite_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self._finite_in_a_row = state["value"], state["finite_in_a_row"]
