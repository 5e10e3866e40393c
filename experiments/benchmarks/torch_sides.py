"""The same work in PyTorch: eager, and with torch.compile. On a GPU in bfloat16, else on CPU in float32.

Training: a GPT written as nanoGPT is (fused qkv, scaled_dot_product_attention, fused AdamW; on a GPU under autocast
and with a padded vocabulary). In eager mode it is faster than Transformers' GPT-2 (1.2 times at the shape small, two
busy cores), so nanoflax is compared with it. Decoding and encoding: Transformers.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from experiments.benchmarks.sides import ENCODED_TOKENS, PROMPT_TOKENS, Job, Side
from nanoflax.config import ModelConfig

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


class Block(nn.Module):
    """A block of GPT-2 with its norms before attention and MLP."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads = c.heads
        self.norm_attention, self.norm_mlp = (nn.LayerNorm(c.dim, bias=c.bias) for _ in range(2))
        self.qkv, self.out = nn.Linear(c.dim, 3 * c.dim, c.bias), nn.Linear(c.dim, c.dim, c.bias)
        self.up, self.down = nn.Linear(c.dim, c.F, c.bias), nn.Linear(c.F, c.dim, c.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, D = x.shape
        parts = self.qkv(self.norm_attention(x)).split(D, 2)
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 with a tied head; returns the mean cross entropy of the targets."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed, self.position_embed = nn.Embedding(c.vocab_size, c.dim), nn.Embedding(c.context, c.dim)
        self.blocks = nn.Sequential(*(Block(c) for _ in range(c.layers)))
        self.norm = nn.LayerNorm(c.dim, bias=c.bias)
        for name, weight in self.named_parameters():
            if weight.ndim > 1:
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * c.layers) if last else 0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.position_embed.weight[: tokens.shape[1]]
        logits = F.linear(self.norm(self.blocks(x)), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def torch_side(job: Job, compiled: bool = False) -> Side:
    """PyTorch in eager mode, or the same module under torch.compile."""
    logging.set_verbosity_error()
    torch.manual_seed(0)
    facts, work = {"train": _train, "decode": _decode, "encode": _encode}[job.kind](job, compiled)

    def run():
        work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):  # torch.compile compiles in the first round
        run()
    return facts | {"cpu": DEVICE == "cpu"}, run


def _train(job: Job, compiled: bool) -> Side:
    c, B = job.decoder, job.sizes[-1]
    if DEVICE == "cuda":  # products with a multiple of 64 are faster
        c = dataclasses.replace(c, vocab_size=-(-c.vocab_size // 64) * 64)
    model = GPT(c).to(DEVICE)
    matrices, rest = ([p for p in model.parameters() if (p.ndim > 1) == big] for big in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(0, job.decoder.vocab_size, (B, c.context), device=DEVICE)
    loss_of = torch.compile(model) if compiled else model

    def run():
        for _ in range(job.steps):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, DTYPE, enabled=DTYPE != torch.float32):
                loss = loss_of(tokens, tokens)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return {"parameters": sum(p.numel() for p in model.parameters())}, run


def _decode(job: Job, compiled: bool) -> Side:
    c = job.decoder
    config = GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.context, n_layer=c.layers, n_embd=c.dim, n_head=c.heads,
        bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = GPT2LMHeadModel(config).to(DEVICE, DTYPE).eval()  # type: ignore  # untyped
    new = min(job.new_tokens, c.context - PROMPT_TOKENS)
    prompts = torch.randint(0, c.vocab_size, (job.batch_size or 1, PROMPT_TOKENS), device=DEVICE)
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    def run():
        with torch.no_grad():
            model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)  # type: ignore  # untyped

    return {}, run


def _encode(job: Job, compiled: bool) -> Side:
    c = job.encoder
    config = BertConfig(num_hidden_layers=c.layers, hidden_size=c.dim, num_attention_heads=c.heads,
                        intermediate_size=c.F)  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).to(DEVICE, DTYPE).eval()  # type: ignore  # untyped
    tokens = torch.randint(0, c.vocab_size, (job.batch_size or 8, ENCODED_TOKENS), device=DEVICE)
    forward = torch.compile(model) if compiled else model

    def run():
        with torch.no_grad():
            for _ in range(job.steps):
                forward(tokens)

    return {}, run
