from __future__ import annotations

import torch

from kvpack.calibrate.hooks import finish, record, run_block
from kvpack.models import open_model
from kvpack.models.view import ModelView
from kvpack.models.weights import SourceReader
from tests.tiny_models import make_model


def test_blocks_one_by_one_equal_the_whole_model(folder, reference, tokens):
    spec = open_model(folder)
    view, reader = ModelView.build(spec), SourceReader.of(spec)
    with torch.no_grad():
        expected = reference(tokens).logits
        view.load_outer(reader)
        recording = record(view, tokens)
        hidden = recording.hidden
        for layer in range(len(spec.blocks)):
            view.load_block(layer, reader)
            hidden = run_block(view, layer, hidden, recording)
            view.free_block(layer)
        logits = view.model.get_output_embeddings()(finish(view, hidden, tokens))
        cap = getattr(view.model.config, "final_logit_softcapping", None)
        logits = cap * torch.tanh(logits / cap) if cap else logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_only_one_block_is_in_memory(folder):
    spec = open_model(folder)
    view, reader = ModelView.build(spec), SourceReader.of(spec)
    assert list(view.resident()) == []
    view.load_block(1, reader)
    assert set(view.resident()) == set(view.block_tensors(1))
    view.free_block(1)
    view.load_outer(reader)
    assert set(view.resident()) == set(view.outer_tensors())
    view.free_outer()
    assert list(view.resident()) == []


def test_tied_tensors_are_read_once_and_shared(tmp_path):
    spec = open_model(make_model(tmp_path, "llama", tied=True))
    reads = []

    class Counting(SourceReader):
        def read(self, name):
            reads.append(name)
            return super().read(name)

    view = ModelView.build(spec)
    view.load_outer(Counting(spec.path, spec.tensors, spec.tied))
    head, embedding = view.model.get_output_embeddings(), view.model.get_input_embeddings()
    assert head.weight is embedding.weight
    assert sorted(reads) == ["model.embed_tokens.weight", "model.norm.weight"]


def test_the_whole_model_from_a_view(folder, reference, tokens):
    spec = open_model(folder)
    view, reader = ModelView.build(spec), SourceReader.of(spec)
    view.load_outer(reader)
    for layer in range(len(spec.blocks)):
        view.load_block(layer, reader)
    with torch.no_grad():
        assert torch.equal(view.model(tokens).logits, reference(tokens).logits)
