"""Untrained models with opinions: fresh ones find every token about as likely, and wrong arithmetic hardly shows."""

from __future__ import annotations

from typing import Any

import torch


def give_opinions(model: Any) -> Any:
    """Widens all matrices in place, and returns the model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model
