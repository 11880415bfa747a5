"""The strict, frozen config: `load_config(path, overrides) -> Config`. Imports no torch, transformers, ray or vllm."""

from morlaif_ray.config.loading import load_config, parse_config
from morlaif_ray.config.root import Config

__all__ = ["Config", "load_config", "parse_config"]
