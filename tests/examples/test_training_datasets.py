"""The data of the training examples: the real files, and hand-made idx, R and WordNet files, whole and damaged."""

import gzip
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import datasets, fetch
from training.glosses import CLASSES, Gloss, draw, parse
from training.images import idx
from training.novels import NOVELS, split_text
from training.r_objects import lazy_data, unserialize


def real(get: Callable[[], Any]) -> Any:
    """The real data, or a skip that says why there is none here."""
    try:
        return get()
    except fetch.DataUnavailable as error:
        pytest.skip(str(error))


# The real files, against what their makers publish.


def test_fashion_mnist_is_whole() -> None:
    images = real(datasets.fashion_mnist)
    assert (images.train_images.shape, images.test_images.shape) == ((60000, 28, 28), (10000, 28, 28))
    assert {images.train_images.dtype, images.test_images.dtype} == {torch.uint8}
    assert {images.train_labels.dtype, images.test_labels.dtype} == {torch.int64}
    assert images.train_labels.bincount().tolist() == [6000] * 10
    assert images.test_labels.bincount().tolist() == [1000] * 10
    # The mean and deviation by which everyone normalizes it.
    pixels = images.train_images.double() / 255
    assert (round(pixels.mean().item(), 4), round(pixels.std().item(), 4)) == (0.2860, 0.3530)
    # The first image is an ankle boot, class 9: dark above, light below.
    assert images.train_labels[0] == 9
    assert images.train_images[0, :7].float().mean() < images.train_images[0, 14:21].float().mean()


def test_the_novels_are_whole_and_in_the_order_of_publication() -> None:
    text = real(datasets.austen).decode("utf-8")
    lines = text.split("\n")
    assert lines.pop() == ""
    assert len(lines) == 73422  # as many rows as the package's own austen_books()
    titles = (
        "SENSE AND SENSIBILITY",
        "PRIDE AND PREJUDICE",
        "MANSFIELD PARK",
        "EMMA",
        "NORTHANGER ABBEY",
        "Persuasion",
    )
    where = [lines.index(title) for title in titles]
    assert where[0] == 0
    assert where == sorted(where)
    assert "It is a truth universally acknowledged, that a single man in possession" in lines
    assert len(NOVELS) == len(set(NOVELS)) == 6


def test_the_glosses_are_whole() -> None:
    pairs = real(datasets.glosses)
    assert len(pairs) == 82115 + 13767  # noun and verb synsets of WordNet 3.0, from wnstats(7WN)
    counts = Counter(label for _, label in pairs)
    assert sorted(counts) == list(range(41)) == list(range(len(CLASSES)))
    assert sum(count for label, count in counts.items() if CLASSES[label].startswith("noun.")) == 82115
    assert pairs[0] == (
        "that which is perceived or known or inferred to have its own distinct existence (living or nonliving)",
        CLASSES.index("noun.Tops"),
    )
    assert ("a tangible and visible entity; an entity that can cast a shadow", CLASSES.index("noun.Tops")) in pairs
    assert ("fall from clouds", CLASSES.index("verb.weather")) in pairs
    assert all(sentence == sentence.strip() for sentence, _ in pairs)
    assert sum('"' in sentence for sentence, _ in pairs) < 20  # quotations inside a definition, examples gone


def test_a_real_package_fills_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fetch, "SYSTEM", tmp_path / "nothing-installed")
    first = real(datasets.austen)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert datasets.austen() == first


# idx


def make_idx(sizes: list[int], values: bytes, kind: int = 8) -> bytes:
    return gzip.compress(bytes([0, 0, kind, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes) + values)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=4), st.randoms())
def test_idx_gives_back_every_value(sizes: list[int], chance: random.Random) -> None:
    want = torch.tensor([chance.randrange(256) for _ in range(torch.Size(sizes).numel())], dtype=torch.uint8)
    assert torch.equal(idx(make_idx(sizes, bytes(want.tolist())), "made"), want.reshape(sizes))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no gzip",
        gzip.compress(b""),
        gzip.compress(b"\x00\x00\x08"),
        gzip.compress(b"\x00\x00\x08\x02\x00\x00\x00\x01"),
        make_idx([2, 3], bytes(5)),
        make_idx([2, 3], bytes(7)),
        make_idx([2], bytes(2), kind=0x0E),
        make_idx([2, 3], bytes(6))[:-9],
    ],
    # gzip writes the time of day, and names must not depend on it.
    ids=lambda content: f"{len(content)} bytes",
)
def test_a_damaged_idx_file_is_refused_by_name(content: bytes) -> None:
    with pytest.raises(fetch.DataError, match=r"^made .*anew"):
        idx(content, "made")


