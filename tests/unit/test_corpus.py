"""Text and token sequences: domains, records, shares, spread, batches. Needs no torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesurg.surgery.calibration.corpus import Corpus, Domain, default_corpus, read_corpus
from moesurg.surgery.calibration.sequences import Sequences, _bit_reversed, tokenise
from moesurg.surgery.errors import InputError, UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[..., Path]) -> Path:
    """Tokenizer and config of a tiny model: a byte is a token. May be changed by no test."""
    target = tmp_path_factory.mktemp("tokenizer")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint("llama") / name, target / name)
    return target


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def joined(sequences: Sequences) -> list[str]:
    """Sequences back as text."""
    return [bytes(ids.astype(np.uint8)).decode("latin-1") for ids in sequences.ids]


def test_files_become_domains(tmp_path: Path) -> None:
    text = tmp_path / "prose.txt"
    text.write_text("One document.\nTwo lines.\n")
    lines = write(
        tmp_path / "mixed.jsonl",
        {"text": "plain"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "question", "completion": " answer"},
        {"text": "a\u2028b"},
    )
    corpus = read_corpus([text, lines])
    assert [domain.name for domain in corpus.domains] == ["prose", "mixed"]
    assert corpus.domains[0].documents == ("One document.\nTwo lines.\n",)
    assert corpus.domains[1].documents == ("plain", "a\nb", "question answer", "a\u2028b")


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ('{"text": 1}', "expected the key text"),
        ("{}", "found no key"),
        ("[1]", "expected a JSON object, found list"),
        ("{", "not valid JSON"),
        ('{"messages": [{"role": "user"}]}', "a message has no text"),
        ('{"prompt": "only"}', "found 'prompt'"),
    ],
)
def test_bad_records_name_their_line(record: str, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "good"}\n\n' + record + "\n")
    with pytest.raises(InputError, match="line 3: ") as caught:
        read_corpus([file])
    assert fault in caught.value.message


def test_unusable_files(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "data.parquet"
    empty.write_text(" \n")
    binary.write_bytes(b"PAR1\xff\xfe")
    with pytest.raises(InputError, match="holds no text"):
        read_corpus([empty])
    with pytest.raises(InputError, match="not UTF-8 text \\(byte 4\\)"):
        read_corpus([binary])
    with pytest.raises(InputError, match="cannot be read"):
        read_corpus([tmp_path / "missing.txt"])
    (tmp_path / "a").mkdir()
    shutil.copy(binary, tmp_path / "a" / "data.txt")
    with pytest.raises(UsageError, match="would both be the domain 'data'"):
        read_corpus([binary, tmp_path / "a" / "data.txt"])


def test_default_needs_no_file() -> None:
    corpus = read_corpus([])
    assert [domain.name for domain in corpus.domains] == ["python", "english"]
    assert all(sum(map(len, domain.documents)) > 400_000 for domain in corpus.domains)
    again = default_corpus()
    assert [d.digest for d in corpus.domains] == [d.digest for d in again.domains]


def test_digest_depends_on_the_split() -> None:
    assert Domain("a", ("ab", "c")).digest != Domain("a", ("a", "bc")).digest
    assert Domain("a", ("ab",)).digest == Domain("b", ("ab",)).digest


def test_shares_are_even_with_the_remainder_first(folder: Path) -> None:
    corpus = Corpus(tuple(Domain(name, ("x" * 5000,)) for name in "abc"))
    sequences = tokenise(corpus, folder, tokens=1001, seq_len=64)
    assert sequences.tokens_by_domain == {"a": 334, "b": 334, "c": 333}
    assert sequences.total == 1001
    assert max(map(len, sequences.ids)) == 64


def test_short_domain_gives_what_it_has(folder: Path) -> None:
    corpus = Corpus((Domain("long", ("x" * 5000,)), Domain("short", ("y" * 30, "", "z" * 7))))
    sequences = tokenise(corpus, folder, tokens=1000, seq_len=16)
    assert sequences.tokens_by_domain == {"long": 500, "short": 37}
    assert joined(sequences)[-3:] == ["y" * 16, "y" * 14, "z" * 7]
    listed = sequences.manifest()["domains"]
    assert isinstance(listed, list)
    assert [item["tokens"] for item in listed] == [500, 37]


def test_a_part_is_spread_over_all_the_text(folder: Path) -> None:
    documents = tuple(f"{index:03d}" + "." * 29 for index in range(100))
    sequences = tokenise(Corpus((Domain("d", documents),)), folder, tokens=320, seq_len=32)
    chosen = [int(text[:3]) for text in joined(sequences)]
    assert chosen == sorted(chosen)
    assert len(chosen) == 10
    assert max(np.diff([0, *chosen, 100])) <= 20


def test_one_long_document_is_not_only_its_beginning(folder: Path) -> None:
    text = "".join(f"{index:07d}," for index in range(10_000))
    sequences = tokenise(Corpus((Domain("d", (text,)),)), folder, tokens=640, seq_len=64)
    first = [int(piece[:7]) for piece in joined(sequences)]
    assert first[-1] > 8000
    assert first == sorted(first)


def test_all_text_is_used_once_when_all_is_asked_for(folder: Path) -> None:
    documents = ("".join(chr(33 + i % 90) for i in range(777)), "short", "b" * 64)
    sequences = tokenise(Corpus((Domain("d", documents),)), folder, tokens=10_000, seq_len=32)
    assert "".join(joined(sequences)) == "".join(documents)


@given(st.integers(1, 300))
def test_bit_reversal_is_a_permutation(count: int) -> None:
    assert sorted(_bit_reversed(count)) == list(range(count))


def test_truncation_of_the_tokenizer_file_is_off(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    data = json.loads(path.read_text())
    data["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(data))
    sequences = tokenise(
        Corpus((Domain("d", ("x" * 100,)),)), tmp_path / "m", tokens=100, seq_len=50
    )
    assert sequences.total == 100


def test_impossible_requests(folder: Path, tmp_path: Path) -> None:
    corpus = Corpus((Domain("a", ("abc",)), Domain("b", ("abc",))))
    with pytest.raises(UsageError, match="--seq-len: expected 2 to 512 tokens"):
        tokenise(corpus, folder, tokens=10, seq_len=513)
    with pytest.raises(UsageError, match="--tokens: expected at least 2 for each of 2"):
        tokenise(corpus, folder, tokens=3, seq_len=8)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    with pytest.raises(InputError, match="has no tokenizer"):
        tokenise(corpus, bare, tokens=10, seq_len=8)
    (bare / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a tokenizer"):
        tokenise(corpus, bare, tokens=10, seq_len=8)
    small = tmp_path / "small"
    shutil.copytree(folder, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 98}))
    with pytest.raises(InputError, match="gives token id 99, the model embeds 98"):
        tokenise(corpus, small, tokens=10, seq_len=8)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 100))
def test_batches_hold_every_token_once(lengths: list[int], max_tokens: int) -> None:
    ids = tuple(np.arange(n) + 100 * i for i, n in enumerate(lengths))
    domain_of = tuple(i % 2 for i in range(len(lengths)))
    sequences = Sequences(ids, domain_of, ("a", "b"), ("", ""), 40, sum(lengths), "")
    batches = sequences.batches(max_tokens)
    position = 0
    for batch in batches:
        assert batch.start == position
        position = batch.stop
        assert batch.mask_BT.sum() == batch.stop - batch.start
        assert batch.ids_BT.size <= max_tokens or len(batch.lengths) == 1
        assert not batch.ids_BT[~batch.mask_BT].any()
    assert position == sequences.total
    found = np.concatenate([batch.ids_BT[batch.mask_BT] for batch in batches])
    np.testing.assert_array_equal(np.sort(found), np.sort(np.concatenate(ids)))


def test_sequences_from_ids() -> None:
    sequences = Sequences.from_ids([[1, 2, 3], [4]])
    assert (sequences.total, sequences.seq_len, sequences.domains) == (4, 3, ("text",))
    for bad in ([], [[1], []]):
        with pytest.raises(UsageError, match="at least one"):
            Sequences.from_ids(bad)


def test_reading_needs_no_torch() -> None:
    modules = ("corpus", "sequences", "statistics", "layer_statistics")
    code = "; ".join(f"import moesurg.surgery.calibration.{name}" for name in modules)
    code += "; import sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
