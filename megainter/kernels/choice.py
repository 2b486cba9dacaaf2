"""What the start-up log says about one operation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelChoice:
    """Which form of an operation runs here, and the reason in a few words."""

    operation: str
    form: str
    why: str

    def __str__(self) -> str:
        return f"{self.operation}: {self.form} ({self.why})"
