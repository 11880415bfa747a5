"""Preference models: from judgements to a scorer per principle.

`PreferenceModel.load(dir).score(texts) -> scores_B`; a model of several heads scores all of them with
`.score_heads(texts)`. `AdapterBank.load(dirs).score_folders(texts)`: many adapters on one backbone in one pass.
"""

from morlaif_ray.preference.adapters import AdapterBank
from morlaif_ray.preference.model import PreferenceModel

__all__ = ["AdapterBank", "PreferenceModel"]
