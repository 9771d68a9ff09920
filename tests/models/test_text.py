"""A checkpoint's words: encoding, chat templates as transformers renders them, settings, and whole characters."""

import json
from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from moekit.errors import ArgumentError
from moekit.models.qwen3next import TINY, ConfigError, Sampling
from moekit.models.qwen3next.sampling import GREEDY
from moekit.models.qwen3next.text import Stream, Text, sampling_of
from tests.models.words import TEMPLATE, write_words

WORDS = ["naïve café – 東京 🍜👩‍👩‍👧 ok", "plain", "", "\ufffd", "né"]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Hi <there> & "you" é'},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("words"))


@pytest.mark.parametrize("words", WORDS)
def test_text_comes_in_whole_characters_and_is_all_there(folder, words):
    text = Text(folder)
    ids, stream = text.encode(words), Stream(text)
    assert len(ids) == len(words.encode())  # a token is a byte here
    pieces = [stream.add(token) for token in ids]
    rest = stream.end()
    assert "".join(pieces) + rest == words
    if "\ufffd" not in words:
        assert rest == ""
        assert not any("\ufffd" in piece for piece in pieces)
        assert [piece for piece in pieces if piece] == list(words)


def test_bytes_that_never_become_a_character_are_given_at_the_end(folder):
    text = Text(folder)
    cut = text.encode("a東")[:-1]
    stream = Stream(text)
    assert [stream.add(token) for token in cut] == ["a", "", ""]
    assert stream.end() == "\ufffd"


def test_special_tokens_are_not_text(folder):
    text = Text(folder)
    ids = text.encode("a<|im_end|>b")
    assert len(ids) == 3
    assert text.decode(ids) == "ab"


@pytest.mark.parametrize("place", ["settings", "file", "named"])
def test_a_conversation_is_written_as_transformers_writes_it(tmp_path, place):
    directory = write_words(tmp_path, template=place)
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    mine = Text(directory)
    wanted = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert "Be brief." in wanted
    assert mine.chat(TALK) == wanted
    ids = theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert mine.encode_chat(TALK) == ids


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "the chat template fails: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "the chat template fails: access to attribute 'append'"),
        ("{{ raise_exception('no tools here') }}", "the chat template fails: no tools here"),
        ("{% if %}", "the chat template fails: Expected an expression"),
        ("{{ 1 / 0 }}", "the chat template fails: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the chat template fails: maximum recursion depth"),
        ("{{ 'a' * 10**14 }}", "the chat template fails: MemoryError"),
    ],
)
def test_a_strangers_template_runs_in_a_sandbox(tmp_path, template, words):
    directory = write_words(tmp_path, template=None)
    (directory / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match=words):
        Text(directory).chat(TALK)


def test_no_template_and_no_tokenizer(tmp_path):
    directory = write_words(tmp_path, template=None)
    with pytest.raises(ConfigError, match="has no chat template; give plain prompts"):
        Text(directory).chat(TALK)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.json is no tokenizer: "):
        Text(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer.json does not exist"):
        Text(directory)


def test_a_templates_json_is_as_it_asks(tmp_path):
    directory = write_words(tmp_path, template=None)
    (directory / "chat_template.jinja").write_text("{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}")
    assert Text(directory).chat([{"role": "user", "content": "x"}]) == '[{"content":"x","role":"user"}]'


def test_what_marks_an_assistants_words_is_as_what_it_marks(tmp_path):
    """`{% generation %}`, which transformers has for masks: with a variable that is set inside, and blanks around it."""
    directory = write_words(tmp_path, template=None)
    (directory / "chat_template.jinja").write_text("""{% set ns = namespace(count=0) %}{% set said = 'nothing' %}
{% for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation -%}
            {% set said = message.content %}{% set ns.count = ns.count + 1 %}
            {{ message.content | tojson }} {{ loop.index }} {{ said }}
        {% endgeneration -%}
    {% else %}
<{{ message.role }}>{{ message.content }}
    {%- endif %}
{% endfor %}{{ said }} {{ ns.count }}""")
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    wanted = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert '"Hello!" 3 Hello!' in wanted
    assert Text(directory).chat(TALK) == wanted


@pytest.mark.parametrize(
    ("words", "stops", "wanted"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "wo"], "one t"),
        ("aaab aab", ["aab"], "a"),
        ("one two", ["twofold"], "one two"),
        ("a\nb\n\nc", ["\n\n"], "a\nb"),
        ("naïve 東京 ok", ["京"], "naïve 東"),
        ("at the start", ["at"], ""),
    ],
)
def test_text_ends_before_a_stop_string(folder, words, stops, wanted):
    """Nothing of it is given out before it is known whether it is one."""
    text = Text(folder)
    stream, pieces, many = Stream(text, stops), [], text.encode(words)
    for token in many:
        pieces.append(stream.add(token))
        assert wanted.startswith("".join(pieces))
    pieces.append(stream.end())
    assert "".join(pieces) == wanted
    assert stream.stopped == (wanted != words)
    with pytest.raises(ArgumentError, match="a stop string is empty"):
        Stream(text, ["a", ""])


