"""morlaif-ray: from principles in plain English to an aligned language model (arXiv 2406.07295).

This package is the science, a plain library that never imports Ray. `actors/` gives its objects processes,
`jobs/` starts them. See `docs/architecture.md`.
"""

__version__ = "0.1.0"
