"""What of Ray is used, in this process."""

from types import SimpleNamespace
from typing import Any


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class NodeDiedError(RayError):
    pass


class RayStandIn:
    """A task is a function, which is run when it is asked for its result; one that gives an error raises it.

    Args:
        resources: Of each node, at most four of which are called a, b, c and d.
    """

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError, NodeDiedError=NodeDiedError)
    util = SimpleNamespace(
        scheduling_strategies=SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: node)
    )

    def __init__(self, *resources: dict[str, float]) -> None:
        self._nodes = [
            {"Alive": True, "NodeID": name, "Resources": each, "NodeManagerHostname": name, "NodeManagerAddress": "::1"}
            for name, each in zip("abcd", resources, strict=False)
        ]
        self.most = 0

    def nodes(self) -> list[dict[str, Any]]:
        return self._nodes

    def wait(self, tasks: list[Any], **options: Any) -> tuple[list[Any], list[Any]]:
        self.most = max(self.most, len(tasks))
        return tasks[:1], tasks[1:]

    def get(self, task: Any) -> Any:
        found = task()
        if isinstance(found, Exception):
            raise found
        return found
