"""Sections `cluster` and `tracking`: where a run lives and how it is watched. They never change a result."""

from __future__ import annotations

from typing import Literal

from morlaif_ray.config.base import PositiveFloat, PositiveInt, Section


class ClusterConfig(Section):
    address: str | None = None
    """A Ray address; None: RAY_ADDRESS where set, else a local Ray that the job starts and ends."""
    num_cpus: PositiveInt | None = None
    """CPUs of the local Ray; None: all."""
    object_store_mb: PositiveInt = 300
    """Object store of the local Ray."""
    dashboard: bool = False
    """Start the dashboard of the local Ray, on 127.0.0.1."""
    connect_timeout_s: PositiveFloat = 30.0
    start_timeout_s: PositiveFloat = 180.0
    """Longest wait for an actor to start."""
    num_gpus_per_node: PositiveInt | None = None
    """For `morlaif plan`: GPUs of one node of the intended cluster."""
    gpu_memory_gb: PositiveFloat | None = None
    """For `morlaif plan`: memory of one GPU."""


class TrackingConfig(Section):
    tracker: Literal["tensorboard", "wandb", "mlflow", "none"] = "tensorboard"
    project: str = "morlaif"
