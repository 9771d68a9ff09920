"""A tokenizer of bytes and a chat template, as files of a checkpoint."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<|im_start|>", "<|im_end|>")
TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {%- if message.role == 'never' %}{% break %}{% endif -%}
<|im_start|>{{ message.role }}{{ loop.index }}
{{ message.content }} {{ message | tojson }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""


def write_words(directory: Path, template: str | None = "settings") -> Path:
    """Write tokenizer.json and tokenizer_config.json; template: where the chat template goes: 'settings', 'named' or 'file'."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    made.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template == "settings":
        settings["chat_template"] = TEMPLATE
    elif template == "named":
        settings["chat_template"] = [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    elif template == "file":
        (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
