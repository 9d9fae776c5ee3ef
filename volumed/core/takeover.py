"""A volume taken from a node that is gone: only with proof that nothing the node still writes can reach it.

Proof is the storage's: it has cut the old holder off, or it says that nobody holds the volume. That a node sends no
heartbeat any more proves nothing: it may write on behind a broken network. Where the storage can say neither, an
operator must say so, who has seen the machine without power.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec

from volumed.core.backends import Backend, Backends
from volumed.core.events import Events
from volumed.core.locks import KeyedLocks
from volumed.core.mounts import describe_each, ended
from volumed.core.presence import handle_of
from volumed.core.reach import Reach, attacher
from volumed.core.volumes import Volumes
from volumed.driver import Capability, Holder, SupportsFencing
from volumed.errors import BackendError, InUse, InvalidRequest, PreconditionFailed
from volumed.model import Attachment, Binding, Volume
from volumed.store.repository import Repository
from volumed.testing import crash

_WORD = "an operator's word"


class Takeover(msgspec.Struct, frozen=True, kw_only=True):
    """What was done, or with a dry run would be. `holders`: of the storage; None where it cannot tell."""

    volume: Volume
    holders: Sequence[Holder] | None
    uses: Sequence[str]  # of other nodes, by the ledger, for people
    proof: str  # why nothing of theirs can reach it any more; empty: there is none yet
    action: str
    done: bool = False


class _Case(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a volume's other holders; `node`: the one to take it from, or all."""

    holders: list[Holder] | None
    doomed: list[Holder]  # those that must be cut off
    bindings: list[Binding]
    attachments: list[Attachment]

    @property
    def uses(self) -> list[str]:
        attached = [f"node {attachment.node}, which has it attached" for attachment in self.attachments]
        return [line for binding in self.bindings for line in describe_each(binding)] + attached


