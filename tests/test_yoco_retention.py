"""Gated retention: the chunked form against its recurrence, and fla's kernels against ours where there is a GPU."""

import pytest
import torch

from diffv2_sparse.yoco.retention import GatedRetention, chunked_retention
from tests.tiny_yoco import tiny_config


def recurrence(q, k, v, log_decay, state):
    """One token after another, one sequence and head at a time."""
    B, T, heads, D = q.shape
    out, last = torch.empty_like(q), torch.empty_like(state)
    for b in range(B):
        for h in range(heads):
            memory = state[b, h]
            for t in range(T):
                memory = log_decay[b, t, h].exp() * memory + torch.outer(k[b, t, h], v[b, t, h])
                out[b, t, h] = q[b, t, h] @ memory / D**0.5
            last[b, h] = memory
    return out, last


def inputs(B=2, T=37, heads=3, D=6):
    q, k, v = (torch.randn(B, T, heads, D, dtype=torch.float64) for _ in range(3))
    log_decay = torch.nn.functional.logsigmoid(4 * torch.randn(B, T, heads, dtype=torch.float64))
    return q, k, v, log_decay, torch.randn(B, heads, D, D, dtype=torch.float64)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 8, 64])
def test_chunks_equal_the_recurrence(chunk_tokens):
    *given, state = inputs()
    o, last = chunked_retention(*given, state, chunk_tokens)
    expected, expected_last = recurrence(*given, state)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, expected_last, rtol=0, atol=1e-12)


def test_gradients_equal_the_recurrences():
    given = [x.requires_grad_() for x in inputs(T=11, D=2)]
    gradients = []
    for form in (lambda *x: chunked_retention(*x, chunk_tokens=4), recurrence):
        o, last = form(*given)
        gradients.append(torch.autograd.grad(o.square().sum() + last.square().sum(), given))
    for chunked, recurrent in zip(*gradients):
        torch.testing.assert_close(chunked, recurrent, rtol=1e-10, atol=1e-10)


def test_state_is_float32_below_float64_and_strong_decay_stays_finite():
    q, k, v, log_decay, _ = (x.bfloat16() for x in inputs())
    o, state = chunked_retention(q, k, v, log_decay - 200)
    assert state.dtype == torch.float32
    assert o.isfinite().all()
    torch.testing.assert_close(o, (q.float() * k.float()).sum(-1, keepdim=True) * v.float() / 6**0.5, rtol=0, atol=1e-5)


def test_the_module_follows_its_formula():
    config = tiny_config(self_decoder="gated_retention")
    module, T = GatedRetention(config).double(), 9
    x = torch.randn(1, T, config.hidden_size, dtype=torch.float64)
    no_turn = (torch.ones(1, T, 4).double(), torch.zeros(1, T, 4).double())
    q, k, v = ((x @ p.weight.T).view(1, T, 4, 8) for p in (module.q_proj, module.k_proj, module.v_proj))
    log_decay = torch.sigmoid(x @ module.decay_proj.weight.T).log() / 16
    o, _ = recurrence(q, k, v, log_decay, torch.zeros(1, 4, 8, 8).double())
    o = o / (o.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
    gate = x @ module.gate_proj.weight.T
    expected = (o.flatten(-2) * gate * torch.sigmoid(gate)) @ module.o_proj.weight.T
    torch.testing.assert_close(module(x, no_turn), expected, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 300])
def test_fla_kernels_agree(tokens):
    simple_gla = pytest.importorskip("fla.ops.simple_gla")
    *given, state = (x.float().cuda() for x in inputs(T=tokens, D=32))
    expected, expected_last = chunked_retention(*given, state)
    kernel = simple_gla.chunk_simple_gla if tokens > 1 else simple_gla.fused_recurrent_simple_gla
    q, k, v, g = given
    o, last = kernel(q, k, v, g=g, scale=32**-0.5, initial_state=state, output_final_state=True)
    torch.testing.assert_close(o, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(last, expected_last, rtol=2e-2, atol=2e-2)
