"""`find_lines` finds the line of every key in every TOML syntax."""

import tomli
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from weighted_mtp_core.recipe.line_numbers import find_lines

TEXT = '''\
# comment [not.a.table]
top = 1

[a.b]
c.d = "x"   # c = 9
"quoted key" = 'literal # no comment'
multi = """
[not a table]
e = 1 \\"\\"\\" """"
inline = { x = 1, y.z = [ 2, 3 ] }

array = [
  "one",  # first
  { deep = 1,
    er = 2 },
]
[[tracker]]
use = "p"
[tracker.options]
k = 1
[[tracker]]
use = 2024-01-01 10:00:00
[[tracker.sub]]
s = \'\'\'a
b\'\'\'\'
[last]
'''


def test_every_way_to_write_a_key_has_its_line():
    lines = find_lines(TEXT)

    assert set(lines) == set(paths(tomli.loads(TEXT)))
    assert lines == {
        ("top",): 2,
        ("a",): 4,
        ("a", "b"): 4,
        ("a", "b", "c"): 5,
        ("a", "b", "c", "d"): 5,
        ("a", "b", "quoted key"): 6,
        ("a", "b", "multi"): 7,
        ("a", "b", "inline"): 10,
        ("a", "b", "inline", "x"): 10,
        ("a", "b", "inline", "y"): 10,
        ("a", "b", "inline", "y", "z"): 10,
        ("a", "b", "inline", "y", "z", 0): 10,
        ("a", "b", "inline", "y", "z", 1): 10,
        ("a", "b", "array"): 12,
        ("a", "b", "array", 0): 13,
        ("a", "b", "array", 1): 14,
        ("a", "b", "array", 1, "deep"): 14,
        ("a", "b", "array", 1, "er"): 15,
        ("tracker",): 17,
        ("tracker", 0): 17,
        ("tracker", 0, "use"): 18,
        ("tracker", 0, "options"): 19,
        ("tracker", 0, "options", "k"): 20,
        ("tracker", 1): 21,
        ("tracker", 1, "use"): 22,
        ("tracker", 1, "sub"): 23,
        ("tracker", 1, "sub", 0): 23,
        ("tracker", 1, "sub", 0, "s"): 24,
        ("last",): 26,
    }


def test_windows_line_ends_count_once():
    assert find_lines("a = 1\r\n\r\nb = 2\r\n") == {("a",): 1, ("b",): 3}


def paths(value, at=()):
    """Every key path and array index of a parsed TOML value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from paths(item, (*at, key))


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalars = st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(texts, values, max_size=4), st.booleans())
def test_every_key_that_tomli_reads_has_a_line(table, multiline_strings):
    text = tomli_w.dumps(table, multiline_strings=multiline_strings)

    assert set(find_lines(text)) == set(paths(tomli.loads(text)))
