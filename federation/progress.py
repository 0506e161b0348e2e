"""How far a run is."""

from dataclasses import dataclass, field

from federation.ledger import LedgerRow


@dataclass
class Progress:
    """A checkpoint holds it."""

    round_number: int = 0  # rounds completed
    wall_seconds: float = 0.0
    simulated_seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    num_failed: int = 0  # updates that could not be used
    num_late: int = 0  # updates for which the server did not wait
    empty_rounds: int = 0  # the last so many rounds in a row lost updates and could use none
    last_failure: str = ""  # why the last one could not be used
    evaluations: list[dict[str, float | None]] = field(default_factory=list)  # oldest first

    def add_bytes(self, rows: list[LedgerRow]) -> tuple[int, int]:
        """Count a round's messages; return its bytes up and down."""
        up = sum(row.bytes for row in rows if row.direction == "up")
        down = sum(row.bytes for row in rows if row.direction == "down")
        self.bytes_up += up
        self.bytes_down += down
        return up, down

    def add_failures(self, failures: dict[str, str]) -> None:
        """failures: by client, why its update could not be used."""
        self.num_failed += len(failures)
        for client, reason in failures.items():
            self.last_failure = f"client {client}: {reason}"
