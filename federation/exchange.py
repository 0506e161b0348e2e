"""How the reports of all ranks' clients reach every rank: as payloads, or as sums."""

from collections.abc import Iterator

from distributed import Ranks
from federation.messages import Report, pack_reports, unpack_reports
from federation.phases import Phases
from federation.server import Average
from training.local_sgd import Interrupted


class Exchange:
    """sums: with `exchange: allreduce` payloads stay where they are, and sums are added up."""

    def __init__(self, ranks: Ranks, sums: bool, phases: Phases):
        self.ranks, self.sums, self.phases = ranks, sums, phases

    def gather(self, own: Iterator[Report]) -> list[Report]:
        """The reports of all ranks' clients, in client order, from those of this rank's.

        Raises Interrupted on every rank if any rank does while it makes its own.
        """
        try:
            mine = list(own)
            sent = [report.without_payloads() for report in mine] if self.sums else mine
            parts = pack_reports(sent)
        except Interrupted:
            parts = [b"stop"]
        with self.phases("exchange"):
            blobs = self.ranks.gather(*parts)
        if b"stop" in blobs:  # some rank was asked to stop: the round never happened
            raise Interrupted
        everybody = {report.client: report for blob in blobs for report in unpack_reports(blob)}
        if self.sums:
            everybody |= {report.client: report for report in mine}
        return [everybody[client] for client in sorted(everybody)]

    def add_up(self, average: Average) -> None:
        """With `exchange: allreduce`, turn each rank's sums of its own clients into all ranks'.

        Of a client that one rank refused, all ranks' reports say so.
        """
        if not self.sums or self.ranks.size == 1:
            return
        refused = {report.client: report.failure for report in average.reports if report.failure}
        sizes = {kind: len(vector) for kind, vector in average.sums.items()}
        with self.phases("exchange"):
            for failures, others in self.ranks.gather_json([refused, sizes]):
                for report in average.reports:
                    report.failure = report.failure or failures.get(str(report.client), "")
                for kind, size in others.items():
                    average.sums.setdefault(kind, average.counters.new_zeros(size))
            for kind in sorted(average.sums):
                self.ranks.sum_(average.sums[kind])
            self.ranks.maximum_(average.counters)
