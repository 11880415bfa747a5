"""Measured figures, never asserted in a timed test. Each module prints a table and, as its last line, one JSON object."""
