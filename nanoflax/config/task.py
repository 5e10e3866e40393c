"""Settings of tasks: one dataclass for each kind."""

import dataclasses
from typing import ClassVar, NamedTuple

from nanoflax.config.fields import field, kinds
from nanoflax.config.generation import COLDEST

NOISES = ("spans", "infilling", "none")
TASK_PACKINGS = ("none", "best_fit")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
BLEU_TOKENIZERS = ("13a", "intl", "zh", "char", "none")  # sacrebleu's that need no other package


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Next-token prediction on windows of a corpus, by experiments.pretrain."""

    section: ClassVar[str] = "task"
    kind: ClassVar[str] = "pretrain"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleTask:
    """Settings of all tasks of finetune."""

    section: ClassVar[str] = "task"
    kind: ClassVar[str]
    length: int = field(128, "Largest length of a text or source, with special tokens.", unit="tokens", at_least=4)
    truncate: bool = field(True, "Cut longer examples (split longer texts) and count them; false: report an error.")
    show: int = field(3, "Number of validation examples and answers to print at the end.", at_least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelTask(ExampleTask):
    """A task with classes."""

    class_weights: str = field("", "Loss weights: balanced, or such as name=2,other=0.5; other classes have 1.")

    def problems(self) -> list[str]:
        try:
            if self.class_weights not in ("", "balanced"):
                read_class_weights(self.class_weights)
        except ValueError:
            return [
                f"task.class_weights={self.class_weights!r} must be empty, balanced, or positive weights as "
                "name=2,other=0.5"
            ]
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetTask(ExampleTask):
    """A task whose answers are generated token by token."""

    target_length: int = field(128, "Largest length of a target, with special tokens.", unit="tokens", at_least=4)
    beams: int = field(1, "Beams for generated answers in evaluation; 1: greedy.", at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShiftTask(ExampleTask):
    """A task whose texts may be shifted: some tokens are inserted, dropped or rotated."""

    max_shift: int = field(0, "Largest shift in tokens; above 0, shifted examples are evaluated too.", at_least=0)
    shift_probability: float = field(0.0, "Share of training examples that are shifted.", within="[0, 1]")

    def problems(self) -> list[str]:
        if self.shift_probability and not self.max_shift:
            return [f"task.shift_probability={self.shift_probability} needs task.max_shift of at least 1"]
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedTask(ExampleTask):
    """A task whose batches may hold several examples in a row."""

    packing: str = field(
        "none",
        "best_fit: fill training rows of task.length tokens with examples that cannot see each other.",
        choices=TASK_PACKINGS,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(LabelTask):
    """The class, or classes, of a text."""

    kind: ClassVar[str] = "classify"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tag(LabelTask):
    """A tag for each word."""

    kind: ClassVar[str] = "tag"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Translate(TargetTask, ShiftTask):
    """A target text for a source text; only sources are shifted."""

    kind: ClassVar[str] = "translate"
    bleu_tokenize: str = field("13a", "Tokenizer of BLEU; zh or char without spaces.", choices=BLEU_TOKENIZERS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruct(PackedTask):
    """The assistant's replies in a chat."""

    kind: ClassVar[str] = "instruct"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModel(PackedTask, ShiftTask):
    """Next-token prediction on examples."""

    kind: ClassVar[str] = "language_model"

    def problems(self) -> list[str]:
        clash = (
            f"task.packing={self.packing!r} does not work with task.shift_probability={self.shift_probability}, which "
            "changes the lengths of texts; set one of them to its default"
        )
        return super().problems() + [clash] * (self.packing != "none" and self.shift_probability > 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLM(ExampleTask):
    """Prediction of masked tokens, as in BERT."""

    kind: ClassVar[str] = "masked_lm"
    noise_rate: float | None = field(None, "Share of tokens to predict; none: 0.15.", within="(0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoise(TargetTask):
    """Reconstruction of a text from its corrupted form."""

    kind: ClassVar[str] = "denoise"
    noise: str = field("spans", "T5's spans, BART's infilling, or none: an autoencoder.", choices=NOISES)
    noise_rate: float | None = field(None, "Share of tokens hidden; none: 0.15, infilling 0.3.", within="(0, 1)")
    noise_span: float = field(3.0, "Mean length of a hidden span.", unit="tokens", at_least=1)

    def problems(self) -> list[str]:
        return [
            f"task.{name}={getattr(self, name)!r} has no effect with task.noise='none'"
            for name in ("noise_rate", "noise_span")
            if self.noise == "none" and getattr(self, name) != getattr(Denoise, name)
        ]


class PreferenceLoss(NamedTuple):
    """What a loss of `Prefer` compares, and the defaults of its settings."""

    reference: bool  # with the log-probabilities of the model before training
    beta: float
    margin: float = 0.0
    nll_weight: float = 0.0


PREFERENCE_LOSSES = {
    "dpo": PreferenceLoss(True, 0.1),  # Rafailov et al. 2023, equation 7
    "dpo_norm": PreferenceLoss(True, 5.0),  # Lambert et al. 2024 (Tulu 3), section 5.1.2
    "ipo": PreferenceLoss(True, 0.1),  # Azar et al. 2023, equation 17
    "robust": PreferenceLoss(True, 0.1),  # Chowdhury et al. 2024, equation 12
    "simpo": PreferenceLoss(False, 2.0, margin=1.0),  # Meng et al. 2024, equation 6
    "orpo": PreferenceLoss(False, 0.1, nll_weight=1.0),  # Hong et al. 2024, equation 6
}
_NOISY_LOSSES = ("dpo", "dpo_norm", "robust", "simpo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairTask(ExampleTask):
    """A task on pairs of a better and a worse answer."""

    chat: bool | None = field(
        None, "true: a text is the message of a user, its answers are replies; none: as the data have them."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefer(PairTask):
    """The better of two answers becomes more probable (DPO and its kin)."""

    kind: ClassVar[str] = "preference"
    loss: str = field(
        "dpo",
        "Loss of a pair: dpo (conservative with label_noise), dpo_norm (of means over tokens), ipo, robust (dpo "
        "without the bias of label_noise), or simpo and orpo, without a reference.",
        choices=PREFERENCE_LOSSES,
    )
    beta: float | None = field(
        None, "Scale of rewards (ipo: tau, orpo: lambda); none: 0.1, dpo_norm 5, simpo 2.", above=0
    )
    label_noise: float = field(0.0, "Probability that the better answer is called the worse.", within="[0, 0.5)")
    margin: float | None = field(None, "simpo: gamma, the reward difference to reach; none: 1.", at_least=0)
    nll_weight: float | None = field(
        None, "Weight of the better answer's mean cross entropy in the loss; none: 0, orpo 1.", at_least=0
    )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the model before training."""
        return self.loss in PREFERENCE_LOSSES and PREFERENCE_LOSSES[self.loss].reference

    def problems(self) -> list[str]:
        found, loss = [], f"task.loss={self.loss!r}"
        if self.label_noise and self.loss not in _NOISY_LOSSES:
            found.append(f"task.label_noise={self.label_noise} is for {', '.join(_NOISY_LOSSES)}, not {loss}")
        if self.loss == "robust" and not self.label_noise:
            found.append(f"{loss} needs task.label_noise above 0; without noise it is dpo")
        if self.margin is not None and self.loss != "simpo":
            found.append(f"task.margin={self.margin} is for task.loss='simpo', not {self.loss!r}")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModel(PairTask):
    """A score of a text: larger for the better of two answers."""

    kind: ClassVar[str] = "reward"
    center: float = field(0.0, "Weight of (the sum of both scores)^2, so that scores are near 0.", at_least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillTask(PackedTask):
    """A task whose targets are the probabilities of another model, the teacher."""

    teacher: str = field("", "The teacher: a workdir, Transformers directory, hub name or .gguf file.")
    teacher_dtype: str = field(
        "float32", "Dtype of the teacher's parameters; bfloat16 halves their memory.", choices=("float32", "bfloat16")
    )
    start: str = field(
        "random",
        "Start of a new student; teacher: the teacher's parameters of the same path and shape (its first layers).",
        choices=("random", "teacher"),
    )
    divergence: str = field(
        "forward_kl",
        "forward_kl: KL(teacher, student); reverse_kl: KL(student, teacher); jsd: the generalised Jensen-Shannon "
        "divergence (GKD).",
        choices=DIVERGENCES,
    )
    beta: float = field(0.5, "jsd: the teacher's share in the mixture of both.", within="(0, 1)")
    temperature: float = field(1.0, "Divides the logits of both in the divergence.", at_least=COLDEST)
    mix: float = field(0.0, "Share of the plain cross entropy in the objective.", within="[0, 1]")
    on_policy: float = field(
        0.0, "Share of the steps that train on continuations by the student itself (GKD).", within="[0, 1]"
    )
    new_tokens: int = field(
        64,
        "on_policy: largest length of a continuation; a chat without room for it is trained as it is.",
        unit="tokens",
        at_least=1,
    )

    def problems(self) -> list[str]:
        found, prompt = [], getattr(self, "prompt_length", 1)
        if self.divergence != "jsd" and self.beta != DistillTask.beta:
            found.append(f"task.beta={self.beta} has no effect with task.divergence={self.divergence!r}; it is for jsd")
        if self.on_policy and self.packing != "none":
            found.append(f"task.on_policy={self.on_policy} does not work with task.packing={self.packing!r}")
        if self.on_policy and prompt + self.new_tokens > self.length:
            found.append(
                f"task.new_tokens={self.new_tokens} and a prompt of {prompt} must be at most task.length={self.length}"
            )
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(DistillTask):
    """A teacher's probabilities of the next token of texts."""

    kind: ClassVar[str] = "distill"
    prompt_length: int = field(32, "on_policy: tokens of a text that are continued.", unit="tokens", at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillChat(DistillTask):
    """A teacher's probabilities of the next token of the assistant's replies in chats."""

    kind: ClassVar[str] = "distill_chat"


NORMALIZATIONS = ("grpo", "dr_grpo", "dapo")
REWARD_SCALES = ("group", "batch", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO(TargetTask):
    """Completions with larger rewards than others of their prompt become more probable (Shao et al. 2024)."""

    kind: ClassVar[str] = "grpo"
    chat: bool | None = field(
        None, "true: a text is the message of a user, a completion is the reply; none: as the data have them."
    )
    reward: str = field(
        "exact",
        "exact, regex:PATTERN, tests, tests:prompt, python:MODULE:FUNCTION, python:FILE.py:FUNCTION or model:SOURCE (a "
        "reward model).",
    )
    reward_seconds: float = field(10.0, "Longest time of a reward function.", unit="seconds", above=0)
    group: int = field(8, "Completions of a prompt; train.batch_size counts completions.", at_least=2)
    temperature: float = field(1.0, "Temperature of completions.", at_least=COLDEST)
    top_k: int = field(0, "Draw from the K most probable tokens; 0: all.", at_least=0)
    top_p: float = field(1.0, "Draw from the fewest tokens with this total probability.", within="(0, 1]")
    min_p: float = field(0.0, "Draw from tokens with this share of the highest probability.", within="[0, 1]")
    beta: float = field(0.0, "Weight of the KL divergence from the model before training.", at_least=0)
    clip_low: float = field(0.2, "The gradient of a token ends at a ratio of 1 - this.", within="(0, 1)")
    clip_high: float = field(0.2, "The gradient of a token ends at a ratio of 1 + this.", above=0)
    normalization: str = field(
        "grpo",
        "Mean of the loss: grpo (over rows, of the mean over a row's tokens), dr_grpo (sum over target_length) or dapo "
        "(over all tokens).",
        choices=NORMALIZATIONS,
    )
    scale_rewards: str = field(
        "group", "What divides advantages: the standard deviation of the group or batch.", choices=REWARD_SCALES
    )
    updates: int = field(1, "Updates from each batch of completions.", at_least=1)
    mask_truncated: bool = field(False, "Completions without an end get no gradient.")
    attempts: int = field(0, "Completions of a validation problem for pass_at_k; 0: none.", at_least=0)


AnyTask = (
    Classify
    | Tag
    | Translate
    | Instruct
    | LanguageModel
    | MaskedLM
    | Denoise
    | Prefer
    | RewardModel
    | Distill
    | DistillChat
    | GRPO
    | Pretrain
)  # fmt: skip
TASK_KINDS = kinds(AnyTask)  # {kind: class}


def read_class_weights(text: str) -> dict[str, float]:
    """{class name: weight} from a text such as "name=2,other=0.5". Raises: ValueError."""
    weights = {}
    for part in text.split(","):
        name, _, weight = part.rpartition("=")
        weights[name.strip()] = float(weight)
        if not name.strip() or not 0 < weights[name.strip()] < float("inf"):
            raise ValueError(part)
    return weights
