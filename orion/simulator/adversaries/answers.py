"""Attackers that a validator cannot look at: commitments withheld, logs and evidence changed, answers never given."""

import re

from orion.common.protocol.messages import Refusal, RefusalCode, Report
from orion.common.protocol.records import EvidenceRequest, LogRequest
from orion.simulator.adversaries.adversary import Adversary
from orion.simulator.adversaries.passes import FreeRider
from orion.simulator.adversaries.records import Forger
from orion.simulator.host import MESSAGE_BYTES
from orion.simulator.network import Address, Respond

_DIGEST = re.compile(rb'"(output_digest|input_digest)":"[0-9a-f]{64}"')
_NO_DIGEST = b"0" * 64


class CommitmentWithheld(Forger, FreeRider):
    """Answers from its cache, and commits to nothing, so that there is nothing to hold against it."""

    def rewritten(self, report: Report) -> Report:
        if report.commitment is None:
            return report
        self.attacked()
        return report.model_copy(update={"commitment": None})


class LogChanged(Adversary):
    """Works honestly, and hands over another log than the one it committed to."""

    def _answer_log(self, request: LogRequest, respond: Respond) -> None:
        def answer(body: object, size_bytes: int) -> None:
            if isinstance(body, bytes):
                self.attacked()
                body = _DIGEST.sub(lambda found: b'"' + found[1] + b'":"' + _NO_DIGEST + b'"', body, count=1)
            respond(body, size_bytes)

        super()._answer_log(request, answer)


class EvidenceChanged(Adversary):
    """Works honestly, and hands over other tensors than those it committed to."""

    def _answer_evidence(self, request: EvidenceRequest, respond: Respond) -> None:
        def answer(body: object, size_bytes: int) -> None:
            if isinstance(body, bytes):
                self.attacked()
                body = body[:-4] + bytes(4)
            respond(body, size_bytes)

        super()._answer_evidence(request, answer)


class EvidenceWithheld(FreeRider):
    """Answers from its cache, and says that it has no tensors to show."""

    def _answer_evidence(self, request: EvidenceRequest, respond: Respond) -> None:
        self.attacked()
        respond(Refusal(code=RefusalCode.NOT_FOUND, message="no such evidence"), MESSAGE_BYTES)


class Evader(FreeRider):
    """Answers from its cache; when it is challenged it falls silent to everybody until it is taken for gone, and joins
    again."""

    _silent_until_s = 0.0

    @property
    def is_silent(self) -> bool:
        return self.clock.now_s() < self._silent_until_s

    def serve(self, source: Address, request: object, respond: Respond) -> None:
        if isinstance(request, LogRequest) and not self.is_silent:
            self.attacked()
            self._silent_until_s = self.clock.now_s() + self.world.spec.time_limits.member_s + 1.0
        if not self.is_silent:
            super().serve(source, request, respond)

    async def _tell_heartbeat(self) -> None:
        if not self.is_silent:
            await super()._tell_heartbeat()
