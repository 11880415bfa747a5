"""Raw rows of a data set on the hub, or of a local folder in a form that `datasets.load_dataset` knows."""

from __future__ import annotations

from collections.abc import Iterator

from morlaif_ray.config.inputs import HubSource
from morlaif_ray.data.rows import RawRow
from morlaif_ray.errors import DataError


def read_hub_rows(source: HubSource) -> Iterator[RawRow]:
    """All rows of `source.split`; DataError where the data set cannot be had."""
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    where = source.id if source.subset is None else f"{source.id}/{source.subset}"
    try:
        table = datasets.load_dataset(
            source.id, source.subset, split=source.split, revision=source.revision
        )
    except (DatasetsError, OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"data.source.id '{where}' (split '{source.split}'): cannot be loaded ({lines[0]}); check id, subset, "
            f"split and revision, or download the files and use data.source.kind: files"
        ) from error
    for number, value in enumerate(table, start=1):
        yield RawRow(f"{where}:{source.split}", number, "row", value)
