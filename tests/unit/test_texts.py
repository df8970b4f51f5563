"""Decoding ids gives back the text, byte for byte, with every kind of tokenizer that can represent it."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from weighted_mtp_core.api import Example, WmtpError
from weighted_mtp_core.data.texts import TextCodec, differing_ids
from weighted_mtp_core.data.tokens import tokenise
from weighted_mtp_core.model.micro import _train_tokenizer

CORPUS = [
    "def add(a, b):\n    return a + b\n",
    '### Instruction:\nAdd <two> numbers, "please".\n\n### Response:\n',
    "for i in range(10):\n\tprint(i | 1)\n",
] * 3
ALPHABET = sorted(set("".join(CORPUS)) | set("abcdefghijklmnopqrstuvwxyz_/"))
SPECIAL = ["<unk>", "<s>", "</s>", "<eot>"]


def wrapped(backend, **names):
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        eos_token="</s>",
        bos_token="<s>",
        **names,
    )


def byte_level(*, prefix_space=False):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return wrapped(backend, additional_special_tokens=["<eot>"])


def sentence_piece():
    """A tokenizer like Llama 2's: a dummy prefix, bytes for other characters, BOS."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=tokens, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    table = json.loads(backend.to_str())
    table["added_tokens"] = table["added_tokens"][: len(SPECIAL)]  # bytes are no control tokens
    backend = Tokenizer.from_str(json.dumps(table))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(backend, unk_token="<unk>", additional_special_tokens=["<eot>"])


def unigram(scheme="always"):
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        special_tokens=SPECIAL,
        unk_token="<unk>",
        initial_alphabet=ALPHABET,
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return wrapped(backend, unk_token="<unk>", additional_special_tokens=["<eot>"])


def word_piece():
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(["".join(ALPHABET), *CORPUS], trainer)
    return wrapped(backend, unk_token="<unk>")


TOKENIZERS = {
    "byte level": byte_level(),
    "byte level with a blank": byte_level(prefix_space=True),
    "SentencePiece": sentence_piece(),
    "Unigram": unigram(),
    "Unigram, first": unigram("first"),
    "Unigram, never": unigram("never"),
}
CODECS = {name: TextCodec(tokenizer) for name, tokenizer in TOKENIZERS.items()}
PIECES = [*CORPUS, *SPECIAL, " ", "  ", "\n", "<", "eot>", "a", "x  y", "    return", "<x"]
PARTS = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)


@pytest.mark.parametrize("name", CODECS)
@given(prompt=PARTS, response=PARTS)
@settings(max_examples=200)
def test_the_text_comes_back_and_a_completion_is_what_follows_the_prompt(name, prompt, response):
    codec = CODECS[name]
    ((first, second),) = codec.encode_documents([(prompt, response)])
    assert [first] == codec.encode_prompts([prompt])

    assert codec.decode([[*first, *second, codec.eos_id]]) == [prompt + response]
    assert codec.decode_completions([(first, [*second, codec.eos_id])]) == [response]
    assert not set(TOKENIZERS[name].all_special_ids) & {*first[len(codec.prefix) :], *second}


@pytest.mark.parametrize("name", CODECS)
@given(text=PARTS)
def test_the_texts_of_single_tokens_add_up_to_the_text(name, text):
    codec = CODECS[name]
    ids = codec.encode_part(text)
    ((_, response),) = codec.encode_documents([("x", text)])

    assert ids == response
    assert codec.decode_part([*ids, codec.eos_id]) == text
    assert "".join(codec.decode_part([token]) for token in ids) == text


def covered(codec, prompt, response):
    """Return the characters of the response to which each token contributes, by decoding every prefix."""
    ((first, second),) = codec.encode_documents([(prompt, response)])
    text = prompt + response
    decoded = codec.decode([[*first, *second[:i]] for i in range(len(second) + 1)])
    shared = [
        next((i for i, (one, other) in enumerate(zip(each, text, strict=False)) if one != other), len(each))
        for each in decoded
    ]
    complete = list(itertools.accumulate(shared, max))  # part of a character can hide whole ones before it
    pending = [each != text[:done] for each, done in zip(decoded, complete, strict=True)]
    return [
        set(range(before - len(prompt), after - len(prompt) + more))
        for before, after, more in zip(complete, complete[1:], pending[1:], strict=False)
    ]


