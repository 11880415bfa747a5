"""Makes this folder the package `tests`: some distributions install one of that name, which child processes would import."""
