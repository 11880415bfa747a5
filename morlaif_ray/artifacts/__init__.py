"""What a run leaves on disk: stage folders with manifests, and tables. Schemas: `docs/artifacts.md`."""

from morlaif_ray.artifacts.folder import (
    MANIFEST,
    STAGES,
    Manifest,
    StageFolder,
    canonical_json,
    file_hash,
    read_manifest,
)
from morlaif_ray.artifacts.tables import (
    read_json,
    read_records,
    read_table,
    write_csv,
    write_json,
    write_records,
    write_table,
)
from morlaif_ray.errors import explain_os_errors

__all__ = [
    "MANIFEST",
    "STAGES",
    "Manifest",
    "StageFolder",
    "canonical_json",
    "explain_os_errors",
    "file_hash",
    "read_json",
    "read_manifest",
    "read_records",
    "read_table",
    "write_csv",
    "write_json",
    "write_records",
    "write_table",
]
