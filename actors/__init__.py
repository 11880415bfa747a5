"""Library objects with a process, a GPU, a name and a restart policy.

Each module holds a plain class (tested without Ray) and one `spawn_*` function that makes it remote.
"""
