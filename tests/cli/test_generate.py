"""`moekit generate`: text in, text out, against the library's own greedy tokens."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file, save_file

from moekit.cli import generate as command
from moekit.cli import run
from moekit.models import qwen3next
from moekit.models.qwen3next import TINY, Engine, generate, load, write_random_checkpoint
from moekit.models.qwen3next.config import ATTENTION, GDN
from moekit.models.qwen3next.text import Text
from tests.models.words import write_words

SMALL = replace(TINY, layer_types=(GDN, ATTENTION), num_experts=4, num_experts_per_tok=2, vocab_size=258)
PROMPTS = ["Once upon a time", "naïve 東京", "x"]
NEW = 8


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Generate on the virtual CPU devices, also where there is a GPU; keep no programs."""
    monkeypatch.setattr(run, "devices", lambda: jax.devices("cpu"))
    monkeypatch.setattr(run, "keep_programs", lambda: None)
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_words(write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small", SMALL))


@pytest.fixture
def asked(moekit, small):
    """Run the command; its stdout."""

    def ask(*arguments, **options):
        always = ("--checkpoint", str(small), "--tp", "1", "--max-new-tokens", str(NEW), "--slots", "2", "--length", "512")
        result = moekit("generate", *always, *arguments, **options)
        assert result.exit_code == 0, result.output
        return result.stdout

    return ask


def of(prompts):
    return [word for prompt in prompts for word in ("--prompt", prompt)]


@pytest.fixture(scope="module")
def wanted(small):
    """The text of each prompt's greedy tokens, up to an end token, by the library's `generate`."""
    text = Text(small)
    made = generate(
        load(small, run.mesh_of(1)),
        [text.encode(prompt) for prompt in PROMPTS],
        max_new_tokens=NEW,
        eos=text.ends(SMALL),
        kernels="xla",
    )
    return [(list(tokens), text.decode(tokens)) for tokens in made.tokens]


def test_the_shipped_model_answers(moekit):
    result = moekit("generate", "--tp", "1", "--chat", *of(["flip moekit", "add 17 25"]))
    assert result.stdout.splitlines() == ["tikeom", "42"]


def test_prompts_become_the_text_of_the_greedy_tokens(asked, wanted, tmp_path):
    report = json.loads(asked(*of(PROMPTS), "--json"))
    assert [(answer["tokens"], answer["text"]) for answer in report["answers"]] == wanted
    assert [answer["prompt"] for answer in report["answers"]] == PROMPTS
    assert (report["kernels"], report["all_reduce"]) == ("xla", "one rank adds up nothing")
    (tmp_path / "prompts").write_text("\n".join(PROMPTS) + "\n")
    whole = "".join(text + "\n" for _, text in wanted)
    assert asked("--prompts-file", str(tmp_path / "prompts")) == whole
    assert asked(*of(PROMPTS), "--stream") == whole


@pytest.mark.parametrize(("kernels", "why"), [("xla", "kernels xla round nothing"), ("pallas", "experts in float8 alone")])
def test_activations_that_nothing_would_round_are_refused(moekit, kernels, why):
    """By kernels that do not do it, and of a model without experts in float8: a sentence, before anything is compiled."""
    told = ("--tp", "1", "--kernels", kernels, "--activations", "float8_e4m3fn")
    result = moekit("generate", *told, *of(["flip moekit"]))
    assert result.exit_code != 0
    assert why in result.stderr
    assert result.stderr.count("Error") == 1


def test_a_prompts_draws_follow_from_its_own_seed(asked):
    hot = ("--temperature", "1.5", "--top-k", "50", "--top-p", "0.95", "--json")
    answers = json.loads(asked(*of(PROMPTS), *hot, "--seed", "3"))["answers"]
    elsewhere = json.loads(asked(*of([PROMPTS[2], PROMPTS[2]]), *hot, "--seed", "5"))["answers"]
    assert elsewhere[0]["tokens"] == answers[2]["tokens"]
    assert elsewhere[1]["tokens"] != answers[2]["tokens"]


def test_a_conversation_remembers_what_was_said(asked, small):
    """Against an engine of its own size, which has compiled the same programs."""
    said = asked("--chat", input="Hi\nBye\n\nnever read\n")
    text, talk, answers = Text(small), [], []
    for line in ("Hi", "Bye"):
        talk.append({"role": "user", "content": line})
        engine = Engine(load(small, run.mesh_of(1)), slots=1, length=512, kernels="xla")
        number = engine.add(text.encode_chat(talk), max_new_tokens=NEW, eos=text.ends(SMALL))
        answers.append(text.decode(engine.results()[number].tokens))
        talk.append({"role": "assistant", "content": answers[-1]})
    assert said == "".join(answer + "\n" for answer in answers)


def test_chat_prompts_go_through_the_template(asked, small):
    (answer,) = json.loads(asked("--chat", "--prompt", "Hi", "--json"))["answers"]
    assert answer["prompt_tokens"] == len(Text(small).encode_chat([{"role": "user", "content": "Hi"}]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "there is nothing to continue"),
        (["--prompt", "x", "--json", "--stream"], "--json prints all at the end"),
        (["--chat", "--json"], "--json prints all at the end"),
        (["--prompt", "x", "--top-p", "0"], "0.0 is not in the range"),
        (["--prompt", "x", "--tp", "3"], "tp = 3 does not divide"),
        (["--prompt", "x", "--prompt", ""], "prompt 1 is empty"),
        (["--prompt", "x", "--temperature", "nan"], "temperature is nan"),
        (["--prompt", "a\udce9"], "is no Unicode"),
        (["--chat", "--length", "256"], "--max-new-tokens 256 leaves no room for a message in --length 256"),
        (["--prompts-file", "prompts"], "prompts is no UTF-8"),
    ],
)
def test_what_is_asked_wrongly(moekit, small, arguments, words, monkeypatch, tmp_path):
    """It is refused before anything is loaded."""
    monkeypatch.setattr(qwen3next, "load", None)
    monkeypatch.chdir(tmp_path)
    Path("prompts").write_bytes(b"a\xff\n")
    result = moekit("generate", "--checkpoint", str(small), *arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.split())