# R


def chars(text: str | None, latin: bool = False) -> bytes:
    if text is None:
        return struct.pack(">Ii", 9, -1)
    raw = text.encode("latin-1" if latin else "utf-8")
    return struct.pack(">Ii", 9 | (4 if latin else 8) << 12, len(raw)) + raw


def strings(*texts: str | None, latin: bool = False) -> bytes:
    return struct.pack(">Ii", 16, len(texts)) + b"".join(chars(text, latin) for text in texts)


def integers(*values: int) -> bytes:
    return struct.pack(f">Ii{len(values)}i", 13, len(values), *values)


NULL = struct.pack(">I", 254)
NAMES_ANEW = struct.pack(">I", 1) + chars("names")
NAMES_AGAIN = struct.pack(">I", 1 << 8 | 255)


def named(names: bytes, *values: bytes, tag: bytes = NAMES_ANEW) -> bytes:
    body = struct.pack(">Ii", 19 | 1 << 9, len(values)) + b"".join(values)
    return body + struct.pack(">I", 2 | 1 << 10) + tag + names + NULL


def stream(item: bytes, version: int = 3) -> bytes:
    encoding = struct.pack(">i", 5) + b"UTF-8" if version == 3 else b""
    return b"X\n" + struct.pack(">3i", version, 0x040201, 0x030500) + encoding + item


def base(**objects: bytes) -> tuple[bytes, bytes]:
    """The (rdx, rdb) of a lazy-load data base."""
    places, rdb = [], b""
    for item in objects.values():
        whole = stream(item)
        stored = struct.pack(">I", len(whole)) + zlib.compress(whole)
        places.append(integers(len(rdb), len(stored)))
        rdb += stored
    # The second list refers back to the symbol `names`, as R writes it.
    variables = named(strings(*objects), *places)
    rdx = named(strings("variables", "compressed"), variables, integers(1), tag=NAMES_AGAIN)
    return gzip.compress(stream(rdx)), rdb


@settings(max_examples=40, deadline=None)
@given(st.lists(st.none() | st.text(st.characters(codec="utf-8"), max_size=20), max_size=20), st.sampled_from([2, 3]))
def test_a_character_vector_is_read_as_it_was_written(texts: list[str | None], version: int) -> None:
    assert unserialize(stream(strings(*texts), version), "made") == texts


def test_lists_numbers_and_latin_strings_are_read() -> None:
    item = named(strings("a", "b", "c"), integers(1, -2), strings("é", latin=True), struct.pack(">Iid", 14, 1, 0.5))
    assert unserialize(stream(item), "made") == {"a": [1, -2], "b": ["é"], "c": [0.5]}
    assert unserialize(stream(NULL), "made") is None
    # A reference whose index has no room in the flags follows them.
    far = named(strings("e"), integers(1), tag=struct.pack(">Ii", 255, 1))
    assert unserialize(stream(named(strings("c", "d"), item, far)), "made")["d"] == {"e": [1]}


def test_a_data_base_is_read_and_the_novels_come_in_order() -> None:
    rdx, rdb = base(emma=strings("Emma", ""), persuasion=strings("Ü"))
    assert lazy_data(rdx, rdb, "made") == {"emma": ["Emma", ""], "persuasion": ["Ü"]}


def novels_in(monkeypatch: pytest.MonkeyPatch, **objects: bytes) -> None:
    rdx, rdb = base(**objects)
    monkeypatch.setattr("training.novels.read", lambda package, data: {"Rdata.rdx": rdx, "Rdata.rdb": rdb})