@pytest.mark.parametrize("name", CODECS)
@given(
    prompt=PARTS,
    response=st.lists(
        st.sampled_from([*PIECES, "사과", "\N{SLIGHTLY SMILING FACE}", "é", "数"]), max_size=6
    ).map("".join),
)
@settings(max_examples=200)
def test_the_offsets_of_a_response_are_the_characters_that_decoding_its_tokens_adds(name, prompt, response):
    codec = CODECS[name]
    if name.startswith("Unigram") and not response.isascii():
        return  # Unigram tokenizers here have no tokens for other characters
    offsets = codec.response_offsets(prompt, response)
    inked = {i for i, character in enumerate(response) if not character.isspace()}

    for (start, end), characters in zip(offsets, covered(codec, prompt, response), strict=True):
        if characters:  # the blank of a dummy prefix can be a token of its own, which adds nothing
            assert set(range(start, end)) & inked == characters & inked


def test_words_come_back_from_word_pieces():
    codec = TextCodec(word_piece())
    ((first, second),) = codec.encode_documents([("def add numbers", " return range")])

    assert codec.decode([[*first, *second]]) == ["def add numbers return range"]
    assert codec.decode_completions([(first, second)]) == [" return range"]


@pytest.mark.parametrize(
    ("tokenizer", "response", "shown"),
    [
        (word_piece(), "\n    return", "'def add return'"),
        (unigram(), "数", "'def add'"),
    ],
    ids=["blanks", "unknown"],
)
def test_a_text_that_does_not_come_back_stops_the_run_and_shows_both(tmp_path, tokenizer, response, shown):
    example = Example(example_id="e7", problem_id="p", prompt="def add", response=response, reward=1.0)

    with pytest.raises(WmtpError) as caught:
        tokenise([example], TextCodec(tokenizer), max_tokens=99, folder=tmp_path)

    lines = str(caught.value).splitlines()
    assert lines[0] == "example `e7` is a different text after encoding and decoding, from character 7 on:"
    assert lines[1:] == [f"  text:    {'def add' + response!r}", f"  decoded: {shown}"]


def test_a_tokenizer_that_normalises_says_how(tmp_path):
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    example = Example(example_id="e", problem_id="p", prompt="x", response="u\u0308", reward=1.0)

    with pytest.raises(WmtpError) as caught:
        tokenise([example], TextCodec(tokenizer), max_tokens=99, folder=tmp_path)

    assert 'unicodedata.normalize("NFC", text)' in caught.value.hint


@pytest.mark.parametrize(
    ("name", "bos", "prefix"),
    [
        ("SentencePiece", "auto", (1,)),
        ("SentencePiece", "never", ()),
        ("byte level", "auto", ()),
        ("byte level", "always", (1,)),
    ],
)
def test_a_document_begins_with_bos_once_if_it_does(name, bos, prefix):
    codec = TextCodec(TOKENIZERS[name], bos=bos)
    ((first, second),) = codec.encode_documents([("<s>def", "<s>")])

    assert codec.prefix == prefix
    assert first.count(1) == len(prefix)
    assert first[: len(prefix)] == list(prefix)
    assert 1 not in second
    assert codec.decode([[*first, *second]]) == ["<s>def<s>"]


def test_bos_needs_a_tokenizer_that_has_it():
    tokenizer = byte_level()
    tokenizer.bos_token = None

    with pytest.raises(WmtpError, match=r'`data\.bos` is "always", but the tokenizer has no BOS'):
        TextCodec(tokenizer, bos="always")


def test_the_ids_of_the_micro_tokenizer_are_what_it_says():
    tokenizer = _train_tokenizer(CORPUS, vocab_size=300)
    codec = TextCodec(tokenizer)
    pairs = list(itertools.product(CORPUS, CORPUS))
    expected = [tuple(tokenizer(list(pair), add_special_tokens=False)["input_ids"]) for pair in pairs]

    assert [tuple(each) for each in codec.encode_documents(pairs)] == expected


def test_two_tokenizers_are_compared_by_ids():
    one, other = byte_level(), byte_level()

    assert differing_ids(one, other) is None

    other.eos_token = "<eot>"

    assert differing_ids(one, other) == "`eos_token_id` is 2 and 3"

    digits = pre_tokenizers.Digits(individual_digits=True)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel()])

    assert differing_ids(one, other).startswith("'def add(a, b):")
