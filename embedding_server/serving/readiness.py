"""Whether the server serves, and if not, why: what probes and load balancers are told."""

from typing import Literal

import msgspec

from embedding_server.catalog import Catalog
from embedding_server.core import Task
from embedding_server.serving.admission import AdmissionQueue
from embedding_server.serving.device import Device
from embedding_server.serving.registry import Registry, State


class Answer(msgspec.Struct, frozen=True):
    """`reasons` says what is missing; `started` stays true once every required model was tried."""

    ready: bool
    tasks: dict[Task, bool]
    reasons: list[str]
    started: bool


class Readiness:
    """Judges the parts of one application.

    Args:
        policy: whether `all` models that are to stay must serve, or `any` of them.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        registry: Registry,
        device: Device,
        queue: AdmissionQueue,
        policy: Literal["all", "any"],
    ) -> None:
        self._catalog = catalog
        self._device = device
        self._queue = queue
        self._registry = registry
        self._policy = policy

    def check(self) -> Answer:
        """The present state."""
        reasons = [self._device.problem] if self._device.problem else []
        if self._queue.draining:
            reasons.append("the server is shutting down")
        able = not reasons
        required = self._registry.pinned
        enough = any if self._policy == "any" and required else all
        reasons += [
            f"{one.spec.id}: {one.state}" + f" ({one.error})" * bool(one.error)
            for one in required
            if one.state is not State.READY
        ]
        ready = able and enough(one.state is State.READY for one in required)
        return Answer(
            ready=ready,
            tasks={task: able and self._serves(task) for task in Task},
            reasons=[] if ready else reasons,
            started=all(one.settled.is_set() for one in required),
        )

    def _serves(self, task: Task) -> bool:
        listed = {spec.id for spec in self._catalog.listed[task].values()}
        pinned = self._registry.pinned
        states = [one.state is State.READY for one in pinned if one.spec.id in listed]
        enough = any if self._policy == "any" and states else all
        return bool(listed) and enough(states)
