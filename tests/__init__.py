"""Makes this folder the package `tests`: child processes would else import one that a distribution installs."""
