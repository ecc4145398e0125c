"""A store as SQL: statements for DuckDB that give one row per position and kept id, with the id's text.

Enters: a store. Leaves: CREATE VIEW statements over exactly the files that the log names. Costs: the log; a query costs
what it reads: one core gives 50,000 positions a second at k = 64, 3.2 million rows of `topk`.

    shards             the columns as they are stored, one row per sequence
    tokens             id, token, text
    topk_positions     sequence, position, input_id, kept, top_logit, log_partition, tail_probability, ids, gaps
    topk               sequence, position, input_id, rank, id, logit, probability, token, text
    sampled            sequence, position, input_id, id, draws, probability, token, text
    hidden             sequence, position, channel, value
    layers             sequence, position, layer, channel, value

Attention maps have no view: DuckDB would copy a sequence's whole map for each of its rows. FORMAT.md has a query for
one row.

`position` is t in the sequence, whose row is about token t + 1; `input_id` is what the teacher read there; `rank` is 1
for the likeliest. Probabilities are at T = 1 over the whole vocabulary, the tail included, in float64. Views need no
extension; only the files of a store in a bucket need DuckDB's httpfs.

    _stillroom/tokens-<sha256>.parquet     id int32, token string, text string: what ids mean, for people

`token` is the vocabulary's own spelling (null where an id has none), `text` what the id decodes to alone; null in the
file where it is `token` with each mark of a space or a line's end as what it marks, which the view puts in.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.storage.calibration import calibration_path
from stillroom.storage.codecs.hidden import ZERO
from stillroom.storage.codecs.tail import STEP
from stillroom.storage.errors import CorruptShard, StoreError
from stillroom.storage.files import Files, sha256_hex
from stillroom.storage.records import BETAS, HiddenSpec, LayersSpec, SampledSpec, TopKSpec
from stillroom.storage.store import Store

FOLDER = "_stillroom"

_NAME = re.compile(rf"{FOLDER}/tokens-[0-9a-f]{{64}}\.parquet")

_TOKENS_SCHEMA = pa.schema([pa.field("id", pa.int32(), nullable=False), ("token", pa.string()), ("text", pa.string())])

#: What byte-level vocabularies write for a space and a line's end, and SentencePiece for a space.
_MARKS = {"Ġ": " ", "Ċ": "\n", "▁": " "}

#: One page a column, as zstd does not look beyond one. Bytes of SmolLM2's 49,152 ids: 212,257. With every text written
#: out 410,178; with dictionaries at zstd 1 as well 915,978; sorted by token 201,000, half of it the ids; brotli 11
#: 198,661, in three to ten times the second that this takes.
_SETTINGS: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 19,
    "use_dictionary": False,
    "column_encoding": {
        "id": "DELTA_BINARY_PACKED",
        "token": "DELTA_LENGTH_BYTE_ARRAY",
        "text": "DELTA_LENGTH_BYTE_ARRAY",
    },
    "data_page_size": 1 << 26,
    "write_statistics": False,
    "write_page_checksum": True,
    "store_schema": False,
}

#: Positions cut out of a sequence's lists at once. DuckDB copies a list for each row that it unnests beside it: with
#: all 512 positions at once the views of 40,960 positions took 38 s, in chunks of 16 1.0 s, of 32 0.57 s.
_CHUNK = 32


class TokenRow(NamedTuple):
    """id; token: as the vocabulary spells it, None for an id that it lacks; text: of this id decoded alone."""

    id: int
    token: str | None
    text: str


def token_table(files: Files) -> str | None:
    """The name of a store's token table, or None. Raises StoreError."""
    return next((name for name in files.list(FOLDER) if _NAME.fullmatch(name)), None)


def write_token_table(files: Files, rows: Iterable[TokenRow]) -> str:
    """Keep what ids mean beside a store's numbers; returns the file's name, which holds its content's digest.

    It is for people: nothing in stillroom but these views and `inspect --tokens` reads it.

    rows: by rising id. Raises StoreFull, StoreError.
    """
    ids, tokens, texts = zip(
        *((i, token, None if text == _spelled(token) else text) for i, token, text in rows), strict=True
    )
    sink = pa.BufferOutputStream()
    columns = [pa.array(ids, pa.int32()), pa.array(tokens, pa.string()), pa.array(texts, pa.string())]
    pq.write_table(pa.table(columns, schema=_TOKENS_SCHEMA), sink, **_SETTINGS)
    data = memoryview(sink.getvalue())
    name = f"{FOLDER}/tokens-{sha256_hex(data)}.parquet"
    files.write(name, data)
    return name


def _spelled(token: str | None) -> str | None:
    """The text of a token that means what it spells."""
    for mark, text in _MARKS.items():
        token = token and token.replace(mark, text)
    return token


