"""Continue prompts with a trained or imported model.

    python -m experiments.sample --workdir=runs/pydocs_tiny --prompt="The function returns"
    python -m experiments.sample --model=SmolLM2.gguf --prompt="The capital of France is"
    python -m experiments.sample --model=SmolLM2.gguf --chat
    python -m experiments.sample --workdir=runs/x --prompt="One" --prompt="Two" --temperature=0
    python -m experiments.sample --workdir=runs/x --prompt_file=prompts.txt --stop="\\n\\n"
    python -m experiments.sample --workdir=runs/x --interactive

Text appears as it is generated. With no prompt, a document is begun. An encoder-decoder reads the
prompt as its source. A run of finetune does its task with each prompt: classes and their
probabilities, the tag of each word (as separated by spaces), a translation (by default as the run's
evaluation writes), the reply to a message.
"""

import itertools
import os
import sys

from absl import flags

from experiments.flags import launch
from nanoflax import config as configs
from nanoflax import runs, tasks, tokenizers
from nanoflax.config import MAX_SEED
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", "", "directory of a run")
flags.DEFINE_string("model", "", "instead of --workdir: a directory of Transformers, a name on the hub or a .gguf file")
flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "which of its checkpoints")
flags.DEFINE_multi_string("prompt", [], "text to continue; may be given several times")
flags.DEFINE_string("prompt_file", "", "file with a prompt on each line")
flags.DEFINE_bool("interactive", False, "ask for prompts until an empty line or Ctrl-D")
flags.DEFINE_bool("chat", False, "talk with the model through its chat template")
flags.DEFINE_string("system", "", "of --chat: the system's message")
flags.DEFINE_integer("beams", 0, "search with so many beams instead of drawing; 0 draws", 0)
flags.DEFINE_float("length_penalty", 1.0, "of --beams: above 0 favours longer texts")
flags.DEFINE_integer(
    "max_new_tokens", None, "at most so many tokens; default 100, or fewer if the model's context has no room", 1
)
flags.DEFINE_float("temperature", 0.8, "0 is greedy")
flags.DEFINE_integer("top_k", 40, "draw among so many tokens; 0 means all")
flags.DEFINE_float("top_p", 1.0, "draw among the fewest tokens with so much probability")
flags.DEFINE_float("min_p", 0.0, "draw among tokens with so much of the best one's probability")
flags.DEFINE_float("repetition_penalty", 1.0, "above 1 makes tokens seen before less likely")
flags.DEFINE_multi_string("stop", [], "text that ends a continuation; \\n is a newline")
flags.DEFINE_integer("seed", 0, "of the random draws", 0, MAX_SEED)


def main():
    from nanoflax import tokenizers

    if (
        FLAGS.interactive
        and (FLAGS.prompt or FLAGS.prompt_file)
        or FLAGS.chat
        and (FLAGS.interactive or FLAGS.prompt or FLAGS.prompt_file)
    ):
        raise UserError("give one of --chat, --interactive, and --prompt with --prompt_file")
    prompts = list(map(tokenizers.well_formed, FLAGS.prompt))
    if FLAGS.prompt_file:
        prompts += read_prompts(FLAGS.prompt_file)
    if "" in prompts:
        raise UserError("--prompt is empty; leave the flag out to begin a document")
    if bool(FLAGS.workdir) == bool(FLAGS.model):
        raise UserError("give either --workdir, of a run, or --model, of a published model")
    if FLAGS.workdir and not runs.is_run(FLAGS.workdir):
        raise UserError(
            f"--workdir={FLAGS.workdir} holds no run (no checkpoints/); give the directory that pretrain wrote"
        )
    runs.setup_jax()
    model, params, tokenizer = runs.open_model(FLAGS.workdir or FLAGS.model, FLAGS.checkpoint)
    if FLAGS.chat and not tokenizer.chat_template:
        raise UserError("--chat: the tokenizer of this model has no chat template")
    if FLAGS.chat:
        return chat(model, params, tokenizer)
    write = lambda texts: generate(model, params, tokenizer, texts)  # noqa: E731
    if FLAGS.workdir:
        config = runs.read_config(os.path.join(FLAGS.workdir, "config.json"))
        if (labels := runs.read_labels(FLAGS.workdir, config)) is not None:
            do = of_task(config, model, params, tokenizer, *labels) or write
            if not isinstance(config.task, configs.LanguageModel):
                write = lambda texts: do(cleaned(config, texts))  # noqa: E731
            if not prompts and not FLAGS.interactive and not isinstance(config.task, configs.LanguageModel):
                raise UserError(f"--prompt is missing: the text that task.kind={config.task.kind!r} is about")
    if FLAGS.interactive:
        return interact(write)
    write(prompts or [""])
    return 0


def of_task(config, model, params, tokenizer, labels, several):
    """A function of prompts that does the task of a finetune run with them and prints the result;
    None if that is to continue them."""
    from nanoflax import tokenizers

    task = config.task
    if task.kind in ("classify", "tag"):
        return lambda texts: predict(config, model, params, tokenizer, labels, several, texts)
    if task.kind == "instruct":
        return lambda texts: generate(
            model,
            params,
            tokenizer,
            [""] * len(texts),
            [tokenizers.chat_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts],
        )
    if task.kind in ("masked_lm", "denoise"):
        return lambda texts: restore(config, model, params, tokenizer, texts)
    if task.kind == "translate":
        if not FLAGS["max_new_tokens"].present:
            FLAGS.max_new_tokens = task.target_length
        if not FLAGS["temperature"].present:
            FLAGS.temperature = 0.0
            if not FLAGS["beams"].present and task.beams > 1:
                FLAGS.beams = task.beams
    return None


