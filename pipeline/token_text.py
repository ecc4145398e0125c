"""What a tokenizer's ids mean, written beside a store's numbers once, so that SQL can show text.

Enters: a store's files and the tokenizer of its teacher. Leaves: `_stillroom/tokens-<sha256>.parquet`. Costs: about
15 µs an id where the table is not there yet, one look where it is.
"""

from collections.abc import Iterator
from typing import Any

from stillroom.storage.catalog.views import TokenRow, token_table, write_token_table
from stillroom.storage.files import Files


def keep_token_table(files: Files, tokenizer: Any, vocabulary: int) -> bool:
    """Write the table of ids 0 … vocabulary − 1 unless it is there; whether it was written.

    tokenizer: of transformers, with the store's `tokenizer` digest; so a table that is there is the same.
    Raises StoreFull, StoreError.
    """
    if token_table(files) is not None:
        return False
    write_token_table(files, token_rows(tokenizer, vocabulary))
    return True


def token_rows(tokenizer: Any, vocabulary: int) -> Iterator[TokenRow]:
    """By rising id. An id that the tokenizer lacks has no token and an empty text; bytes that are no whole character
    decode to U+FFFD, and the token still tells them apart."""
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(range(vocabulary))):
        # Without clean-up: it would take the space from " ." and other words than the teacher read would stand there.
        text = "" if token is None else tokenizer.decode([number], clean_up_tokenization_spaces=False)
        yield TokenRow(number, token, text)
