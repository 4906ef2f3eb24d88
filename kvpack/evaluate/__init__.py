"""Quality of a packed model beside its source: perplexity, KL divergence, top-1 agreement.

Quantised KV caches are measured in the two ways that the literature uses, and never in the third
one that measures nothing (a single forward through a cache that returns exact keys and values):

- ``prefill`` (KVQuant, RotateKV): one forward over the chunk in which every key and value that
  fills a token block is quantised, the newest included; windows do not apply, sinks do.
- ``decode`` (what users experience): teacher forcing through the real cache, `step_tokens` at a
  time; recent tokens are exact, older ones are encoded.

An artifact without a KV scheme has one measurement, ``weights``: a plain forward.
"""