def texts_of(files: Files) -> list[str] | None:
    """Of all ids, by id; None where the store has no table. Raises CorruptShard, StoreError."""
    name = token_table(files)
    if name is None:
        return None
    data = files.read(name)
    if sha256_hex(data) != name.removeprefix(f"{FOLDER}/tokens-").removesuffix(".parquet"):
        raise CorruptShard(
            f"{files.uri}/{name} is not what its name says: the file was damaged; remove it, `stillroom teach` on the "
            "store's recipe writes it again"
        )
    table = pq.read_table(pa.BufferReader(data), columns=["token", "text"])
    rows = zip(table["token"].to_pylist(), table["text"].to_pylist(), strict=True)
    return [(_spelled(token) or "") if text is None else text for token, text in rows]


def views_sql(store: Store) -> str:
    """The statements, each ended by a semicolon. Run them in an empty database or schema: names are short.

    A path holds for this machine; shards committed later need the statements made anew.
    Raises StoreError where nothing is committed, or what is committed is packed: SQL cannot read that.
    """
    paths = [f"{store.uri}/{ref.path}" for _, ref in sorted(store.committed().items())]
    if not paths:
        raise StoreError(f"store {store.uri} has no committed shards: run `stillroom teach` on its recipe first")
    spec = store.identity.signal
    views = [
        f"CREATE OR REPLACE VIEW shards AS SELECT * FROM {_parquet(paths)};",
        f"CREATE OR REPLACE VIEW tokens AS {_tokens(store.files)};",
    ]
    if spec.topk and spec.topk.layout == "plain":
        views += _topk(spec.topk, store.identity.vocabulary)
    if spec.sampled:
        views.append(_sampled(spec.sampled))
    if spec.hidden:
        views.append(_hidden(spec.hidden, store.uri))
    if spec.layers:
        views.append(_layers(spec.layers))
    if len(views) == 2 and not spec.attention:
        raise StoreError(
            f"store {store.uri} keeps {spec.in_words()}, which SQL cannot read: `stillroom transcode {store.uri} DST "
            "--layout plain` makes a store that it can"
        )
    return "\n".join(views) + "\n"


def _tokens(files: Files) -> str:
    name = token_table(files)
    if name is not None:
        spelled = "token"
        for mark, text in _MARKS.items():
            spelled = f"replace({spelled}, '{mark}', chr({ord(text)}))"
        return f"SELECT id, token, coalesce(text, {spelled}) AS text FROM {_parquet([f'{files.uri}/{name}'])}"
    return "SELECT NULL::INTEGER AS id, NULL::VARCHAR AS token, NULL::VARCHAR AS text WHERE false"


def _topk(spec: TopKSpec, vocabulary: int) -> list[str]:
    """log Z − top logit = ln(Σ_kept exp(−gap) + exp(tail)), where the tail at T = 1 is the last of the ten codes'
    double sums: c_10 = c_0 + Σ_j (11 − j) · code_j, in steps of 2⁻¹¹ nat (codecs/tail.py)."""
    grid = len(BETAS)
    codes = " + ".join(f"{grid - j} * tail_code[{grid} * (row - 1) + {j + 1}]" for j in range(grid))
    step = "1" if spec.gap_step is None else repr(float(spec.gap_step))
    kept = "topk_count[row]" if spec.nucleus else str(spec.k)
    positions = _positions(
        ["topk_ids", "topk_gap"], each="topk_count" if spec.nucleus else spec.k, lone=["top_logit"], tens=["tail_code"]
    )
    return [
        f"""CREATE OR REPLACE VIEW topk_positions AS
SELECT sequence, position, input_id, kept, top_logit, top_logit + ln(held + tail) AS log_partition,
       tail / (held + tail) AS tail_probability, ids, gaps
FROM (
  SELECT *, list_sum(list_transform(gaps, lambda gap: exp(-gap::DOUBLE))) AS held
  FROM (
    SELECT sequence, position, input_id, {kept} AS kept, top_logit[row] AS top_logit, elements_1 AS ids,
           list_transform(elements_2, lambda code: code * ({step})::FLOAT) AS gaps,
           exp(({codes} + round(ln({vocabulary} - {kept}) / {STEP})) * {STEP}) AS tail
    FROM ({positions})));""",
        """CREATE OR REPLACE VIEW topk AS
SELECT sequence, position, input_id, rank, topk.id, top_logit - gap AS logit,
       exp(-gap::DOUBLE + top_logit - log_partition) AS probability, token, text
FROM (SELECT sequence, position, input_id, top_logit, log_partition, unnest(ids) AS id, unnest(gaps) AS gap,
             generate_subscripts(ids, 1) AS rank
      FROM topk_positions) AS topk LEFT JOIN tokens ON tokens.id = topk.id;""",
    ]


