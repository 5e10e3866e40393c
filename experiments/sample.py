"""Continue prompts with a trained model.

    python -m experiments.sample --workdir=runs/pydocs_tiny --prompt="The function returns"
    python -m experiments.sample --workdir=runs/x --prompt="One" --prompt="Two" --temperature=0
    python -m experiments.sample --workdir=runs/x --prompt_file=prompts.txt --stop="\\n\\n"
    python -m experiments.sample --workdir=runs/x --interactive

Text appears as it is generated. With no prompt, a document is begun.
"""

import sys

from absl import flags

from experiments import common
from nanoflax.config import MAX_SEED
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "directory of the run", required=True)
flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "which of its checkpoints")
flags.DEFINE_multi_string("prompt", [], "text to continue; may be given several times")
flags.DEFINE_string("prompt_file", "", "file with a prompt on each line")
flags.DEFINE_bool("interactive", False, "ask for prompts until an empty line or Ctrl-D")
flags.DEFINE_integer("max_new_tokens", 100, "at most so many tokens")
flags.DEFINE_float("temperature", 0.8, "0 is greedy")
flags.DEFINE_integer("top_k", 40, "draw among so many tokens; 0 means all")
flags.DEFINE_float("top_p", 1.0, "draw among the fewest tokens with so much probability")
flags.DEFINE_float("min_p", 0.0, "draw among tokens with so much of the best one's probability")
flags.DEFINE_float("repetition_penalty", 1.0, "above 1 makes tokens seen before less likely")
flags.DEFINE_multi_string("stop", [], "text that ends a continuation; \\n is a newline")
flags.DEFINE_integer("seed", 0, "of the random draws", 0, MAX_SEED)


def main():
    prompts = list(FLAGS.prompt)
    if FLAGS.prompt_file:
        prompts += read_prompts(FLAGS.prompt_file)
    if "" in prompts:
        raise UserError("--prompt is empty; leave the flag out to begin a document")
    config, tokenizer = common.read_run(FLAGS.workdir)
    common.setup_jax()
    model, params = common.restore_model(FLAGS.workdir, config, tokenizer, FLAGS.checkpoint)
    if FLAGS.interactive:
        return interact(model, params, tokenizer)
    generate(model, params, tokenizer, prompts or [""])
    return 0


def read_prompts(path):
    try:
        with open(path, encoding="utf-8") as f:
            lines = [line.rstrip("\n") for line in f]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_file={path}: {error}") from error
    if not (prompts := [line for line in lines if line]):
        raise UserError(f"--prompt_file={path} holds no prompt; write one on each line")
    return prompts


def interact(model, params, tokenizer):
    """Read a prompt, write its continuation, until an empty line or the end of input."""
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return 0
        if not prompt:
            return 0
        try:
            generate(model, params, tokenizer, [prompt])
        except UserError as error:
            print(error, file=sys.stderr)


def generate(model, params, tokenizer, prompts):
    """Print each prompt with its continuation: a single one as it comes, several in turn."""
    import jax

    from nanoflax import report, sampling

    safe = report.printable if sys.stdout.isatty() else str
    stops = [s.replace("\\n", "\n") for s in FLAGS.stop if s]
    live = len(prompts) == 1
    ids, texts = [[] for _ in prompts], [""] * len(prompts)

    def show(i, ended):
        text, stopped = visible(tokenizer.decode(ids[i]), stops, ended)
        if live:
            print(safe(text[len(texts[i]):]), end="", flush=True)
        texts[i] = text
        return stopped

    if live:
        print(safe(prompts[0]), end="", flush=True)
    stopped = [False] * len(prompts)
    for new in sampling.stream(
            model, params, [[tokenizer.bos_id, *tokenizer.encode(p)] for p in prompts],
            FLAGS.max_new_tokens, FLAGS.temperature, FLAGS.top_k or None,
            FLAGS.top_p if FLAGS.top_p != 1 else None, FLAGS.min_p or None,
            FLAGS.repetition_penalty if FLAGS.repetition_penalty != 1 else None,
            jax.random.PRNGKey(FLAGS.seed), tokenizer.eos_id, tokenizer.vocab_size):
        for i, tokens in enumerate(new):
            if not stopped[i]:
                ids[i] += tokens
                stopped[i] = show(i, ended=False)
        if all(stopped):
            break
    for i in range(len(prompts)):
        show(i, ended=True)
    print("" if live else "\n".join(f"--- {i + 1}\n{safe(prompt + text)}"
                                    for i, (prompt, text) in enumerate(zip(prompts, texts))))


def visible(text, stops, ended):
    """The part of a text that will not change, and whether a stop string has ended it.

    While more may come, what could begin a stop string, or is half a character, is held back.
    """
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        return text[:min(found)], True
    if ended:
        return text, False
    text = text.rstrip("\ufffd")
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
               default=0)
    return text[:len(text) - held], False


if __name__ == "__main__":
    common.launch(main)
