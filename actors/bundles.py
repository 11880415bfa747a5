"""The processes of a plan, by phase, and whether a cluster can hold them.

    check_plan(plan, available) -> None   pure: ResourceError with what is required, what is there, what to reduce

Phases do not overlap, nor do the turns of a phase, so a cluster must hold the largest turn, not their sum. Within a
turn all processes live at once, except Tune's trials, which wait for one another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from morlaif_ray.errors import ResourceError

_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Bundle:
    """`count` processes of one kind."""

    phase: str
    """The stage folder that this process works for."""
    role: str
    count: int
    cpus: float
    """CPUs of each."""
    gpus: float
    """GPUs of each; a fraction shares one."""
    memory_gb: float
    """Estimate for each: memory per GPU where `gpus` > 0, else host memory; NaN where the model's shape is unknown."""
    reduce: str
    """The settings that make this smaller."""
    waits: bool = False
    """Tune runs as many as fit: one at a time is enough."""
    turn: int = 0
    """Processes of a later turn start when those of the earlier ones have ended."""

    @property
    def least(self) -> int:
        """How many must live at once."""
        return min(self.count, 1) if self.waits else self.count

    def describe(self) -> str:
        return f"{self.least} x {self.role}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that runs, by phase."""

    bundles: tuple[Bundle, ...]

    @property
    def phases(self) -> list[str]:
        return list(dict.fromkeys(bundle.phase for bundle in self.bundles))

    def of(self, phase: str) -> list[Bundle]:
        return [bundle for bundle in self.bundles if bundle.phase == phase]

    def turns(self, phase: str) -> list[list[Bundle]]:
        """What lives at once, one turn after the other."""
        bundles = self.of(phase)
        return [
            [b for b in bundles if b.turn == turn] for turn in sorted({b.turn for b in bundles})
        ]

    def cpus(self, phase: str) -> float:
        """CPUs that the phase needs at least."""
        return max(map(cpus_of, self.turns(phase)), default=0.0)

    def gpus(self, phase: str) -> int:
        """GPUs that the phase needs at least."""
        return max(map(gpus_of, self.turns(phase)), default=0)

    @property
    def peak_cpus(self) -> float:
        return max(self.cpus(phase) for phase in self.phases)

    @property
    def peak_gpus(self) -> int:
        return max(self.gpus(phase) for phase in self.phases)


@dataclass(frozen=True, slots=True)
class Available:
    """What a cluster offers. None: not known, not checked."""

    cpus: float | None
    gpus: float
    gpus_per_node: int | None = None
    gpu_memory_gb: float | None = None


def cpus_of(bundles: list[Bundle]) -> float:
    """CPUs of what must live at once."""
    return sum(bundle.least * bundle.cpus for bundle in bundles)


def gpus_of(bundles: list[Bundle]) -> int:
    """GPUs of what must live at once."""
    return pack_gpus([bundle.gpus for bundle in bundles for _ in range(bundle.least)])


def pack_gpus(wanted: list[float]) -> int:
    """GPUs that hold all processes: whole ones take their own, fractions share one (first fit, largest first)."""
    whole = sum(math.ceil(gpus - _ROUNDING) for gpus in wanted if gpus >= 1)
    free: list[float] = []
    for gpus in sorted((gpus for gpus in wanted if 0 < gpus < 1), reverse=True):
        place = next((i for i, left in enumerate(free) if left + _ROUNDING >= gpus), None)
        if place is None:
            free.append(1.0 - gpus)
        else:
            free[place] -= gpus
    return whole + len(free)


def check_plan(plan: Plan, available: Available) -> None:
    """Raises ResourceError where a phase can never fit; says what is required, what is there, what to reduce."""
    turns = [(phase, bundles) for phase in plan.phases for bundles in plan.turns(phase)]
    for phase, bundles in turns:
        shown = ", ".join(f"{b.describe()} at {b.cpus:g} CPU" for b in bundles if b.cpus)
        needed = cpus_of(bundles)
        if available.cpus is not None and needed > available.cpus + _ROUNDING:
            raise ResourceError(
                f"{phase} needs {needed:g} CPUs ({shown}), there are {available.cpus:g}; "
                f"reduce {_reduce(bundles)}, or add CPUs (a local Ray: cluster.num_cpus)"
            )
        if gpus_of(bundles) > available.gpus + _ROUNDING:
            shown = ", ".join(f"{b.describe()} at {b.gpus:.3g} GPU" for b in bundles if b.gpus)
            raise ResourceError(
                f"{phase} needs {gpus_of(bundles)} GPUs ({shown}), there are {available.gpus:g}; "
                f"reduce {_reduce([b for b in bundles if b.gpus])}, or add nodes"
            )
        for bundle in bundles:
            _check_bundle(bundle, available)


def _check_bundle(bundle: Bundle, available: Available) -> None:
    """One process must fit on one node, and into its share of a GPU."""
    per_node = available.gpus_per_node
    if per_node is not None and bundle.gpus > per_node:
        raise ResourceError(
            f"{bundle.phase}: one {bundle.role} needs {bundle.gpus:g} GPUs, a node has {per_node}; "
            f"reduce {bundle.reduce}"
        )
    if available.gpu_memory_gb is None or bundle.gpus <= 0:
        return
    share_gb = available.gpu_memory_gb * min(bundle.gpus, 1.0)
    if bundle.memory_gb > share_gb:  # False for NaN: an unknown model is not judged
        raise ResourceError(
            f"{bundle.phase}: one {bundle.role} needs about {bundle.memory_gb:.1f} GB, its share of a GPU "
            f"({min(bundle.gpus, 1.0):.3g} of {available.gpu_memory_gb:g} GB) is {share_gb:.1f} GB; "
            f"change {bundle.reduce}"
        )


def _reduce(bundles: list[Bundle]) -> str:
    return " or ".join(dict.fromkeys(bundle.reduce for bundle in bundles))
