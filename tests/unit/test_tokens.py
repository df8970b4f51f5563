"""Examples become flat arrays of ids on disk: prompt, response, EOS; made once, mapped afterwards."""

import os
import re
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from weighted_mtp_core.api import DatasetVersion, Example, WmtpError
from weighted_mtp_core.data.array_files import array_appender, drop_pages, mapped
from weighted_mtp_core.data.batches import collate, collate_packed
from weighted_mtp_core.data.texts import TextCodec
from weighted_mtp_core.data.token_cache import TokenCache, tokenizer_fingerprint
from weighted_mtp_core.data.tokens import open_tokens, tokenise
from weighted_mtp_core.plugins.loading import Kind
from weighted_mtp_core.plugins.selection import ComponentSelector

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class CharacterCodec:
    """One token per character; EOS is 1."""

    eos_id = 1

    def __init__(self, size=200):
        self.size = size

    def encode_documents(self, pairs):
        return [tuple([ord(letter) for letter in text] for text in pair) for pair in pairs]

    def decode(self, rows):
        return ["".join(map(chr, row)) for row in rows]


def fast_tokenizer(letters=LETTERS, eos="<eos>"):
    """One token per letter, as a transformers tokenizer."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", "<other>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<other>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=eos)


def example(number, prompt="ab", response="cd", problem="p", reward=1.0):
    return Example(
        example_id=f"e{number}", problem_id=problem, prompt=prompt, response=response, reward=reward
    )


@pytest.fixture
def make(tmp_path):
    """Tokenise examples into a new folder and map it."""

    def tokens(examples, *, max_tokens=20, codec=None):
        folder = tmp_path / f"tokens{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        tokenise(examples, codec or CharacterCodec(), max_tokens=max_tokens, folder=folder)
        return open_tokens(folder, sha256="")

    return tokens


# ------------------------------------------------------------------ arrays


def test_a_document_is_prompt_response_and_eos(make):
    tokens = make([example(0)])

    assert tokens.ids_N.tolist() == [ord("a"), ord("b"), ord("c"), ord("d"), 1]
    assert tokens.prompt_D.tolist() == [2]


def test_documents_are_stored_one_after_the_other(make):
    tokens = make([example(0), example(1, response="xyz")])

    assert tokens.start_D1.tolist() == [0, 5, 11]
    assert tokens.length_D.tolist() == [5, 6]
    assert tokens.lengths([1, 0, 1]).tolist() == [6, 5, 6]


def test_metadata_come_back_as_they_are(make):
    kept = {"source": "사과 \N{SLIGHTLY SMILING FACE}", "score": 0.1, "year": 2026}
    tokens = make([example(0), attrs.evolve(example(1), metadata=kept), example(2)])

    batch = collate_packed(tokens, [np.array([1, 0]), np.array([2])], device=torch.device("cpu"))

    assert batch.metadata == ((kept, {}), ({},))
    assert batch.names == (("e1", "e0"), ("e2",))


@pytest.mark.parametrize("metadata", [{"a": None}, {"a": True}, {"a": [1]}, {1: "a"}])
def test_metadata_are_text_and_numbers(metadata):
    with pytest.raises(ValueError, match="`metadata` must map strings to strings or numbers"):
        attrs.evolve(example(0), metadata=metadata)


def test_longer_documents_are_left_out_and_counted(make):
    tokens = make([example(0), example(1, response="x" * 9)], max_tokens=6)

    assert list(tokens.example_ids) == ["e0"]
    assert (tokens.examples, tokens.left_out) == (2, 1)


def test_a_document_of_exactly_max_tokens_is_kept(make):
    assert make([example(0, response="x" * 3)], max_tokens=6).left_out == 0


def test_responses_to_one_problem_share_its_number(make):
    names = ["b", "a", "b", "c", "a"]

    tokens = make([example(i, problem=each) for i, each in enumerate(names)])

    assert tokens.problem_D.tolist() == [0, 1, 0, 2, 1]


def test_batches_know_a_problem_by_the_same_number_in_every_set_of_examples(make):
    """The numbers of a token set count from its first example."""
    first = make([example(0, problem="p"), example(1, problem="q")])
    second = make([example(2, problem="q", prompt="longer"), example(3, problem="p")])

    one, other = (
        collate(tokens, [0, 1], device=torch.device("cpu")).problem_BT for tokens in (first, second)
    )

    assert one[0, 0] == other[1, 0]
    assert one[1, 0] == other[0, 0]
    assert one[0, 0] != one[1, 0]
    assert other[1, -1] == 0  # padding


def test_nothing_short_enough_is_an_error(make):
    with pytest.raises(WmtpError, match="none of the 1 examples has at most 3 tokens"):
        make([example(0)], max_tokens=3)


def test_chunks_of_documents_give_the_same_as_one_by_one(make):
    examples = [example(i, response="r" * (i % 7 + 1), reward=i % 2) for i in range(2500)]
    tokens = make(iter(examples))

    expected = np.concatenate([[*map(ord, e.prompt), *map(ord, e.response), 1] for e in examples])

    assert np.array_equal(tokens.ids_N, expected)
    assert tokens.reward_D.tolist() == [e.reward for e in examples]
    assert list(tokens.example_ids) == [e.example_id for e in examples]


@pytest.mark.parametrize(("vocabulary", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.int32)])
def test_ids_take_two_bytes_if_the_vocabulary_allows_it(make, vocabulary, dtype):
    assert make([example(0)], codec=CharacterCodec(vocabulary)).ids_N.dtype == dtype


def test_an_id_that_does_not_fit_is_an_error_and_not_another_token(make):
    with pytest.raises(OverflowError):
        make([example(0, prompt=chr(2**16))])


def test_names_may_hold_any_text(make):
    names = ["", "Grüße/0", "数", "plain"]

    assert list(make([attrs.evolve(example(0), example_id=name) for name in names]).example_ids) == names


@given(parts=st.lists(st.lists(st.integers(0, 999), max_size=9), max_size=9))
def test_an_array_that_grew_reads_as_one_that_was_saved(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("arrays") / "grown.npy"
    with array_appender(path, np.int32) as append:
        for part in parts:
            append(part)

    assert np.load(path).tolist() == [value for part in parts for value in part]
    assert mapped(path).dtype == np.int32


def mapped_megabytes():
    """Return how many MiB of this process's memory are pages of files."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssFile:\s+(\d+)", status).group(1)) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="told by Linux alone")