def rewritten(directory, **parts):
    path = directory / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))
    return Text(directory)


def test_a_prompt_is_neither_cut_nor_padded(tmp_path, folder):
    """As transformers reads the same file."""
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 7, "pad_type_id": 0}
    mine = rewritten(write_words(tmp_path), truncation=cut, padding={**pad, "pad_token": "x"})
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path).encode("Once upon")
    assert mine.encode("Once upon") == Text(folder).encode("Once upon") == theirs
    assert mine.encode_chat(TALK) == Text(folder).encode_chat(TALK)


def test_what_cannot_be_encoded(tmp_path, folder, capfd):
    with pytest.raises(ArgumentError, match=r"the text 'a\\udce9' is no Unicode: surrogates not allowed at 1"):
        Text(folder).encode("a\udce9")
    directory = write_words(tmp_path)
    unknown = rewritten(directory, model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}, added_tokens=[])
    with pytest.raises(ConfigError, match=r"tokenizer.json cannot encode 'b': WordLevel error"):
        unknown.encode("b")
    single = [{"SpecialToken": {"id": "zz", "type_id": 0}}]
    adds = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    panics = rewritten(directory, post_processor=adds)
    with pytest.raises(ConfigError, match=r"tokenizer.json cannot encode 'a': no entry found for key"):
        panics.encode("a")


def test_a_list_of_no_ends_names_none(tmp_path):
    directory = write_words(tmp_path)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    assert Text(directory).ends(replace(TINY, eos_token_ids=(7,))) == (7,)


def test_an_end_that_is_no_token_ends_nothing(folder):
    assert Text(folder).ends(replace(TINY, eos_token_ids=(-1, 7, 512))) == (7,)


def test_ends_are_the_configs_or_else_the_tokenizers(folder, tmp_path):
    text = Text(folder)
    assert text.ends(TINY) == (text.encode("<|im_end|>")[0],)
    directory = write_words(tmp_path)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9, 10**6]}))
    assert Text(directory).ends(TINY) == (7, 9)


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (None, GREEDY),
        ({"temperature": 0.6}, GREEDY),
        ({"do_sample": True}, Sampling(1.0)),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "eos_token_id": 3}, Sampling(0.7, 20, 0.8)),
    ],
)
def test_how_tokens_are_drawn(tmp_path, raw, wanted):
    if raw is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    assert sampling_of(tmp_path) == wanted


@pytest.mark.parametrize("wrong", [{"temperature": "hot"}, {"top_k": 1.5}, {"top_p": 0}, {"top_k": True}])
def test_settings_that_no_sampling_can_have(tmp_path, wrong):
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, **wrong}))
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is .*, which no sampling can have"):
        sampling_of(tmp_path)


def test_the_template_of_these_tests_uses_what_real_ones_use():
    assert all(word in TEMPLATE for word in ("tojson", "loop", "add_generation_prompt", "bos_token", "break"))