def _sampled(spec: SampledSpec) -> str:
    return f"""CREATE OR REPLACE VIEW sampled AS
SELECT sequence, position, input_id, sampled.id, draws, draws / {spec.draws} AS probability, token, text
FROM (SELECT sequence, position, input_id, unnest(elements_1) AS id, unnest(elements_2) AS draws
      FROM ({_positions(["sampled_ids", "sampled_draws"], each="sampled_count")})) AS sampled
     LEFT JOIN tokens ON tokens.id = sampled.id;"""


def _hidden(spec: HiddenSpec, uri: str) -> str:
    """Products and sums in float32 and in the codec's order, so that the numbers are the reader's to the bit."""
    if spec.calibration is None:
        positions = _positions(["hidden"], each=spec.width)
        return f"""CREATE OR REPLACE VIEW hidden AS
SELECT sequence, position, unnest(range({spec.width})) AS channel, unnest(elements_1) AS value
FROM ({positions});"""
    scaled = spec.dtype == "int8"
    positions = _positions(["hidden_code"], each=spec.width, lone=["hidden_scale"] if scaled else [])
    channels = _parquet([f"{uri}/{calibration_path(spec.calibration)}"], ", file_row_number = true")
    value = f"(code - {ZERO[spec.dtype]})::FLOAT{' * scale' if scaled else ''} * channel_scale + channel_offset"
    return f"""CREATE OR REPLACE VIEW hidden AS
SELECT sequence, position, channel, {value} AS value
FROM (SELECT sequence, position, unnest(range({spec.width})) AS channel, unnest(elements_1) AS code{
        ", hidden_scale[row] AS scale" if scaled else ""
    }
      FROM ({positions})) AS codes
     JOIN {channels} AS channels ON channels.file_row_number = codes.channel;"""


def _layers(spec: LayersSpec) -> str:
    each = [
        f"SELECT sequence, position, {layer} AS layer, unnest(range({spec.width})) AS channel, "
        f"unnest(elements_1) AS value\nFROM ({_positions([f'layer_{layer}'], each=spec.width)})"
        for layer in spec.layers
    ]
    return "CREATE OR REPLACE VIEW layers AS\n" + "\nUNION ALL\n".join(each) + ";"


def _positions(columns: list[str], *, each: int | str, lone: Iterable[str] = (), tens: Iterable[str] = ()) -> str:
    """One row per sequence and position, with this position's part of each of `columns` as elements_1, elements_2 …

    each: how many elements a position has, or the column that says so. lone, tens: columns of one and of ten numbers a
    position; they come as the chunk's part of them, in which this position's are number `row` (from 1).
    """

    def before(count: str) -> str:
        """Elements of the first `count` positions of a sequence or of a chunk."""
        return f"{count} * {each}" if isinstance(each, int) else f"coalesce(list_sum({each}[1:{count}]), 0)::BIGINT"

    rows = "len(input_ids) - greatest(context - 1, 0)"
    start, stop = f"chunk * {_CHUNK}", f"(chunk + 1) * {_CHUNK}"
    cut = [f"input_ids[first + {start} + 1:first + {stop}] AS input_ids"]
    cut += [f"{name}[{before(f'({start})')} + 1:{before(f'({stop})')}] AS {name}" for name in columns]
    cut += [f"{name}[{start} + 1:{stop}] AS {name}" for name in (*lone, *([each] if isinstance(each, str) else []))]
    cut += [f"{name}[{start} * {len(BETAS)} + 1:{stop} * {len(BETAS)}] AS {name}" for name in tens]
    own = [
        f"{name}[{before('(row - 1)')} + 1:{before('row')}] AS elements_{number}"
        for number, name in enumerate(columns, start=1)
    ]
    return f"""
      SELECT *, (first + {start} + row - 1)::INTEGER AS position, input_ids[row] AS input_id, {", ".join(own)}
      FROM (SELECT *, unnest(range(1, len(input_ids) + 1)) AS row
            FROM (SELECT sequence, first, chunk, {", ".join(cut)}
                  FROM (SELECT *, greatest(context - 1, 0) AS first,
                               unnest(range(({rows} + {_CHUNK - 1}) // {_CHUNK})) AS chunk
                        FROM shards)))"""


def _parquet(paths: Iterable[str], option: str = "") -> str:
    """read_parquet of these files and no others: no folder's name is a pattern (`*`) or a column (`day=1`)."""
    listed = ", ".join(_literal(re.sub(r"[*?\[]", r"[\g<0>]", path)) for path in paths)
    return f"read_parquet([{listed}], hive_partitioning = false{option})"


def _literal(text: str) -> str:
    """An SQL string. Raises StoreError where SQL has none for it."""
    if "\0" in text:
        raise StoreError(f"path {text!r} cannot be written in SQL")
    return "'" + text.replace("'", "''") + "'"
