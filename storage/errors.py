"""Every error that stillroom raises on purpose. The tree is drawn here once:

    StillroomError                   exit code 1: a problem was found
    ├── UsageError                   exit code 2: the recipe or the command line is wrong
    │   └── RecipeError              a key, a value or a file named in a recipe
    ├── CorpusError                  a document that cannot be read (strict mode), an empty corpus
    ├── StoreError                   anything about a store
    │   ├── IdentityMismatch         the store holds another teacher, tokenizer, vocabulary or signal
    │   ├── FormatMismatch           written by another format version, or not a store at all
    │   │   └── NoStore              exit code 2: nothing there, or a store of another kind than is asked about
    │   ├── CorruptShard             bytes that are not the ones committed
    │   └── StoreFull                no room for what is to be written
    ├── TeacherError                 the teacher cannot be loaded or run
    │   ├── BatchDependent           rows that depend on what else is in the batch
    │   └── BadLogits                NaN or infinite logits; names the unit and its documents
    └── StudentError                 the student cannot be trained from this store
        ├── TokenizerMismatch        the student reads other ids than the teacher wrote
        ├── UnsupportedSignal        the stored signal does not determine what is asked of it
        ├── PackingUnsafe            packed logits differ from isolated ones
        ├── NonFiniteLoss            NaN or infinite loss; names the units of the batch
        └── RankLost                 one of several processes that train together is gone, or silent

A message says what is wrong, where, what was expected against what was got, and the remedy. All of
them carry one message string and nothing else, so they pickle across Ray and processes unchanged.
"""


class StillroomError(Exception):
    """Base of all. `exit_code` is what the command line returns for it."""

    exit_code = 1


class UsageError(StillroomError):
    """The command line or the recipe asks for something that cannot be."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe key, value or file is wrong."""


class CorpusError(StillroomError):
    """A document cannot be read, or nothing can."""


class StoreError(StillroomError):
    """A store cannot be read or written."""


class IdentityMismatch(StoreError):
    """The store's numbers come from something else than what is asked for."""


class FormatMismatch(StoreError):
    """The store is of another format version, or no store."""


class NoStore(FormatMismatch):
    """There is no store, or one of another kind, where somebody named one: a mistake of usage, and of no store."""

    exit_code = 2


class CorruptShard(StoreError):
    """The bytes read are not the bytes committed."""


class StoreFull(StoreError):
    """There is no room for what is to be written."""


class TeacherError(StillroomError):
    """The teacher cannot be loaded or run."""


class BatchDependent(TeacherError):
    """The teacher's rows depend on what else is in the batch."""


class BadLogits(TeacherError):
    """The teacher gave NaN or infinite logits."""


class StudentError(StillroomError):
    """The student cannot be trained as asked."""


class TokenizerMismatch(StudentError):
    """Student and store disagree on what an id means."""


class UnsupportedSignal(StudentError):
    """The stored signal does not determine what the loss needs."""


class PackingUnsafe(StudentError):
    """The model lets packed documents see each other."""


class NonFiniteLoss(StudentError):
    """The loss is NaN or infinite."""


class RankLost(StudentError):
    """Another process of the same training has ended, or does not answer."""


def first_line(error: BaseException) -> str:
    """The first line of what another library raised, for a message of ours; its type's name if it says nothing.

    Without the quotes that a KeyError puts around its text.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip("'\"")
