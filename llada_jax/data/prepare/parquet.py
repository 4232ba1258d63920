"""Reads a column of text from .parquet files, in each of the types in which Arrow holds text.

Text is text whatever its encoding: string, large_string, string_view, dictionary-encoded or run-end-encoded text, and
an extension type that is stored as one of these. Bytes (binary, large_binary, binary_view) are read as text in UTF-8,
because files of older programs do not say that their bytes are text.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llada_jax.config import UserError
from llada_jax.data.prepare.left_out import BadItem

_ROWS = 64  # number of rows that are read at a time


def read_parquet(file: Path, raw: BinaryIO, key: str) -> Iterator[tuple[str, bool, str] | BadItem]:
    """Yields (text, True, file and row for messages) for each row, or what is wrong with the row.

    The True says that the text ends its document.

    Args:
      file: The path of the file, for error messages.
      raw: The open file.
      key: The name of the column. "a.b" is the field b of the column a, unless there is a column with the name "a.b".

    Raises:
      UserError: If the file cannot be read, or if it has no such column of text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(raw, pre_buffer=False, buffer_size=1 << 20)
        path, kind = _column(file, table.schema_arrow, key)
        if not _is_text(kind):
            raise UserError(f'{file}: column "{key}" holds {_short(kind)}, not text')
        row = 0
        for batch in _batches(table, ".".join(path)):
            column = batch.column(batch.schema.get_field_index(path[0]))
            for value in _texts(column, path[1:]):
                row += 1
                where = f"{file}, row {row}"
                try:
                    text = value.as_py()
                    text = text.decode() if isinstance(text, bytes) else text
                except UnicodeDecodeError as error:
                    yield BadItem(f"{where}: not UTF-8 text: {error.reason}", "not UTF-8")
                    continue
                if text is None:
                    yield BadItem(f'{where}: there is no text in the column "{key}"', f'no text under "{key}"')
                else:
                    yield text, True, where
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as a parquet file: {' '.join(str(error).split())[:300]}") from error


def _batches(table: Any, column: str) -> Iterator[Any]:
    """Yields a column in batches; none spans row groups, whose dictionaries in nested columns pyarrow cannot join."""
    for group in range(table.num_row_groups):
        yield from table.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[column], use_threads=False)


def _column(file: Path, schema: Any, key: str) -> tuple[list[str], Any]:
    """Returns the path to a column, as names from the outside to the inside, and the type of the column."""
    import pyarrow as pa

    path = [key] if key in schema.names else key.split(".")
    fields, kind = schema, None
    for depth, name in enumerate(path):
        names = [field.name for field in fields]
        if names.count(name) > 1:
            raise UserError(f'{file} has several columns "{name}": rename one of them')
        if name not in names:
            inside = f' in "{".".join(path[:depth])}"' if depth else ""
            raise UserError(
                f'{file} has no column "{key}" (text_key chooses another column); its columns{inside} are '
                f"{', '.join(names)}"
            )
        kind = next(field.type for field in fields if field.name == name)
        fields = kind if pa.types.is_struct(kind) else []
    return path, kind


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return _is_text(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _is_text(kind.value_type)
    # A column in which every value is null may have the type null.
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    as_bytes = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(is_type(kind) for is_type in (*text, *as_bytes))


def _texts(column: Any, path: list[str]) -> Any:
    """Returns the array of texts in a column: the fields that `path` names, with extension types as they are stored."""
    import pyarrow.compute as pc

    if path:
        column = pc.struct_field(column, path)
    while hasattr(column, "storage"):
        column = column.storage
    return column


def _short(kind: Any) -> str:
    text = " ".join(str(kind).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
