"""What the footers of shards say of their columns, without reading one.

Enters: a store and a shard's reference. Leaves: Parquet's own description. Costs: one short read a shard.
"""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.storage.errors import CorruptShard
from stillroom.storage.records import ShardRef
from stillroom.storage.store import UnitStore


def footer_of(store: UnitStore, ref: ShardRef) -> pq.FileMetaData:
    """Raises CorruptShard where the file is none of Parquet, StoreError where there is none."""
    try:
        return pq.read_metadata(store.files.open(ref.path))
    except (pa.ArrowException, OSError) as error:
        where = f"{store.uri}/{ref.path}"
        raise CorruptShard(f"{where} is no Parquet file: {error}; run `stillroom verify {store.uri}`") from error


def columns_of(footer: pq.FileMetaData) -> Iterator[tuple[str, pq.ColumnChunkMetaData]]:
    """Each column of each row group, with its name in the schema's first level."""
    for group in range(footer.num_row_groups):
        for number in range(footer.num_columns):
            column = footer.row_group(group).column(number)
            yield str(column.path_in_schema).partition(".")[0], column
