"""Stock models through attn_implementation="diffv2_sparse": against eager attention, and against a selector that goes
token by token."""

import math

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)
from transformers.masking_utils import eager_mask

from diffv2_sparse import TopK, TopP
from diffv2_sparse.hf import SparseAttention, configure, settings, sparse_attention_forward

CLOSE = 1e-4  # float32 noise on logits of about 5, two layers deep

BITING = SparseAttention(budget=TopK(3), block_m=1, block_n=4, sink_blocks=1, local_blocks=1)
LONG_ROWS = SparseAttention(budget=TopK(5), block_m=6, block_n=4, sink_blocks=1, local_blocks=1)


def brute_force(module, query, key, value, attention_mask, scaling, **kwargs):
    """Selects (as row_queries="first" does) and attends token by token, over the keys that the eager mask shows."""
    sparse = settings(module.config)
    B, HQ, T, D = query.shape
    H = key.shape[1]
    G = HQ // H
    o = torch.zeros(B, T, HQ, D, dtype=query.dtype)
    n = sparse.block_n
    for b in range(B):
        first_of_row, real = None, 0
        for t in range(T):
            if attention_mask is None:
                seen = torch.arange(key.shape[2] - T + t + 1)
            else:
                seen = (attention_mask[b, 0, t] > -1).nonzero()[:, 0]
            if not len(seen) or seen[-1] != key.shape[2] - T + t:
                continue  # a padding token
            if real % sparse.block_m == 0:
                first_of_row = (t, len(seen) - 1)
            real += 1
            t0, position = first_of_row
            for h in range(H):
                keys, values = key[b, h, seen], value[b, h, seen]
                complete = position // n
                score = torch.zeros(complete)
                if complete:
                    means = keys[: complete * n].view(complete, n, D).mean(1)
                    logits = query[b, h * G : (h + 1) * G, t0] @ means.T * scaling
                    score = logits.softmax(-1).mean(0).detach()
                row_end = min(position + sparse.block_m, position + T - t0) - 1
                own = set(range(complete, row_end // n + 1))
                kept = set(range(min(sparse.sink_blocks, complete)))
                kept |= set(range(max(0, complete - sparse.local_blocks + 1), complete))
                free = sorted(set(range(complete)) - kept, key=lambda j: (-score[j].item(), j))
                if isinstance(sparse.budget, TopK):
                    kept |= set(free[: sparse.budget.blocks - len(own) - len(kept)])
                else:
                    mass = sum(score[j].item() for j in kept)
                    for j in free:
                        if mass >= sparse.budget.mass or len(kept) >= sparse.budget.max_blocks - len(own):
                            break
                        kept.add(j)
                        mass += score[j].item()
                chosen = torch.tensor([s for s in range(len(seen)) if s // n in kept | own])
                for g in range(h * G, (h + 1) * G):
                    weights = (query[b, g, t] @ keys[chosen].T * scaling).softmax(-1)
                    o[b, t, g] = weights @ values[chosen]
    return o, None


AttentionInterface.register("brute_force", brute_force)
AttentionMaskInterface.register("brute_force", eager_mask)


def llama(sparse=None, heads=6, kv_heads=2, **fields):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=8,
        initializer_range=0.4,  # so that attention is far from uniform
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **fields,
    )
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.3  # not the default of attention
    if sparse is not None:
        configure(model.config, sparse)
    return model


def prompts(lengths, side, seed=1):
    """input_ids and attention_mask, padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(3, 61, (len(lengths), longest), generator=generator)
    place = torch.arange(longest)
    mask = torch.stack([place < n if side == "right" else place >= longest - n for n in lengths])
    return ids.masked_fill(~mask, 0), mask.long()


def both(model, ours, theirs, call):
    """The same call under two attention implementations."""
    results = []
    for name in (ours, theirs):
        model.set_attn_implementation(name)
        results.append(call(model))
    return results


def worst(a, b, mask=None):
    difference = (a - b).abs()
    return (difference if mask is None else difference[mask.bool()]).max().item()


@pytest.mark.parametrize("side", ["left", "right"])
def test_ample_budget_is_the_stock_model(side):
    ids, mask = prompts((37, 12, 1, 29), side)
    for arguments in ({}, {"attention_mask": mask}, {"attention_mask": torch.ones_like(mask)}):
        a, b = both(llama(), "diffv2_sparse", "eager", lambda m, kw=arguments: m(ids, **kw).logits.detach())
        assert worst(a, b, arguments.get("attention_mask")) < CLOSE
    unpadded, _ = both(llama(), "diffv2_sparse", "eager", lambda m: m(ids).logits.detach())
    assert worst(a, unpadded) == 0  # a mask of ones is no mask


@pytest.mark.parametrize("sparse", [BITING, LONG_ROWS], ids=["block_m=1", "block_m=6"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_biting_budget_is_the_brute_force(side, sparse):
    ids, mask = prompts((41, 13, 30), side)
    model = llama(sparse)
    a, b = both(model, "diffv2_sparse", "brute_force", lambda m: m(ids, attention_mask=mask).logits.detach())
    assert worst(a, b, mask) < CLOSE
    model.set_attn_implementation("eager")
    assert worst(a, model(ids, attention_mask=mask).logits.detach(), mask) > 0.5  # it bites
    alone = llama(sparse)
    alone.set_attn_implementation("diffv2_sparse")
    for row, length in enumerate((41, 13, 30)):  # a padded batch equals each sequence alone
        own = alone(ids[row][mask[row].bool()][None]).logits
        assert worst(a[row][mask[row].bool()], own[0]) < CLOSE, length


def test_mass_budget_is_the_brute_force():
    ids, mask = prompts((33, 20), "left")
    model = llama(SparseAttention(budget=TopP(0.6, max_blocks=6), block_m=2, block_n=3, sink_blocks=0, local_blocks=2))
    a, b = both(model, "diffv2_sparse", "brute_force", lambda m: m(ids, attention_mask=mask).logits.detach())
    assert worst(a, b, mask) < CLOSE


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_chunks(side):
    """T ≠ S: a prompt in three pieces, one of which is all padding for the short sequences."""
    ids, mask = prompts((40, 9, 26), side)

    def in_chunks(model):
        cache, parts, start = DynamicCache(config=model.config), [], 0
        for size in (15, 24, 1):
            stop = start + size
            out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
            parts.append(out.logits.detach())
            start = stop
        return torch.cat(parts, 1)

    for sparse in (None, BITING):
        model = llama(sparse)
        a, b = both(model, "diffv2_sparse", "brute_force" if sparse else "eager", in_chunks)
        assert worst(a, b, mask) < CLOSE
        model.set_attn_implementation("diffv2_sparse")
        whole = model(ids, attention_mask=mask).logits.detach()
        assert worst(a, whole, mask) < CLOSE  # with block_m = 1 chunks do not matter


@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_generate(cache_implementation):
    ids, mask = prompts((17, 8, 11), "left")

    def generate(model):
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            cache_implementation=cache_implementation,
            output_logits=True,
            return_dict_in_generate=True,
        )

    for sparse in (None, BITING):
        model = llama(sparse)
        if sparse is not None and cache_implementation == "static":
            a, b = both(model, "diffv2_sparse", "diffv2_sparse", generate)
            cache_implementation = None
            b = generate(model)
        else:
            a, b = both(model, "diffv2_sparse", "brute_force" if sparse else "eager", generate)
        assert torch.equal(a.sequences, b.sequences)
        assert worst(torch.stack(a.logits), torch.stack(b.logits)) < CLOSE


@pytest.mark.parametrize("capacity_mask", [False, True])
def test_static_cache_in_chunks(capacity_mask):
    """Without a mask, and with one as long as the cache."""
    ids, mask = prompts((14, 9), "left")
    mask = torch.nn.functional.pad(mask, (0, 32 - 14), value=1) if capacity_mask else None

    def steps(model):
        cache = StaticCache(config=model.config, max_cache_len=32)
        parts = [model(x, attention_mask=mask, past_key_values=cache).logits for x in ids.split((9, 4, 1), dim=1)]
        return torch.cat(parts, 1).detach()

    a, b = both(llama(), "diffv2_sparse", "eager", steps)
    assert worst(a, b, mask[:, :14] if capacity_mask else None) < CLOSE


def test_sliding_window_layers_keep_their_window():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        initializer_range=0.4,
    )
    model = MistralForCausalLM(config).eval()
    configure(model.config, BITING)  # windowed layers choose nothing
    for side in ("left", "right"):
        ids, mask = prompts((25, 9, 14), side)

        def in_chunks(model, ids=ids, mask=mask):
            whole = model(ids, attention_mask=mask).logits.detach()
            cache, parts, start = DynamicCache(config=model.config), [], 0
            for size in (11, 13, 1):
                out = model(ids[:, start : start + size], attention_mask=mask[:, : start + size], past_key_values=cache)
                parts.append(out.logits.detach())
                start += size
            return torch.stack([whole, torch.cat(parts, 1)])

        a, b = both(model, "diffv2_sparse", "eager", in_chunks)
        assert worst(a[:, mask.bool()], b[:, mask.bool()]) < CLOSE


def test_packed_sequences():
    lengths = (13, 22, 6)
    ids, _ = prompts((sum(lengths),), "left")
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, 13, 35, 41])
    for sparse in (None, BITING):
        model = llama(sparse)
        model.set_attn_implementation("diffv2_sparse")
        packed = model(ids, position_ids=position_ids, use_cache=False).logits
        flattened = model(
            ids,
            position_ids=position_ids,
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=22,
            max_length_k=22,
        ).logits
        alone = torch.cat([model(x).logits for x in ids.split(lengths, 1)], 1)
        assert worst(packed, alone) < CLOSE
        assert worst(flattened, alone) < CLOSE


def test_gradients():
    ids, mask = prompts((31, 14), "right")
    labels = ids.masked_fill(mask == 0, -100)

    def gradients(model):
        model.train()
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}

    for sparse in (None, LONG_ROWS):
        (loss_a, a), (loss_b, b) = both(llama(sparse), "diffv2_sparse", "brute_force" if sparse else "eager", gradients)
        assert math.isclose(loss_a, loss_b, rel_tol=1e-5)
        for name in a:
            assert worst(a[name], b[name]) < 1e-4 * b[name].abs().max().item() + 1e-6, name


def test_later_tokens_choose_for_earlier_ones_only_when_asked():
    ids, _ = prompts((48,), "left")
    changed = ids.clone()
    changed[0, 40:] = (changed[0, 40:] + 17) % 58 + 3
    sparse = SparseAttention(budget=TopK(5), block_m=16, block_n=4, sink_blocks=0, local_blocks=1)
    for row_queries, training, leaks in (
        ("first", False, False),
        ("all", False, True),
        ("all", True, False),
        ("first", True, False),
    ):
        model = llama(SparseAttention(**{**vars(sparse), "row_queries": row_queries})).train(training)
        model.set_attn_implementation("diffv2_sparse")
        difference = worst(model(ids).logits[:, :40], model(changed).logits[:, :40])
        assert (difference > 1e-3) == leaks, (row_queries, training, difference)


def test_autocast():
    """Qwen3's norms leave q and k in float32 there, v in bfloat16; attention then computes as on bfloat16 inputs."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
    )
    model = Qwen3ForCausalLM(config).train()
    configure(model.config, BITING)
    model.set_attn_implementation("diffv2_sparse")
    ids, mask = prompts((30, 11), "left")
    exact = model(ids, attention_mask=mask).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids, attention_mask=mask, use_cache=False).logits
    rounded.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    exact, rounded = exact[mask.bool()], rounded.float()[mask.bool()]
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=-1).median() > 0.99

    layer = model.model.layers[0].self_attn
    q, k, v = torch.randn(1, 6, 300, 8), torch.randn(1, 2, 300, 8), torch.randn(1, 2, 300, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = sparse_attention_forward(layer, q, k, v.bfloat16(), None, scaling=0.3)
    outside, _ = sparse_attention_forward(layer, *(x.bfloat16() for x in (q, k, v)), None, scaling=0.3)
    assert torch.equal(inside, outside)


@pytest.mark.gpu
@pytest.mark.parametrize("sparse", [None, LONG_ROWS], ids=["dense", "block_m=6"])
def test_on_a_gpu(sparse):
    ids, mask = prompts((70, 33), "left")
    model = llama(sparse)
    model.set_attn_implementation("diffv2_sparse")
    on_cpu = model(ids, attention_mask=mask).logits.detach()
    model, ids, mask = model.cuda(), ids.cuda(), mask.cuda()
    assert worst(model(ids, attention_mask=mask).logits.cpu(), on_cpu, mask.cpu()) < 10 * CLOSE
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(
        model.generate(ids, **arguments), model.generate(ids, cache_implementation="static", **arguments)
    )


def test_settings_are_saved_with_the_model(tmp_path):
    sparse = SparseAttention(budget=TopP(0.9, max_blocks=12), block_m=4, block_n=8, local_blocks=3, row_queries="all")
    model = llama(sparse)
    assert settings(model.config) == sparse
    model.save_pretrained(tmp_path)
    assert settings(AutoConfig.from_pretrained(tmp_path)) == sparse
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="diffv2_sparse").eval()
    assert settings(loaded.config) == sparse
    for layer in loaded.model.layers:
        layer.self_attn.scaling = 0.3
    assert settings(llama().config) == SparseAttention()
    ids, mask = prompts((21, 33), "left")
    model.set_attn_implementation("diffv2_sparse")
    assert worst(model(ids, attention_mask=mask).logits, loaded(ids, attention_mask=mask).logits, mask) == 0


