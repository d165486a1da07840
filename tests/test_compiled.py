"""Compiled code computes what plain code does."""

import copy
import shutil

import numpy as np
import pytest
import torch
from test_decoding import observations, play
from test_models import CAUSAL, differences, policy_in, policy_of
from test_packing import shared_batch
from test_policy import tiny_policy

from textgym.decoding import Decoding

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a compiler"),
]


@pytest.fixture(autouse=True, scope="module")
def nothing_is_compiled_yet(tmp_path_factory):
    """An empty cache, in which torch notes what this machine's processor can do only once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


def test_compiled_code_gives_the_same_for_all_sizes():
    plain, compiled = tiny_policy(), tiny_policy(compile=True)
    results = []
    for policy in (plain, compiled, copy.deepcopy(compiled)):
        judged = torch.stack(policy.evaluate_actions(*shared_batch()[:3]))
        policy.zero_grad()
        judged.sum().backward()
        results.append((judged.detach(), [p.grad for p in policy.parameters() if p.grad is not None]))
    assert compiled.model.transformer.h[0]._compiled_call_impl is not None
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for judged, gradients in results[1:]:
        np.testing.assert_allclose(judged, results[0][0], atol=1e-4)
        for gradient, reference in zip(gradients, results[0][1], strict=True):
            np.testing.assert_allclose(gradient, reference, atol=1e-4 * max(1, reference.abs().max().item()))

    graphs = []
    for prompt_columns, horizon, rows in ((7, 12, 9), (5, 10, 6), (9, 12, 8)):
        ids, mask, prefix_lengths = observations(np.random.default_rng(rows), rows, prompt_columns)
        texts, expected = (
            play(policy.model, ids, mask, prefix_lengths, np.arange(rows), Decoding(temperature=1.5), horizon)
            for policy in (compiled, plain)
        )
        assert len({len(tokens) for tokens, _, _ in texts}) > 2, "the test needs rows that leave early"
        for (tokens, log_probs, _), (expected_tokens, expected_log_probs, _) in zip(texts, expected, strict=True):
            assert tokens == expected_tokens
            np.testing.assert_allclose(log_probs, expected_log_probs, atol=1e-4)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[2], "compiled once, for any number of rows, tokens and steps"


def test_half_precision_turns_positions_too(monkeypatch):
    config = copy.deepcopy(CAUSAL["llama"])
    config.num_hidden_layers = 1
    monkeypatch.setitem(CAUSAL, name := "llama of one layer", config)
    policy = policy_in("bfloat16 autocast", name, compile=True)
    assert all(differences(policy, policy_of(name)).near())
    assert policy.model.model.layers[0]._compiled_call_impl is not None