def test_austen_joins_the_lines_of_each_novel(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = {name: strings(name, "", "end é") for name in sorted(NOVELS)}
    novels_in(monkeypatch, **objects)
    assert datasets.austen() == "".join(f"{name}\n\nend é\n" for name in NOVELS).encode()
    for wrong in (integers(1), strings("a", None), NULL):
        novels_in(monkeypatch, **{**objects, "emma": wrong})
        with pytest.raises(fetch.DataError, match="holds no lines of emma"):
            datasets.austen()


def nested(depth: int) -> bytes:
    return struct.pack(">Ii", 19, 1) * depth + integers(7)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (strings("abc")[:-1], "bytes should follow"),
        (strings("abc") + b"\0", "1 bytes are left over"),
        (struct.pack(">Ii", 16, 2**31 - 1) + chars("a"), "bytes should follow"),
        (struct.pack(">Ii", 13, 2**31 - 1), "bytes should follow"),
        (struct.pack(">Ii", 13, -1), "should follow"),
        (struct.pack(">Ii", 16, -1), "count"),
        (struct.pack(">Iii", 16, 1, 9) + struct.pack(">i", -5), "bytes should follow"),
        (struct.pack(">Ii", 16, 1) + struct.pack(">Ii", 9, 1) + b"\xff", "not UTF-8"),
        (struct.pack(">Ii", 16, 1) + integers(1), "is no string"),
        (struct.pack(">I", 3 << 8 | 255), "symbol 3"),
        (named(strings("a"), integers(1), tag=integers(1)), "a name is no string"),
        (struct.pack(">I", 1) + integers(1), "a name is no string"),
        (struct.pack(">I", 6), "type 6"),  # a call: code is never read, let alone run
        (nested(100_000), "nested deeper"),
    ],
)
def test_a_damaged_r_object_is_refused_with_its_place(item: bytes, reason: str) -> None:
    with pytest.raises(fetch.DataError, match=rf"^made .*{reason}.* at byte \d+; get it anew"):
        unserialize(stream(item), "made")


@pytest.mark.parametrize("content", [b"", b"A\n", stream(NULL, 4), stream(NULL)[:9]])
def test_a_stream_of_another_kind_is_refused(content: bytes) -> None:
    with pytest.raises(fetch.DataError, match=r"^made is no R object"):
        unserialize(content, "made")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_brings_anything_but_a_data_error(data: st.DataObject) -> None:
    item = named(strings("a", "b"), integers(1, 2), named(strings("c"), strings("é", None), tag=NAMES_AGAIN))
    whole = bytearray(stream(item))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))]) if data.draw(st.booleans()) else bytes(whole)
    with suppress(fetch.DataError):
        unserialize(cut, "made")


def test_a_damaged_data_base_is_refused() -> None:
    rdx, rdb = base(emma=strings("Emma"), other=strings("x"))
    # A place before the first byte, which a slice would count from the end: there lies all of emma.
    emma = integers(-len(rdb), rdb.index(zlib.compress(stream(strings("x")))) - 4)
    far = gzip.compress(stream(named(strings("variables"), named(strings("emma"), emma), tag=NAMES_AGAIN)))
    none = gzip.compress(stream(integers(1)))
    for index, content in (
        (b"", rdb), (rdx[:-9], rdb), (rdx + b"x", rdb), (none, rdb), (far, rdb),
        (rdx, rdb[:-1]), (rdx, b""), (rdx, b"\xff" + rdb[1:]), (rdx, rdb[:8] + b"\0\0\0" + rdb[11:]),
    ):  # fmt: skip
        with pytest.raises(fetch.DataError, match="anew"):
            lazy_data(index, content, "made")


# The parts of a text


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 8), st.floats(0.02, 0.4), st.floats(0.02, 0.4))
def test_a_text_falls_into_its_parts_line_by_line(seed: int, stretches: int, held_out: float, test: float) -> None:
    chance = random.Random(seed)
    lines = [b"%d:" % number + b"x" * chance.randrange(20) + b"\n" for number in range(2000)]
    text = b"".join(lines)
    parts = split_text(text, held_out, test, stretches)
    got = {name: part.splitlines(keepends=True) for name, part in vars(parts).items()}
    # Every line is in one part, and within a part in the order of the text.
    order = {line: number for number, line in enumerate(lines)}
    owner = {order[line]: name for name, part in got.items() for line in part}
    assert sorted(order[line] for part in got.values() for line in part) == list(range(len(lines)))
    assert all(part == sorted(part, key=order.__getitem__) for part in got.values())
    # Contiguous: the owner changes twice within a stretch, and once between stretches.
    runs = [owner[0]] + [owner[n] for n in range(1, len(lines)) if owner[n] != owner[n - 1]]
    assert runs == ["train", "held_out", "test"] * stretches
    # Each cut moves by less than a line.
    longest = max(map(len, lines))
    assert abs(len(parts.held_out) - held_out * len(text)) <= (longest + 1) * stretches
    assert abs(len(parts.test) - test * len(text)) <= (longest + 1) * stretches