def test_by_default_chunks_do_not_matter():
    sparse = SparseAttention(budget=TopK(5), block_n=4)
    model, (ids, _) = llama(sparse), prompts((40, 40), "left")
    model.set_attn_implementation("diffv2_sparse")
    whole = model(ids).logits
    cache, parts = DynamicCache(config=model.config), []
    for chunk in ids.split((13, 20, 1, 6), 1):
        parts.append(model(chunk, past_key_values=cache).logits)
    assert worst(torch.cat(parts, 1), whole) < CLOSE


def test_refusals():
    ids, mask = prompts((9, 5), "left")
    model = llama()
    with pytest.raises(ValueError, match="sparse: expected a SparseAttention, got dict"):
        configure(model.config, {"block_m": 1})
    for wrong in (
        SparseAttention(budget=TopK(2), block_m=1),
        SparseAttention(row_queries="last"),
        SparseAttention(block_n=0),
        SparseAttention(budget=8),
    ):
        with pytest.raises(ValueError, match=r"budget|row_queries|block_n"):
            configure(model.config, wrong)
    model.set_attn_implementation("diffv2_sparse")
    with pytest.raises(ValueError, match=r"attention_mask.*2-D"):
        model(ids, attention_mask=torch.zeros(2, 1, 9, 9))
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=mask[:, :-1], past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="softcap"):
        model(ids, softcap=30.0)
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(ValueError, match="is_causal"):
        model(ids)
    model.config.is_causal = False
    with pytest.raises(ValueError, match="tokens see later ones"):
        model(ids)
    dropping = llama(attention_dropout=0.1).train()
    dropping.set_attn_implementation("diffv2_sparse")
    with pytest.raises(ValueError, match="dropout"):
        dropping(ids)
