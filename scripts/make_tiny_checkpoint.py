#!/usr/bin/env python
"""Writes a tiny DeepSeek-V3 whose outputs depend on attention, with an MTP layer; safetensors.

    python scripts/make_tiny_checkpoint.py DIR            the same weights for the same seed
    python scripts/make_tiny_checkpoint.py DIR --check    and show that they depend on the context

With weights as SGLang's ``--load-format dummy`` makes them, every token is as likely as any other
whatever attention returns, so that any two backends agree. Here scores have a standard deviation of
about 2.5, which leaves a handful of tokens with most of the weight, in short contexts and long, and
what attention returns weighs as much as the token itself. Half of the next tokens follow from the
present one alone (a fixed permutation), so that the MTP layer, which sees little else, drafts
tokens that are accepted about as often as not.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

import torch
from sglang_eval.model import DEEPSEEK_V3

CONFIG: dict[str, Any] = DEEPSEEK_V3 | {
    "vocab_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 3,  # every layer; the MTP layer has experts, as SGLang wants it
    "q_lora_rank": 384,
    "max_position_embeddings": 65536,
    "aux_loss_alpha": 0.001,
    "num_nextn_predict_layers": 1,
}
HEADS: int = CONFIG["num_attention_heads"]
SCORE_STD = 2.5
BIGRAM = 0.7  # weight of the permutation in the output layer
OUTPUT_STD = 4.0  # of the logits that do not come from it


class Weights:
    """Random matrices by name, each of a given gain: variance of output over that of input."""

    def __init__(self, seed: int, heads: int) -> None:
        self.heads = heads
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, torch.Tensor] = {}

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def linear(self, name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        self.tensors[f"{name}.weight"] = self.random(rows, columns) * gain / columns**0.5

    def ones(self, name: str, size: int) -> None:
        self.tensors[f"{name}.weight"] = torch.ones(size)

    def attention(self, name: str, gain: float) -> None:
        c = CONFIG
        hidden, heads, rank = c["hidden_size"], self.heads, c["kv_lora_rank"]
        nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        self.linear(f"{name}.q_a_proj", c["q_lora_rank"], hidden)
        self.ones(f"{name}.q_a_layernorm", c["q_lora_rank"])
        self.linear(f"{name}.q_b_proj", heads * (nope + rope), c["q_lora_rank"], SCORE_STD)
        self.linear(f"{name}.kv_a_proj_with_mqa", rank + rope, hidden)
        self.ones(f"{name}.kv_a_layernorm", rank)
        self.linear(f"{name}.kv_b_proj", heads * (nope + value), rank)
        self.linear(f"{name}.o_proj", hidden, heads * value, gain)

    def mlp(self, name: str, size: int, gain: float) -> None:
        hidden = CONFIG["hidden_size"]
        self.linear(f"{name}.gate_proj", size, hidden)
        self.linear(f"{name}.up_proj", size, hidden)
        self.linear(f"{name}.down_proj", hidden, size, gain)

    def layer(self, name: str, gain: float) -> None:
        for norm in ("input_layernorm", "post_attention_layernorm"):
            self.ones(f"{name}.{norm}", CONFIG["hidden_size"])
        self.attention(f"{name}.self_attn", gain)

    def output(self, embedding: torch.Tensor) -> None:
        """Output layer: random, plus a row that points at the token before it in a permutation."""
        vocabulary, hidden = embedding.shape
        permutation = torch.randperm(vocabulary, generator=self.generator)
        head = self.random(vocabulary, hidden) * OUTPUT_STD / hidden**0.5
        head[permutation] += BIGRAM * embedding / hidden**0.5
        self.tensors["lm_head.weight"] = head


def make_weights(seed: int, heads: int = HEADS) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint, bf16 but for the router's bias."""
    weights = Weights(seed, heads)
    layers, hidden = CONFIG["num_hidden_layers"], CONFIG["hidden_size"]
    embedding = weights.random(CONFIG["vocab_size"], hidden)
    weights.tensors["model.embed_tokens.weight"] = embedding
    weights.output(embedding)
    weights.ones("model.norm", hidden)
    for layer in range(layers):
        weights.layer(f"model.layers.{layer}", gain=1.5)
        weights.mlp(f"model.layers.{layer}.mlp", CONFIG["intermediate_size"], gain=0.5)
    # The MTP layer: the next token's embedding goes through, little is added to it.
    name = f"model.layers.{layers}"
    weights.layer(name, gain=0.3)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        weights.ones(f"{name}.{norm}", hidden)
    identity = torch.eye(hidden)
    mixed = weights.random(hidden, hidden) * 0.3 / hidden**0.5
    weights.tensors[f"{name}.eh_proj.weight"] = torch.cat([identity, mixed], dim=1)
    weights.tensors[f"{name}.embed_tokens.weight"] = embedding.clone()
    weights.tensors[f"{name}.shared_head.head.weight"] = weights.tensors["lm_head.weight"].clone()
    weights.linear(f"{name}.mlp.gate", CONFIG["n_routed_experts"], hidden)
    bias = f"{name}.mlp.gate.e_score_correction_bias"
    for expert in range(CONFIG["n_routed_experts"]):
        expert_name = f"{name}.mlp.experts.{expert}"
        weights.mlp(expert_name, CONFIG["moe_intermediate_size"], gain=0.2)
    weights.mlp(f"{name}.mlp.shared_experts", CONFIG["moe_intermediate_size"], gain=0.2)
    tensors = {key: value.bfloat16().contiguous() for key, value in weights.tensors.items()}
    tensors[bias] = torch.zeros(CONFIG["n_routed_experts"])
    return tensors


