"""Serve a model over HTTP: OpenAI's API, and a page to chat.

    python -m experiments.serve --model=SmolLM2.gguf --port=8000
    python -m experiments.serve --workdir=runs/x --slots=4
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello"}]}'

The addresses: / (the page), /v1/models, /v1/completions, /v1/chat/completions, /healthz, /metrics (for Prometheus)
and /openapi.json, which says of each field of a request whether it is computed, not used or refused. An encoder, or a
model with a bottleneck, also has /v1/embeddings: vectors of texts. With --api_key clients must send the key, also for
/metrics, but not for the page, /healthz and /openapi.json.

A text can be bound to a rule, as in vLLM: {"structured_outputs": {"regex": "[a-z]+"}}, or choice, json or grammar.
Settings that a request does not give are those of the model's generation_config.json. A request for more new tokens
than --max_tokens, or than there is room for in the context, gets as many as there is room for; its finish_reason is
length. Ctrl-C or SIGTERM ends the server: it finishes the texts that have begun and refuses the others.
"""

import dataclasses
import os
import sys
from typing import Any

from absl import flags

import nanoflax
from experiments.flags import launch
from experiments.source import check_source, define_source, open_source

FLAGS = flags.FLAGS
define_source()
flags.DEFINE_string("host", "127.0.0.1", "address to listen on; 0.0.0.0: every network of this machine")
flags.DEFINE_integer("port", 8000, "port to listen on; 0: a free one", 0, 65535)
flags.DEFINE_integer("slots", 8, "texts that are generated together", 1)
flags.DEFINE_integer("context", None, "most tokens of a text with its prompt; default: the model's, at most 4096", 2)
flags.DEFINE_integer("queue", 64, "most texts that wait for a slot; more are refused", 0)
flags.DEFINE_integer("max_tokens", 1024, "most new tokens of a text; a request for more gets so many", 1)
flags.DEFINE_integer("max_body", 4 * 2**20, "most bytes of a request", 1024)
flags.DEFINE_string(
    "api_key", "", "key that clients must send; default: NANOFLAX_API_KEY of the environment, else none"
)
flags.DEFINE_string("name", "", "name of the model in the API; default: the last part of its path")


def main():
    names = [field.name for field in dataclasses.fields(nanoflax.serve.Settings)]
    given: dict[str, Any] = {name: FLAGS[name].value for name in names}
    settings = nanoflax.serve.Settings(**given)
    if not settings.api_key:
        settings = dataclasses.replace(settings, api_key=os.environ.get("NANOFLAX_API_KEY", ""))
    check_source()
    nanoflax.serve.check_installed()
    listener = nanoflax.serve.listen(FLAGS.host, FLAGS.port)
    nanoflax.runs.setup_jax()
    run = open_source()
    own = nanoflax.runs.model_settings(run.model.config.generation)
    if beams := own.pop("beams", None):
        print(f"generation_config.json has num_beams={beams}; the server does no beam search", file=sys.stderr)
    if used := ", ".join(f"{name}={value}" for name, value in own.items() if name != "length_penalty"):
        print(f"unless a request has others, set by generation_config.json: {used}", file=sys.stderr)
    if FLAGS.host not in nanoflax.serve.LOCAL and not settings.api_key:
        print("everyone who reaches this machine can use the server; --api_key prevents this", file=sys.stderr)

    print(f"loading and compiling {run.source} ...", file=sys.stderr)

    def show(url):
        print(f"{run.source} at {url} (the page; the API is at {url}/v1). Ctrl-C ends the server.", flush=True)

    nanoflax.serve.serve(run, listener, settings, show)


if __name__ == "__main__":
    launch(main)
