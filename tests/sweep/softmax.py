"""Attention by torch alone, and the part of each token by counting pixels, for the tables that are about them."""

import numpy as np
import torch
import torch.nn.functional as functional


def attention_of(task, inputs) -> list[torch.Tensor]:
    """Every attention call's probabilities [1, heads, queries, keys], float64, in order; by torch alone."""
    found = []
    stock = functional.scaled_dot_product_attention

    def spy(query, key, value, **options):
        logits = query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5
        found.append(logits.softmax(-1))
        return stock(query, key, value, **options)

    functional.scaled_dot_product_attention = spy
    try:
        with torch.inference_mode():
            task.predict(inputs)
    finally:
        functional.scaled_dot_product_attention = stock
    return found


def part_of_each_token(mask: np.ndarray, edge: int, parts: int) -> np.ndarray:
    """Masks of 32 x 32: the part that most pixels of a token are of, the first of equals."""
    pixels = 32 // edge
    blocks = mask.reshape(edge, pixels, edge, pixels).transpose(0, 2, 1, 3).reshape(edge * edge, -1)
    return np.array([np.bincount(block, minlength=parts).argmax() for block in blocks])
