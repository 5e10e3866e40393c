"""Five small tasks of different kinds, as files of lm-eval."""

import json
import pathlib

import yaml

ANIMALS = [
    ("A robin is a kind of", ["bird", "fish", "tree", "stone"], 0, "Robins sing early in the morning."),
    ("A salmon is a kind of", ["bird", "fish", "tree", "stone"], 1, "Salmon swim up the river to spawn."),
    ("An oak is a kind of", ["bird", "fish", "tree", "stone"], 2, "Oaks grow slowly; they live for centuries."),
    ("Granite is a kind of", ["bird", "fish", "tree", "stone"], 3, "Granite is hard, and so it lasts."),
    ("A sparrow is a kind of", ["bird", "fish", "tree", "stone"], 0, "Sparrows — small & brown — eat seeds."),
    ("A trout is a kind of", ["bird", "fish", "tree", "stone"], 1, "The trout's skin has spots.\n\nIt hides."),
]
SENTENCES = [
    ("The capital of France is", "Paris"),
    ("Water freezes at zero degrees", "Celsius"),
    ("The opposite of hot is", "cold"),
    ("Monday, Tuesday,", "Wednesday"),
]


NAMES = ["choice_of_letters", "choice_of_texts", "last_word", "whole_texts", "written_answer"]


def write(folder: pathlib.Path, long_text: str, few: int = 2) -> None:
    """Write the data and the YAML files of the tasks."""
    lines = {
        "animals": [dict(question=q, options=o, answer=a, fact=f) for q, o, a, f in ANIMALS],
        "sentences": [dict(begin=begin, end=end) for begin, end in SENTENCES],
        "texts": [{"text": ANIMALS[5][3]}, {"text": "One short text."}, {"text": long_text}],
    }
    for name, records in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def task(name, data, output_type, metrics, **more):
        files = {"test": str(folder / f"{data}.jsonl"), "train": str(folder / f"{data}.jsonl")}
        found = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}}
        found |= {"output_type": output_type, "test_split": "test", "metric_list": [{"metric": m} for m in metrics]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(found | more))

    letters = "{% for option in options %}{{ 'ABCD'[loop.index0] }}. {{ option }}\n{% endfor %}"
    choice = dict(doc_to_target="answer", fewshot_split="train")
    asked = dict(doc_to_text=f"{{{{question}}}}?\n{letters}Answer:", doc_to_choice=[*"ABCD"], num_fewshot=few)
    task("choice_of_letters", "animals", "multiple_choice", ["acc"], **choice, **asked)
    asked = dict(doc_to_text="{{question}}", doc_to_choice="options")
    task("choice_of_texts", "animals", "multiple_choice", ["acc", "acc_norm"], **choice, **asked)
    asked = dict(doc_to_text="{{begin}}", doc_to_target=" {{end}}")
    task("last_word", "sentences", "loglikelihood", ["perplexity", "acc"], **asked)
    asked = dict(doc_to_text="", doc_to_target="{{text}}")
    metrics = ["word_perplexity", "byte_perplexity", "bits_per_byte"]
    task("whole_texts", "texts", "loglikelihood_rolling", metrics, **asked)
    asked = dict(doc_to_text="{{begin}}", doc_to_target="{{end}}")
    written = {"until": ["\n", ".", ","], "max_gen_toks": 12, "do_sample": False}
    steps = [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}]
    more = dict(generation_kwargs=written, filter_list=[{"name": "first_word", "filter": steps}])
    task("written_answer", "sentences", "generate_until", ["exact_match"], **asked, **more)