@pytest.fixture
def copy(small, tmp_path):
    return Path(shutil.copytree(small, tmp_path / "copy"))


def test_what_the_tokenizers_files_lack_is_known_before_anything_is_loaded(moekit, copy, monkeypatch):
    monkeypatch.setattr(qwen3next, "load", None)
    (copy / "tokenizer_config.json").unlink()
    result = moekit("generate", "--checkpoint", str(copy), "--chat", input="Hi\n")
    assert (result.exit_code, result.stderr) == (1, f"Error: {copy} has no chat template; give plain prompts\n")
    raw = json.loads((copy / "tokenizer.json").read_text())
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": 258, "content": "more"})
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    result = moekit("generate", "--checkpoint", str(copy), "--prompt", "more")
    assert (result.exit_code, result.stderr) == (2, "Error: prompt 0 holds token 258, outside the vocabulary of 258\n")


def test_logits_that_are_not_finite_are_a_failure(moekit, copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][:] = 3e38
    save_file(tensors, copy / "model.safetensors")
    result = moekit("generate", "--checkpoint", str(copy), "--prompt", "x", "--max-new-tokens", "4", "--tp", "1")
    assert result.exit_code == 1
    assert "the logits of prompt 0 hold NaN or an infinity after 0 new tokens" in result.stderr


def test_a_conversation_that_grows_too_long(moekit, small):
    """The length that is given is the engine's, not one that it is rounded up to."""
    always = ("--checkpoint", str(small), "--tp", "1", "--chat", "--max-new-tokens", "4", "--length", "120")
    result = moekit("generate", *always, input="Hi\n" + "x" * 64 + "\n")
    assert result.exit_code == 2
    assert "where --length leaves room for 116; give more" in result.stderr
    assert "Traceback" not in result.output


def test_without_tokenizers_the_exit_code_is_3(moekit, small, monkeypatch):
    monkeypatch.setattr(command, "installed", lambda module: module != "tokenizers")
    result = moekit("generate", "--checkpoint", str(small), "--prompt", "x")
    assert (result.exit_code, result.stderr) == (3, "Error: generate needs tokenizers; install moekit[text]\n")


def test_programs_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        run.keep_programs()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "moekit" / "programs")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
