"""The learner's end of a direct weight transfer. What fails is a result, not an error: the loop has another way."""

from __future__ import annotations

from morlaif_ray.rl.policy_model import PolicyModel
from morlaif_ray.rl.weight_broadcast import (
    Announcement,
    Rendezvous,
    WeightSender,
    make_sender,
)


class WeightOutlet:
    """Holds the sender of the group that this process is rank 0 of."""

    def __init__(self) -> None:
        self._sender: WeightSender | None = None

    def open(self, where: Rendezvous) -> str | Exception:
        """Forms the group, in the place of an earlier one; this process's GPU for `ipc`, else '', or what failed."""
        self.close()
        try:
            self._sender = make_sender(where)
        except Exception as error:  # noqa: BLE001 - whatever a backend raises, the weights have another way
            return plain(error)
        return own_gpu() if where.backend == "ipc" else ""

    def offer(self, policy: PolicyModel, version: int) -> Announcement | Exception:
        """What the engines are to be told, or what failed."""
        assert self._sender is not None, "open comes first"
        announcement = policy.announce(version)
        try:
            return self._sender.offer(announcement, policy.merged_weights())
        except Exception as error:  # noqa: BLE001 - see above
            self.close()
            return plain(error)

    def send(self, message: Announcement, policy: PolicyModel) -> Exception | None:
        """Sends what was offered. After a failure the group is of no more use."""
        assert self._sender is not None, "open comes first"
        weights = policy.merged_weights()
        try:
            self._sender.send(message, weights)
        except Exception as error:  # noqa: BLE001 - see above
            self.close()
            for _ in weights:
                pass  # sharded ranks gather all of them together, whatever becomes of the transfer
            return plain(error)
        return None

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()
            self._sender = None


def plain(error: Exception) -> Exception:
    """The error as one that any process can unpickle."""
    return RuntimeError(f"learner: {str(error).strip() or type(error).__name__}")


def own_gpu() -> str:
    """The name that CUDA gives to this process's GPU, the same in every process."""
    import torch

    return str(torch.cuda.get_device_properties(0).uuid)