def cleaned(config, texts):
    """Texts as those are that the run was trained on. Raises: UserError if nothing is left of one."""
    from nanoflax import data

    source = tasks.examples_of(config.data)
    found = [source.clean(text, "--prompt", data.DataReport()) for text in texts]
    if not all(found):
        raise UserError("--prompt is empty when it is cleaned as the run's data was")
    return found


def predict(config, model, params, tokenizer, labels, several, texts):
    """Print what the model says of each text: its classes with probabilities, or the tags of its words."""
    from nanoflax import data, parallel, tasks

    report = data.DataReport()
    rows = tasks.encode_texts(texts, config, tokenizer, labels, several, report, "--prompt")
    for line in report.lines():
        print(line, file=sys.stderr)
    mesh = parallel.make_mesh("-1,1,1")
    evaluator = tasks.Evaluator(model, config, tokenizer, labels, rows, mesh)
    for i, text in enumerate(evaluator.describe(parallel.put_params(params, mesh))):
        print("\n".join([f"--- {i + 1}"] * (len(texts) > 1) + [evaluator.task.show(text)]))


def restore(config, model, params, tokenizer, texts):
    """Print what the model makes of each text under the noise of its task."""
    from nanoflax import parallel, tasks

    rows = tasks.encode_texts(texts, config, tokenizer, place="--prompt")
    mesh = parallel.make_mesh("-1,1,1")
    evaluator = tasks.Evaluator(model, config, tokenizer, (), rows, mesh)
    print("\n".join(map(printed(), evaluator.describe(parallel.put_params(params, mesh)))))


def read_prompts(path):
    try:
        with open(path, encoding="utf-8") as f:
            lines = [line.rstrip("\n") for line in f]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_file={path}: {error}") from error
    if not (prompts := [line for line in lines if line]):
        raise UserError(f"--prompt_file={path} holds no prompt; write one on each line")
    return prompts


def interact(write):
    """Read a prompt, `write` what belongs to it, until an empty line or the end of input."""
    for prompt in typed():
        try:
            write([prompt])
        except UserError as error:
            print(error, file=sys.stderr)
    return 0


def chat(model, params, tokenizer):
    """Talk: every turn reads the whole conversation through the tokenizer's template."""
    messages = [{"role": "system", "content": FLAGS.system}] if FLAGS.system else []
    for text in typed():
        turn = [*messages, {"role": "user", "content": text}]
        try:
            (reply,) = generate(model, params, tokenizer, [""], [tokenizer.apply_chat(turn)])
        except UserError as error:
            print(error, file=sys.stderr)
            continue
        messages = [*turn, {"role": "assistant", "content": reply}]
    return 0


def typed():
    """The lines that a person types, until an empty one or the end of input."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if not line:
            return
        yield line


def generate(model, params, tokenizer, prompts, ids_of_prompts=None):
    """Print each prompt with its continuation: a single one as it comes, several in turn.
    Returns the continuations."""
    import jax

    from nanoflax.generate import beam_search, stream

    safe = printed()
    sources = ids_of_prompts or [tokenizers.prompt_ids(tokenizer, p, model.config.reads_source) for p in prompts]
    decoder = not model.config.reads_source
    room = model.config.context - (max(map(len, sources)) if decoder else 0)
    limit = FLAGS.max_new_tokens or max(1, min(100, room))
    ends = {*getattr(tokenizer, "stop_ids", ()), tokenizer.eos_id}
    stops = [s.replace("\\n", "\n") for s in FLAGS.stop if s]
    live = len(prompts) == 1
    ids, texts = [[] for _ in prompts], [""] * len(prompts)

    def show(i, ended):
        text, stopped = visible(tokenizer.decode(ids[i]), stops, ended)
        if live:
            print(safe(text[len(texts[i]) :]), end="", flush=True)
        texts[i] = text
        return stopped

    if live and decoder:
        print(safe(prompts[0]), end="", flush=True)
    stopped = [False] * len(prompts)
    if FLAGS.beams:
        pieces = [
            beam_search(
                model,
                params,
                sources,
                FLAGS.beams,
                limit,
                FLAGS.length_penalty,
                tokenizer.eos_id,
                vocab_size=tokenizer.vocab_size,
            )
        ]
    else:
        pieces = stream(
            model,
            params,
            sources,
            limit,
            FLAGS.temperature,
            FLAGS.top_k or None,
            FLAGS.top_p if FLAGS.top_p != 1 else None,
            FLAGS.min_p or None,
            FLAGS.repetition_penalty if FLAGS.repetition_penalty != 1 else None,
            jax.random.PRNGKey(FLAGS.seed),
            tokenizer.eos_id,
            tokenizer.vocab_size,
        )
    for new in pieces:
        for i, tokens in enumerate(new):
            if not stopped[i]:
                whole = list(itertools.takewhile(lambda token: token not in ends, tokens))
                ids[i] += whole
                stopped[i] = show(i, ended=False) or len(whole) < len(tokens)
        if all(stopped):
            break
    for i in range(len(prompts)):
        show(i, ended=True)
    print(
        ""
        if live
        else "\n".join(
            f"--- {i + 1}\n{safe(prompt * decoder + text)}" for i, (prompt, text) in enumerate(zip(prompts, texts))
        )
    )
    return texts


def printed():
    """What text goes through on its way out: control characters cannot drive a terminal."""
    from nanoflax import report

    return report.printable if sys.stdout.isatty() else str


def visible(text, stops, ended):
    """The part of a text that will not change, and whether a stop string has ended it.

    While more may come, what could begin a stop string, or is half a character, is held back.
    """
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        return text[: min(found)], True
    if ended:
        return text, False
    text = text.rstrip("\ufffd")
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held], False


if __name__ == "__main__":
    launch(main)