def test_a_cut_at_the_end_of_a_line_stays_there() -> None:
    parts = split_text(b"a line\n" * 100, 0.2, 0.1, stretches=1)
    assert [part.count(b"\n") for part in (parts.train, parts.held_out, parts.test)] == [70, 20, 10]


def test_a_text_that_cannot_be_split_is_refused() -> None:
    text = b"a line\n" * 100
    for shares in ((0, 0.1), (0.1, 0), (0.5, 0.5), (float("nan"), 0.1)):
        with pytest.raises(ValueError, match="shares above 0"):
            split_text(text, *shares)
    with pytest.raises(ValueError, match="at least one stretch"):
        split_text(text, stretches=0)
    for short in (b"", b"one line\n", b"x" * 1000):
        with pytest.raises(ValueError, match="too few"):
            split_text(short)


# WordNet


def test_the_classes_stand_in_the_order_of_lexnames() -> None:
    # Alphabetical, nouns before verbs, after the unique beginners.
    assert CLASSES[0] == "noun.Tops"
    assert list(CLASSES[1:]) == sorted(CLASSES[1:])
    assert [sum(name.startswith(kind) for name in CLASSES) for kind in ("noun.", "verb.")] == [26, 15]


LICENSE = b"  1 This software and database is being provided to you\n"


def synset(file: str, gloss: str) -> bytes:
    return f"00001740 {file} n 01 entity 0 001 ~ 00001930 n 0000 | {gloss}  \n".encode()


@pytest.mark.parametrize(
    ("gloss", "definition"),
    [
        ("a living thing", "a living thing"),
        ('a thing; a whole; "one example"; "another; with a mark"', "a thing; a whole"),
        ('move with force, "He pushed the table"', "move with force"),
        ('undergo passive experience of:"We felt it"', "undergo passive experience of"),
        ('usually expressed as "on behalf of"; "on behalf of the child"', 'usually expressed as "on behalf of"'),
    ],
)
def test_a_gloss_loses_its_examples_only(gloss: str, definition: str) -> None:
    assert parse(LICENSE + synset("43", gloss) + synset("03", "x | y"), "made") == [(definition, 40), ("x | y", 0)]


@pytest.mark.parametrize("line", [b"\n", b"00001740 03 n\n", synset("02", "a"), synset("44", "a"), synset("xx", "a"),
                                  synset("03", ""), synset("03", '; "only an example"')])  # fmt: skip
def test_a_damaged_synset_is_refused_with_its_line(line: bytes) -> None:
    with pytest.raises(fetch.DataError, match=r"^line 2 of made"):
        parse(LICENSE + line, "made")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.integers(0, 5), st.integers(0, 30))
def test_drawn_glosses_are_disjoint_and_keep_their_test_part(a: int, b: int, c: int, seed: int, fewer: int) -> None:
    clear: list[Gloss] = [(f"sentence {n}", n % 41) for n in range(90)]
    pairs = [*clear, *clear[:40], ("torn", 1), ("torn", 2)]
    parts = draw(pairs, a, b, c, seed)
    assert (len(parts.train), len(parts.held_out), len(parts.test)) == (a, b, c)
    drawn = parts.train + parts.held_out + parts.test
    assert len({sentence for sentence, _ in drawn}) == a + b + c
    assert set(drawn) <= set(clear)
    assert draw(pairs, a, b, c, seed) == parts
    other = draw(pairs, min(a, fewer), b, c, seed)
    assert (other.held_out, other.test, other.train) == (parts.held_out, parts.test, parts.train[:fewer])


def test_draws_differ_by_seed_and_have_an_end() -> None:
    pairs: list[Gloss] = [(f"sentence {n}", 0) for n in range(90)]
    assert draw(pairs, 30, 30, 30, 0) != draw(pairs, 30, 30, 30, 1)
    for counts in ((31, 30, 30), (-1, 0, 0), (0, -1, 0), (0, 0, -1)):
        with pytest.raises(ValueError, match="90 different glosses"):
            draw(pairs, *counts, seed=0)


def test_sampled_glosses_are_real_and_no_sentence_comes_twice() -> None:
    parts = real(lambda: datasets.sample_glosses(2000, 500, 1000, seed=3))
    drawn = parts.train + parts.held_out + parts.test
    assert len({sentence for sentence, _ in drawn}) == 3500
    assert len({label for _, label in parts.train}) > 35
