"""Generate text after prompts with a trained or imported model, or predict with a fine-tuned run.

    python -m experiments.sample --workdir=runs/pydocs_tiny --prompt="The function returns"
    python -m experiments.sample --model=SmolLM2.gguf --prompt="The capital of France is"
    python -m experiments.sample --model=SmolLM2.gguf --chat
    python -m experiments.sample --workdir=runs/x --prompt="One" --prompt="Two" --temperature=0
    python -m experiments.sample --workdir=runs/x --prompt_file=prompts.txt --stop="\\n\\n"
    python -m experiments.sample --workdir=runs/x --interactive
    python -m experiments.sample --model=SmolLM2.gguf --prompt="Paris as JSON: " --json_schema=city_schema.json

Text is printed while it is generated. Without a prompt, the model begins a new document. An encoder-decoder reads the
prompt as its source, with language codes (>>fr<<, fr_XX), <mask> and sentinels (<extra_id_0>) as tokens; "</s>" stays
text. A fine-tuned run, or a published classifier or tagger, does its task: it prints classes and their probabilities,
the tag of each word (spaces separate words), a translation (by default with the settings of the run's evaluation), or
the reply to a message. Settings that no flag gives are those of the model's generation_config.json, if there is one.
"""

import dataclasses
import os
import sys
from typing import Any

from absl import flags

import nanoflax
from experiments.flags import launch
from experiments.source import check_source, define_source, open_source
from nanoflax.config import MAX_SEED
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
define_source()
flags.DEFINE_multi_string("prompt", [], "text to continue; may be given several times")
flags.DEFINE_string("prompt_file", "", "file with a prompt on each line")
flags.DEFINE_bool("interactive", False, "ask for prompts until an empty line or Ctrl-D")
flags.DEFINE_bool("chat", False, "chat with the model, using its chat template")
flags.DEFINE_string("system", "", "system message of --chat")
flags.DEFINE_integer("beams", 0, "number of beams of a beam search; 0: sampling", 0)
flags.DEFINE_float("length_penalty", 1.0, "for --beams: above 0 favours longer texts")
flags.DEFINE_integer("max_new_tokens", None, "default 100, or fewer if the model's context is too short", 1)
flags.DEFINE_float("temperature", 0.8, "temperature of sampling; 0: always the most probable token", 0)
flags.DEFINE_integer("top_k", 40, "sample from the K most probable tokens; 0: all", 0)
flags.DEFINE_float("top_p", 1.0, "sample from the smallest set of tokens whose total probability is P", 0, 1)
flags.DEFINE_float("min_p", 0.0, "sample from tokens with at least this fraction of the highest probability", 0, 1)
flags.DEFINE_float("top_h", None, "sample from the most probable tokens with this share of the entropy; 0: all", 0, 1)
flags.DEFINE_float("typical_p", None, "sample from the most typical tokens with this total probability; 1: all", 0, 1)
flags.DEFINE_float("epsilon_cutoff", None, "sample from tokens with this probability, such as 3e-4; 0: all", 0, 1)
flags.DEFINE_float("eta_cutoff", None, "as --epsilon_cutoff, but lower where many tokens are probable", 0, 1)
flags.DEFINE_float("repetition_penalty", 1.0, "above 1: earlier tokens become less probable")
flags.DEFINE_multi_string("stop", [], "text that ends a continuation; \\n is a newline")
flags.DEFINE_integer("seed", 0, "seed of sampling", 0, MAX_SEED)
flags.DEFINE_bool("lookup", False, "guess that the text repeats itself or its prompt; faster then, and the same text")
flags.DEFINE_string("draft", "", "smaller model with the same tokenizer that guesses tokens; as --model")
flags.DEFINE_string("json_schema", None, "file with a JSON schema that the new text must match")
flags.DEFINE_string("regex", None, "regular expression that the complete new text must match")
flags.DEFINE_multi_string("choices", None, "the new text is one of these; give the flag once for each")
flags.DEFINE_string("grammar", None, "file with a grammar, in llguidance's form of Lark, that the new text must match")


def main():
    prompts, settings = read_prompts(), read_settings()
    check_source()
    nanoflax.runs.setup_jax()
    run = open_source()
    as_task = run.task is not None and not FLAGS.chat
    if run.task is None and run.config.model.head != "lm":
        raise UserError(f"{run.source} {run.why_no_task()}")
    if as_task and run.task.needs_prompt and not FLAGS.interactive:
        if not prompts:
            raise UserError(f"--prompt is missing: the text that task.kind={run.config.task.kind!r} is about")
        if not all(map(str.strip, run.cleaned_texts(prompts))):
            raise UserError("--prompt is empty after cleaning, with the settings of the run's data")
    if not as_task and (used := nanoflax.runs.used_of_model(settings, run.model.config.generation)):
        print(f"set by the model's generation_config.json: {used}", file=sys.stderr)
    if FLAGS.chat:
        nanoflax.runs.chat(run, FLAGS.system, **settings)
    elif FLAGS.interactive:
        nanoflax.runs.answer_typed_prompts(run, as_task, **settings)
    else:
        nanoflax.runs.print_answers(run, prompts or [""], as_task, **settings)


def read_settings():
    """The settings of generation that are given. Raises: UserError for ranges and contradictions."""
    names = [field.name for field in dataclasses.fields(nanoflax.runs.GenerationSettings)]
    settings: dict[str, Any] = {name: FLAGS[name].value for name in names if FLAGS[name].present}
    for name in {"json_schema", "grammar"} & settings.keys():
        where, (folder, file) = f"--{name}={settings[name]}", os.path.split(settings[name])
        if not os.path.isfile(settings[name]):
            raise UserError(f"{where}: no such file")
        text = nanoflax.untrusted.read_bytes(folder or ".", file, 1_000_000)
        is_json = name == "json_schema"
        settings[name] = nanoflax.untrusted.json_object(text, where) if is_json else text.decode(errors="replace")
    if "stop" in settings:
        settings["stop"] = [text.replace("\\n", "\n") for text in FLAGS.stop]
    nanoflax.runs.GenerationSettings.of(settings, prefix="--")
    return settings


def read_prompts():
    """The prompts of the flags. Raises: UserError for flags that contradict each other."""
    given = FLAGS.prompt or FLAGS.prompt_file
    if FLAGS.interactive and given or FLAGS.chat and (FLAGS.interactive or given):
        raise UserError("give one of --chat, --interactive, and --prompt with --prompt_file")
    if FLAGS.system and not FLAGS.chat:
        raise UserError("--system is only read with --chat")
    prompts = list(FLAGS.prompt)
    if FLAGS.prompt_file:
        with nanoflax.data.open_text(FLAGS.prompt_file) as file:
            lines = [line for _, line in nanoflax.data.text_lines(file, FLAGS.prompt_file)]
        if not any(lines):
            raise UserError(f"--prompt_file={FLAGS.prompt_file} holds no prompt; write one on each line")
        prompts += filter(None, lines)
    if "" in prompts:
        raise UserError("--prompt is empty; leave the flag out to begin a document")
    return [nanoflax.tokenizers.well_formed(prompt) for prompt in prompts]


if __name__ == "__main__":
    launch(main)
