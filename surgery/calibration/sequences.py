"""Token sequences cut from a corpus, and the batches in which they pass through a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.header import read_json
from ..checkpoint.reader import contained, file_digest
from ..errors import InputError, UsageError
from .corpus import Corpus, Domain

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..progress import Progress

    Ids = NDArray[np.int64]
    Encode = Callable[[str], list[int]]

PASSAGE = 8
"""Characters of text per token of sequence length that are tokenised at a time."""


@dataclass(frozen=True)
class Batch:
    """Sequences of one domain, padded on the right.

    Attributes:
        ids_BT: int64 token ids, 0 where padded.
        lengths: tokens of each sequence.
        domain: index of the domain.
        start: place of the first token when the tokens of all batches are laid end to end.
    """

    ids_BT: Ids
    lengths: tuple[int, ...]
    domain: int
    start: int

    @property
    def stop(self) -> int:
        return self.start + sum(self.lengths)

    @property
    def mask_BT(self) -> NDArray[np.bool_]:
        """True at real tokens. In row-major order they are the tokens ``start`` to ``stop``."""
        import numpy as np

        return np.arange(self.ids_BT.shape[1])[None, :] < np.asarray(self.lengths)[:, None]


@dataclass(frozen=True)
class Sequences:
    """Tokenised text.

    Attributes:
        ids: int64 token ids of every sequence.
        domain_of: the domain of each, as an index.
        domains: names.
        digests: SHA-256 of each domain's text, empty where unknown.
        seq_len: longest allowed sequence.
        tokens: tokens that were asked for.
        tokenizer: SHA-256 of the tokenizer file, empty where unknown.
    """

    ids: tuple[Ids, ...]
    domain_of: tuple[int, ...]
    domains: tuple[str, ...]
    digests: tuple[str, ...]
    seq_len: int
    tokens: int
    tokenizer: str

    @classmethod
    def from_ids(cls, ids: Iterable[Sequence[int]], *, domain: str = "text") -> Sequences:
        """Sequences given as ids, all of one domain.

        Raises:
            UsageError: there is none, or one is empty.
        """
        import numpy as np

        arrays = tuple(np.asarray(item, np.int64) for item in ids)
        if not arrays or any(item.ndim != 1 or not len(item) for item in arrays):
            raise UsageError("expected at least one sequence, each with at least one token id")
        total = sum(map(len, arrays))
        longest = max(map(len, arrays))
        return cls(arrays, (0,) * len(arrays), (domain,), ("",), longest, total, "")

    @property
    def total(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.ids))

    @property
    def tokens_by_domain(self) -> dict[str, int]:
        """Tokens each domain gives: less than its share where its text is too short."""
        counts = dict.fromkeys(self.domains, 0)
        for ids, domain in zip(self.ids, self.domain_of, strict=True):
            counts[self.domains[domain]] += len(ids)
        return counts

    def manifest(self) -> dict[str, object]:
        """What identifies the text, as JSON values."""
        return {
            "domains": [
                {"name": name, "tokens": tokens, "text_sha256": digest}
                for (name, tokens), digest in zip(
                    self.tokens_by_domain.items(), self.digests, strict=True
                )
            ],
            "tokens_requested": self.tokens,
            "tokens": self.total,
            "sequences": len(self.ids),
            "seq_len": self.seq_len,
            "tokenizer_sha256": self.tokenizer,
        }

    def batches(self, max_tokens: int) -> list[Batch]:
        """Batches of one domain each, sequences of similar length together, longest first.

        Args:
            max_tokens: most tokens of a batch with its padding; a longer sequence is a batch of its
            own.
        """
        batches: list[Batch] = []
        start = 0
        for domain in range(len(self.domains)):
            members = [i for i, of in enumerate(self.domain_of) if of == domain]
            members.sort(key=lambda i: (-len(self.ids[i]), i))
            while members:
                fitting = max(1, max_tokens // len(self.ids[members[0]]))
                batch = _pad([self.ids[i] for i in members[:fitting]], domain, start)
                batches.append(batch)
                start = batch.stop
                del members[:fitting]
        return batches


def _pad(ids: Sequence[Ids], domain: int, start: int) -> Batch:
    import numpy as np

    lengths = tuple(map(len, ids))
    ids_BT = np.zeros((len(ids), max(lengths)), np.int64)
    for row, item in zip(ids_BT, ids, strict=True):
        row[: len(item)] = item
    return Batch(ids_BT, lengths, domain, start)


def tokenise(corpus: Corpus, folder: Path, *, tokens: int, seq_len: int) -> Sequences:
    """Cut a corpus into sequences with the tokenizer of a checkpoint folder.

    The tokens are split evenly over the domains, the remainder to the first ones. Documents are
    tokenised in passages of ``PASSAGE * seq_len`` characters, each begun with the tokenizer's own
    special tokens and cut into sequences of at most ``seq_len``; the first sequence of every
    passage is used before the second of any, and passages are visited in bit-reversed order, so
    that a prefix of any length is spread over all the text. A domain with too little text gives
    what it has, which ``tokens_by_domain`` shows.

    Raises:
        UsageError: ``tokens`` or ``seq_len`` are impossible for the corpus or the model.
        InputError: no usable tokenizer, or one that knows more tokens than the model embeds.
    """
    import numpy as np

    config = read_json(contained(folder, "config.json"))
    longest = config.get("max_position_embeddings")
    if seq_len < 2 or (isinstance(longest, int) and seq_len > longest):
        raise UsageError(
            f"--seq-len: expected 2 to {longest if isinstance(longest, int) else 'any'} tokens "
            f"(max_position_embeddings of {folder / 'config.json'}), found {seq_len}"
        )
    if tokens < 2 * len(corpus.domains):
        raise UsageError(
            f"--tokens: expected at least 2 for each of {len(corpus.domains)} domains, "
            f"found {tokens}"
        )
    encode, digest = _tokenizer(folder)
    ids: list[Ids] = []
    domain_of: list[int] = []
    for index, domain in enumerate(corpus.domains):
        share = tokens // len(corpus.domains) + (index < tokens % len(corpus.domains))
        found = [np.asarray(item, np.int64) for item in _spread(domain, encode, share, seq_len)]
        if not found:
            raise InputError(f"domain {domain.name!r}: its text gives no tokens")
        ids.extend(found)
        domain_of.extend([index] * len(found))
    vocab, highest = config.get("vocab_size"), max(int(item.max()) for item in ids)
    if not isinstance(vocab, int) or highest >= vocab:
        raise InputError(
            f"{folder}: the tokenizer gives token id {highest}, the model embeds {vocab!r} tokens",
            hint="the tokenizer belongs to another model",
        )
    names = tuple(domain.name for domain in corpus.domains)
    digests = tuple(domain.digest for domain in corpus.domains)
    return Sequences(tuple(ids), tuple(domain_of), names, digests, seq_len, tokens, digest)


def read_sequences(
    corpus: Corpus, folder: Path, *, tokens: int, seq_len: int, progress: Progress
) -> Sequences:
    """The same, with a warning where the text has fewer tokens than are asked for.

    Raises:
        UsageError, InputError: as :func:`tokenise`.
    """
    found = tokenise(corpus, folder, tokens=tokens, seq_len=seq_len)
    if found.total < tokens:
        counts = [f"{name}: {count:,}" for name, count in found.tokens_by_domain.items()]
        progress.warn(
            f"the text gives {found.total:,} of the {tokens:,} tokens asked for ({', '.join(counts)})"
        )
    return found


def _spread(domain: Domain, encode: Encode, share: int, seq_len: int) -> list[list[int]]:
    """Sequences of a domain until its share is reached, in the order of the text."""
    size = PASSAGE * seq_len
    passages = [
        document[begin : begin + size]
        for document in domain.documents
        for begin in range(0, len(document), size)
    ]
    rest: dict[int, list[int]] = {}  # what a visited passage has left
    taken: list[tuple[int, int, list[int]]] = []
    turn, left = 0, share
    order: list[int] = list(_bit_reversed(len(passages)))
    while order and left:
        for index in order:
            ids = encode(passages[index]) if turn == 0 else rest[index]
            chunk, rest[index] = ids[: min(seq_len, left)], ids[seq_len:]
            if chunk:
                taken.append((index, turn, chunk))
                left -= len(chunk)
            if not left:
                break
        order = [index for index in order if rest.get(index)]
        turn += 1
    return [chunk for _, _, chunk in sorted(taken, key=lambda item: item[:2])]


def _bit_reversed(count: int) -> Iterator[int]:
    """The numbers below ``count``, every prefix of them evenly spread (van der Corput)."""
    bits = max(1, (count - 1).bit_length())
    for value in range(1 << bits):
        reverse = int(f"{value:0{bits}b}"[::-1], 2)
        if reverse < count:
            yield reverse


def _tokenizer(folder: Path) -> tuple[Encode, str]:
    """The folder's tokenizer as text to ids, and the digest of its file."""
    if (folder / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        path = contained(folder, "tokenizer.json")
        try:
            fast = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every defect
            raise InputError(f"{path}: not a tokenizer ({error})") from None
        fast.no_truncation()
        fast.no_padding()
        return lambda text: list(fast.encode(text).ids), file_digest(path)
    return _slow_tokenizer(folder)


def _slow_tokenizer(folder: Path) -> tuple[Encode, str]:
    names = ("tokenizer.model", "vocab.json", "tokenizer_config.json")
    present = [name for name in names if (folder / name).exists()]
    if not present:
        raise InputError(
            f"{folder}: has no tokenizer (expected tokenizer.json or one of {', '.join(names)})",
            hint="copy the tokenizer files of the model into the folder",
        )
    from transformers import AutoTokenizer

    path = contained(folder, present[0])
    try:
        slow: Any = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # any of a dozen types, depending on the tokenizer
        raise InputError(f"{folder}: its tokenizer does not load ({error})") from error
    return lambda text: list(slow(text)["input_ids"]), file_digest(path)