class Takeovers:
    def __init__(
        self,
        *,
        node: str,
        repository: Repository,
        backends: Backends,
        volumes: Volumes,
        reach: Reach,
        locks: KeyedLocks,
        events: Events,
    ) -> None:
        self._node = node
        self._repository = repository
        self._backends = backends
        self._volumes = volumes
        self._reach = reach
        self._locks = locks
        self._events = events

    def run(self, reference: str, *, node: str = "", operator_word: bool = False, dry_run: bool = False) -> Takeover:
        """Take the volume from `node`, or from whichever others have it: their uses become history, and this node may
        have it. The same again is success.

        Raises PreconditionFailed while the old holder may still write and `operator_word` is not given, InUse when
        somebody unknown holds it beside `node`, and what the storage raises; then nothing is changed.
        """
        volume = self._volumes.get(reference)
        if node == self._node:
            raise InvalidRequest("is this node", subject=f"node {node}", hint="a volume is taken over from another one")
        backend = self._backends.get(volume.backend)
        return backend.call(lambda: self._run(volume, backend, node=node, operator_word=operator_word, dry_run=dry_run))

    def _run(self, volume: Volume, backend: Backend, *, node: str, operator_word: bool, dry_run: bool) -> Takeover:
        with self._locks.hold(volume.id):
            case = self._look(volume, backend, node)
            report = Takeover(
                volume=volume,
                holders=case.holders,
                uses=case.uses,
                proof="" if case.doomed or case.holders is None else "the storage says that nobody else holds it",
                action=self._action(case, backend),
            )
            if dry_run:
                return report
            if not case.uses and not case.doomed:
                return msgspec.structs.replace(report, done=True)
            proof = report.proof or self._prove(volume, backend, case, operator_word=operator_word)
            crash.point("takeover.proved")
            self._end(volume, case, proof)
        self._events.publish(
            "volume.taken-over",
            volume.name,
            f"taken over by node {self._node} from {', '.join(case.uses) or 'holders on its storage'}: {proof}",
            level=logging.WARNING,
        )
        return msgspec.structs.replace(report, proof=proof, done=True)

    # Looking
    def _look(self, volume: Volume, backend: Backend, node: str) -> _Case:
        def theirs(record: Binding | Attachment) -> bool:
            return record.node == node if node else record.node != self._node

        holders = self._holders(volume, backend)
        foreign = [holder for holder in holders or () if not holder.ours]
        doomed = [holder for holder in foreign if not node or holder.node == node]
        strangers = [holder.text for holder in foreign if node and not holder.node]
        if strangers:
            raise InUse(
                f"cannot be taken from node {node} alone, as there are others that no node is known for",
                holders=strangers,
                subject=f"volume {volume.name}",
                hint="leave the node out to cut all of them off",
            )
        return _Case(
            holders=holders,
            doomed=doomed,
            bindings=[binding for binding in self._repository.bindings(volume.id) if theirs(binding)],
            attachments=[each for each in self._repository.attachments(volume.id) if theirs(each)],
        )

    def _holders(self, volume: Volume, backend: Backend) -> list[Holder] | None:
        """By the storage's word; with the node's name where the ledger knows whose machine it is."""
        handle, driver = handle_of(volume), backend.driver
        named = {
            record.machines[backend.name]: record.name
            for record in self._repository.nodes()
            if backend.name in record.machines
        }
        if isinstance(driver, SupportsFencing) and Capability.FENCING in backend.capabilities:
            return [holder._replace(node=holder.node or named.get(holder.id, "")) for holder in driver.holders(handle)]
        attaching = attacher(backend)
        if attaching is None:
            return None
        own = self._reach.machine(backend, self._node)
        return [
            Holder(id=machine, node=named.get(machine, ""), ours=machine == own, text=f"machine {machine}")
            for machine in attaching.machines(handle)
        ]

    def _action(self, case: _Case, backend: Backend) -> str:
        if not case.uses and not case.doomed:
            return "nothing: nobody else has it"
        if case.holders is None:
            return f"{_WORD} is needed: backend {backend.name} cannot tell who holds it"
        if not case.doomed:
            return "end what the ledger still holds"
        who = ", ".join(holder.text for holder in case.doomed)
        if Capability.FENCING in backend.capabilities:
            return f"cut off {who}"
        return f"{_WORD} is needed: {who} has it, and backend {backend.name} cannot cut anybody off"

    # Acting
    def _prove(self, volume: Volume, backend: Backend, case: _Case, *, operator_word: bool) -> str:
        """Why nothing can reach the volume any more. Raises PreconditionFailed where nothing proves it."""
        handle, driver = handle_of(volume), backend.driver
        if isinstance(driver, SupportsFencing) and Capability.FENCING in backend.capabilities:
            for holder in case.doomed:
                driver.fence(handle, holder)
                crash.point("takeover.fenced")
            cut_off = {holder.id for holder in case.doomed}
            left = [holder.text for holder in driver.holders(handle) if holder.id in cut_off]
            if left:
                raise BackendError(
                    f"was told to cut off {', '.join(left)}, and they still hold it", subject=f"volume {volume.name}"
                )
            return f"its storage has cut off {', '.join(holder.text for holder in case.doomed)}"
        if not operator_word:
            who = ", ".join(case.uses or [holder.text for holder in case.doomed])
            raise PreconditionFailed(
                f"may still be written to by {who}, and backend {backend.name} can neither cut them off nor tell that "
                "they are gone",
                subject=f"volume {volume.name}",
                hint="make sure that the machine is without power, then say so: --force-with-operator-word",
            )
        attaching = attacher(backend)
        if attaching is not None:
            for holder in case.doomed:
                attaching.detach(handle, holder.id, force=True)
        return _WORD

    def _end(self, volume: Volume, case: _Case, proof: str) -> None:
        for attachment in case.attachments:
            self._reach.detach(volume, attachment, force=True)
        operation = self._repository.operation(volume.id)
        with self._repository.transaction() as transaction:
            for binding in case.bindings:
                transaction.delete(binding)
                transaction.put(ended(binding, volume, reason=f"taken over by node {self._node}: {proof}"))
            if operation is not None and operation.node in {binding.node for binding in case.bindings}:
                # What that node had begun is this one's to finish.
                transaction.put(msgspec.structs.replace(operation, node=self._node))
        crash.point("takeover.committed")
