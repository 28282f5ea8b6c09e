"""The gpt_moe model: GPT-2 blocks in which every FFN is a mixture of experts.

Pre-LN blocks, learned positions, tanh-GELU, softmax router without bias,
top-1.  The chosen expert's output is multiplied by its router probability and
added to the residual stream.  No token is ever dropped.

Parameter names and shapes are those of the exported model.safetensors.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    vocab_size: int = 1024
    n_positions: int = 512
    n_embd: int = 96
    n_layer: int = 8
    n_head: int = 4
    n_inner: int = 384
    num_experts: int = 16
    layer_norm_epsilon: float = 1e-5
    bos_token_id: int = 0
    eos_token_id: int = 0

    def to_json(self):
        return {"model_type": "gpt_moe", **asdict(self), "top_k": 1,
                "tie_word_embeddings": True, "norm_topk_prob": None}


class ExpertFFN(torch.autograd.Function):
    """y[rows of e] = gelu(x[rows of e] w1[e]^T + b1[e]) w2[e]^T + b2[e]

    The rows of `x` are sorted by expert, `counts[e]` of them for expert `e`.
    Written out by hand because autograd over sixteen slices of one parameter
    would build sixteen full-sized gradients of it.
    """

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, counts):
        h = x.new_empty(x.shape[0], w1.shape[1])
        y = torch.empty_like(x)
        parts = list(zip(x.split(counts), h.split(counts), y.split(counts)))
        for e, (xe, he, _) in enumerate(parts):
            torch.addmm(b1[e], xe, w1[e].T, out=he)
        a = F.gelu(h, approximate="tanh")
        for e, (ae, (_, _, ye)) in enumerate(zip(a.split(counts), parts)):
            torch.addmm(b2[e], ae, w2[e].T, out=ye)
        ctx.save_for_backward(x, h, a, w1, w2)
        ctx.counts = counts
        return y

    @staticmethod
    def backward(ctx, dy):
        x, h, a, w1, w2 = ctx.saved_tensors
        counts = ctx.counts
        dy = dy.contiguous()
        da, dx = torch.empty_like(a), torch.empty_like(x)
        dw1, dw2 = torch.empty_like(w1), torch.empty_like(w2)
        db1, db2 = x.new_empty(w1.shape[:2]), x.new_empty(w2.shape[:2])
        for e, (dye, ae, dae) in enumerate(zip(
                dy.split(counts), a.split(counts), da.split(counts))):
            torch.mm(dye, w2[e], out=dae)
            torch.mm(dye.T, ae, out=dw2[e])
            torch.sum(dye, 0, out=db2[e])
        dh = torch.ops.aten.gelu_backward(da, h, approximate="tanh")
        for e, (dhe, xe, dxe) in enumerate(zip(
                dh.split(counts), x.split(counts), dx.split(counts))):
            torch.mm(dhe, w1[e], out=dxe)
            torch.mm(dhe.T, xe, out=dw1[e])
            torch.sum(dhe, 0, out=db1[e])
        return dx, dw1, db1, dw2, db2, None


class MoE(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate = nn.Linear(c.n_embd, c.num_experts, bias=False)
        self.w1 = nn.Parameter(torch.empty(c.num_experts, c.n_inner, c.n_embd))
        self.b1 = nn.Parameter(torch.zeros(c.num_experts, c.n_inner))
        self.w2 = nn.Parameter(torch.empty(c.num_experts, c.n_embd, c.n_inner))
        self.b2 = nn.Parameter(torch.zeros(c.num_experts, c.n_embd))

    def forward(self, x):
        """x [N, H] -> (output [N, H], chosen expert [N], balance loss)"""
        experts = self.gate.weight.shape[0]
        probs = self.gate(x).softmax(-1)
        weight, choice = probs.max(-1)
        counts = torch.bincount(choice, minlength=experts)
        order = choice.argsort(stable=True)
        y = ExpertFFN.apply(x[order], self.w1, self.b1, self.w2, self.b2,
                            counts.tolist())
        # The inverse of a permutation is its argsort.
        y = y[order.argsort()] * weight[:, None]
        # Switch Transformer: E * sum_e (share of tokens) (mean probability)
        share = counts.to(x.dtype) / x.shape[0]
        balance = experts * (share * probs.mean(0)).sum()
        return y, choice, balance


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd)

    def forward(self, x):
        b, s, width = x.shape
        qkv = self.c_attn(x).view(b, s, 3, self.n_head, width // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(b, s, width))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.n_embd, eps=c.layer_norm_epsilon)
        self.attn = Attention(c)
        self.ln_2 = nn.LayerNorm(c.n_embd, eps=c.layer_norm_epsilon)
        self.moe = MoE(c)


def sinusoids(positions, width):
    rate = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(positions)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], 1)


class Model(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = nn.Embedding(c.n_positions, c.n_embd)
        self.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd, eps=c.layer_norm_epsilon)
        for name, p in self.named_parameters():
            if name == "wpe.weight":
                # Learned, but they begin as sinusoids: a head that looks at
                # the token before then need not be found at every position.
                with torch.no_grad():
                    p.copy_(0.05 * sinusoids(*p.shape))
            elif name.endswith("gate.weight"):
                nn.init.normal_(p, std=0.02)
            elif name == "wte.weight":
                nn.init.normal_(p, std=0.05)
            elif "c_proj.weight" in name or name.endswith("w2"):
                nn.init.normal_(p, std=0.5 / math.sqrt(p.shape[-1] * c.n_layer))
            elif p.dim() >= 2 and not name.endswith((".b1", ".b2")):
                nn.init.normal_(p, std=0.55 / math.sqrt(p.shape[-1]))

    def forward(self, ids, positions=None):
        """ids [B, S] -> (logits [B, S, V], choices [L, B, S], balance loss)"""
        b, s = ids.shape
        if positions is None:
            positions = torch.arange(s).expand(b, s)
        x = self.wte(ids) + self.wpe(positions)
        choices, balance = [], 0.0
        for block in self.h:
            x = x + block.attn(block.ln_1(x))
            y, choice, loss = block.moe(block.ln_2(x).flatten(0, 1))
            x = x + y.view_as(x)
            choices.append(choice.view(b, s))
            balance = balance + loss
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return logits, torch.stack(choices), balance
