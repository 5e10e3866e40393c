"""What is trained in a chat: equal to Transformers' assistant mask, for templates that write in different ways.

The templates are written here in the styles of published ones. Each has {% generation %} marks, which Transformers
needs for its mask; the same template without marks must give the same mask.
"""

import datetime
import json
import random

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from nanoflax import tokenizers
from nanoflax.errors import UserError

R, E = "{% generation %}", "{% endgeneration %}"
# name: (special tokens, the first is eos; template)
TEMPLATES = {
    "chatml with a default system message": (
        ["<|im_end|>", "<|im_start|>"],
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}" + R + "{{ m.content }}<|im_end|>" + E + "{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    "eos is another token than the end of a reply": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}" + R + "{{ m.content + '<|im_end|>' }}" + E + "{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    "thoughts only in the last turn": (
        ["<|im_end|>", "<|im_start|>"],
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}" + R + "{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content "
        "else '' %}{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
        "{{ text + '<|im_end|>' }}" + E + "{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    "the prompt opens the thoughts": (
        ["<|im_end|>", "<|im_start|>"],
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content "
        "else 'none' %}{% if loop.last %}{{ '<think>\n' }}" + R
        + "{{ thought + '\n</think>\n\n' + text + '<|im_end|>' }}"
        + E + "{% else %}" + R + "{{ text + '<|im_end|>' }}" + E + "{% endif %}{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    ),
    "instructions in brackets": (
        ["</s>", "<s>"],
        "{% set rest = messages %}{% set system = '' %}{% if messages[0].role == 'system' %}"
        "{% set rest = messages[1:] %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% endif %}{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles alternate') }}{% endif %}{% if m.role == 'user' %}"
        "{{ '<s>[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
        "{% else %}" + R + "{{ ' ' + m.content.strip() + ' </s>' }}" + E + "{% endif %}{% endfor %}",
    ),
    "headers": (
        ["<|eot_id|>", "<|begin|>", "<|start_header_id|>", "<|end_header_id|>"],
        "{% for m in messages %}{{ ('<|begin|>' if loop.first else '') + '<|start_header_id|>' + m.role + "
        "'<|end_header_id|>\n\n' }}{% if m.role == 'assistant' %}" + R + "{{ m.content | trim + '<|eot_id|>' }}" + E
        + "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ),
    "brackets that are special, the system message in the last turn": (
        ["</s>", "<s>", "[INST]", "[/INST]"],
        "<s>{% set ns = namespace(last=0, system='') %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% elif m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
        "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + (ns.system if loop.index0 == ns.last else '') + m.content + '[/INST]' }}"
        "{% elif m.role == 'assistant' %}" + R + "{{ ' ' + m.content + '</s>' }}" + E + "{% endif %}{% endfor %}",
    ),
    "the role model": (
        ["<end_of_turn>", "<bos>", "<start_of_turn>"],
        "<bos>{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = m.content + '\n\n' %}{% elif m.role == 'user' %}"
        "{{ '<start_of_turn>user\n' + ns.system + m.content | trim + '<end_of_turn>\n' }}{% set ns.system = '' %}"
        "{% else %}{{ '<start_of_turn>model\n' }}" + R + "{{ m.content | trim + '<end_of_turn>' }}" + E + "{{ '\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ),
    "another token after the conversation": (
        ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}" + R
        + "{{ m.content + '<|end|>' }}" + E + "{{ '\n' }}{% else %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ),
    "roles are text": (
        ["</s>"],
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}" + R
        + "{{ m.content + eos_token }}" + E + "{{ '\n' }}{% else %}{{ m.content + eos_token + '\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ),
    "nothing around the contents": (
        ["<eos>", "<bos>", "<User>", "<Assistant>"],
        "<bos>{% for m in messages %}{% if m.role == 'user' %}{{ '<User>' + m.content }}"
        "{% elif m.role == 'assistant' %}{{ '<Assistant>' }}" + R + "{{ m.content + '<eos>' }}" + E
        + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<Assistant>' }}{% endif %}",
    ),
    "special tokens on both sides of a reply": (
        ["<END>", "<START>", "<U>", "<C>", "<S>", "<RESPONSE>", "</RESPONSE>"],
        "{% for m in messages %}{{ '<START>' }}{% if m.role == 'assistant' %}{{ '<C>' }}" + R
        + "{{ '<RESPONSE>' + m.content + '</RESPONSE><END>' }}" + E + "{% else %}"
        "{{ ('<U>' if m.role == 'user' else '<S>') + m.content + '<END>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<START><C>' }}{% endif %}",
    ),
    "channels": (
        ["<|return|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>"],
        "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}" + R
        + "{{ '<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}" + E
        + "{% else %}{{ '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
    ),
    "eos only at the end": (
        ["</s>"],
        "{% for m in messages %}{{ '' if loop.first else '\n' }}{{ m.role | upper + ':' }}"
        "{% if m.role == 'assistant' %}" + R + "{{ ' ' + m.content.strip() + (eos_token if loop.last else '') }}" + E
        + "{% else %}{{ ' ' + m.content.strip() }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\nASSISTANT:' }}{% endif %}",
    ),
    "numbered turns": (
        ["<|im_end|>", "<|im_start|>"],
        "{% for m in messages %}{{ '<|im_start|>' ~ loop.index ~ ' ' ~ m.role ~ '\n' }}"
        "{% if m.role == 'assistant' %}" + R + "{{ m.content + '<|im_end|>' }}" + E
        + "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>' ~ (messages | length + 1) ~ ' assistant\n' }}{% endif %}",
    ),
    "no generation prompt": (
        ["<|im_end|>", "<|im_start|>"],
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}" + R
        + "{{ m.content + '<|im_end|>' }}" + E + "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
        "{% endfor %}",
    ),
    "always a generation prompt": (
        ["<|end_of_text|>", "<|eot|>", "<|header|>", "<|/header|>"],
        "{% for m in messages %}{{ '<|header|>' + m.role + '<|/header|>\n\n' }}{% if m.role == 'assistant' %}" + R
        + "{{ m.content + '<|eot|>' }}" + E + "{% else %}{{ m.content + '<|eot|>' }}{% endif %}{% endfor %}"
        "{{ '<|header|>assistant<|/header|>\n\n' }}",
    ),
}  # fmt: skip
PARTS = ["yes", "2+2?", " It is 4. ", "yes", "a\n\nb", "  x", "y\n", "é日本!", "<think>hm\nhm</think>\n\nno", "[INST]",
         "user", "assistant\n", "###", "日."]  # fmt: skip


def make(tmp_path, special, template, kind="bytes", trim_offsets=False):
    """The tokenizer of a template, as ours and as Transformers'."""
    if kind == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges = [("Ġ", "I"), ("Ġ", "y"), ("e", "s"), ("y", "es"), ("Ċ", "Ċ"), (":", "ĠI"), ("Ġ", "Ġ")]
        pieces = alphabet + [a + b for a, b in merges]
        tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
        tokenizer.decoder = decoders.ByteLevel()
    else:  # a space belongs to the word after it
        pieces = [
            "<unk>",
            "▁",
            *sorted({*"".join(PARTS) + "".join(map(chr, range(33, 127)))} - {" "}),
            "▁yes",
            "es",
            "▁I",
        ]
        tokenizer = Tokenizer(models.Unigram([(p, -1.0 - len(p) / 99) for p in pieces], unk_id=0))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[0], "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizers.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)


def without_marks(template):
    return template.replace(R, "").replace(E, "")


def conversations(seed, number, special=()):
    """Random chats that end with a reply, without the special tokens."""
    draw, parts = random.Random(seed), [part for part in PARTS if not any(token in part for token in special)]
    for _ in range(number):
        contents = ["".join(draw.choices(parts, k=draw.randint(1, 3))) for _ in range(draw.randint(1, 3) * 2)]
        if draw.random() < 0.2:
            contents[-1] = contents[0]
        messages = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
        yield [{"role": "system", "content": draw.choice(parts)}] * (draw.random() < 0.3) + messages


@pytest.mark.parametrize("kind", ["bytes", "unigram"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_without_marks_is_the_one_of_transformers_with_marks(tmp_path, name, kind):
    special, template = TEMPLATES[name]
    marked, theirs = make(tmp_path, special, template, kind)
    plain = marked.with_chat_template(without_marks(template))
    for messages in conversations(name, 12, special):
        expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        for mine in (marked, plain):
            ids, weights = tokenizers.chat_ids(mine, messages)
            assert ids == expected["input_ids"]
            assert weights == expected["assistant_masks"], (
                tokenizers.show_mask(mine, ids, weights),
                tokenizers.show_mask(mine, ids, expected["assistant_masks"]),
                messages,
            )
            if messages[-1]["content"][0].isspace():  # a token may hold the end of the prompt and this space
                continue
            prompt = tokenizers.chat_prompt(mine, messages[:-1])
            assert ids[: len(prompt)] == prompt and weights[len(prompt)] and not weights[len(prompt) - 1]


CHATML = without_marks(TEMPLATES["eos is another token than the end of a reply"][1])
USER, REPLY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}


def shown(tokenizer, messages, **more):
    return tokenizers.show_mask(tokenizer, *tokenizers.chat_ids(tokenizer, messages, **more))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_stops_at_what_ends_a_trained_reply(tmp_path, name):
    special, template = TEMPLATES[name]
    mine, _ = make(tmp_path, special, without_marks(template))
    for messages in ([USER, REPLY], [USER, REPLY, USER]):
        ids, weights = tokenizers.chat_ids(mine, messages)
        last = [i for i, weight in zip(ids, weights, strict=True) if weight][-1]
        assert last in tokenizers.stop_ids(mine) or name == "eos only at the end" and messages[-1] is USER
    assert tokenizers.stop_ids(mine)[0] == mine.eos_id
    assert len(tokenizers.stop_ids(mine)) <= 2


def test_special_tokens_in_a_reply_and_spaces_without_offsets(tmp_path):
    mine, _ = make(tmp_path, *TEMPLATES["channels"], trim_offsets=True)
    mine = mine.with_chat_template(without_marks(mine.chat_template))
    text = "  say <|end|> or <|return|>  "
    assert shown(mine, [USER, REPLY | {"content": text}]).endswith(
        f"<|start|>assistant⟦<|channel|>final<|message|>{text}<|return|>⟧"
    )


def test_marks_inside_macros_and_blocks(tmp_path):
    template = (
        "{% macro reply(m) %}" + R + "{% set end = '<|im_end|>' %}{{ m.content }}{{ end }}" + E + "{% endmacro %}"
        "{% for m in messages %}{{ '<|im_start|>' }}{% set text %}{{ reply(m) }}{% endset %}"
        "{{ text if m.role == 'assistant' else m.content }}{% endfor %}"
    )
    mine, _ = make(tmp_path, ["<|im_end|>", "<|im_start|>"], template)
    assert shown(mine, [USER, REPLY]) == "<|im_start|>2+2?<|im_start|>⟦It is 4.<|im_end|>⟧"


def test_marks_also_decide_the_prompt(tmp_path):
    """A prompt that the conversation does not have is not given to a model that never saw it."""
    opened = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    template = CHATML[: CHATML.index("{% if add_gen")] + opened
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    mine, _ = make(tmp_path, special, template)
    with pytest.raises(UserError, match=r"prompt for message 2 .* has '<think>\\n', which it does not write there"):
        tokenizers.chat_ids(mine, [USER, REPLY])
    marked = mine.with_chat_template(
        TEMPLATES["eos is another token than the end of a reply"][1].split("{% if add_gen")[0] + opened
    )
    prompt = tokenizers.chat_prompt(marked, [USER])
    assert shown(marked, [USER, REPLY]).startswith(tokenizers.show_mask(marked, prompt, [0] * len(prompt)) + "⟦It is")


TOOL = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    + R
    + "{{ m.reasoning_content }}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>' }}" + E + "{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("content", ["Let me see.", "", None])
def test_tool_calls_are_a_part_of_the_reply(tmp_path, content):
    mine, theirs = make(tmp_path, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<call>", "</call>"], TOOL)
    plain = mine.with_chat_template(without_marks(TOOL))
    call = {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "b": None}}}],
        "thinking": "hm",
    }
    tools = [{"name": "add"}]
    for messages in ([USER, call], [USER, call, {"role": "tool", "content": "4"}, REPLY], [USER, REPLY, REPLY]):
        expected = theirs.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        for tokenizer in (mine, plain):
            ids, weights = tokenizers.chat_ids(tokenizer, messages, tools=tools)
            assert (ids, weights) == (expected["input_ids"], expected["assistant_masks"])
    other_end = plain.with_chat_template(
        plain.chat_template.replace("{{ '<|im_end|>' }}", "{{ '<|im_start|>' if m.tool_calls else '<|im_end|>' }}")
    )
    with pytest.raises(UserError, match=r"ends message 2 with <\|im_start\|>, which does not end a generated text"):
        tokenizers.chat_ids(other_end, [USER, call])
    ids, _ = tokenizers.chat_ids(plain, [USER, REPLY], tools=[{"name": "<|im_start|>"}])
    assert ids.count(mine.special["<|im_start|>"]) == 3  # special tokens in tools stay text


@pytest.mark.parametrize(
    "template,match",
    [
        (
            "{% for m in messages %}{{ m.content | upper + '</s>' }}{% endfor %}",
            "changes or repeats the text of message 2",
        ),
        ("{% for m in messages %}{{ m.content + m.content + '</s>' }}{% endfor %}", "changes or repeats the text"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no special token after a reply"),
        ("{% for m in messages | reverse %}{{ m.content + '</s>' }}{% endfor %}", "prompt for message 2"),
        (
            "{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}" + R + E,
            "but marks nothing in this conversation",
        ),
        ("{% if messages[1:] %}{{ raise_exception('one message') }}{% endif %}</s>", "fails: one message"),
    ],
)
def test_templates_that_hide_a_reply_are_refused_by_name(tmp_path, template, match):
    mine, _ = make(tmp_path, ["</s>"], template)
    with pytest.raises(UserError, match=match) as error:
        tokenizers.chat_ids(mine, [USER, REPLY])
    assert "\n" not in str(error.value)
    assert tokenizers.stop_ids(mine) == (mine.eos_id,)


DATED = (
    "{%- set day = '%d %b %Y' %}{%- if not date is defined %}{%- set date = strftime_now(day) %}{%- endif %}\n"
    "  {% macro year() %}{{ strftime_now('%Y') }}{% endmacro %}{{ date + ' ' + year() }}{% for m in messages %}"
    "{{ m.content + '<|im_end|>' }}{% endfor %}"
)


@pytest.mark.parametrize("place", ["config", "named", "file"])
def test_a_fixed_date_is_written_by_transformers_too(tmp_path, place):
    template = (
        [{"name": "default", "template": DATED}, {"name": "other", "template": "x"}] if place == "named" else DATED
    )
    mine, _ = make(tmp_path, ["<|im_end|>"], template)
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(DATED)
        mine = tokenizers.load(tmp_path)
    fixed = tokenizers.with_date(mine, datetime.datetime(2001, 2, 3, 4, 5))
    assert fixed.chat_template != mine.chat_template and fixed.fingerprint == mine.fingerprint
    assert tokenizers.with_date(fixed, datetime.datetime(2002, 1, 1)) is fixed
    fixed.save(tmp_path / "new")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    text = theirs.apply_chat_template([USER], tokenize=False)
    assert text == "03 Feb 2001 20012+2?<|im_end|>"
    for tokenizer in (fixed, tokenizers.load(tmp_path / "new")):
        assert tokenizer.apply_chat([USER]) == theirs.apply_chat_template([USER])["input_ids"]
    if place == "named":
        assert theirs.chat_template["other"] == "x"
    harmless = mine.with_chat_template(CHATML)
    assert tokenizers.with_date(harmless, datetime.datetime(2001, 2, 3)) is harmless
    made_from_parts = tokenizers.with_date(
        mine.with_chat_template("{{ strftime_now('%' ~ 'Y') }}"), datetime.datetime(2001, 2, 3)
    )
    with pytest.raises(UserError, match="the date of this run has no format %Y"):
        made_from_parts.apply_chat([USER])
