"""Measured figures, never asserted in a timed test. A module prints a table and, as its last line, one JSON object."""