def write(directory: pathlib.Path, seed: int, heads: int = HEADS) -> None:
    """Write ``config.json`` and ``model.safetensors``."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    save_file(make_weights(seed, heads), directory / "model.safetensors", metadata={"format": "pt"})
    config = CONFIG | {"num_attention_heads": heads, "num_key_value_heads": heads}
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")


@torch.no_grad()
def context_dependence(directory: pathlib.Path) -> dict[str, float]:
    """How much the next token's distribution depends on other tokens than the last one.

    Runs Hugging Face's model on the CPU. The same last token follows contexts of other tokens;
    only attention can tell them apart.

    Returns
    -------
    dict
        ``divergence``: mean Kullback-Leibler divergence between two contexts, in nats;
        ``entropy``: mean entropy of a prediction; ``bigram``: share of predictions that are those
        of the permutation; ``dummy``: the divergence with weights as ``--load-format dummy``
        makes them, which this must be far above.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    contexts = torch.randint(2, CONFIG["vocab_size"], (8, 65), generator=generator)
    contexts[:, -1] = 7

    def divergence_and_entropy(network: Any) -> tuple[float, float, torch.Tensor]:
        logits = network(contexts).logits[:, -1].double().log_softmax(-1)
        other = logits.roll(1, 0)
        divergence = (logits.exp() * (logits - other)).sum(-1).mean().item()
        return divergence, -(logits.exp() * logits).sum(-1).mean().item(), logits.argmax(-1)

    divergence, entropy, tokens = divergence_and_entropy(model)
    head = model.get_output_embeddings().weight
    bigram = (head @ model.get_input_embeddings().weight[7]).argmax()
    dummy = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).float().eval()
    for parameter in dummy.parameters():
        parameter.uniform_(-1e-3, 1e-3, generator=generator)
    return {
        "divergence": divergence,
        "entropy": entropy,
        "bigram": (tokens == bigram).float().mean().item(),
        "dummy": divergence_and_entropy(dummy)[0],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="needs transformers; half a minute")
    options = parser.parse_args(arguments)
    write(options.directory, options.seed)
    print(f"written: {options.directory}")
    if not options.check:
        return 0
    found = context_dependence(options.directory)
    print(", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    if found["divergence"] < 0.5 or found["dummy"] > found["divergence"] / 100:
        print("the outputs do not depend on the context as they should", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
