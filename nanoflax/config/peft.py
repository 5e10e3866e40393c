"""Settings of parameter-efficient fine-tuning: one dataclass for each kind of adapter."""

import dataclasses
import re
from typing import ClassVar, Self

from nanoflax.config.fields import field, kinds


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The setting of all kinds: which parameters are trained."""

    section: ClassVar[str] = "peft"
    kind: ClassVar[str]
    trained: str = field(
        "",
        "Parameters to train, separated by commas: all, adapters, head, biases, last:N (the last N blocks and all "
        "after them) or a pattern of paths. Empty: the adapters, or all parameters if there are no adapters.",
    )

    def problems(self) -> list[str]:
        return _pattern_problems("trained", self.trained)

    def for_steps(self, steps: int) -> Self:
        """This setting with its open fields (none) filled for a run of `steps`."""
        return self

    def first_best_step(self, steps: int) -> int:
        """The first step of a run of `steps` that may be its best: 0, unless the model still shrinks."""
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullFineTuning(PeftConfig):
    """No adapters: all parameters of the model are trained, or those in `trained`."""

    kind: ClassVar[str] = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(PeftConfig):
    """Adapters that add a low-rank matrix to the kernel of a Linear."""

    targets: str = field("query|key|value|out|up|gate|down", "Pattern for the end of an adapted Linear's path.")
    rank: int = field(8, "Rank of an added matrix; for adalora the initial rank.", at_least=1)
    alpha: float = field(16.0, "The added matrices are scaled by alpha / rank.", above=0)
    quantize: str = field(
        "none",
        "Pack the matrices that are not trained in 8 or 4 bits, as QLoRA (Dettmers et al. 2023) does.",
        choices=("none", "int8", "int4"),
    )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def problems(self) -> list[str]:
        return super().problems() + _pattern_problems("targets", self.targets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(LowRank):
    """LoRA (Hu et al. 2021)."""

    kind: ClassVar[str] = "lora"
    rank_stabilized: bool = field(False, "Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023).")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank ** (0.5 if self.rank_stabilized else 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """LoRA on the direction of each kernel column, and a trained magnitude (Liu et al. 2024)."""

    kind: ClassVar[str] = "dora"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoRA(LowRank):
    """Low-rank adapters whose ranks are pruned to a budget (Zhang et al. 2023)."""

    kind: ClassVar[str] = "adalora"
    target_rank: int = field(4, "Mean rank of a matrix at the end.", at_least=1)
    warmup_steps: int | None = field(
        None, "Steps before the first rank is pruned; none: 100, in a short run fewer.", at_least=0
    )
    final_steps: int | None = field(
        None, "Steps after the last rank is pruned; none: 100, in a short run fewer.", at_least=0
    )
    orthogonality: float = field(0.1, "Weight of the penalty that keeps the factors orthogonal.", at_least=0)
    beta1: float = field(0.85, "Decay of the moving average of the sensitivities.", within="(0, 1)")
    beta2: float = field(0.85, "Decay of the moving average of their uncertainties.", within="(0, 1)")

    def schedule(self, steps: int) -> tuple[int, int]:
        """(warmup_steps, final_steps) of a run of `steps`: open ones (none) leave at least one step for pruning."""
        given = [n for n in (self.warmup_steps, self.final_steps) if n is not None]
        longest = max(0, steps - 1 - sum(given)) // max(1, 2 - len(given))
        warmup, final = (min(100, longest) if n is None else n for n in (self.warmup_steps, self.final_steps))
        return warmup, final

    def for_steps(self, steps: int) -> Self:
        warmup, final = self.schedule(steps)
        return dataclasses.replace(self, warmup_steps=warmup, final_steps=final)

    def first_best_step(self, steps: int) -> int:
        return steps - self.schedule(steps)[1]  # before it, there are more ranks than the budget

    def problems(self) -> list[str]:
        found = super().problems()
        if self.target_rank > self.rank:
            found.append(f"peft.target_rank={self.target_rank} must be at most peft.rank={self.rank}")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Houlsby(PeftConfig):
    """Small MLPs after attention and MLP (Houlsby et al. 2019)."""

    kind: ClassVar[str] = "houlsby"
    bottleneck: int = field(64, "Hidden size of an adapter.", at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pfeiffer(PeftConfig):
    """Small MLPs after the MLP (Pfeiffer et al. 2020)."""

    kind: ClassVar[str] = "pfeiffer"
    bottleneck: int = field(64, "Hidden size of an adapter.", at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuning(PeftConfig):
    """Trained embeddings before the text (Lester et al. 2021)."""

    kind: ClassVar[str] = "prompt"
    virtual_tokens: int = field(20, "Virtual tokens before the text.", at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuning(PeftConfig):
    """Trained keys and values before those of the text, in every attention (Li and Liang 2021)."""

    kind: ClassVar[str] = "prefix"
    virtual_tokens: int = field(20, "Virtual tokens before the text.", at_least=1)


AnyPeft = FullFineTuning | LoRA | DoRA | AdaLoRA | Houlsby | Pfeiffer | PromptTuning | PrefixTuning
PEFT_KINDS = kinds(AnyPeft)  # {kind: class}


def _pattern_problems(name, pattern):
    try:
        re.compile(pattern)
    except re.error as error:
        return [f"peft.{name}={pattern!r} is not a regular expression: {error}"]
    return []
