"""Preference models: from judgements to a scorer per principle.

`PreferenceModel.load(dir).score(texts) -> scores_B`; a shared trunk scores all its heads with `.score_heads(texts)`.
"""

from morlaif_ray.preference.model import PreferenceModel

__all__ = ["PreferenceModel"]