def test_pages_that_were_read_are_released(tmp_path):
    np.save(tmp_path / "large.npy", np.zeros(2**25, dtype=np.uint8))
    array = mapped(tmp_path / "large.npy")
    before = mapped_megabytes()
    array.sum()
    read = mapped_megabytes()
    drop_pages(array)

    assert read - before > 30
    assert mapped_megabytes() - before < 2
    assert array.sum() == 0


def test_the_tokenizer_uses_all_cores_by_default(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    TextCodec(fast_tokenizer())

    assert os.environ.pop("TOKENIZERS_PARALLELISM") == "true"

    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    TextCodec(fast_tokenizer())

    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


# ------------------------------------------------------------------ cache

VERSION = DatasetVersion(name="words", version="1", sha256="0" * 64)


def cache(storage, *, version=VERSION, tokenizer=None, options=None, max_tokens=20):
    data = ComponentSelector().select(Kind.DATA, "core.jsonl", options=options or {})
    return TokenCache(
        storage, version, data=data, codec=TextCodec(tokenizer or fast_tokenizer()), max_tokens=max_tokens
    )


def never():
    raise AssertionError("the examples were read again")


def test_a_second_run_maps_the_arrays_without_reading_an_example(tmp_path):
    first = cache(tmp_path).open("policy", "train", examples=lambda: [example(0)])
    second = cache(tmp_path).open("policy", "train", examples=never)

    assert isinstance(second.ids_N, np.memmap)
    assert second.ids_N.tolist() == first.ids_N.tolist()
    assert second.sha256 == first.sha256 != ""


def test_arrays_are_stored_with_the_version_of_the_data(tmp_path):
    made = cache(tmp_path)
    made.open("critic", "test", examples=lambda: [example(0)])
    folder = tmp_path / "datasets_v2" / "words" / "1" / "derived"

    assert (folder / f"tokens-{made.fingerprint[:12]}-20-critic-test" / "ids.npy").is_file()


@pytest.mark.parametrize(
    "other",
    [
        {"version": attrs.evolve(VERSION, sha256="1" * 64)},
        {"options": {"validation_share": 0.5}},
        {"tokenizer": fast_tokenizer(LETTERS[::-1])},
        {"tokenizer": fast_tokenizer(eos="<pad>")},
        {"max_tokens": 19},
    ],
)
def test_other_data_options_or_tokenizers_have_other_arrays(tmp_path, other):
    cache(tmp_path).open("policy", "train", examples=lambda: [example(0)])
    made = cache(tmp_path, **other).open("policy", "train", examples=lambda: [example(1)])

    assert list(made.example_ids) == ["e1"]


def test_purposes_and_splits_are_kept_apart(tmp_path):
    made = cache(tmp_path)
    for number, (purpose, split) in enumerate([("policy", "train"), ("critic", "train"), ("policy", "test")]):
        tokens = made.open(purpose, split, examples=lambda number=number: [example(number)])

        assert list(tokens.example_ids) == [f"e{number}"]


def test_a_flipped_bit_stops_the_run(tmp_path):
    cache(tmp_path).open("policy", "train", examples=lambda: [example(0)])
    cache(tmp_path).open("policy", "train", examples=never)
    path = next(tmp_path.rglob("ids.npy"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(WmtpError, match=r"ids\.npy` changed since it was written"):
        cache(tmp_path).open("policy", "train", examples=never)


def test_a_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(WmtpError):
        cache(tmp_path, max_tokens=8).open("policy", "train", examples=lambda: [example(0, "a" * 9)])

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_tokenizers_fingerprint_ignores_its_folder_and_last_call(tmp_path):
    tokenizer = fast_tokenizer()
    expected = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path / "elsewhere")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "elsewhere")
    loaded(["a", "bcd"], padding=True, truncation=True, max_length=2)

    assert tokenizer_fingerprint(loaded) == expected
