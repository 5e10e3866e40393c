"""Continue prompts with a trained or imported model, or do the task of a fine-tuned run with them.

    python -m experiments.sample --workdir=runs/pydocs_tiny --prompt="The function returns"
    python -m experiments.sample --model=SmolLM2.gguf --prompt="The capital of France is"
    python -m experiments.sample --model=SmolLM2.gguf --chat
    python -m experiments.sample --workdir=runs/x --prompt="One" --prompt="Two" --temperature=0
    python -m experiments.sample --workdir=runs/x --prompt_file=prompts.txt --stop="\\n\\n"
    python -m experiments.sample --workdir=runs/x --interactive

Text appears as it is generated. Without a prompt, a new document is begun. An encoder-decoder reads the
prompt as its source. A fine-tuned run does its task with each prompt: it prints classes and their
probabilities, the tag of each word (as separated by spaces), a translation (by default generated as in
the run's evaluation), or the reply to a message.
"""

import dataclasses

from absl import flags

import nanoflax
from experiments.flags import launch
from nanoflax import runs, tokenizers
from nanoflax.config import MAX_SEED
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", "", "directory of a run")
flags.DEFINE_string("model", "", "instead of --workdir: a directory of Transformers, a name on the hub or a .gguf file")
flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "checkpoint of the run")
flags.DEFINE_multi_string("prompt", [], "text to continue; may be given several times")
flags.DEFINE_string("prompt_file", "", "file with a prompt on each line")
flags.DEFINE_bool("interactive", False, "ask for prompts until an empty line or Ctrl-D")
flags.DEFINE_bool("chat", False, "talk with the model through its chat template")
flags.DEFINE_string("system", "", "system message of --chat")
flags.DEFINE_integer("beams", 0, "beams of a search for the most probable text; 0 draws tokens instead", 0)
flags.DEFINE_float("length_penalty", 1.0, "of --beams: above 0 favours longer texts")
flags.DEFINE_integer("max_new_tokens", None, "default 100, or fewer if the model's context has no room", 1)
flags.DEFINE_float("temperature", 0.8, "of the draws; 0 always takes the most probable token", 0)
flags.DEFINE_integer("top_k", 40, "draw among so many most probable tokens; 0 means all", 0)
flags.DEFINE_float("top_p", 1.0, "draw among the fewest tokens that have this probability together", 0, 1)
flags.DEFINE_float("min_p", 0.0, "draw among tokens with this fraction of the best one's probability", 0, 1)
flags.DEFINE_float("repetition_penalty", 1.0, "above 1 makes tokens that were seen before less probable")
flags.DEFINE_multi_string("stop", [], "text that ends a continuation; \\n is a newline")
flags.DEFINE_integer("seed", 0, "of the random draws", 0, MAX_SEED)


def main():
    prompts = read_prompts()
    names = [field.name for field in dataclasses.fields(runs.GenerationSettings)]
    settings = {name: FLAGS[name].value for name in names if FLAGS[name].present}
    settings["stop"] = [text.replace("\\n", "\n") for text in FLAGS.stop]
    runs.setup_jax()
    run = nanoflax.open(FLAGS.workdir or FLAGS.model, FLAGS.checkpoint)
    as_task = bool(FLAGS.workdir) and run.task is not None and not FLAGS.chat
    if as_task and run.task.needs_prompt and not FLAGS.interactive:
        if not prompts:
            raise UserError(f"--prompt is missing: the text that task.kind={run.config.task.kind!r} is about")
        if not all(run.cleaned_texts(prompts)):
            raise UserError("--prompt is empty when it is cleaned as the run's data was")
    if FLAGS.chat:
        if not run.tokenizer.chat_template:
            raise UserError("--chat: the tokenizer of this model has no chat template")
        runs.chat(run, FLAGS.system, **settings)
    elif FLAGS.interactive:
        runs.answer_typed_prompts(run, as_task, **settings)
    else:
        runs.print_answers(run, prompts or [""], as_task, **settings)


def read_prompts():
    """The prompts of the flags. Raises: UserError for flags that contradict each other."""
    given = FLAGS.prompt or FLAGS.prompt_file
    if FLAGS.interactive and given or FLAGS.chat and (FLAGS.interactive or given):
        raise UserError("give one of --chat, --interactive, and --prompt with --prompt_file")
    prompts = list(FLAGS.prompt)
    if FLAGS.prompt_file:
        try:
            with open(FLAGS.prompt_file, encoding="utf-8") as file:
                lines = [line.rstrip("\n") for line in file]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt_file={FLAGS.prompt_file}: {error}") from error
        if not any(lines):
            raise UserError(f"--prompt_file={FLAGS.prompt_file} holds no prompt; write one on each line")
        prompts += filter(None, lines)
    if "" in prompts:
        raise UserError("--prompt is empty; leave the flag out to begin a document")
    if bool(FLAGS.workdir) == bool(FLAGS.model):
        raise UserError("give either --workdir, of a run, or --model, of a published model")
    if FLAGS.workdir and not runs.is_run(FLAGS.workdir):
        raise UserError(
            f"--workdir={FLAGS.workdir} holds no run (no checkpoints/); give the directory that pretrain wrote"
        )
    return [tokenizers.well_formed(prompt) for prompt in prompts]


if __name__ == "__main__":
    launch(main)
